"""One migration after another through the Vmm port: the fake keeps the rules of the real ones."""

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import pytest

from migrd.core.facts import (
    QemuStatus,
    RunState,
    TransferAddress,
    TransferSample,
    TransferSettings,
)
from migrd.engine.ports import TransferFeed, Vmm
from migrd.errors import VmmDied, VmmRefused, VmmTimedOut
from tests.contract.vmm_world import LATER, MIB, World

V = TypeVar("V", bound=Vmm)

WITHIN_S = 20.0
FAST = TransferSettings(
    downtime_limit_s=0.5,
    max_bandwidth_bytes_per_s=0,
    tls=False,
    migration_id="contract",
    epoch=1,
)
ENDLESS = replace(FAST, downtime_limit_s=0.02, max_bandwidth_bytes_per_s=12 * MIB)
"""Slower than the guest dirties: it never converges."""


async def seen(
    feed: TransferFeed, holds: Callable[[TransferSample], bool], what: str
) -> TransferSample:
    """The first sample from now on for which `holds`; fails loudly when there is none."""
    deadline_s = time.monotonic() + WITHIN_S
    while time.monotonic() < deadline_s:
        sample = await feed.newer(within_s=1.0)
        if sample is not None and holds(sample):
            return sample
    raise AssertionError(f"not seen: {what}; last: {feed.latest}")


async def death_told(feed: TransferFeed) -> bool:
    """Whether the feed says, after what it had still to tell, that its QEMU is dead."""
    for _ in range(100):
        try:
            await feed.newer(within_s=1)
        except VmmDied:
            return True
    return False


async def status_seen(feed: TransferFeed, *statuses: QemuStatus) -> TransferSample:
    return await seen(feed, lambda sample: sample.qemu_status in statuses, str(statuses))


async def state_reached(machine: Vmm, *states: RunState) -> None:
    deadline_s = time.monotonic() + WITHIN_S
    while (now := await machine.run_state()) not in states:
        assert time.monotonic() < deadline_s, f"{now}, not {states}"
        await asyncio.sleep(0.01)


async def status_reached(machine: Vmm, *statuses: QemuStatus) -> TransferSample:
    deadline_s = time.monotonic() + WITHIN_S
    while (now := await machine.sample()).qemu_status not in statuses:
        assert time.monotonic() < deadline_s, f"{now}, not {statuses}"
        await asyncio.sleep(0.01)
    return now


async def prepared(world: World[V], settings: TransferSettings) -> tuple[V, V, TransferAddress]:
    source, destination = await world.source(), await world.destination()
    address = await destination.prepare_incoming(settings, None, "127.0.0.1")
    await source.prepare_outgoing(settings, None)
    return source, destination, address


async def test_facts_say_what_runs_and_what_it_offers(world: World[Vmm]) -> None:
    source, destination = await world.source(), await world.destination()
    facts = await source.facts()
    assert facts.is_running
    assert (facts.qemu_status, facts.memory_bytes) == (QemuStatus.NONE, 64 * MIB)
    assert facts.machine_type is not None
    assert facts.machine_type.startswith(world.machine_type)
    assert (facts.passthrough_devices, facts.blocked_reasons) == ((), ())
    assert facts.pid == source.pid is not None
    assert world.offers <= facts.features
    assert facts.features & LATER == world.later_features
    assert (await destination.facts()).run_state is RunState.INMIGRATE


