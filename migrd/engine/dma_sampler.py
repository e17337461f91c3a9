"""Dirty rates of a running VM's devices, sampled without touching what belongs to its VMM.

    page tables ─► what is mapped ─► slices, spread ─► peek … window … peek ─► core.dma_rate
       (find_hwpts)   (galloping)      (as many as the budget allows)

Every look is a peek: nothing is cleared and tracking is never switched, for the VMM counts on both.
A look costs time in proportion to the page-table entries it walks, and holds locks that the VMM
wants too; so a sample has a budget of kernel time, and looks at fewer slices when they are dear.

There is no call that lists mappings, and a range with a hole is not looked at; whether a range is
mapped can be asked without walking it (`OpenDevices.is_mapped`). Guest memory begins at few
addresses, in all machines QEMU makes; from each the mapped range is found by doubling, then
halving.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from migrd.core.dma_rate import DmaRate, Window, estimate, granule, spread_over
from migrd.engine.device_ports import DirtyPeek, HwptRef, OpenDevices
from migrd.engine.ports import Clock

PAGE_BYTES: Final = 4096
LARGE_PAGE_BYTES: Final = 2 << 20
UNIT_BYTES: Final = 1 << 20
"""What is mapped is found to this grain."""
SLICE_BYTES: Final = 32 << 20
STARTS: Final = (1 << 20, 1 << 30, 4 << 30)
"""Guest memory above x86's first MiB, of Arm's `virt` machine, and above the hole below 4 GiB."""
LARGEST_BYTES: Final = 24 << 40
REDISCOVER: Final = 60
"""Samples after which what is mapped is looked for anew."""


@dataclass(frozen=True)
class Area:
    """IOVA space that is mapped without holes."""

    iova: int
    length_bytes: int

    @property
    def end(self) -> int:
        return self.iova + self.length_bytes


@dataclass(frozen=True)
class Limits:
    """What a sample may cost."""

    window_s: float = 1.0
    """Between the two looks at a slice."""
    budget_s: float = 0.02
    """Kernel time of all looks of one sample, aimed at; one slice is always looked at."""
    most_slices: int = 64


class DmaSampler:
    """Samples one VM's page tables; make one when its QEMU has started."""

    def __init__(self, opened: OpenDevices, clock: Clock, limits: Limits | None = None) -> None:
        self._opened = opened
        self._clock = clock
        self._limits = limits or Limits()
        self._areas: dict[HwptRef, Sequence[Area]] = {}
        self._slices = 1
        self._samples = 0
        self.cost_s = 0.0
        """Kernel time of the last sample's looks."""

    async def sample(self, *, tracking_is_on: bool = False) -> Mapping[HwptRef, DmaRate]:
        """One rate for each page table with dirty tracking. `tracking_is_on`: a migration goes on,
        so the VMM has switched it on. Raises KernelError (KernelGone once the VM is gone)."""
        if self._samples % REDISCOVER == 0:
            self._areas.clear()
        self._samples += 1
        rates, spent_s, slices = {}, 0.0, self._slices
        for hwpt in await self._opened.find_hwpts():
            looks = _Looks(self._opened, hwpt)
            areas = await self._areas_of(hwpt)
            rates[hwpt] = await self._rate(looks, areas, tracking_is_on)
            spent_s += looks.spent_s
        self.cost_s = spent_s
        fitting = int(slices * self._limits.budget_s / spent_s) if spent_s else 2 * slices
        self._slices = max(1, min(fitting, 2 * slices, self._limits.most_slices))
        return rates

    async def _areas_of(self, hwpt: HwptRef) -> Sequence[Area]:
        async def is_mapped(area: Area) -> bool:
            return await self._opened.is_mapped(hwpt, area.iova, area.length_bytes)

        if not self._areas.get(hwpt):
            self._areas[hwpt] = await find_areas(is_mapped)
        return self._areas[hwpt]

    async def _rate(self, looks: "_Looks", areas: Sequence[Area], tracking_is_on: bool) -> DmaRate:
        chosen = slices_of(areas, self._slices, self._samples)
        before = [(piece, await looks.at(piece), self._clock.monotonic_s()) for piece in chosen]
        await asyncio.sleep(self._limits.window_s)
        windows, block = [], None
        for piece, first, at_s in before:
            second, now_s = await looks.at(piece), self._clock.monotonic_s()
            if first is None or second is None:
                self._areas.pop(looks.hwpt, None)  # the mappings have changed: look anew
                continue
            pages = piece.length_bytes // PAGE_BYTES
            windows.append(Window(pages, first.dirty_pages, second.dirty_pages, now_s - at_s))
            if block is None and second.dirty_pages:
                block = await self._granule(looks, piece)
        return estimate(
            windows,
            page_size_bytes=PAGE_BYTES,
            total_bytes=sum(area.length_bytes for area in areas),
            granule_bytes=block,
            tracking_is_on=tracking_is_on,
        )

    async def _granule(self, looks: "_Looks", piece: Area) -> int | None:
        if (piece.iova | piece.length_bytes) % LARGE_PAGE_BYTES:
            return None
        seen = {}
        for size in (LARGE_PAGE_BYTES, PAGE_BYTES):
            look = await looks.at(piece, size)
            if look is None:
                return None
            seen[size] = look.dirty_pages
        return granule(seen)


class _Looks:
    """Peeks at one page table, and what they have cost."""

    def __init__(self, opened: OpenDevices, hwpt: HwptRef) -> None:
        self._opened = opened
        self.hwpt = hwpt
        self.spent_s = 0.0

    async def at(self, area: Area, page_size_bytes: int = PAGE_BYTES) -> DirtyPeek | None:
        look = await self._opened.peek(self.hwpt, area.iova, area.length_bytes, page_size_bytes)
        self.spent_s += 0.0 if look is None else look.took_s
        return look


async def find_areas(is_mapped: Callable[[Area], Awaitable[bool]]) -> Sequence[Area]:
    """What is mapped from each of STARTS on, found to whole UNIT_BYTES."""
    areas: list[Area] = []
    for start in STARTS:
        if areas and start < areas[-1].end:
            continue
        length = await _mapped_from(start, is_mapped)
        if length:
            areas.append(Area(start, length))
    return areas


async def _mapped_from(start: int, is_mapped: Callable[[Area], Awaitable[bool]]) -> int:
    """Bytes that are mapped without a hole from `start` on."""
    known, step = 0, UNIT_BYTES
    while known < LARGEST_BYTES and await is_mapped(Area(start, known + step)):
        known += step
        step *= 2
    while step > UNIT_BYTES:
        step //= 2
        if await is_mapped(Area(start, known + step)):
            known += step
    return known


def slices_of(areas: Sequence[Area], parts: int, turn: int) -> Sequence[Area]:
    """Some pieces of SLICE_BYTES of the areas, spread over them; they begin at multiples of it, the
    ends are shorter. Not made of the list of all: a guest of 8 TiB has a quarter of a million."""
    counts = [-(-area.end // SLICE_BYTES) - area.iova // SLICE_BYTES for area in areas]
    return [_slice(areas, counts, index) for index in spread_over(sum(counts), parts, turn)]


def _slice(areas: Sequence[Area], counts: Sequence[int], index: int) -> Area:
    for area, count in zip(areas, counts, strict=True):
        if index < count:
            begin = (area.iova // SLICE_BYTES + index) * SLICE_BYTES
            end = min(begin + SLICE_BYTES, area.end)
            begin = max(begin, area.iova)
            return Area(begin, end - begin)
        index -= count
    raise IndexError(index)
