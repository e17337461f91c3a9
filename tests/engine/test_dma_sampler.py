"""Sampling devices' dirty rates: right, within its budget, and never in the VMM's way."""

from __future__ import annotations

import asyncio
import tracemalloc
from dataclasses import dataclass
from itertools import pairwise

import pytest

from migrd.core.dma_rate import DmaRate, RateQuality
from migrd.engine.dma_sampler import Area, DmaSampler, Limits, find_areas, slices_of
from migrd.errors import KernelGone
from tests.fakes.open_devices import MIB, FakeOpenDevices

GIB = 1 << 30
PC = [(0, 640 << 10), (MIB, 2 * GIB - MIB), (4 * GIB, 2 * GIB)]
"""A guest of 4 GiB: low memory, up to the hole below 4 GiB, and above it."""


@dataclass
class LoopClock:
    def monotonic_s(self) -> float:
        return asyncio.get_running_loop().time()

    def wall_s(self) -> float:
        return 0.0


async def rate_of(sampler: DmaSampler, *, tracking_is_on: bool = False) -> DmaRate:
    (rate,) = (await sampler.sample(tracking_is_on=tracking_is_on)).values()
    return rate


def close_to(rate: DmaRate, pages_per_s: float) -> bool:
    assert rate.low_pages_per_s is not None
    assert rate.high_pages_per_s is not None
    return rate.low_pages_per_s <= pages_per_s <= rate.high_pages_per_s


async def test_the_rate_of_a_device_is_found_from_a_part_of_the_memory() -> None:
    opened = FakeOpenDevices(PC, pages_per_s=20_000, page_cost_s=1e-8)
    sampler = DmaSampler(opened, LoopClock())
    rate = await rate_of(sampler)
    for _ in range(6):
        opened.vmm_syncs()
        rate = await rate_of(sampler)
    assert rate.quality is RateQuality.MEASURED
    assert close_to(rate, 20_000), rate
    assert rate.sampled_bytes < rate.total_bytes
    assert rate.total_bytes == 4 * GIB - MIB
    assert rate.amplification == 1


async def test_a_sample_clears_nothing_and_asks_only_for_what_is_mapped() -> None:
    opened = FakeOpenDevices(PC, pages_per_s=1000)
    sampler = DmaSampler(opened, LoopClock())
    first = await rate_of(sampler)
    again = await rate_of(sampler)
    assert first.quality is again.quality is RateQuality.MEASURED
    for iova, length in opened.peeks:
        assert any(a <= iova and iova + length <= a + n for a, n in PC)


async def test_looks_that_are_dear_become_fewer_and_cheap_ones_more() -> None:
    dear = FakeOpenDevices(PC, page_cost_s=1e-5)
    sampler = DmaSampler(dear, LoopClock(), Limits(budget_s=0.2))
    for _ in range(4):
        dear.peeks.clear()
        await sampler.sample()
    assert len(dear.peeks) == 2, "one slice, twice: at 80 ms a look no more fit"
    cheap = FakeOpenDevices(PC, page_cost_s=1e-9)
    sampler = DmaSampler(cheap, LoopClock(), Limits(most_slices=16))
    for _ in range(8):
        cheap.peeks.clear()
        await sampler.sample()
    assert len(cheap.peeks) == 2 * 16


async def test_entries_of_2_mib_are_recognised() -> None:
    opened = FakeOpenDevices([(4 * GIB, 64 * MIB)], pages_per_s=3, entry_bytes=2 << 20)
    sampler = DmaSampler(opened, LoopClock())
    await sampler.sample()
    rate = await rate_of(sampler)
    assert rate.granule_bytes == 2 << 20
    assert rate.amplification == 512


async def test_a_silent_page_table_is_unproven_until_a_migration_tracks() -> None:
    opened = FakeOpenDevices(PC, pages_per_s=5000)
    opened.is_tracking = False
    sampler = DmaSampler(opened, LoopClock())
    assert (await rate_of(sampler)).quality is RateQuality.UNPROVEN
    assert (await rate_of(sampler, tracking_is_on=True)).dirty_pages_per_s == 0


async def test_a_dirty_sync_within_the_window_makes_no_zero() -> None:
    opened = FakeOpenDevices([(MIB, 15 * MIB)], pages_per_s=1000)
    sampler = DmaSampler(opened, LoopClock())
    await sampler.sample()

    async def sync() -> None:
        await asyncio.sleep(0.9)
        opened.vmm_syncs()

    rate, _ = await asyncio.gather(rate_of(sampler, tracking_is_on=True), sync())
    assert rate.quality is RateQuality.CLEARED
    assert rate.dirty_pages_per_s is None


async def test_memory_that_is_unmapped_meanwhile_is_looked_for_anew() -> None:
    opened = FakeOpenDevices(PC, pages_per_s=100)
    sampler = DmaSampler(opened, LoopClock(), Limits(most_slices=4))
    for _ in range(3):
        await sampler.sample()
    opened.areas = [(0, 640 << 10), (MIB, GIB - MIB)]
    for _ in range(64):  # until one of the slices is met that are gone
        if (await rate_of(sampler)).total_bytes == GIB - MIB:
            break
    assert (await rate_of(sampler)).total_bytes == GIB - MIB


async def test_what_is_mapped_is_asked_for_once_and_not_at_every_sample() -> None:
    opened = FakeOpenDevices(PC)
    sampler = DmaSampler(opened, LoopClock())
    await sampler.sample()
    asked = opened.questions
    assert asked < 150
    await sampler.sample()
    assert opened.questions == asked


async def test_a_vm_that_is_gone_is_an_error_that_says_so() -> None:
    opened = FakeOpenDevices(PC)
    await opened.close()
    with pytest.raises(KernelGone):
        await DmaSampler(opened, LoopClock()).sample()


@pytest.mark.parametrize(
    "areas",
    [[], [(MIB, MIB)], [(MIB, 3 * MIB)], [(1 << 30, 5 * GIB)], [(MIB, 8 * GIB)], PC[1:]],
)
async def test_areas_are_found_to_the_mib(areas: list[tuple[int, int]]) -> None:
    async def is_mapped(area: Area) -> bool:
        return any(a <= area.iova and area.end <= a + n for a, n in areas)

    found = await find_areas(is_mapped)
    assert [(area.iova, area.length_bytes) for area in found] == areas


def test_slices_cover_their_areas_exactly_once() -> None:
    areas = [Area(MIB, 100 * MIB), Area(1 << 30, 31 * MIB), Area(4 << 30, 64 * MIB)]
    pieces = sorted(slices_of(areas, 1000, 7), key=lambda piece: piece.iova)
    for area in areas:
        within = [piece for piece in pieces if area.iova <= piece.iova < area.end]
        assert within[0].iova == area.iova
        assert within[-1].end == area.end
        assert all(one.end == other.iova for one, other in pairwise(within))
    assert len(pieces) == 4 + 1 + 2
    assert max(piece.length_bytes for piece in pieces) <= 32 * MIB


def test_what_is_chosen_of_a_huge_guest_costs_no_more_than_of_a_small_one() -> None:
    """It is chosen on the event loop."""
    small, huge = [Area(4 << 30, GIB)], [Area(4 << 30, 8 << 40)]
    slices_of(huge, 64, 1)
    assert _allocations(huge) < 2 * _allocations(small)


def _allocations(areas: list[Area]) -> int:
    tracemalloc.start()
    try:
        slices_of(areas, 32, 1)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
