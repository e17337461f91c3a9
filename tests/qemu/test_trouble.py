"""A Machine whose QEMU is in trouble: lost events, garbage in the middle, a hanging main loop."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from migrd.core.facts import QemuStatus, RunState
from migrd.errors import VmmRefused, VmmTimedOut
from migrd.qemu.machine import UNANSWERED_LIMIT
from tests.contract.test_machine import FAST, prepared, seen, status_seen
from tests.contract.vmm_world import FakeWorld
from tests.fakes.qmp_server import Fault
from tests.qemu.test_qmp import until


@pytest.fixture
async def world(short_tmp_path: Path) -> AsyncIterator[FakeWorld]:
    world = FakeWorld("10.0", short_tmp_path)
    try:
        yield world
    finally:
        await world.close()


async def test_a_migration_whose_events_are_lost_is_followed_by_asking(world: FakeWorld) -> None:
    source, destination, address = await prepared(world, FAST)
    for vm in world.vms.values():
        vm.qmp.lost_events = {"MIGRATION", "MIGRATION_PASS", "STOP", "RESUME"}
    async with source.feed() as feed, destination.feed() as arriving:
        await source.start_outgoing(address)
        stopped = await status_seen(feed, QemuStatus.PRE_SWITCHOVER)
        assert stopped.stopped_at_s is None  # not known, and not made up
        await source.continue_switchover()
        await status_seen(feed, QemuStatus.COMPLETED)
        await status_seen(arriving, QemuStatus.COMPLETED)
    assert await destination.run_state() is RunState.PAUSED


@pytest.mark.parametrize("fault", [Fault.GARBAGE, Fault.EOF_MID_REPLY, Fault.SILENCE])
async def test_a_broken_answer_in_the_middle_of_a_migration_costs_no_more_than_time(
    world: FakeWorld, fault: Fault
) -> None:
    source, _destination, address = await prepared(world, FAST)
    async with source.feed() as feed:
        await source.start_outgoing(address)
        source._call_deadline_s = 0.5  # for what is never answered
        world.vms[source].qmp.faults = [None, fault, None, fault]
        await status_seen(feed, QemuStatus.PRE_SWITCHOVER)
        await source.wait_connected(within_s=5)
        await until(lambda: not world.vms[source].qmp.faults)
        source._call_deadline_s = 5.0
        await source.wait_connected(within_s=5)
        await source.continue_switchover()
        await status_seen(feed, QemuStatus.COMPLETED)


async def test_a_blocked_qemu_is_not_buried_in_questions_and_is_freed_out_of_band(
    world: FakeWorld,
) -> None:
    source, _destination, address = await prepared(world, FAST)
    qemu = world.vms[source].qmp
    async with source.feed() as feed:
        await source.start_outgoing(address)
        await status_seen(feed, QemuStatus.PRE_SWITCHOVER)
        source._call_deadline_s = 0.1
        world.network.stalled = True
        await source.monitor.execute("migrate-continue", {"state": "pre-switchover"}, deadline_s=5)
        await until(lambda: not qemu.unblocked.is_set())
        with pytest.raises(VmmTimedOut):
            await source.run_state()
        await asyncio.sleep(1.5)  # the feed tries on meanwhile
        assert source.monitor.unanswered <= UNANSWERED_LIMIT + 2
        assert source.is_reachable
        source._call_deadline_s = 5.0
        await source.free_stalled()
        await seen(feed, lambda s: s.run_state is RunState.RUNNING, "the guest running again")
    assert (await source.sample()).qemu_status is QemuStatus.FAILED


async def test_passthrough_devices_and_blockers_are_facts(world: FakeWorld) -> None:
    source = await world.source()
    vm = world.vms[source]
    vm.devices, vm.blocked_reasons = ("hostdev0",), ("VFIO: no dirty tracking",)
    facts = await source.facts()
    assert facts.passthrough_devices == ("hostdev0",)
    assert facts.blocked_reasons == ("VFIO: no dirty tracking",)


async def test_combinations_that_qemu_refuses_are_told_in_its_words(world: FakeWorld) -> None:
    source = await world.source()
    with pytest.raises(VmmRefused, match="not yet compatible"):
        await source.prepare_outgoing(replace(FAST, postcopy=True, multifd_channels=2), None)