@pytest.mark.parametrize("channels", [0, 2])
async def test_the_guest_moves_and_waits_on_both_sides_for_the_engine(
    world: World[Vmm], channels: int
) -> None:
    settings = replace(FAST, multifd_channels=channels)
    source, destination, address = await prepared(world, settings)
    async with source.feed() as feed, destination.feed() as arriving:
        before_s = time.monotonic()
        await source.start_outgoing(address)
        stopped = await status_seen(feed, QemuStatus.PRE_SWITCHOVER)
        assert stopped.stopped_at_s is not None
        assert before_s < stopped.stopped_at_s <= stopped.at_s
        assert await destination.run_state() is RunState.INMIGRATE
        await source.continue_switchover()
        await status_seen(feed, QemuStatus.COMPLETED)
        await status_seen(arriving, QemuStatus.COMPLETED)
    await state_reached(source, RunState.POSTMIGRATE)
    await state_reached(destination, RunState.PAUSED)  # held: only `cont` runs it
    await destination.run_guest()
    assert await destination.run_state() is RunState.RUNNING
    await source.quit()
    assert source.is_dead


async def test_every_status_comes_in_order_and_rounds_are_seen(world: World[Vmm]) -> None:
    source, _destination, address = await prepared(world, ENDLESS)
    statuses: list[QemuStatus] = []
    syncs: set[int] = set()
    async with source.feed() as feed:
        await source.start_outgoing(address)

        def third_round(sample: TransferSample) -> bool:
            statuses.append(sample.qemu_status)
            syncs.add(sample.qemu_dirty_sync_count or 0)
            return (sample.qemu_dirty_sync_count or 0) >= 3

        sample = await seen(feed, third_round, "three dirty syncs")
        assert {1, 2, 3} <= syncs
        assert sample.page_size_bytes == 4096
        assert sample.total_bytes is not None
        assert sample.total_bytes >= 64 * MIB
        # QEMU measures it once a second at most, however fast the rounds are
        sample = await seen(feed, lambda s: s.dirty_pages_per_s is not None, "a dirty rate")
        assert (sample.dirty_pages_per_s or 0) > 100
        assert sample.bandwidth_bytes_per_s is not None
        order = list(dict.fromkeys(s for s in statuses if s is not QemuStatus.NONE))
        assert order == [QemuStatus.SETUP, QemuStatus.ACTIVE]
        await source.cancel_transfer()
        await status_seen(feed, QemuStatus.CANCELLED)


async def test_limits_take_effect_while_it_runs(world: World[Vmm]) -> None:
    source, _destination, address = await prepared(world, ENDLESS)
    async with source.feed() as feed:
        await source.start_outgoing(address)
        await seen(feed, lambda s: (s.qemu_dirty_sync_count or 0) >= 2, "a second round")
        assert feed.latest is not None
        assert feed.latest.qemu_status is QemuStatus.ACTIVE
        await source.set_limits(
            max_bandwidth_bytes_per_s=0,
            downtime_limit_s=0.5,
            switchover_bandwidth_bytes_per_s=500 * MIB,
        )
        await status_seen(feed, QemuStatus.PRE_SWITCHOVER)
        await source.cancel_transfer()


async def test_a_throttled_guest_converges(world: World[Vmm]) -> None:
    settings = replace(ENDLESS, auto_converge=True, downtime_limit_s=0.3)
    source, _destination, address = await prepared(world, settings)
    async with source.feed() as feed:
        await source.start_outgoing(address)
        await seen(feed, lambda s: (s.qemu_dirty_sync_count or 0) >= 2, "a second round")
        await source.set_throttle(95)
        await status_seen(feed, QemuStatus.PRE_SWITCHOVER)
        await source.cancel_transfer()


async def test_a_cancel_while_paused_before_the_switchover_brings_the_guest_back(
    world: World[Vmm],
) -> None:
    source, destination, address = await prepared(world, FAST)
    async with source.feed() as feed:
        await source.start_outgoing(address)
        await status_seen(feed, QemuStatus.PRE_SWITCHOVER)
        await source.cancel_transfer()
        resumed = await seen(feed, lambda s: s.resumed_at_s is not None, "RESUME")
        assert resumed.stopped_at_s is not None
        assert resumed.resumed_at_s is not None
        assert resumed.stopped_at_s < resumed.resumed_at_s
    ended = await status_reached(source, QemuStatus.CANCELLED)
    assert ended.remaining_bytes is None  # the numbers have vanished
    await state_reached(source, RunState.RUNNING)
    await world.nothing_is_left_behind(source)
    await destination.quit()

    another = await world.destination()  # the same source, a fresh destination
    address = await another.prepare_incoming(FAST, None, "127.0.0.1")
    await source.prepare_outgoing(FAST, None)
    async with source.feed() as feed:
        await source.start_outgoing(address)
        await status_seen(feed, QemuStatus.PRE_SWITCHOVER)
        await source.continue_switchover()
        await status_seen(feed, QemuStatus.COMPLETED)
    await state_reached(another, RunState.PAUSED)


