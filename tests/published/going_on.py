"""Published failures of a migration that goes on, or should end: checks and their plants.

Restarts, deadlines, cancels, convergence, postcopy, how many at once.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import MappingProxyType

import pytest

from migrd.core import convergence, phases
from migrd.core.convergence import Decision, Estimate, Situation, Verdict
from migrd.core.migration import Cause, MigrationEvent, Policy, WhenNotConverging
from migrd.core.phases import Instruction, Phase, Trigger
from migrd.engine import granting, migrations, outgoing, precopy, recover_postcopy, switchover
from migrd.engine.absent import AbsentVmm
from migrd.engine.limits import Limits
from migrd.engine.outgoing import Outgoing
from migrd.engine.prepare import prepare_destination
from migrd.errors import PeerTimedOut, PeerUnreachable, VmmUnreachable
from tests.core.test_convergence import judged, round_
from tests.engine.test_postcopy import moving
from tests.engine.test_steering import never_converges
from tests.fakes.road import Loss
from tests.fakes.virtual_time import until
from tests.fakes.world import VM, Pair
from tests.published.handover import copying, step_is
from tests.published.row import alone, losing, on_a_pair

# A daemon that begins anew ------------------------------------------------------------------------


@on_a_pair()
async def what_a_new_daemon_does_not_find_at_once_is_not_dead(pair: Pair) -> None:
    await pair.migrate()
    await pair.settle()
    host = pair.hosts["beta"]
    there, host.qemus = host.qemus, []  # its monitors cannot be reached yet
    await pair.restart("beta")
    state = pair.beta.service.vm(VM).state
    await pair.beta.service.start_vm(VM)
    host.qemus += there
    alone(pair)
    assert state == "unreachable"
    assert pair.running_on() == "beta"


def what_is_not_found_is_dead(patch: pytest.MonkeyPatch) -> None:
    def dead(self: AbsentVmm, vm: str, instance: str, *, is_dead: bool = False) -> None:
        self.vm, self.instance, self.is_dead = vm, instance, True

    patch.setattr(AbsentVmm, "__init__", dead)


@on_a_pair()
async def a_monitor_that_cannot_be_reached_is_no_dead_guest(pair: Pair) -> None:
    migration_id = await copying(pair)
    vmm = pair.alpha.launcher.handle(VM)
    vmm.is_connected = False
    await pair.alpha.service.change_policy(migration_id, Policy(downtime_limit_s=1.0), by="op")
    await asyncio.sleep(3.0)
    vmm.is_connected = True
    view = await pair.until_over(migration_id)
    assert view.phase == Phase.ROLLED_BACK, f"it runs, and is said to be {view.phase}"
    assert pair.running_on() == "alpha"


def who_is_not_reached_is_gone(patch: pytest.MonkeyPatch) -> None:
    after = Outgoing._after_error

    def naive(self: Outgoing, exc: Exception) -> MigrationEvent | None:
        if isinstance(exc, VmmUnreachable):
            return self.event(Trigger.GUEST_DIED, cause=Cause("vmm_died", "no such domain"))
        return after(self, exc)

    patch.setattr(Outgoing, "_after_error", naive)


# No phase without an exit -------------------------------------------------------------------------


@on_a_pair()
async def a_destination_that_fails_after_the_copy_calls_a_person_and_goes_on(pair: Pair) -> None:
    pair.road.faults = losing("grant", Loss.UNREACHABLE)
    migration_id = await pair.ask()
    await pair.until_phase(migration_id, Phase.GRANTED)
    await pair.kill("beta")
    said = lambda: pair.stands(migration_id)[0] == Phase.NEEDS_OPERATOR  # noqa: E731 - named
    await until(said, within_s=60.0, what="a person is called")
    assert "beta" in (pair.view(migration_id).next_step or "")
    pair.road.heal()
    await pair.start("beta")
    assert (await pair.until_over(migration_id)).phase == Phase.SUCCEEDED


def the_answer_is_waited_for_without_end(patch: pytest.MonkeyPatch) -> None:
    async def hang(m: Outgoing) -> MigrationEvent:
        return await granting.ask_until_answered(m)

    step_is(patch, Instruction.OBTAIN_ANSWER, hang)


async def preparing_for_nobody(pair: Pair) -> str:
    """A migration whose destination's daemon was killed while it got ready."""
    migration_id = await pair.ask()
    await pair.until_phase(migration_id, Phase.PREPARING)
    await pair.kill("beta")
    return migration_id


