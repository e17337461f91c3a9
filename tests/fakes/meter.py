"""QEMU's dirty-rate measurement of a simulated guest, by the real one's rules.

One measurement at a time; the figure is whole MiB/s, rounded down, of as many pages as are sampled;
milliseconds are taken by newer QEMUs only. The guest writes as its Load says: evenly over a working
set, so distinct bytes saturate (`core.working_set`).
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from migrd.core.rate_reading import GIB, MIB, MeasuredRate, RateMode, RateOffer
from migrd.core.working_set import distinct_bytes
from migrd.errors import MigrdError, VmmRefused
from tests.fakes.virtual_time import now_s

if TYPE_CHECKING:
    from tests.fakes.qemu_process import Load

NEW = RateOffer(frozenset(RateMode), step_s=0.001, least_s=0.05)
OLD = RateOffer(frozenset(RateMode))


class FakeMeter:
    """What `calc-dirty-rate` does in one process."""

    def __init__(self) -> None:
        self.offer = NEW
        self.begun: list[tuple[float, float, RateMode]] = []
        """(when, window, mode) of each measurement."""
        self.overrun_s = 0.002
        self.error: MigrdError | None = None
        """Raised instead of each figure."""
        self.odd: MeasuredRate | None = None
        """Answered instead of each figure."""
        self.is_stuck = False
        """Measurements never end."""
        self.most_at_once = 0
        self._going_on = 0

    def begin(self, window_s: float, mode: RateMode) -> None:
        if self._going_on:
            raise VmmRefused("the dirty rate is already being measured.", code="rate_busy")
        assert mode in self.offer.modes
        assert self.offer.least_s <= window_s <= self.offer.most_s
        assert (window_s / self.offer.step_s).is_integer(), "QEMU takes whole ones"
        self.begun.append((now_s(), window_s, mode))

    async def until_over(self, window_s: float) -> float:
        self._going_on += 1
        self.most_at_once = max(self.most_at_once, self._going_on)
        try:
            await asyncio.sleep(1e9 if self.is_stuck else window_s + self.overrun_s)
        finally:
            self._going_on -= 1
        if self.error is not None:
            raise self.error
        return self.overrun_s

    def figure(
        self,
        load: Load,
        window_s: float,
        pages_per_gib: int | None,
        overrun_s: float,
        *,
        is_running: bool,
    ) -> MeasuredRate:
        if self.odd is not None:
            return self.odd
        rate = float(load.dirty_bytes_per_s) if is_running else 0.0
        dirtied = distinct_bytes(rate, float(load.working_set_bytes), window_s)
        if pages_per_gib is not None:
            per_hit = GIB / pages_per_gib
            dirtied = round(dirtied / per_hit) * per_hit
        return MeasuredRate(int(dirtied / MIB / window_s), window_s, pages_per_gib, overrun_s)
