"""QEMUs and guests that end in the middle, in every phase; the answer is the ground truth."""

from __future__ import annotations

import asyncio

import pytest

from migrd.core.facts import QemuStatus
from migrd.core.migration import Policy
from migrd.core.phases import Phase
from migrd.engine.service import Resolution, Whereabouts
from tests.engine.test_happy_path import busy
from tests.fakes.qemu_process import FakeQemu
from tests.fakes.virtual_time import until
from tests.fakes.wire import MIB
from tests.fakes.world import VM, Pair, running_pair
from tests.sweep import scenarios


async def held_at(pair: Pair, phase: Phase) -> str:
    """A migration that stays in a phase long enough to be looked at."""
    if phase is Phase.PRECOPY:
        busy(pair)
        policy = Policy(downtime_limit_s=0.05)
        pair.ground.load.dirty_bytes_per_s = 400 * MIB
        migration_id = await pair.ask(policy=policy)
        await pair.until_phase(migration_id, phase)
        await until_status(pair.hosts["beta"].qemu(VM), QemuStatus.ACTIVE)
    else:
        pair.ground.load.device_s = 0.5
        migration_id = await pair.ask()
    await pair.until_phase(migration_id, phase)
    return migration_id


async def until_status(qemu: FakeQemu, *statuses: QemuStatus) -> None:
    await until(lambda: qemu.status in statuses, what=f"{qemu.name} in {statuses}")


@pytest.mark.parametrize("phase", [Phase.PREPARING, Phase.PRECOPY, Phase.SWITCHOVER])
async def test_the_source_dies_and_the_guest_is_lost_and_said_to_be(phase: Phase) -> None:
    async with running_pair() as pair:
        migration_id = await held_at(pair, phase)
        pair.hosts["alpha"].qemu(VM).die("killed")
        view = await pair.until_over(migration_id)
        assert view.phase == Phase.GUEST_LOST
        assert view.guest_runs_on is Whereabouts.NOWHERE
        assert view.cause is not None
        assert "dead" in view.cause.message
        assert view.next_step is not None
        assert pair.running_on() is None
        await pair.settle()
        await until(lambda: not pair.all_living(), what="the destination's half copy is gone")
        pair.ground.calm()
        await pair.alpha.service.start_vm(VM)
        await pair.migrates_again()


async def test_the_source_dies_before_the_first_byte_and_it_is_plain_that_the_guest_is_lost() -> (
    None
):
    """Without our migrate-continue its QEMU cannot have completed: nobody need be asked."""
    async with running_pair() as pair:

        def dies_of_migrate(call: str, number: int) -> None:
            del number
            if call == "vmm.start_outgoing":
                pair.hosts["alpha"].qemu(VM).die("killed")

        pair.alpha.gate.plan = dies_of_migrate
        migration_id = await pair.ask()
        view = await pair.until_over(migration_id, within_s=2.0)
        assert view.phase == Phase.GUEST_LOST
        assert view.timeline[-2].phase == Phase.PRECOPY
        assert not pair.ground.wire.transfers
        await pair.settle()


async def test_the_source_dies_with_all_of_the_guest_at_the_destination_and_it_is_saved() -> None:
    async with running_pair() as pair:
        pair.ground.wire.swallows_ack = True
        migration_id = await pair.ask()
        await pair.until_phase(migration_id, Phase.SWITCHOVER)
        there = pair.hosts["beta"].qemu(VM)
        await until_status(there, QemuStatus.COMPLETED)
        pair.hosts["alpha"].qemu(VM).die("killed")
        view = await pair.until_over(migration_id)
        assert view.phase == Phase.SUCCEEDED
        assert pair.running_on() == "beta"
        await pair.migrates_again()


async def test_a_source_that_dies_unwatched_may_have_run_on_so_a_person_decides() -> None:
    """The monitor is lost with the guest stopped, the switchover times out, then QEMU dies: it
    might have resumed meanwhile, and then the destination's copy would be an old one."""
    async with running_pair() as pair:
        pair.ground.wire.swallows_ack = True
        migration_id = await pair.ask()
        await pair.until_phase(migration_id, Phase.SWITCHOVER)
        await until_status(pair.hosts["beta"].qemu(VM), QemuStatus.COMPLETED)
        pair.alpha.launcher.handle(VM).is_connected = False
        await pair.until_phase(migration_id, Phase.ROLLING_BACK)
        await asyncio.sleep(1.0)
        pair.hosts["alpha"].qemu(VM).die("killed")
        view = await pair.until_phase(migration_id, Phase.NEEDS_OPERATOR)
        assert (view.cause and view.cause.code) == "source_died_unwatched"
        await asyncio.sleep(100.0)
        assert pair.running_on() is None
        assert pair.hosts["beta"].living(VM), "the copy is kept"
        service = pair.alpha.service
        answer = await service.resolve(
            migration_id, Resolution.USE_DESTINATION_COPY, evidence="I watched it", by="op"
        )
        assert answer.admission == "queued"
        view = await pair.until_over(migration_id)
        assert view.phase == Phase.SUCCEEDED, view.cause
        assert pair.running_on() == "beta"
        await pair.migrates_again()


