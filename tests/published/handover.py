"""Published failures of who runs the guest, and of a guest that stays: checks and their plants."""

from __future__ import annotations

import asyncio
import contextlib
from types import MappingProxyType

import pytest

from migrd.core import phases
from migrd.core.facts import QemuStatus, RunState, TransferSample
from migrd.core.handover import DestinationTrigger
from migrd.core.migration import Cause, MigrationEvent
from migrd.core.phases import Instruction, Phase, Trigger
from migrd.engine import granting, migrations, outgoing, rollback, switchover
from migrd.engine.incoming import Incoming
from migrd.engine.outgoing import Outgoing, Step
from migrd.engine.outgoing_record import OutgoingRecord
from migrd.engine.ports import StoredVm
from migrd.engine.service import Whereabouts
from migrd.errors import Conflict, VmmRefused, VmmTimedOut
from tests.engine.test_steering import never_converges
from tests.fakes.road import Loss
from tests.fakes.virtual_time import until
from tests.fakes.wire import MIB
from tests.fakes.world import VM, Pair
from tests.published.row import alone, losing, on_a_pair


def step_is(patch: pytest.MonkeyPatch, instruction: Instruction, step: Step) -> None:
    """Another step for one instruction."""
    patch.setattr(migrations, "STEPS", {**migrations.STEPS, instruction: step})


async def refused_after_the_grant(pair: Pair) -> str:
    """A migration whose destination has everything, and refuses before it starts the guest."""
    pair.road.faults = losing("grant", Loss.UNREACHABLE)
    migration_id = await pair.ask()
    await pair.until_phase(migration_id, Phase.GRANTED)
    pair.beta.engine.migrations.incoming[migration_id].want_refusal("no memory after all")
    await until(lambda: pair.stands(migration_id, "beta")[0] == "refused", what="it refuses")
    pair.road.heal()
    return migration_id


async def copying(pair: Pair) -> str:
    """A migration that goes on copying until somebody ends it."""
    never_converges(pair)
    migration_id = await pair.ask()
    await pair.until_phase(migration_id, Phase.PRECOPY)
    there = pair.hosts["beta"].qemu(VM)
    await until(lambda: there.status is QemuStatus.ACTIVE, what="it copies")
    return migration_id


# The destination runs, and the source resumes by itself -------------------------------------------


@on_a_pair()
async def no_source_resumes_beside_a_destination_that_runs(pair: Pair) -> None:
    wire = pair.ground.wire
    wire.swallows_ack = True
    migration_id = await pair.ask()
    await pair.until_phase(migration_id, Phase.PRECOPY)
    there = pair.hosts["beta"].qemu(VM)
    there.listeners.append(lambda event: wire.cut() if event == "RESUME" else None)
    view = await pair.until_over(migration_id)
    alone(pair)
    assert view.phase == Phase.ROLLED_BACK, view.cause


def a_source_in_its_device_phase_is_done(patch: pytest.MonkeyPatch) -> None:
    verdict = switchover._verdict

    def hasty(m: Outgoing, sample: TransferSample) -> tuple[bool, MigrationEvent | None]:
        return (True, None) if sample.qemu_status is QemuStatus.DEVICE else verdict(m, sample)

    patch.setattr(switchover, "_verdict", hasty)


# The source is not ended --------------------------------------------------------------------------


@on_a_pair()
async def one_process_is_left_after_a_success(pair: Pair) -> None:
    view = await pair.migrate()
    assert view.phase == Phase.SUCCEEDED, view.cause
    left = [qemu.name for qemu in pair.all_living()]
    assert len(left) == 1, f"left: {left}"


def the_source_is_released_in_words_only(patch: pytest.MonkeyPatch) -> None:
    async def leave_it(m: Outgoing) -> MigrationEvent:
        return m.event(Trigger.SOURCE_RELEASED)

    step_is(patch, Instruction.RELEASE_SOURCE, leave_it)


# The source crashes after the guest has left ------------------------------------------------------


