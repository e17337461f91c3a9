"""One look at how much memory was newly dirtied: a window, and what was found in it.

    |<--- window_s --->|
    all clean          dirty_bytes: distinct bytes written at least once, whole pages

What is found is never exact, so it is a Figure: the best guess and a 95 % interval. `rate` divides
both by the window. A page that is written ten times within a window counts once, so the rate of a
longer window is lower than that of a short one: `core.working_set` makes use of that.

QEMU's `calc-dirty-rate` (qapi/migration.json, migration/dirtyrate.c) says whole MiB/s, rounded
down, in both modes that migrd uses:

- page-sampling: a few pages of each GiB, hashed before and after; `hits` of `samples` had changed.
  Their number follows from the rate, up to the rounding. The interval is that of a Poisson variable
  (as in `core.dma_rate`) at both ends of the rounding: with no hit at all, up to four may have been
  missed. What is written with what was there already is not seen, and need not be sent either.
- dirty-bitmap: every page; only the rounding is unsure.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from migrd.core.dma_rate import DmaRate, RateQuality, poisson_interval

MIB: Final = 1 << 20
GIB: Final = 1 << 30
Z_95: Final = 1.96


class Tracker(StrEnum):
    """Who saw the writes."""

    QEMU = "qemu"
    """The guest's CPUs, by QEMU."""
    IOMMU = "iommu"
    """Devices, by the IOMMU's page tables."""
    DEVICE = "device"
    """Devices, by themselves."""
    PAGEMAP = "pagemap"
    """A process's CPUs, by its page tables."""


class RateMode(StrEnum):
    """How QEMU measures the writes of a guest's CPUs; its own words (DirtyRateMeasureMode)."""

    PAGE_SAMPLING = "page-sampling"
    """Hashes some pages twice: the guest does not notice."""
    DIRTY_BITMAP = "dirty-bitmap"
    """Switches dirty logging on: each page's first write is slower. Counts every page."""


@dataclass(frozen=True)
class RateOffer:
    """What one VMM can measure of its guest's own writes."""

    modes: frozenset[RateMode] = frozenset()
    step_s: float = 1.0
    """Windows are whole multiples of it."""
    least_s: float = 1.0
    most_s: float = 60.0

    def windows(self, wanted_s: Iterable[float]) -> tuple[float, ...]:
        """The windows nearest to those wanted, all different: what is too short becomes longer."""
        steps: list[int] = []
        for window_s in sorted(wanted_s):
            least = max(math.ceil(self.least_s / self.step_s), steps[-1] + 1 if steps else 0)
            step = max(round(window_s / self.step_s), least)
            if step * self.step_s <= self.most_s:
                steps.append(step)
        return tuple(step * self.step_s for step in steps)


@dataclass(frozen=True)
class MeasuredRate:
    """What a QEMU answered to one measurement."""

    mib_per_s: int
    """Rounded down."""
    window_s: float
    pages_per_gib: int | None
    """Sampled; None: all pages were looked at."""
    overrun_s: float
    """How much later than the window's end the answer was there: what the hashing took, at most."""


@dataclass(frozen=True)
class Figure:
    """A quantity with its 95 % interval."""

    value: float | None
    """None: somewhere in the interval, and no best guess is possible."""
    low: float
    high: float | None
    """None: without bound."""

    def over(self, divisor: float) -> "Figure":
        """The same in another unit: all divided."""
        value = None if self.value is None else self.value / divisor
        return Figure(value, self.low / divisor, None if self.high is None else self.high / divisor)


@dataclass(frozen=True)
class RateReading:
    """What one source found in one window."""

    window_s: float
    """As long as it really was."""
    page_size_bytes: int
    dirty_bytes: Figure | None
    """Distinct bytes dirtied within the window; None: not known, `why` says why."""
    cost_s: float = 0.0
    """CPU time that the look took from the host: measured, or an upper bound of it."""
    why: str = ""
    """A code (`core.dma_rate.RateQuality`), when the bytes are not known."""

    @property
    def rate(self) -> Figure | None:
        """Bytes/s newly dirtied, as long as the window lasted."""
        if self.dirty_bytes is None or self.window_s <= 0:
            return None
        return self.dirty_bytes.over(self.window_s)


def of_page_sampling(
    mib_per_s: int, *, window_s: float, samples: float, total_bytes: int
) -> Figure:
    """Bytes dirtied, from QEMU's rate of `samples` pages of `total_bytes`."""
    per_hit = total_bytes / max(1.0, samples)
    least, middle, most = (
        mib * MIB * window_s / per_hit for mib in (mib_per_s, _middle(mib_per_s), mib_per_s + 1)
    )
    most_hits = max(least, math.ceil(most) - 1)  # the last whole number that is rounded down so
    low, high = poisson_interval(least)[0], poisson_interval(most_hits)[1]
    value = min(middle * per_hit, float(total_bytes))
    return Figure(
        value, min(low * per_hit, value), max(value, min(high * per_hit, float(total_bytes)))
    )


def of_bitmap(mib_per_s: int, *, window_s: float) -> Figure:
    """Bytes dirtied, from QEMU's rate of all pages."""
    least, most = mib_per_s * MIB * window_s, (mib_per_s + 1) * MIB * window_s
    return Figure(_middle(mib_per_s) * MIB * window_s, least, most)


def _middle(mib_per_s: int) -> float:
    """Of what was rounded down; an idle guest is idle, not half a MiB/s."""
    return mib_per_s + 0.5 if mib_per_s else 0.0


def of_devices(rates: Sequence[DmaRate], *, cost_s: float) -> RateReading:
    """What all devices of a VM wrote, from the rate of each page table. Known as soon as one of
    them is: the others, where nothing was proven, are left out."""
    measured = [rate for rate in rates if rate.quality is RateQuality.MEASURED]
    window_s = max((rate.window_s for rate in measured or rates), default=0.0)
    page_size_bytes = rates[0].page_size_bytes if rates else 4096
    if not measured:
        why = rates[0].quality.value if rates else RateQuality.NOTHING_MAPPED.value
        return RateReading(window_s, page_size_bytes, None, cost_s, why)
    value, low, high = (
        sum(
            (pages or 0.0) * rate.page_size_bytes
            for pages, rate in zip(side, measured, strict=True)
        )
        for side in (
            [rate.dirty_pages_per_s for rate in measured],
            [rate.low_pages_per_s for rate in measured],
            [rate.high_pages_per_s for rate in measured],
        )
    )
    found = Figure(value * window_s, low * window_s, high * window_s)
    return RateReading(window_s, page_size_bytes, found, cost_s)


def pages_per_gib(total_bytes: int | None, *, wanted: int, least: int, most: int) -> int:
    """How many pages of each GiB to sample so that about `wanted` are sampled of all memory."""
    if not total_bytes or total_bytes <= 0:
        return least
    return max(least, min(most, -(-wanted * GIB // total_bytes)))


def headline(readings: Sequence[RateReading]) -> RateReading | None:
    """The reading that stands for all where one number is asked for: of the windows that found
    something out, the one nearest to a second."""
    known = [reading for reading in readings if reading.rate is not None]
    return min(known, key=lambda reading: abs(reading.window_s - 1.0), default=None)
