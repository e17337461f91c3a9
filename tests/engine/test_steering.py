"""Precopy: wishes while it runs, links that stall, deadlines, throttles, a peer that is away."""

from __future__ import annotations

import asyncio

import pytest

from migrd.core.convergence import FIXED_COST_S
from migrd.core.facts import QemuStatus
from migrd.core.migration import Policy, WhenNotConverging
from migrd.core.phases import Phase
from tests.fakes.road import Loss
from tests.fakes.virtual_time import now_s, until
from tests.fakes.wire import MIB
from tests.fakes.world import VM, Pair, running_pair


def never_converges(pair: Pair) -> None:
    pair.ground.wire.bandwidth_bytes_per_s = 100 * MIB
    pair.ground.load.dirty_bytes_per_s = 1000 * MIB
    pair.ground.load.working_set_bytes = 200 * MIB


@pytest.mark.parametrize(
    "phase", [Phase.PENDING, Phase.PREFLIGHT, Phase.PREPARING, Phase.PRECOPY, Phase.SWITCHOVER]
)
async def test_a_cancel_in_any_phase_before_the_grant_leaves_the_guest_where_it_is(
    phase: Phase,
) -> None:
    async with running_pair() as pair:
        if phase is Phase.SWITCHOVER:
            pair.ground.load.device_s = 1.0
        else:
            never_converges(pair)
        migration_id = await pair.ask()
        if phase is not Phase.PENDING:
            await pair.until_phase(migration_id, phase)
        answer = await pair.alpha.service.cancel(migration_id, by="op")
        assert answer.admission == "queued"
        again = await pair.alpha.service.cancel(migration_id, by="op")
        assert again.admission == "already_so"
        asked_s = now_s()
        view = await pair.until_over(migration_id)
        assert view.phase == Phase.CANCELLED
        assert view.cause is not None
        assert "op" in view.cause.message
        assert now_s() - asked_s < 5.0
        assert pair.running_on() == "alpha"
        await pair.migrates_again()


async def test_a_cancel_after_the_grant_is_denied_and_the_migration_goes_on() -> None:
    async with running_pair() as pair:
        pair.road.faults = lambda caller, callee, call: (
            Loss.REQUEST_LOST if call == "grant" else None
        )
        migration_id = await pair.ask()
        await pair.until_phase(migration_id, Phase.GRANTED)
        answer = await pair.alpha.service.cancel(migration_id, by="op")
        assert (answer.admission, answer.reason) == ("denied", "past_point_of_no_return")
        pair.road.heal()
        assert (await pair.until_over(migration_id)).phase == Phase.SUCCEEDED


async def test_a_cancel_that_hangs_behind_a_stalled_multifd_link_is_finished_by_a_yank() -> None:
    async with running_pair() as pair:
        never_converges(pair)
        migration_id = await pair.ask(multifd_channels=2)
        await pair.until_phase(migration_id, Phase.PRECOPY)
        await until(lambda: pair.hosts["alpha"].qemu(VM).status is QemuStatus.ACTIVE)
        pair.ground.wire.freeze()
        await pair.alpha.service.cancel(migration_id, by="op")
        view = await pair.until_over(migration_id)
        assert view.phase == Phase.CANCELLED
        assert "vmm.free_stalled" in pair.alpha.gate.calls
        assert pair.running_on() == "alpha"
        await until(lambda: not pair.hosts["beta"].living(VM), what="it noticed nothing itself")
        await pair.migrates_again()


async def test_a_link_that_stalls_is_said_so_after_a_second_and_given_up_in_the_end() -> None:
    async with running_pair() as pair:
        never_converges(pair)
        migration_id = await pair.ask()
        await pair.until_phase(migration_id, Phase.PRECOPY)
        await asyncio.sleep(1.0)
        pair.ground.wire.freeze()
        frozen_s = now_s()
        await until(
            lambda: "LinkStalled" in {c.type for c in pair.view(migration_id).conditions},
            within_s=2.0,
        )
        assert pair.view(migration_id).progress.stalled_s is not None
        view = await pair.until_over(migration_id)
        assert (view.phase, view.cause and view.cause.code) == (Phase.ROLLED_BACK, "link_stalled")
        assert 9.0 < now_s() - frozen_s < 15.0
        assert len(pair.guest().runs) == 1, "it ran all the time"
        await pair.migrates_again()


