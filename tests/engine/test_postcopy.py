"""Postcopy: the guest moves first. From then on nothing is killed, and nothing is guessed."""

from __future__ import annotations

import asyncio

from migrd.core.facts import QemuStatus
from migrd.core.migration import Mode, Policy, WhenNotConverging
from migrd.core.phases import Phase
from migrd.engine.service import Whereabouts
from tests.engine.test_steering import never_converges
from tests.fakes.virtual_time import until
from tests.fakes.wire import MIB
from tests.fakes.world import VM, Pair, running_pair

POSTCOPY = Policy(when_not_converging=WhenNotConverging.POSTCOPY)


async def moving(pair: Pair) -> str:
    """A migration whose guest has moved, and whose memory is still coming."""
    never_converges(pair)
    migration_id = await pair.ask(policy=POSTCOPY)
    await pair.until_phase(migration_id, Phase.COMPLETING)
    pair.ground.wire.bandwidth_bytes_per_s = 20 * MIB  # and it takes its time
    return migration_id


async def test_a_guest_that_does_not_converge_moves_by_postcopy() -> None:
    async with running_pair() as pair:
        never_converges(pair)
        view = await pair.migrate(policy=POSTCOPY)
        assert view.phase == Phase.SUCCEEDED, view.cause
        assert view.mode is Mode.POSTCOPY
        assert pair.running_on() == "beta"
        assert view.blackout_s is not None
        assert view.blackout_s < 0.5
        assert not pair.hosts["alpha"].living(VM)
        await pair.migrates_again()


async def test_the_source_stays_until_all_memory_is_there() -> None:
    async with running_pair() as pair:
        migration_id = await moving(pair)
        assert pair.running_on() == "beta"
        assert pair.view(migration_id).guest_runs_on is Whereabouts.DESTINATION
        await asyncio.sleep(1.0)
        assert pair.hosts["alpha"].qemu(VM).status is QemuStatus.POSTCOPY_ACTIVE
        assert (await pair.until_over(migration_id)).phase == Phase.SUCCEEDED


async def test_a_partition_is_waited_out_and_the_connection_recovered() -> None:
    async with running_pair() as pair:
        migration_id = await moving(pair)
        pair.ground.wire.freeze()
        await until(
            lambda: "PostcopyPaused" in {c.type for c in pair.view(migration_id).conditions}
        )
        assert "Kill neither" in (pair.view(migration_id).next_step or "")
        await asyncio.sleep(20.0)
        assert len(pair.all_living()) == 2, "nobody was killed"
        pair.ground.wire.heal()
        view = await pair.until_over(migration_id)
        assert view.phase == Phase.SUCCEEDED
        assert view.conditions == ()
        await pair.migrates_again()


async def test_a_destination_that_is_complete_without_ever_running_is_left_again() -> None:
    """All memory went over while beta's daemon was away: here nothing is older than there."""
    async with running_pair() as pair:
        never_converges(pair)
        pair.ground.load.device_s = 0.3
        migration_id = await pair.ask(policy=POSTCOPY)
        await pair.until_phase(migration_id, Phase.SWITCHOVER)
        pair.ground.wire.bandwidth_bytes_per_s = 1000 * MIB
        await pair.kill("beta")
        view = await pair.until_over(migration_id)
        assert view.phase == Phase.ROLLED_BACK
        assert pair.running_on() == "alpha"
        await pair.start("beta")
        await pair.migrates_again()


async def test_a_connection_that_breaks_again_and_again_is_recovered_each_time() -> None:
    async with running_pair() as pair:
        migration_id = await moving(pair)
        for _ in range(3):
            await asyncio.sleep(1.0)
            pair.ground.wire.cut()
        assert (await pair.until_over(migration_id)).phase == Phase.SUCCEEDED


