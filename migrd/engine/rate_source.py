"""What can be asked how fast a VM's memory gets dirty, outside of migrations.

    RateSource     tracker, windows, measure(window) -> RateReading       the port
    CpuSource      the guest's CPUs, by QEMU's own measurement            here
    DmaSource      devices, by peeks at page tables                       engine.dma_sampling

A source measures one VM (one process of it) and changes nothing that a migration relies on; what it
cannot find out is a reading without bytes and the reason why. It may take long, fail or never
answer: `engine.sampler` sees to that.
"""

from collections.abc import Sequence
from typing import Final, Protocol

from migrd.core.rate_reading import (
    GIB,
    RateMode,
    RateReading,
    Tracker,
    of_bitmap,
    of_page_sampling,
    pages_per_gib,
)
from migrd.engine.options import SamplingOptions
from migrd.engine.vms import Entry

PAGE_BYTES: Final = 4096
LEAST_PER_GIB: Final = 128
MOST_PER_GIB: Final = 4096
"""QEMU 7.2 takes no more (migration/dirtyrate.h)."""
HASH_S: Final = 20e-6
"""CPU time to hash a page twice, on a slow host: what takes longer has waited for something."""
BITMAP_COST_S: Final = 1.0
MOST_TOTAL_BYTES: Final = 1 << 50
UNKNOWN_SIZE: Final = "memory_size_unknown"


class RateSource(Protocol):
    """One way to see one VM's writes."""

    @property
    def tracker(self) -> Tracker: ...

    @property
    def name(self) -> str:
        """For people, and different from those of the VM's other sources."""

    @property
    def interval_s(self) -> float:
        """Between the beginnings of two sets of windows, when the budget allows."""

    @property
    def goes_on_in_migration(self) -> bool:
        """Else it stops as soon as a migration is asked for."""

    async def windows(self) -> Sequence[float]:
        """The lengths (seconds) that are to be measured now, one after the other; none: this VM
        cannot be asked. Raises MigrdError."""

    async def measure(self, window_s: float) -> RateReading:
        """Look for so long. Raises MigrdError."""


class CpuSource:
    """The writes of a guest's CPUs, by QEMU's `calc-dirty-rate`."""

    tracker = Tracker.QEMU
    goes_on_in_migration = False

    def __init__(self, entry: Entry, options: SamplingOptions, mode: RateMode) -> None:
        self._entry = entry
        self._options = options
        self._mode = mode
        self.name = f"calc-dirty-rate, {mode.value}"
        self.interval_s = options.interval_s

    async def windows(self) -> Sequence[float]:
        vmm = self._entry.vmm
        if vmm is None:
            return ()
        offer = await vmm.rate_offer()
        return offer.windows(self._options.windows_s) if self._mode in offer.modes else ()

    async def measure(self, window_s: float) -> RateReading:
        vmm, facts = self._entry.vmm, self._entry.facts
        total = None if facts is None else facts.memory_bytes
        if vmm is None or total is None or not 0 < total < MOST_TOTAL_BYTES:
            return RateReading(window_s, PAGE_BYTES, None, why=UNKNOWN_SIZE)
        per_gib = pages_per_gib(
            total, wanted=self._options.pages, least=LEAST_PER_GIB, most=MOST_PER_GIB
        )
        measured = await vmm.measure_rate(window_s, self._mode, pages_per_gib=per_gib)
        if measured.pages_per_gib is None:
            found = of_bitmap(measured.mib_per_s, window_s=measured.window_s)
            cost_s = min(measured.overrun_s, BITMAP_COST_S)
            return RateReading(measured.window_s, PAGE_BYTES, found, cost_s)
        samples = measured.pages_per_gib * total / GIB
        found = of_page_sampling(
            measured.mib_per_s, window_s=measured.window_s, samples=samples, total_bytes=total
        )
        return RateReading(
            measured.window_s, PAGE_BYTES, found, min(measured.overrun_s, samples * HASH_S)
        )