async def test_a_source_that_dies_while_the_destinations_daemon_is_away_is_not_called_lost() -> (
    None
):
    async with running_pair() as pair:
        pair.ground.wire.swallows_ack = True
        migration_id = await pair.ask()
        await pair.until_phase(migration_id, Phase.SWITCHOVER)
        await until_status(pair.hosts["beta"].qemu(VM), QemuStatus.COMPLETED)
        await pair.kill("beta")
        pair.hosts["alpha"].qemu(VM).die("killed")
        view = await pair.until_phase(migration_id, Phase.NEEDS_OPERATOR)
        assert view.guest_runs_on is Whereabouts.UNKNOWN
        assert view.next_step is not None
        await asyncio.sleep(60.0)
        assert pair.stands(migration_id)[0] == Phase.NEEDS_OPERATOR
        await pair.start("beta")
        view = await pair.until_over(migration_id)
        assert view.phase == Phase.SUCCEEDED
        await pair.migrates_again()


@pytest.mark.parametrize("phase", [Phase.PREPARING, Phase.PRECOPY, Phase.SWITCHOVER])
async def test_the_destinations_qemu_dies_and_the_guest_goes_on_at_the_source(
    phase: Phase,
) -> None:
    async with running_pair() as pair:
        migration_id = await held_at(pair, phase)
        await until(lambda: pair.hosts["beta"].living(VM), what="the destination's QEMU")
        pair.hosts["beta"].qemu(VM).die("out of memory, said the kernel")
        view = await pair.until_over(migration_id)
        assert view.phase == Phase.ROLLED_BACK
        assert pair.running_on() == "alpha"
        assert view.cause is not None
        assert view.next_step is not None
        await pair.migrates_again()


async def test_the_destinations_qemu_dies_before_switchover_with_the_guest_stopped() -> None:
    """QEMU does not notice at pre-switchover; only when it goes on writing."""
    async with running_pair() as pair:
        pair.plans["alpha"] = scenarios.OnCall("vmm.continue_switchover", scenarios.KILLED_BEFORE)
        await pair.restart("alpha")
        migration_id = await pair.ask()
        await until(lambda: pair.alpha.gate.is_dead, what="alpha dies at pre-switchover")
        source = pair.hosts["alpha"].qemu(VM)
        assert source.status is QemuStatus.PRE_SWITCHOVER
        pair.hosts["beta"].qemu(VM).die("killed")
        await asyncio.sleep(0.5)
        assert source.status is QemuStatus.PRE_SWITCHOVER
        await pair.restart("alpha")
        view = await pair.until_over(migration_id)
        assert view.phase == Phase.ROLLED_BACK
        assert pair.running_on() == "alpha"


async def test_the_destinations_qemu_dies_as_it_starts_and_nobody_guesses() -> None:
    async with running_pair() as pair:
        migration_id = await scenarios.the_destination_dies_as_it_starts(pair)
        view = pair.view(migration_id)
        assert view.cause is not None
        assert view.cause.code == "destination_died_starting"
        there = pair.view(migration_id, "beta")
        assert (there.phase, there.is_terminal) == ("starting", False)  # a word may change it
        assert view.guest_runs_on is Whereabouts.UNKNOWN
        other = pair.view(migration_id, on="beta")
        assert other.guest_runs_on is Whereabouts.UNKNOWN
        assert other.next_step is not None
        await pair.alpha.service.resolve(
            migration_id, Resolution.GUEST_LOST, evidence="it ran there", by="op"
        )
        assert (await pair.until_over(migration_id)).phase == Phase.GUEST_LOST


async def test_the_destinations_qemu_dies_as_it_starts_while_its_daemon_is_down() -> None:
    async with running_pair() as pair:
        await scenarios.the_destination_dies_as_it_starts_unwatched(pair)


async def test_a_destination_that_exits_on_a_broken_stream_is_the_same_as_one_that_stays() -> None:
    async with Pair() as pair:
        pair.hosts["beta"].make.stays_on_error = False  # QEMU before 9
        await pair.boot()
        migration_id = await held_at(pair, Phase.PRECOPY)
        pair.ground.wire.cut()
        view = await pair.until_over(migration_id)
        assert view.phase == Phase.ROLLED_BACK
        assert pair.running_on() == "alpha"
        await pair.migrates_again()


@pytest.mark.parametrize("phase", [Phase.PRECOPY, Phase.SWITCHOVER])
async def test_a_guest_that_shuts_down_in_the_middle_is_not_run_again(phase: Phase) -> None:
    async with running_pair() as pair:
        migration_id = await held_at(pair, phase)
        pair.hosts["alpha"].qemu(VM).shut_down()
        view = await pair.until_over(migration_id)
        assert view.is_terminal
        assert pair.running_on() in (None, "alpha", "beta")
        await pair.settle()
        assert len(pair.all_living()) == 1