@on_a_pair(prepare_deadline_s=20.0)
async def getting_ready_has_a_deadline(pair: Pair) -> None:
    migration_id = await preparing_for_nobody(pair)
    view = await pair.until_over(migration_id, within_s=60.0)
    assert view.phase == Phase.ROLLED_BACK, view.cause
    assert pair.running_on() == "alpha"


def getting_ready_takes_its_time(patch: pytest.MonkeyPatch) -> None:
    async def patient(m: Outgoing) -> MigrationEvent:
        await m.vmm.prepare_outgoing(m.settings(), m.world.options.tls)
        while True:
            try:
                view = await m.peer.prepare(m.id, m.state.epoch, m.spec_there(), m.settings())
            except (PeerUnreachable, PeerTimedOut):
                await asyncio.sleep(1.0)
            else:
                return m.event(Trigger.DESTINATION_PREPARED, address=view.address)

    step_is(patch, Instruction.PREPARE_DESTINATION, patient)


@on_a_pair(prepare_deadline_s=10.0)
async def a_destination_that_cannot_get_ready_costs_the_guest_nothing(pair: Pair) -> None:
    view = await pair.until_over(await preparing_for_nobody(pair))
    assert pair.running_on() == "alpha", "stopped, because it could not be moved"
    assert len(pair.guest().runs) == 1
    assert view.phase == Phase.ROLLED_BACK, view.cause


def who_cannot_be_moved_is_stopped(patch: pytest.MonkeyPatch) -> None:
    async def fatal(m: Outgoing) -> MigrationEvent:
        event = await prepare_destination(m)
        if event.trigger is Trigger.STEP_FAILED:
            await m.vmm.quit()
        return event

    step_is(patch, Instruction.PREPARE_DESTINATION, fatal)


# Cancelling ---------------------------------------------------------------------------------------


@on_a_pair()
async def a_cancel_before_anything_is_copied_is_heard(pair: Pair) -> None:
    migration_id = await preparing_for_nobody(pair)
    answer = await pair.alpha.service.cancel(migration_id, by="op")
    assert answer.admission == "queued"
    view = await pair.until_over(migration_id, within_s=5.0)
    assert view.phase == Phase.CANCELLED, view.cause


def only_what_copies_can_be_cancelled(patch: pytest.MonkeyPatch) -> None:
    table = dict(phases.TRANSITIONS)
    row = dict(table[Phase.PREPARING])
    del row[Trigger.CANCEL_REQUESTED]
    table[Phase.PREPARING] = row
    for module in (phases, outgoing):
        patch.setattr(module, "TRANSITIONS", MappingProxyType(table))


# Convergence --------------------------------------------------------------------------------------

STRESSED = Policy(
    when_not_converging=WhenNotConverging.THROTTLE, max_throttle_percent=97, deadline_s=60.0
)


@on_a_pair()
async def a_guest_under_stress_is_slowed_until_it_can_move(pair: Pair) -> None:
    never_converges(pair)
    view = await pair.migrate(policy=STRESSED)
    assert view.phase == Phase.SUCCEEDED, view.cause


def nobody_is_slowed(patch: pytest.MonkeyPatch) -> None:
    def never(guess: Estimate, situation: Situation) -> int:
        return situation.throttle_percent

    patch.setattr(convergence, "throttle_for", never)


@on_a_pair()
async def the_deadline_that_was_asked_for_is_kept(pair: Pair) -> None:
    never_converges(pair)
    migration_id = await pair.ask(policy=Policy(deadline_s=30.0))
    view = await pair.until_over(migration_id, within_s=60.0)
    assert (view.phase, view.cause and view.cause.code) == (Phase.ROLLED_BACK, "deadline")
    assert len(pair.guest().runs) == 1, "it ran all the time"


def the_deadline_is_not_looked_at(patch: pytest.MonkeyPatch) -> None:
    def timeless(situation: Situation) -> Decision:
        return convergence.decide(replace(situation, deadline_at_s=float("inf")))

    patch.setattr(precopy, "decide", timeless)


def a_switchover_counts_what_is_not_memory() -> None:
    limit = Policy(downtime_limit_s=0.3)
    decision = judged([round_(1, 29.0, sent_mib=100.0)], limit)
    assert decision.verdict is not Verdict.SWITCH_OVER, decision.message


