"""What goes wrong in one run, all of it decided by one number.

    seed -> Schedule(script, [Blow, ...]) -> tests.sim.run

A blow is struck at a call of a daemon (its n-th, before or after its effect), at a message, or at a
moment of virtual time. Times are spread over orders of magnitude: most of what matters happens
within milliseconds, some of it needs a deadline to pass.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from tests.fakes.road import Loss
from tests.sim.arbiter_blows import FIRST_ARBITRATED, ArbiterBlows, arbiter_blows
from tests.sim.tempo import BRISK, SHIPPED, SHIPPED_EACH, Tempo
from tests.sweep import scripts
from tests.sweep.sweeping import Script

SCRIPTS: Sequence[Script] = (
    scripts.plain,
    scripts.plain,
    scripts.plain,
    scripts.plain,
    scripts.several_rounds,
    scripts.several_rounds,
    scripts.throttled,
    scripts.postcopy,
    scripts.postcopy,
    scripts.cancelled_in_precopy,
    scripts.with_devices,
    scripts.after_a_round_trip,
)
HOSTS = ("alpha", "beta")
LOOKS = 8
MOST = 8
"""Faults in one schedule."""


@dataclass(frozen=True)
class Struck:
    """A call of a daemon, counted over all its lives: an error, a time-out or its death."""

    host: str
    number: int
    choice: int
    """Which of the things that may happen to that call."""
    away_s: float
    """If it dies: for so long it stays down."""


@dataclass(frozen=True)
class Lost:
    """A message between the daemons, counted: of all, or of those of one kind."""

    number: int
    loss: Loss
    call: str | None = None


@dataclass(frozen=True)
class Timed:
    """Something that happens at a moment, and perhaps ends."""

    at_s: float
    what: str
    host: str
    for_s: float
    after: str | None = None
    """Counted from the moment at which the journal of either side comes to this phase."""


Blow = Struck | Lost | Timed

CALLS = (None, None, None, "grant", "grant", "view", "prepare", "discard")
AFTER = (
    *(None, None, None, None, None),
    *("precopy", "switchover", "granted", "granted", "starting", "completing", "rolling_back"),
)
"""Most of what matters happens around the grant, and lasts for milliseconds."""

WHATS = (
    "part",
    "part_one_way",
    "cut",
    "freeze",
    "qemu_dies",
    "qemu_hangs",
    "monitor_lost",
    "disk_full",
    "kill",
    "cancel",
    "force_switchover",
    "ask_again",
    "guest_shuts_down",
    "swallow_ack",
    "stopped",
    "crash_loop",
    "half_open",
    "disk_slow",
    "fsync_fails",
    "events_lost",
    "events_late",
    "clock_jumps",
    "device_fails",
    "policy",
    "delete",
)


@dataclass(frozen=True)
class Schedule:
    """One run."""

    seed: int
    script: Script
    blows: tuple[Blow, ...]
    tempo: Tempo = SHIPPED
    arbiter: ArbiterBlows | None = None
    """With an arbiter, and what happens to it."""
    looks: tuple[float, ...] = ()
    """When both daemons are asked what they know, in s after the request."""

    def __str__(self) -> str:
        first = f"seed {self.seed}: {self.script.__name__} ({self.tempo.name})"
        more = () if self.arbiter is None else (*self.arbiter.requests, *self.arbiter.timed)
        return "\n  ".join((first, *map(str, self.blows), *map(str, more)))


def from_seed(seed: int, most: int = MOST) -> Schedule:
    """The same schedule for the same number, always."""
    random_ = random.Random(seed)
    script = random_.choice(SCRIPTS)
    count = random_.randint(1, most)
    tempo = BRISK if random_.randrange(SHIPPED_EACH) else SHIPPED
    blows = tuple(_blow(random_, tempo) for _ in range(count))
    looks = tuple(sorted(10 ** random_.uniform(-2.5, 1.0) for _ in range(LOOKS)))
    arbiter = None if seed < FIRST_ARBITRATED else arbiter_blows(random_, tempo.lasts_s)
    return Schedule(seed, script, blows, tempo, arbiter, looks)


def _blow(random_: random.Random, tempo: Tempo) -> Blow:
    return random_.choice((_struck, _struck, _lost, _timed, _timed))(random_, tempo)


def _struck(random_: random.Random, tempo: Tempo) -> Struck:
    number = random_.randint(1, random_.choice((12, 30, 60)))
    away_s = random_.choice(tempo.aways_s)
    return Struck(random_.choice(HOSTS), number, random_.randrange(64), away_s)


def _lost(random_: random.Random, tempo: Tempo) -> Lost:
    call = random_.choice(CALLS)
    number = random_.randint(1, 20 if call is None else 3)
    return Lost(number, random_.choice(list(Loss)), call)


def _timed(random_: random.Random, tempo: Tempo) -> Timed:
    after = random_.choice(AFTER)
    at_s = 10 ** random_.uniform(-3.0, 0.7) if after is None else 10 ** random_.uniform(-4.0, -1.0)
    for_s, what = random_.choice(tempo.lasts_s), random_.choice(WHATS)
    return Timed(at_s, what, random_.choice(HOSTS), for_s, after)