async def test_a_migration_to_nobody_is_accepted_and_fails_in_the_feed(world: World[Vmm]) -> None:
    source = await world.source()
    await source.prepare_outgoing(FAST, None)
    async with source.feed() as feed:
        await source.start_outgoing(TransferAddress("127.0.0.1", 1))
        failed = await seen(feed, lambda s: s.error is not None, "QEMU's reason")
    assert failed.qemu_status is QemuStatus.FAILED
    assert "connect" in (failed.error or "").lower()
    assert await source.run_state() is RunState.RUNNING
    await world.nothing_is_left_behind(source)


async def test_a_destination_that_dies_in_precopy_leaves_the_guest_running(
    world: World[Vmm],
) -> None:
    source, destination, address = await prepared(world, ENDLESS)
    async with source.feed() as feed:
        await source.start_outgoing(address)
        await seen(feed, lambda s: (s.transferred_bytes or 0) > MIB, "some bytes sent")
        world.kill(destination)
        await status_seen(feed, QemuStatus.FAILED)
    assert await source.run_state() is RunState.RUNNING
    with pytest.raises(VmmDied):
        await destination.run_state()
    await world.nothing_is_left_behind(source)


async def test_a_destination_that_dies_while_the_source_is_paused_is_found_at_the_switchover(
    world: World[Vmm],
) -> None:
    source, destination, address = await prepared(world, FAST)
    async with source.feed() as feed:
        await source.start_outgoing(address)
        await status_seen(feed, QemuStatus.PRE_SWITCHOVER)
        world.kill(destination)
        async with asyncio.timeout(5):
            while not destination.is_dead:  # noqa: ASYNC110 - a Vmm has no event for it
                await asyncio.sleep(0.001)
        await source.continue_switchover()
        await status_seen(feed, QemuStatus.FAILED)
    await state_reached(source, RunState.RUNNING)


@pytest.mark.parametrize("channels", [0, 2])
async def test_a_stalled_switchover_is_freed_out_of_band(world: World[Vmm], channels: int) -> None:
    settings = replace(FAST, multifd_channels=channels)
    source, _destination, address = await prepared(world, settings)
    link = await world.link(address)
    async with source.feed() as feed:
        await source.start_outgoing(link.address)
        await status_seen(feed, QemuStatus.PRE_SWITCHOVER)
        await link.freeze()
        with contextlib.suppress(VmmTimedOut):  # it may block before it has answered
            await source.continue_switchover()
        await status_seen(feed, QemuStatus.DEVICE)
        started_s = time.monotonic()
        await source.free_stalled()
        failed = await status_seen(feed, QemuStatus.FAILED)
        assert time.monotonic() - started_s < 3.0
        if failed.run_state is not RunState.RUNNING:
            await seen(feed, lambda s: s.run_state is RunState.RUNNING, "the guest running again")