async def test_a_short_stall_is_waited_out() -> None:
    async with running_pair() as pair:
        pair.ground.wire.bandwidth_bytes_per_s = 100 * MIB
        migration_id = await pair.ask()
        await pair.until_phase(migration_id, Phase.PRECOPY)
        await asyncio.sleep(0.3)
        pair.ground.wire.freeze()
        await asyncio.sleep(4.0)
        pair.ground.wire.heal()
        view = await pair.until_over(migration_id)
        assert view.phase == Phase.SUCCEEDED
        assert view.conditions == ()


async def test_a_link_that_is_cut_in_precopy_is_told_in_qemus_words() -> None:
    async with running_pair() as pair:
        never_converges(pair)
        migration_id = await pair.ask()
        await pair.until_phase(migration_id, Phase.PRECOPY)
        await until(lambda: pair.hosts["beta"].qemu(VM).status is QemuStatus.ACTIVE)
        pair.ground.wire.cut()
        view = await pair.until_over(migration_id)
        assert (view.phase, view.cause and view.cause.code) == (
            Phase.ROLLED_BACK,
            "transfer_failed",
        )
        assert view.cause is not None
        assert "Connection reset" in view.cause.message
        await pair.migrates_again()


async def test_a_stall_after_migrate_continue_is_freed_within_its_deadline() -> None:
    """The guest stands still, and no in-band command is answered: only the yank is."""
    async with running_pair() as pair:
        pair.ground.load.device_s = 0.05
        migration_id = await pair.ask()
        await pair.until_phase(migration_id, Phase.SWITCHOVER)
        pair.ground.wire.freeze()
        view = await pair.until_over(migration_id)
        assert (view.phase, view.cause and view.cause.code) == (
            Phase.ROLLED_BACK,
            "switchover_timed_out",
        )
        assert pair.running_on() == "alpha"
        deadline_s = pair.alpha.options.switchover_s(0.3)
        assert pair.guest().blackouts_s[0] < deadline_s + 1.0, "I10"
        await pair.migrates_again()


async def test_a_lost_acknowledgement_does_not_run_the_guest_twice() -> None:
    async with running_pair() as pair:
        pair.ground.wire.swallows_ack = True
        view = await pair.migrate()
        assert view.phase == Phase.ROLLED_BACK
        assert pair.running_on() == "alpha"
        await pair.migrates_again()


async def test_the_deadline_ends_a_migration_that_does_not_converge() -> None:
    async with running_pair() as pair:
        never_converges(pair)
        view = await pair.migrate(policy=Policy(deadline_s=30.0))
        assert (view.phase, view.cause and view.cause.code) == (Phase.ROLLED_BACK, "deadline")
        assert view.total_s == pytest.approx(30.0, abs=2.0)
        assert view.next_step is not None
        await pair.migrates_again()


async def test_give_up_does_not_wait_for_the_deadline() -> None:
    async with running_pair() as pair:
        never_converges(pair)
        policy = Policy(when_not_converging=WhenNotConverging.GIVE_UP)
        view = await pair.migrate(policy=policy)
        assert (view.phase, view.cause and view.cause.code) == (Phase.ROLLED_BACK, "not_converging")
        decisions = await pair.alpha.service.decisions(view.id)
        assert decisions[-1].verdict == "give_up"
        assert decisions[-1].estimate.converges is False


async def test_a_throttle_is_raised_until_it_fits_and_taken_back_afterwards() -> None:
    async with running_pair() as pair:
        never_converges(pair)
        source = pair.hosts["alpha"].qemu(VM)
        policy = Policy(when_not_converging=WhenNotConverging.THROTTLE, max_throttle_percent=97)
        migration_id = await pair.ask(policy=policy)
        seen: list[int] = []

        async def watch() -> None:
            while True:
                seen.append(source.limits.throttle_percent)
                await asyncio.sleep(0.1)

        watching = asyncio.create_task(watch())
        view = await pair.until_over(migration_id)
        watching.cancel()
        await asyncio.wait([watching])
        assert view.phase == Phase.SUCCEEDED
        assert seen == sorted(seen), "never slower and faster again"
        assert 80 <= max(seen) <= 97
        decisions = await pair.alpha.service.decisions(migration_id)
        assert [d.throttle_percent for d in decisions if d.verdict == "throttle"]


async def test_a_guest_that_was_throttled_in_vain_gets_its_speed_back() -> None:
    async with running_pair() as pair:
        never_converges(pair)
        policy = Policy(
            when_not_converging=WhenNotConverging.THROTTLE, max_throttle_percent=30, deadline_s=60.0
        )
        view = await pair.migrate(policy=policy)
        assert (view.phase, view.cause and view.cause.code) == (Phase.ROLLED_BACK, "deadline")
        assert pair.hosts["alpha"].qemu(VM).limits.throttle_percent == 0
        assert max(view.progress.throttle_percent, 30) == 30


