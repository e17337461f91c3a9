"""How fast devices dirty memory, from looks that change nothing.

A slice of IOVA space is peeked twice; what is dirty the second time and was not the first has been
written in between:

    |<------------ window_s ------------>|
    peek: before_pages                   peek: after_pages        new = after - before

What the numbers can and cannot say:

- The VMM owns the bits and clears them at each of its dirty syncs. A window in which the count fell
  had such a clearing in it and says nothing: it is left out, never counted as zero.
- A page that was dirty before cannot show a second write. Where hardly a page is clean, the rate is
  not known (SATURATED).
- No dirty page at all: either nothing is written, or the VMM has not switched tracking on. Unless
  the caller knows that it is on, that is UNPROVEN, not zero.
- An IOMMU marks whole page-table entries. With entries of 2 MiB one written byte shows as 512 dirty
  pages of 4 KiB: `granule_bytes` is the largest size in which all dirty pages came as whole blocks,
  and `amplification` says by how much the rate may be too high, at most.

The interval covers 95 % of: chance of how many granules were hit (Poisson; Wilson and Hilferty's
approximation), and, where only part of the memory was looked at, the differences between slices.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

LEAST_CLEAN: Final = 0.05
"""Of a slice's pages: with fewer clean ones it is too full to tell."""
Z_95: Final = 1.96
TURN: Final = 7919
"""A prime, so that turns come to every slice."""
LEAST_SLICES: Final = 3
"""Differences between fewer slices mean nothing."""


class RateQuality(StrEnum):
    """What a sample is worth."""

    MEASURED = "measured"
    UNPROVEN = "unproven"
    """Nothing was dirty, and it is not known whether the VMM tracks at all."""
    SATURATED = "saturated"
    CLEARED = "cleared"
    """The VMM cleared in every window."""
    NOTHING_MAPPED = "nothing_mapped"
    """No slice could be looked at twice."""


@dataclass(frozen=True)
class Window:
    """One slice of IOVA space, peeked twice."""

    pages: int
    before_pages: int
    after_pages: int
    window_s: float

    @property
    def is_cleared(self) -> bool:
        return self.after_pages < self.before_pages

    @property
    def is_saturated(self) -> bool:
        return self.pages - self.before_pages < LEAST_CLEAN * self.pages

    @property
    def new_pages(self) -> int:
        return self.after_pages - self.before_pages

    @property
    def exposure(self) -> float:
        """Clean pages times seconds."""
        return (self.pages - self.before_pages) * self.window_s


@dataclass(frozen=True)
class DmaRate:
    """DMA of the devices behind one page table. Rates are None unless MEASURED."""

    quality: RateQuality
    page_size_bytes: int
    total_bytes: int
    """Mapped for the devices, as far as it is known."""
    sampled_bytes: int
    """Looked at."""
    window_s: float
    """Mean time between the two looks."""
    dirty_pages_per_s: float | None = None
    low_pages_per_s: float | None = None
    high_pages_per_s: float | None = None
    granule_bytes: int | None = None

    @property
    def amplification(self) -> float | None:
        """At most so many times too many bytes are counted; None: nothing was dirty."""
        if self.granule_bytes is None:
            return None
        return self.granule_bytes / self.page_size_bytes

    @property
    def dirty_bytes_per_s(self) -> float | None:
        if self.dirty_pages_per_s is None:
            return None
        return self.dirty_pages_per_s * self.page_size_bytes


@dataclass(frozen=True)
class SampledRate:
    """What was found last of one page table of a VM."""

    devices: tuple[str, ...]
    """QEMU ids of the devices of its iommufd object, whose DMA it is together; empty: not known."""
    iommufd: int
    hwpt_id: int
    rate: DmaRate
    wall_s: float


def estimate(
    windows: Sequence[Window],
    *,
    page_size_bytes: int,
    total_bytes: int,
    granule_bytes: int | None = None,
    tracking_is_on: bool = False,
) -> DmaRate:
    """The rate over `total_bytes` from slices of it. `tracking_is_on`: known, so zero is zero."""
    sampled_bytes = sum(window.pages for window in windows) * page_size_bytes
    window_s = statistics.fmean(window.window_s for window in windows) if windows else 0.0
    quality, usable = _judge(windows, tracking_is_on=tracking_is_on)
    known = DmaRate(
        quality, page_size_bytes, total_bytes, sampled_bytes, window_s, granule_bytes=granule_bytes
    )
    if quality is not RateQuality.MEASURED:
        return known
    total_pages = total_bytes / page_size_bytes
    exposure = sum(window.exposure for window in usable)
    new_pages = sum(window.new_pages for window in usable)
    granule_pages = max(1.0, (granule_bytes or page_size_bytes) / page_size_bytes)
    low, high = poisson_interval(new_pages / granule_pages)
    per_page = total_pages / exposure
    rate = new_pages * per_page
    spread = _spread(usable, total_pages, complete=sampled_bytes >= total_bytes)
    return DmaRate(
        quality,
        page_size_bytes,
        total_bytes,
        sampled_bytes,
        window_s,
        dirty_pages_per_s=rate,
        low_pages_per_s=max(0.0, min(low * granule_pages * per_page, rate - spread)),
        high_pages_per_s=max(high * granule_pages * per_page, rate + spread),
        granule_bytes=granule_bytes,
    )


def _judge(
    windows: Sequence[Window], *, tracking_is_on: bool
) -> tuple[RateQuality, Sequence[Window]]:
    whole = [window for window in windows if not window.is_cleared and window.window_s > 0]
    usable = [window for window in whole if not window.is_saturated]
    if not windows:
        return RateQuality.NOTHING_MAPPED, usable
    if not whole:
        return RateQuality.CLEARED, usable
    if not usable:
        return RateQuality.SATURATED, usable
    if not tracking_is_on and not any(window.after_pages for window in windows):
        return RateQuality.UNPROVEN, usable
    return RateQuality.MEASURED, usable


def _spread(usable: Sequence[Window], total_pages: float, *, complete: bool) -> float:
    """Half the width of the interval that the differences between slices give, pages/s."""
    if complete or len(usable) < LEAST_SLICES:
        return 0.0
    rates = [window.new_pages / window.exposure for window in usable]
    return Z_95 * statistics.stdev(rates) / math.sqrt(len(rates)) * total_pages


def poisson_interval(count: float) -> tuple[float, float]:
    """95 % interval of the mean of a Poisson variable that was seen to be `count`."""
    low = 0.0
    if count > 0:
        low = count * max(0.0, 1 - 1 / (9 * count) - Z_95 / (3 * math.sqrt(count))) ** 3
    above = count + 1
    return low, above * (1 - 1 / (9 * above) + Z_95 / (3 * math.sqrt(above))) ** 3


def granule(dirty_pages_by_size: Mapping[int, int]) -> int | None:
    """The largest page size in which all that is dirty came in whole blocks.

    `dirty_pages_by_size`: page size in bytes -> dirty pages of that size in one and the same range
    at one time. None when nothing was dirty.
    """
    sizes = sorted(dirty_pages_by_size)
    if not sizes or not dirty_pages_by_size[sizes[0]]:
        return None
    dirty_bytes = sizes[0] * dirty_pages_by_size[sizes[0]]
    whole = [size for size in sizes if size * dirty_pages_by_size[size] == dirty_bytes]
    return max(whole)


def spread_over(total: int, parts: int, turn: int) -> Iterable[int]:
    """`parts` different indices below `total` (all of them if there are fewer), evenly spread;
    other ones at each `turn`."""
    parts = min(parts, total)
    return ((turn * TURN + index * total // parts) % total for index in range(parts))