async def test_a_destination_that_is_cut_off_takes_no_guest_and_the_source_runs_on(
    world: World[Vmm],
) -> None:
    """Done before silence counts as a refusal (engine.incoming): nothing comes afterwards."""
    postcopy = replace(ENDLESS, postcopy=True)
    if world.version == "direct":  # it has no need of it
        with pytest.raises(VmmRefused, match="postcopy"):
            await prepared(world, postcopy)
        return
    source, destination, address = await prepared(world, postcopy)
    with contextlib.suppress(VmmRefused):  # nobody is connected yet
        await destination.free_stalled()
    assert (await destination.sample()).qemu_status in (QemuStatus.SETUP, QemuStatus.NONE)
    async with source.feed() as feed:
        await source.start_outgoing(address)
        await seen(feed, lambda s: (s.transferred_bytes or 0) > MIB, "some bytes sent")
        with contextlib.suppress(VmmDied):  # older ones exit of it, before or after they answer
            await destination.free_stalled()
            await status_reached(destination, QemuStatus.FAILED)
        assert await source.run_state() is RunState.RUNNING
        # What a source does that hears of the refusal: by itself, 10.0 may stay `active`, with its
        # sender blocked on a socket that has no reader any more.
        with contextlib.suppress(VmmRefused):  # it has failed already
            await source.cancel_transfer()
        await status_seen(feed, QemuStatus.FAILED, QemuStatus.CANCELLED)
    assert await source.run_state() is RunState.RUNNING
    await world.nothing_is_left_behind(source)


async def test_a_destination_prepared_twice_listens_once(world: World[Vmm]) -> None:
    destination = await world.destination()
    first = await destination.prepare_incoming(FAST, None, "127.0.0.1")
    assert await destination.prepare_incoming(FAST, None, "127.0.0.1") == first
    assert first.port > 0


async def test_a_destination_that_has_had_its_migration_takes_no_other(world: World[Vmm]) -> None:
    source, destination, address = await prepared(world, FAST)
    async with source.feed() as feed:
        await source.start_outgoing(address)
        await status_seen(feed, QemuStatus.PRE_SWITCHOVER)
        await source.continue_switchover()
        await status_seen(feed, QemuStatus.COMPLETED)
    await state_reached(destination, RunState.PAUSED)
    with pytest.raises(VmmRefused):
        await destination.prepare_incoming(FAST, None, "127.0.0.1")


async def test_preparing_a_source_twice_is_the_same_as_once(world: World[Vmm]) -> None:
    source, _destination, address = await prepared(world, FAST)
    await source.prepare_outgoing(FAST, None)
    async with source.feed() as feed:
        await source.start_outgoing(address)
        await status_seen(feed, QemuStatus.PRE_SWITCHOVER)
        await source.cancel_transfer()


async def test_a_vm_without_incoming_refuses_to_be_a_destination(world: World[Vmm]) -> None:
    source = await world.source()
    with pytest.raises(VmmRefused, match="incoming"):
        await source.prepare_incoming(FAST, None, "127.0.0.1")


async def test_encryption_without_an_identity_is_refused_and_never_plain(world: World[Vmm]) -> None:
    source, destination = await world.source(), await world.destination()
    encrypted = replace(FAST, tls=True, peer_name="other")
    with pytest.raises(VmmRefused, match="no TLS identity") as caught:
        await source.prepare_outgoing(encrypted, None)
    assert caught.value.code == "tls_identity_missing"
    with pytest.raises(VmmRefused, match="no TLS identity"):
        await destination.prepare_incoming(encrypted, None, "127.0.0.1")


async def test_a_feed_tells_of_the_death_of_its_qemu(world: World[Vmm]) -> None:
    source = await world.source()
    async with source.feed() as feed:
        await status_seen(feed, QemuStatus.NONE)
        world.kill(source)
        assert await death_told(feed)
    assert source.is_dead
    with pytest.raises(VmmDied):
        await source.facts()
    await source.quit()  # nothing left to do


async def test_a_feed_that_hears_nothing_new_says_so_in_time(world: World[Vmm]) -> None:
    destination = await world.destination()
    async with destination.feed() as feed:
        assert await feed.newer(within_s=5) is not None
        started_s = time.monotonic()
        assert await feed.newer(within_s=0.05) is None
        assert time.monotonic() - started_s < 0.4


def test_a_time_out_is_never_taken_for_a_refusal() -> None:
    assert not issubclass(VmmTimedOut, VmmRefused)