async def test_a_policy_changed_while_it_runs_takes_effect() -> None:
    async with running_pair() as pair:
        never_converges(pair)
        migration_id = await pair.ask()
        await pair.until_phase(migration_id, Phase.PRECOPY)
        await asyncio.sleep(8.0)
        wider = Policy(downtime_limit_s=5.0, max_bandwidth_bytes_per_s=50 * MIB)
        answer = await pair.alpha.service.change_policy(migration_id, wider, by="op")
        assert answer.admission == "queued"
        limits = pair.hosts["alpha"].qemu(VM).limits
        await until(lambda: limits.max_bandwidth_bytes_per_s == 50 * MIB, within_s=1.5)
        assert limits.downtime_limit_s == pytest.approx(5.0 - FIXED_COST_S)
        view = await pair.until_over(migration_id)
        assert view.phase == Phase.SUCCEEDED
        assert view.policy == wider


async def test_a_changed_policy_is_durable() -> None:
    async with running_pair() as pair:
        never_converges(pair)
        migration_id = await pair.ask()
        await pair.until_phase(migration_id, Phase.PRECOPY)
        policy = Policy(when_not_converging=WhenNotConverging.GIVE_UP)
        await pair.alpha.service.change_policy(migration_id, policy, by="op")
        await until(lambda: pair.view(migration_id).policy == policy)
        await pair.restart("alpha")
        assert pair.view(migration_id).policy == policy
        view = await pair.until_over(migration_id)
        assert view.cause is not None
        assert view.cause.code == "not_converging"


async def test_a_forced_switchover_happens_now_and_survives_a_restart() -> None:
    async with running_pair() as pair:
        never_converges(pair)
        migration_id = await pair.ask()
        await pair.until_phase(migration_id, Phase.PRECOPY)
        await asyncio.sleep(4.0)
        answer = await pair.alpha.service.switch_over(migration_id, by="op")
        assert answer.admission == "queued"
        await until(lambda: pair.engine_state(migration_id).switchover_forced)
        again = await pair.alpha.service.switch_over(migration_id, by="op")
        assert again.admission == "already_so"
        await pair.restart("alpha")
        view = await pair.until_over(migration_id)
        assert view.phase == Phase.SUCCEEDED
        decisions = await pair.alpha.service.decisions(migration_id)
        assert "forced" in {d.reason for d in decisions}


async def test_the_guest_is_not_stopped_while_the_destinations_daemon_is_away() -> None:
    async with running_pair() as pair:
        pair.ground.wire.bandwidth_bytes_per_s = 100 * MIB
        migration_id = await pair.ask()
        await pair.until_phase(migration_id, Phase.PRECOPY)
        await pair.kill("beta")
        await asyncio.sleep(60.0)
        assert pair.stands(migration_id)[0] == Phase.PRECOPY
        assert len(pair.guest().runs) == 1
        types = {c.type for c in pair.view(migration_id).conditions}
        assert "DestinationUnreachable" in types
        await pair.start("beta")
        view = await pair.until_over(migration_id)
        assert view.phase == Phase.SUCCEEDED
        assert view.conditions == ()


async def test_an_idle_guest_that_cannot_be_held_is_brought_back_at_once() -> None:
    """Nothing is left to be sent, so QEMU goes on to the switchover whatever its limits say."""
    async with running_pair() as pair:
        pair.ground.load.dirty_bytes_per_s = 0
        pair.ground.load.memory_bytes = 4 * MIB  # sent even at the pace of a held round
        migration_id = await pair.ask()
        await pair.until_phase(migration_id, Phase.PRECOPY)
        await pair.kill("beta")
        view = await pair.until_over(migration_id)
        assert view.phase == Phase.ROLLED_BACK, view.cause
        assert pair.guest().blackouts_s[0] < 3.0
        await pair.start("beta")
        await pair.migrates_again()


async def test_a_transfer_cancelled_on_qemus_monitor_by_somebody_else_is_told_as_that() -> None:
    async with running_pair() as pair:
        never_converges(pair)
        migration_id = await pair.ask()
        await pair.until_phase(migration_id, Phase.PRECOPY)
        source = pair.hosts["alpha"].qemu(VM)
        await until(lambda: source.status is QemuStatus.ACTIVE)
        assert source.transfer is not None
        source.transfer.cancel()
        view = await pair.until_over(migration_id)
        assert (view.phase, view.cause and view.cause.code) == (
            Phase.ROLLED_BACK,
            "cancelled_outside",
        )