def a_switchover_costs_nothing_but_its_bytes(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(convergence, "FIXED_COST_S", 0.0)


# A short cut --------------------------------------------------------------------------------------


@on_a_pair()
async def a_network_cut_of_five_seconds_is_waited_out(pair: Pair) -> None:
    migration_id = await copying(pair)
    pair.ground.wire.freeze()
    pair.road.part("alpha", "beta")
    await asyncio.sleep(5.0)
    pair.ground.calm()
    pair.road.heal()
    view = await pair.until_over(migration_id)
    alone(pair)
    assert view.phase == Phase.SUCCEEDED, view.cause
    assert [run.host for run in pair.guest().runs] == ["alpha", "beta"]


def who_is_not_heard_is_started_anew(patch: pytest.MonkeyPatch) -> None:
    async def health_check(self: Limits, condition: str, why: str) -> None:
        await self._m.vmm.quit()

    patch.setattr(Limits, "hold_for", health_check)


# Postcopy -----------------------------------------------------------------------------------------


@on_a_pair()
async def a_broken_postcopy_is_taken_up_again(pair: Pair) -> None:
    migration_id = await moving(pair)
    pair.ground.wire.cut()
    view = await pair.until_over(migration_id)
    alone(pair)
    assert view.phase == Phase.SUCCEEDED, view.cause


def a_pause_in_postcopy_is_the_end(patch: pytest.MonkeyPatch) -> None:
    async def fail(m: Outgoing, *, stalled: bool) -> bool:
        raise recover_postcopy._DestinationDied("postcopy failed")

    patch.setattr(recover_postcopy, "_recover", fail)


@on_a_pair()
async def a_guest_that_was_lost_in_postcopy_is_not_run_from_its_old_copy(pair: Pair) -> None:
    migration_id = await moving(pair)
    pair.hosts["beta"].qemu(VM).die("killed")
    view = await pair.until_over(migration_id, within_s=60.0)
    alone(pair)
    assert view.phase == Phase.GUEST_LOST, view.cause
    assert pair.running_on() is None


def a_failed_postcopy_resumes_its_source(patch: pytest.MonkeyPatch) -> None:
    async def resume(m: Outgoing) -> MigrationEvent | None:
        try:
            await recover_postcopy._until_completed(m)
        except recover_postcopy._DestinationDied as exc:
            await m.vmm.run_guest()
            return m.event(Trigger.GUEST_DIED, cause=Cause("vmm_died", str(exc)))
        return None

    patch.setattr(switchover, "finish_postcopy", resume)


# How many at once ---------------------------------------------------------------------------------


async def many(pair: Pair, count: int) -> list[str]:
    """So many VMs that all want to go at the same moment, and take long."""
    never_converges(pair)
    names = [VM, *(f"vm{number}" for number in range(2, count + 1))]
    for name in names[1:]:
        await pair.boot(name)
    return list(await asyncio.gather(*(pair.ask(name) for name in names)))


@on_a_pair(outgoing_slots=1, incoming_slots=4)
async def no_more_leave_at_once_than_are_allowed(pair: Pair) -> None:
    most = 0
    await many(pair, 3)
    for _ in range(200):
        most = max(most, len(pair.ground.wire.transfers))
        await asyncio.sleep(0.05)
    assert most == 1, f"{most} at once"


def only_what_copies_takes_a_slot(patch: pytest.MonkeyPatch) -> None:
    late = (Phase.PRECOPY, Phase.SWITCHOVER, Phase.GRANTED, Phase.COMPLETING)

    def lagging(self: migrations.Migrations) -> int:
        return sum(m.state.phase in late for m in self.outgoing.values())

    patch.setattr(migrations.Migrations, "outgoing_active", property(lagging))


@on_a_pair(outgoing_slots=2, incoming_slots=4)
async def a_limit_lowered_below_what_goes_on_starts_nothing(pair: Pair) -> None:
    ids = await many(pair, 4)
    await pair.until_phase(ids[1], Phase.PRECOPY)
    pair.options["alpha"] = replace(pair.options["alpha"], outgoing_slots=1)
    await pair.restart("alpha")
    await asyncio.sleep(5.0)
    waiting = [pair.stands(id_)[0] for id_ in ids[2:]]
    assert waiting == [Phase.PENDING] * 2, f"begun beyond the limit: {waiting}"


def free_slots_may_be_negative(patch: pytest.MonkeyPatch) -> None:
    def unguarded(self: migrations.Migrations) -> None:
        free = self.world.options.outgoing_slots - self.outgoing_active
        for m in self.pending[:free]:
            m.wish(m.event(Trigger.STARTED))

    patch.setattr(migrations.Migrations, "start_pending", unguarded)
