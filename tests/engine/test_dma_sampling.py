"""The rates of all VMs here: found without anybody asking, shown, and gone with their VM."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from migrd.core.dma_rate import RateQuality
from migrd.core.phases import Phase
from migrd.engine.service import VmView
from tests.engine.test_steering import never_converges
from tests.fakes.open_devices import MIB, FakeOpenDevices
from tests.fakes.virtual_time import until
from tests.fakes.world import VM, Pair, running_pair

INTERVAL_S = 10.0


def seen(pair: Pair) -> VmView:
    return pair.alpha.service.vm(VM)


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    async with running_pair() as pair:
        yield pair


@pytest.fixture
def opened(pair: Pair) -> FakeOpenDevices:
    opened = FakeOpenDevices([(MIB, 255 * MIB)], pages_per_s=200)
    vmm = pair.alpha.engine.vms.require(VM).vmm
    assert vmm is not None
    pair.alpha.engine.holding.hold(vmm, opened)
    return opened


async def test_a_running_vm_is_sampled_and_its_rate_shown(
    pair: Pair, opened: FakeOpenDevices
) -> None:
    assert not seen(pair).dma_rates
    await asyncio.sleep(3 * INTERVAL_S)
    (sampled,) = seen(pair).dma_rates
    assert sampled.rate.quality is RateQuality.MEASURED
    assert sampled.rate.low_pages_per_s is not None
    assert sampled.rate.high_pages_per_s is not None
    assert sampled.rate.low_pages_per_s <= 200 <= sampled.rate.high_pages_per_s
    assert sampled.hwpt_id == 3


async def test_no_rate_outlives_its_qemu(pair: Pair, opened: FakeOpenDevices) -> None:
    await asyncio.sleep(2 * INTERVAL_S)
    assert seen(pair).dma_rates
    opened.exit()
    await until(lambda: not seen(pair).dma_rates)
    assert not seen(pair).iommufds_held
    assert opened.is_gone


async def test_what_cannot_be_sampled_is_left_out_and_the_next_one_tried(
    pair: Pair, opened: FakeOpenDevices
) -> None:
    await asyncio.sleep(2 * INTERVAL_S)
    opened.is_gone = True
    await asyncio.sleep(2 * INTERVAL_S)
    assert not seen(pair).dma_rates
    opened.is_gone = False
    await asyncio.sleep(2 * INTERVAL_S)
    assert seen(pair).dma_rates


async def test_silence_is_a_zero_only_while_a_migration_has_tracking_on(
    pair: Pair, opened: FakeOpenDevices
) -> None:
    opened.is_tracking = False
    await asyncio.sleep(2 * INTERVAL_S)
    assert seen(pair).dma_rates[0].rate.quality is RateQuality.UNPROVEN
    never_converges(pair)
    migration_id = await pair.ask()
    await pair.until_phase(migration_id, Phase.PRECOPY)
    await asyncio.sleep(2 * INTERVAL_S)
    assert seen(pair).dma_rates[0].rate.dirty_pages_per_s == 0