async def test_memory_lost_at_the_very_end_is_an_alarm_that_a_person_can_end() -> None:
    async with running_pair() as pair:
        migration_id = await moving(pair)
        transfer = pair.hosts["alpha"].qemu(VM).transfer
        assert transfer is not None
        transfer.lose_what_was_sent()
        await until(
            lambda: "PostcopyFailed" in {c.type for c in pair.view(migration_id).conditions}
        )
        assert pair.view(migration_id).phase == Phase.COMPLETING
        assert "end its QEMU there" in (pair.view(migration_id).next_step or "")
        assert len(pair.all_living()) == 2, "nobody was killed"
        pair.hosts["beta"].qemu(VM).die("ended by the operator")
        view = await pair.until_over(migration_id)
        assert view.phase == Phase.GUEST_LOST
        assert not pair.all_living()


async def test_a_destination_that_dies_in_postcopy_takes_the_guest_with_it_and_that_is_said() -> (
    None
):
    async with running_pair() as pair:
        migration_id = await moving(pair)
        pair.hosts["beta"].qemu(VM).die("killed")
        view = await pair.until_over(migration_id)
        assert view.phase == Phase.GUEST_LOST
        assert pair.running_on() is None
        assert not pair.all_living(), "what is left at the source is of no use to anybody"


async def test_a_source_that_dies_in_postcopy_takes_the_guest_with_it_and_that_is_said() -> None:
    async with running_pair() as pair:
        migration_id = await moving(pair)
        pair.hosts["alpha"].qemu(VM).die("killed")
        view = await pair.until_over(migration_id)
        assert view.phase == Phase.GUEST_LOST
        assert view.cause is not None
        assert "still needed memory" in view.cause.message


async def test_a_cancel_in_postcopy_is_denied() -> None:
    async with running_pair() as pair:
        never_converges(pair)
        migration_id = await pair.ask(policy=POSTCOPY)
        await until(lambda: pair.engine_state(migration_id).mode is Mode.POSTCOPY)
        answer = await pair.alpha.service.cancel(migration_id, by="op")
        assert answer.admission == "denied"
        assert (await pair.until_over(migration_id)).phase == Phase.SUCCEEDED


async def test_a_device_state_that_fails_to_go_over_brings_the_guest_back() -> None:
    """QEMU may say `postcopy-active` before that: the status alone is no proof."""
    async with running_pair() as pair:
        never_converges(pair)
        pair.ground.load.device_s = 0.5
        migration_id = await pair.ask(policy=POSTCOPY)
        await pair.until_phase(migration_id, Phase.SWITCHOVER)
        await until(lambda: pair.hosts["alpha"].qemu(VM).status is QemuStatus.POSTCOPY_ACTIVE)
        assert pair.hosts["beta"].qemu(VM).copy is None
        pair.ground.wire.cut()
        view = await pair.until_over(migration_id)
        assert view.phase == Phase.ROLLED_BACK, view.cause
        assert pair.running_on() == "alpha"
        await pair.migrates_again()


async def test_a_destination_away_after_the_guest_has_left_is_waited_for_without_end() -> None:
    async with running_pair() as pair:
        never_converges(pair)
        pair.ground.load.device_s = 0.3
        migration_id = await pair.ask(policy=POSTCOPY)
        await pair.until_phase(migration_id, Phase.SWITCHOVER)
        pair.ground.wire.bandwidth_bytes_per_s = 20 * MIB
        await pair.kill("beta")
        view = await pair.until_phase(migration_id, Phase.NEEDS_OPERATOR)
        assert view.guest_runs_on is Whereabouts.UNKNOWN
        await asyncio.sleep(200.0)
        assert len(pair.all_living()) == 2, "nothing was killed"
        await pair.start("beta")
        assert (await pair.until_over(migration_id)).phase == Phase.SUCCEEDED
        await pair.migrates_again()


async def test_a_loaded_postcopy_destination_never_refuses_by_time_out() -> None:
    async with running_pair() as pair:
        never_converges(pair)
        pair.ground.load.device_s = 0.3
        migration_id = await pair.ask(policy=POSTCOPY)
        await pair.until_phase(migration_id, Phase.SWITCHOVER)
        await pair.kill("alpha")
        await asyncio.sleep(600.0)
        assert pair.stands(migration_id, "beta")[0] == "loaded"
        await pair.start("alpha")
        assert (await pair.until_over(migration_id)).phase == Phase.SUCCEEDED