@on_a_pair()
async def a_source_that_crashes_after_the_guest_has_left_changes_nothing(pair: Pair) -> None:
    migration_id = await pair.ask()
    await pair.until_phase(migration_id, Phase.PRECOPY)
    here, there = (pair.hosts[name].qemu(VM) for name in ("alpha", "beta"))
    there.listeners.append(lambda event: here.die("crashed") if event == "RESUME" else None)
    view = await pair.until_over(migration_id)
    assert pair.running_on() == "beta"
    assert view.phase == Phase.SUCCEEDED, f"it runs on beta, and is said to be {view.phase}"
    assert view.guest_runs_on is Whereabouts.DESTINATION


def a_dead_source_is_a_lost_guest(patch: pytest.MonkeyPatch) -> None:
    async def naive(m: Outgoing) -> MigrationEvent:
        if m.vmm.is_dead:
            return m.event(Trigger.GUEST_DIED, cause=Cause("vmm_died", "the source has failed"))
        return await switchover.release_source(m)

    step_is(patch, Instruction.RELEASE_SOURCE, naive)


# The answer that says it runs is lost -------------------------------------------------------------


@on_a_pair()
async def a_success_that_is_not_heard_is_asked_for_again(pair: Pair) -> None:
    pair.road.faults = losing("grant", Loss.ANSWER_LOST, times=1)
    migration_id = await pair.ask()
    view = await pair.until_over(migration_id, within_s=300.0)
    assert view.phase == Phase.SUCCEEDED, view.cause


def a_grant_is_asked_for_once(patch: pytest.MonkeyPatch) -> None:
    asked: set[str] = set()

    async def once(m: Outgoing, *, died_is_unknown: bool = True) -> MigrationEvent:
        if m.id not in asked:
            asked.add(m.id)
            event = await granting.grant_once(m, died_is_unknown)
            if event is not None:
                return event
        await asyncio.Event().wait()
        raise AssertionError

    patch.setattr(switchover, "ask_until_answered", once)


# A later step fails after the guest has moved -----------------------------------------------------


@on_a_pair(release_deadline_s=5.0)
async def what_fails_after_the_guest_runs_there_does_not_bring_it_back(pair: Pair) -> None:
    migration_id = await pair.ask()
    here = pair.hosts["alpha"].qemu(VM)
    here.ignores_quit = True
    view = await pair.until_over(migration_id)
    here.ignores_quit = False
    alone(pair)
    assert view.phase == Phase.SUCCEEDED, view.cause
    assert view.cause is not None
    assert view.cause.code == "source_left_behind"
    assert pair.running_on() == "beta"


def a_late_failure_is_a_failure(patch: pytest.MonkeyPatch) -> None:
    back = {Trigger.STEP_FAILED: Phase.ROLLING_BACK}
    table = dict(phases.TRANSITIONS)
    table[Phase.COMPLETING] = {**table[Phase.COMPLETING], **back}
    for module in (phases, outgoing):
        patch.setattr(module, "TRANSITIONS", MappingProxyType(table))

    async def strict(m: Outgoing) -> MigrationEvent:
        event = await switchover.release_source(m)
        return event if event.cause is None else m.failed(event.cause.code, event.cause.message)

    step_is(patch, Instruction.RELEASE_SOURCE, strict)


@on_a_pair(release_deadline_s=5.0)
async def a_vm_that_has_left_is_not_started_again(pair: Pair) -> None:
    migration_id = await pair.ask()
    await pair.until_phase(migration_id, Phase.PRECOPY)
    quit_, vmm = pair.alpha.launcher.handle(VM).quit, pair.alpha.launcher.handle(VM)

    async def with_an_error() -> None:
        await quit_()
        raise VmmTimedOut("the connection broke as it ended")

    vmm.quit = with_an_error  # type: ignore[method-assign]  # the fault
    await pair.until_over(migration_id)
    await pair.settle()
    assert pair.running_on() == "beta"
    with contextlib.suppress(Conflict):
        await pair.alpha.service.start_vm(VM)
    alone(pair)
    assert pair.alpha.service.vm(VM).state == "departed"


