"""A daemon killed in precopy goes on steering as the one before it did: nothing of what a client
asked for, or of what was measured and decided, is forgotten, and no clock starts anew."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace

import pytest

from migrd.core.convergence import FIXED_COST_S, Decision
from migrd.core.deadline import GRACE_S
from migrd.core.facts import QemuStatus, Round
from migrd.core.migration import Mode, Policy, WhenNotConverging
from migrd.core.phases import Phase
from migrd.engine.limits import AT_ONCE_S
from migrd.engine.outgoing_record import KEEP_EVERY_S
from tests.engine.test_steering import never_converges
from tests.fakes.virtual_time import now_s, until
from tests.fakes.wire import MIB
from tests.fakes.world import VM, Pair, running_pair

THROTTLING = Policy(
    when_not_converging=WhenNotConverging.THROTTLE, max_throttle_percent=40, deadline_s=900.0
)
WAITING = Policy(deadline_s=900.0)


@dataclass(frozen=True)
class Steered:
    """All that decides what a daemon does next in precopy."""

    policy: Policy
    mode: Mode
    forced: bool
    throttle_percent: int
    deadline_at_s: float
    rounds: tuple[Round, ...]
    decisions: tuple[Decision, ...]


def steered(pair: Pair, migration_id: str) -> Steered:
    m = pair.alpha.engine.migrations.outgoing[migration_id]
    return Steered(
        m.state.policy,
        m.state.mode,
        m.state.switchover_forced,
        m.throttle_percent,
        m.deadline_at_s,
        tuple(m.rounds),
        tuple(m.decisions),
    )


async def until_kept() -> None:
    """What is only observed is written within a second."""
    await asyncio.sleep(KEEP_EVERY_S + 0.1)


@pytest.mark.parametrize("after_s", [0.05, 2.0, 11.0, 40.0])
@pytest.mark.parametrize("policy", [WAITING, THROTTLING], ids=["wait", "throttle"])
async def test_rounds_decisions_throttle_and_limits_are_what_they_were(
    policy: Policy, after_s: float
) -> None:
    async with running_pair() as pair:
        never_converges(pair)
        migration_id = await pair.ask(policy=policy)
        await pair.until_phase(migration_id, Phase.PRECOPY)
        await asyncio.sleep(after_s)
        await until_kept()
        before = steered(pair, migration_id)
        limits = replace(pair.hosts["alpha"].qemu(VM).limits)
        await pair.restart("alpha")
        await asyncio.sleep(0.1)  # it has looked at QEMU
        after = steered(pair, migration_id)
        assert after.rounds[: len(before.rounds)] == before.rounds
        assert after.decisions[: len(before.decisions)] == before.decisions
        gists = [(d.verdict, d.reason, d.round_number, d.throttle_percent) for d in after.decisions]
        assert len(gists) == len(set(gists)), "no decision twice"
        for name in ("policy", "mode", "forced", "throttle_percent", "deadline_at_s"):
            assert getattr(after, name) == getattr(before, name), name
        limit_s = policy.downtime_limit_s - FIXED_COST_S  # said anew, as after any change of it
        assert pair.hosts["alpha"].qemu(VM).limits == replace(limits, downtime_limit_s=limit_s)
        assert pair.view(migration_id).estimate is not None or not before.rounds


async def test_what_was_measured_since_it_was_last_kept_is_all_that_is_lost() -> None:
    async with running_pair() as pair:
        never_converges(pair)
        migration_id = await pair.ask(policy=WAITING)
        await pair.until_phase(migration_id, Phase.PRECOPY)
        await asyncio.sleep(20.3)
        before, killed_s = steered(pair, migration_id), now_s()
        await pair.restart("alpha")
        kept = steered(pair, migration_id).rounds
        assert kept == before.rounds[: len(kept)]
        assert all(r.at_s > killed_s - KEEP_EVERY_S - 0.2 for r in before.rounds[len(kept) :])


@pytest.mark.parametrize("megabytes", [90, 80, 70])
async def test_a_change_of_the_policy_is_kept_and_told_to_qemu_again(megabytes: int) -> None:
    async with running_pair() as pair:
        never_converges(pair)
        migration_id = await pair.ask(policy=WAITING)
        await pair.until_phase(migration_id, Phase.PRECOPY)
        policy = Policy(
            downtime_limit_s=0.2, max_bandwidth_bytes_per_s=megabytes * MIB, deadline_s=700.0
        )
        await pair.alpha.service.change_policy(migration_id, policy, by="op")
        await until(lambda: pair.view(migration_id).policy == policy)
        await pair.kill("alpha")
        limits = pair.hosts["alpha"].qemu(VM).limits
        limits.downtime_limit_s, limits.max_bandwidth_bytes_per_s = 0.001, 1
        await pair.start("alpha")
        await until(lambda: limits.max_bandwidth_bytes_per_s == megabytes * MIB)
        assert limits.downtime_limit_s == pytest.approx(0.2 - FIXED_COST_S)
        assert steered(pair, migration_id).policy == policy


async def test_a_throttle_that_was_decided_and_not_said_is_said_and_never_lowered() -> None:
    """QEMU shows none while the rounds show what it was decided on."""
    async with running_pair() as pair:
        never_converges(pair)
        migration_id = await pair.ask(policy=THROTTLING)
        await pair.until_phase(migration_id, Phase.PRECOPY)
        await until(lambda: steered(pair, migration_id).throttle_percent > 0)
        await until_kept()
        decided = steered(pair, migration_id).throttle_percent
        await pair.kill("alpha")
        limits = pair.hosts["alpha"].qemu(VM).limits
        limits.throttle_percent = 0
        await pair.start("alpha")
        await until(lambda: limits.throttle_percent == decided, within_s=1.0)
        await asyncio.sleep(30.0)
        assert steered(pair, migration_id).throttle_percent >= decided


async def test_a_forced_switchover_is_told_to_qemu_again() -> None:
    async with running_pair() as pair:
        never_converges(pair)
        migration_id = await pair.ask(policy=WAITING)
        await pair.until_phase(migration_id, Phase.PRECOPY)
        await asyncio.sleep(3.0)
        pair.ground.wire.freeze()
        await pair.alpha.service.switch_over(migration_id, by="op")
        await until(lambda: steered(pair, migration_id).forced)
        await pair.kill("alpha")
        limits = pair.hosts["alpha"].qemu(VM).limits
        limits.downtime_limit_s = 0.001
        await pair.start("alpha")
        await until(lambda: limits.downtime_limit_s == AT_ONCE_S, within_s=1.0)
        pair.ground.wire.heal()
        assert (await pair.until_over(migration_id)).phase == Phase.SUCCEEDED


async def test_a_wish_for_postcopy_that_qemu_did_not_hear_is_said_again() -> None:
    async with running_pair() as pair:
        never_converges(pair)
        policy = Policy(when_not_converging=WhenNotConverging.POSTCOPY, deadline_s=900.0)
        pair.ground.wire.bandwidth_bytes_per_s = 20 * MIB
        migration_id = await pair.ask(policy=policy)
        await until(lambda: pair.engine_state(migration_id).mode is Mode.POSTCOPY, within_s=300.0)
        pair.alpha.gate.crash()  # before start_postcopy is said
        await pair.restart("alpha")
        view = await pair.until_over(migration_id)
        assert (view.phase, view.mode) == (Phase.SUCCEEDED, Mode.POSTCOPY)


# Clocks -----------------------------------------------------------------------------------------


async def test_a_deadline_that_was_not_over_counts_on() -> None:
    async with running_pair() as pair:
        never_converges(pair)
        migration_id = await pair.ask(policy=Policy(deadline_s=100.0))
        asked_s = now_s()
        await pair.until_phase(migration_id, Phase.PRECOPY)
        for _ in range(4):
            await asyncio.sleep(10.0)
            await pair.restart("alpha")
        view = await pair.until_over(migration_id)
        assert (view.phase, view.cause and view.cause.code) == (Phase.ROLLED_BACK, "deadline")
        assert now_s() - asked_s == pytest.approx(100.0, abs=2.0)


async def test_a_migration_that_can_end_is_not_ended_because_nobody_was_there() -> None:
    """The guest has calmed down while the daemon was away, and the deadline has passed."""
    async with running_pair(receive_idle_s=10_000.0) as pair:
        never_converges(pair)
        migration_id = await pair.ask(policy=Policy(deadline_s=100.0))
        await pair.until_phase(migration_id, Phase.PRECOPY)
        await asyncio.sleep(5.0)
        await pair.kill("alpha")
        qemu = pair.hosts["alpha"].qemu(VM)
        qemu.limits.downtime_limit_s = 0.0001  # so that it has not begun by itself
        await asyncio.sleep(3600.0)
        assert qemu.status is QemuStatus.ACTIVE
        await pair.start("alpha")
        pair.ground.calm()
        view = await pair.until_over(migration_id)
        assert view.phase == Phase.SUCCEEDED, view.cause


async def test_a_long_absence_gives_what_was_left_and_no_more_than_the_grace() -> None:
    async with running_pair(receive_idle_s=10_000.0) as pair:
        never_converges(pair)
        migration_id = await pair.ask(policy=Policy(deadline_s=100.0))
        await pair.until_phase(migration_id, Phase.PRECOPY)
        await asyncio.sleep(5.0)
        await pair.kill("alpha")
        await asyncio.sleep(3600.0)
        await pair.start("alpha")
        back_s = now_s()
        view = await pair.until_over(migration_id)
        assert (view.phase, view.cause and view.cause.code) == (Phase.ROLLED_BACK, "deadline")
        assert now_s() - back_s == pytest.approx(GRACE_S, abs=2.0)


async def test_a_daemon_that_dies_again_and_again_does_not_put_the_deadline_off() -> None:
    async with running_pair() as pair:
        never_converges(pair)
        migration_id = await pair.ask(policy=Policy(deadline_s=60.0))
        asked_s = now_s()
        await pair.until_phase(migration_id, Phase.PRECOPY)
        while not pair.stands(migration_id)[1] and now_s() - asked_s < 300.0:
            await asyncio.sleep(5.0)
            await pair.restart("alpha")
            await asyncio.sleep(0.5)
        assert pair.view(migration_id).phase == Phase.ROLLED_BACK
        assert now_s() - asked_s < 75.0


async def test_a_stall_is_timed_from_the_first_look_and_not_from_before_the_absence() -> None:
    async with running_pair(receive_idle_s=10_000.0) as pair:
        never_converges(pair)
        migration_id = await pair.ask(policy=Policy(deadline_s=90_000.0))
        await pair.until_phase(migration_id, Phase.PRECOPY)
        await asyncio.sleep(2.0)
        await pair.kill("alpha")
        pair.ground.wire.freeze()
        await asyncio.sleep(600.0)
        await pair.start("alpha")
        back_s = now_s()
        await asyncio.sleep(5.0)
        assert pair.stands(migration_id)[0] == Phase.PRECOPY, "not given up at once"
        view = await pair.until_over(migration_id)
        assert (view.phase, view.cause and view.cause.code) == (Phase.ROLLED_BACK, "link_stalled")
        assert 9.0 < now_s() - back_s < 16.0
        pair.ground.calm()
        await pair.migrates_again()
