"""Dirty rates as clients see them: the last sample, with its age, and the hours before it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from migrd.core.rate_history import HistoryPoint
from migrd.core.rate_reading import RateReading, Tracker
from migrd.core.working_set import WorkingSet


class SamplingState(StrEnum):
    """Whether something of a VM is measured now and then."""

    ON = "on"
    OFF = "off"
    """Nothing can be, or is wished to be, measured of it."""
    MIGRATING = "migrating"
    """It stops for a migration; the rounds tell more."""
    NOT_RUNNING = "not_running"
    """The guest stands still, or its QEMU is not there."""
    UNREACHABLE = "unreachable"


@dataclass(frozen=True)
class Trouble:
    """Why the newest try has brought nothing."""

    code: str
    message: str
    wall_s: float


@dataclass(frozen=True)
class TrackerRates:
    """What one source has found of one VM."""

    tracker: Tracker
    source: str
    readings: tuple[RateReading, ...] = ()
    """Of the last set of windows, in the order they were measured; empty: none yet."""
    working_set: WorkingSet | None = None
    sampled_wall_s: float | None = None
    age_s: float | None = None
    cost_s: float | None = None
    """CPU time that the last set took from the host, at most."""
    interval_s: float | None = None
    """Between the beginnings of the last two sets: longer than configured when the budget says."""
    sets: int = 0
    """Sets of windows measured since the QEMU was found."""
    failures: int = 0
    trouble: Trouble | None = None
    """None: the newest try went well."""


@dataclass(frozen=True)
class DirtyRatesView:
    """All that is known of how fast a VM's memory gets dirty."""

    vm: str
    state: SamplingState
    trackers: tuple[TrackerRates, ...]


@dataclass(frozen=True)
class HistoryView:
    """The past of a VM's dirty rates, by tracker; times are of the wall clock."""

    vm: str
    since_wall_s: float
    step_s: int
    points: Mapping[Tracker, Sequence[HistoryPoint]]


@dataclass(frozen=True)
class AskedRate:
    """What became of the wish to measure soon."""

    vm: str
    is_new: bool
    """False: somebody asked before, or it is being measured."""
    within_s: float
    """It should be over by then."""


@dataclass(frozen=True)
class RateSeen:
    """One set of windows, for those who count."""

    vm: str
    tracker: Tracker
    outcome: str
    """ok; unknown (nothing could be found out); failed; interrupted (a migration has begun)."""
    bytes_per_s: float | None = None
    pages: float = 0.0
    """Seen dirty in all windows."""
    cost_s: float = 0.0
    wall_s: float = 0.0