def a_vm_that_has_left_is_only_off(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(OutgoingRecord, "has_left", False)


# What is written down ahead of the fact -----------------------------------------------------------


@on_a_pair()
async def a_guest_that_stayed_is_this_hosts_after_a_restart(pair: Pair) -> None:
    view = await pair.until_over(await refused_after_the_grant(pair))
    assert view.phase == Phase.ROLLED_BACK, view.cause
    await pair.settle()
    await pair.restart("alpha")
    here = pair.alpha.service
    await until(lambda: here.vm(VM).state == "running", what=f"said: {here.vm(VM).state}")


def the_vm_is_written_down_as_gone_with_the_grant(patch: pytest.MonkeyPatch) -> None:
    after = Outgoing._vm_after

    def early(self: Outgoing, event: MigrationEvent) -> StoredVm | None:
        if event.trigger is Trigger.TRANSFER_COMPLETED:
            return StoredVm(self.stored.spec, self.state.epoch, here=False, instance=None)
        return after(self, event)

    patch.setattr(Outgoing, "_vm_after", early)


# The destination does not run what it was given ---------------------------------------------------


@on_a_pair()
async def a_success_is_said_of_a_guest_that_runs(pair: Pair) -> None:
    migration_id = await pair.ask()
    await pair.until_phase(migration_id, Phase.PRECOPY)
    there = pair.hosts["beta"].qemu(VM)
    there.refuses_cont = 'Failed to get "write" lock'

    def in_the_end() -> None:
        there.refuses_cont = None

    asyncio.get_running_loop().call_later(3.0, in_the_end)
    view = await pair.until_over(migration_id)
    assert view.phase == Phase.SUCCEEDED, view.cause
    assert pair.running_on() == "beta", "said to have succeeded, and it stands still"


def cont_is_said_and_not_looked_after(patch: pytest.MonkeyPatch) -> None:
    async def blind(self: Incoming) -> None:
        with contextlib.suppress(VmmTimedOut, VmmRefused):
            await self._living().run_guest()
        await self._apply(DestinationTrigger.GUEST_RAN)

    patch.setattr(Incoming, "_start_guest", blind)


# A guest that stays -------------------------------------------------------------------------------


@on_a_pair()
async def a_guest_that_was_stopped_for_nothing_runs_again(pair: Pair) -> None:
    view = await pair.until_over(await refused_after_the_grant(pair))
    assert view.phase == Phase.ROLLED_BACK, view.cause
    assert pair.running_on() == "alpha", "rolled back, and it stands still"
    assert view.guest_runs_on is Whereabouts.SOURCE


def the_source_is_left_as_it_stands(patch: pytest.MonkeyPatch) -> None:
    async def leave_it(m: Outgoing) -> None:
        return None

    patch.setattr(rollback, "_see_it_run", leave_it)


@on_a_pair()
async def a_paused_guest_stays_paused_when_its_migration_fails(pair: Pair) -> None:
    pair.is_paused_guest = True
    here = pair.hosts["alpha"].qemu(VM)
    here.stop(RunState.PAUSED)
    pair.ground.wire.bandwidth_bytes_per_s = 50 * MIB
    migration_id = await pair.ask()
    await pair.until_phase(migration_id, Phase.PRECOPY)
    await until(lambda: pair.hosts["beta"].qemu(VM).status is QemuStatus.ACTIVE, what="copying")
    pair.ground.wire.cut()
    view = await pair.until_over(migration_id)
    assert view.phase == Phase.ROLLED_BACK, view.cause
    assert len(pair.guest().runs) == 1, "it was paused, and runs"


def whoever_is_rolled_back_runs(patch: pytest.MonkeyPatch) -> None:
    async def run(m: Outgoing) -> None:
        if await m.vmm.run_state() is not RunState.RUNNING:
            await m.vmm.run_guest()

    patch.setattr(rollback, "_see_it_run", run)


@on_a_pair()
async def a_guest_that_sleeps_is_not_woken_by_a_migration_that_is_undone(pair: Pair) -> None:
    migration_id = await copying(pair)
    here = pair.hosts["alpha"].qemu(VM)
    here.stop(RunState.SUSPENDED)
    await pair.alpha.service.cancel(migration_id, by="op")
    assert (await pair.until_over(migration_id)).phase == Phase.CANCELLED
    assert here.run_state is RunState.SUSPENDED, "it slept, and was woken"


def sleeping_is_being_paused(patch: pytest.MonkeyPatch) -> None:
    asleep = {RunState.SUSPENDED}
    patch.setattr(rollback, "BY_ITSELF", rollback.BY_ITSELF - asleep)
    patch.setattr(rollback, "STOPPED", rollback.STOPPED | asleep)
