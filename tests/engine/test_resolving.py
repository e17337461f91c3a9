"""An operator's word: judged by what both sides answer, durable before it is carried out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from migrd.core.admission import Admission
from migrd.core.facts import QemuStatus
from migrd.core.phases import Phase
from migrd.engine.service import Answer, Resolution, ResolutionView
from migrd.errors import JournalError
from tests.engine.test_handover import granted, losing
from tests.fakes.gate import Fault, no_faults
from tests.fakes.road import Loss
from tests.fakes.virtual_time import until
from tests.fakes.world import VM, Pair, running_pair
from tests.sweep.scenarios import OnCall, the_destination_dies_as_it_starts

FENCED, RUNS, USE, LOST = (
    Resolution.DESTINATION_FENCED,
    Resolution.DESTINATION_RUNS,
    Resolution.USE_DESTINATION_COPY,
    Resolution.GUEST_LOST,
)


async def say(pair: Pair, id_: str, said: Resolution, on: str = "alpha") -> Answer:
    service = pair.daemons[on].service
    return await service.resolve(id_, said, evidence="seen dark", by="uid:0/root")


def words(pair: Pair, id_: str, on: str = "alpha") -> tuple[ResolutionView, ...]:
    return pair.view(id_, on).resolutions


async def unanswered(pair: Pair) -> str:
    """Granted, and beta's host silent: a person is called. Its QEMU is loaded, stopped."""
    migration_id = await granted(pair)
    await pair.until_phase(migration_id, Phase.NEEDS_OPERATOR)
    return migration_id


def power_off(pair: Pair, host: str) -> None:
    for qemu in pair.hosts[host].living(VM):
        qemu.die("power off")


async def test_the_record_says_who_when_why_and_what_could_be_seen() -> None:
    async with running_pair() as pair:
        id_ = await unanswered(pair)
        await pair.kill("beta")
        power_off(pair, "beta")
        assert (await say(pair, id_, FENCED)).admission is Admission.QUEUED
        await pair.until_over(id_)
        await pair.restart("alpha")
        (word,) = words(pair, id_)
        said, known = word.stored, word.stored.known
        assert (said.resolution, said.evidence) == ("destination_fenced", "seen dark")
        assert (said.by, said.host, said.role) == ("uid:0/root", "alpha", "source")
        assert (known.phase, known.cause) == ("needs_operator", "grant_unanswered")
        assert known.run_state == "postmigrate"
        assert known.pid == pair.hosts["alpha"].qemu(VM).pid
        assert (known.peer, known.peer_phase) == ("beta", None)
        assert "refused" in (known.peer_problem or ""), "beta's daemon is not there"
        assert word.carried_out_wall_s is not None
        assert word.carried_out_wall_s >= said.wall_s
        assert not word.is_pending


# Denied -------------------------------------------------------------------------------------------


async def denied(pair: Pair, id_: str, said: Resolution, on: str = "alpha") -> str:
    """The code; nothing was written, and nothing moved."""
    before, phase = len(words(pair, id_, on)), pair.stands(id_, on)[0]
    running = pair.running_on()
    answer = await say(pair, id_, said, on)
    assert answer.admission is Admission.DENIED, answer
    await asyncio.sleep(0.0)
    assert len(words(pair, id_, on)) == before
    assert pair.stands(id_, on)[0] == phase
    assert pair.running_on() == running
    return answer.reason


@pytest.mark.parametrize("said", [*Resolution])
async def test_no_word_counts_where_nobody_asked(said: Resolution) -> None:
    async with running_pair() as pair:
        view = await pair.migrate()
        assert await denied(pair, view.id, said) == "not_needs_operator"
        assert await denied(pair, view.id, said, on="beta") == "not_needs_operator"


async def test_a_destination_that_answers_that_it_runs_is_not_fenced_by_a_word() -> None:
    """The worst mistake there is: the guest would run twice."""
    async with running_pair() as pair:
        pair.road.faults = losing("grant", Loss.ANSWER_LOST)  # type: ignore[assignment]  # Faults
        id_ = await pair.ask()
        await pair.until_phase(id_, Phase.NEEDS_OPERATOR)
        assert pair.running_on() == "beta"
        assert await denied(pair, id_, FENCED) == "destination_ran"
        assert await denied(pair, id_, LOST) == "destination_runs"
        assert await denied(pair, id_, USE) == "source_not_dead"
        answer = await say(pair, id_, FENCED)
        assert answer.message == "migrd on beta answers: running: what is here is old"


async def test_a_destination_that_answers_with_a_living_copy_is_not_fenced_by_a_word() -> None:
    async with running_pair() as pair:
        id_ = await unanswered(pair)
        pair.road.heal()
        pair.road.faults = losing("grant", Loss.REQUEST_LOST)  # type: ignore[assignment]  # Faults
        assert await denied(pair, id_, FENCED) == "destination_lives"
        assert await denied(pair, id_, RUNS) == "destination_not_running"


async def test_a_destination_whose_vmm_died_as_it_started_is_judged_by_a_person() -> None:
    async with running_pair() as pair:
        id_ = await the_destination_dies_as_it_starts(pair)
        assert await denied(pair, id_, RUNS) == "destination_not_running"
        assert (await say(pair, id_, LOST)).admission is Admission.QUEUED
        assert (await pair.until_over(id_)).phase == Phase.GUEST_LOST
        assert words(pair, id_)[0].stored.known.peer_vmm_died is True


async def test_a_dead_source_cannot_take_the_guest_back() -> None:
    async with running_pair() as pair:
        id_ = await unanswered(pair)
        await pair.kill("beta")
        power_off(pair, "beta")
        power_off(pair, "alpha")
        assert await denied(pair, id_, FENCED) == "source_dead"
        assert (await say(pair, id_, LOST)).admission is Admission.QUEUED
        assert (await pair.until_over(id_)).phase == Phase.GUEST_LOST


async def test_a_copy_that_is_not_there_cannot_be_used() -> None:
    async with running_pair() as pair:
        pair.ground.wire.swallows_ack = True
        id_ = await pair.ask()
        await pair.until_phase(id_, Phase.SWITCHOVER)
        await until(lambda: pair.hosts["beta"].qemu(VM).status is QemuStatus.COMPLETED)
        await pair.kill("alpha")
        power_off(pair, "alpha")
        await pair.start("alpha")
        await pair.until_phase(id_, Phase.NEEDS_OPERATOR)
        assert await denied(pair, id_, FENCED) == "not_granted"
        assert await denied(pair, id_, RUNS) == "not_granted"
        pair.guest().may_end = True  # by the hand of this test
        pair.beta.engine.migrations.incoming[id_].want_refusal("no more")
        await until(lambda: pair.stands(id_, "beta")[0] == "refused")
        if pair.stands(id_)[0] == Phase.NEEDS_OPERATOR:
            assert await denied(pair, id_, USE) == "no_copy_there"
        assert (await pair.until_over(id_)).phase == Phase.GUEST_LOST


async def test_the_destination_hears_no_word_while_its_source_answers() -> None:
    async with running_pair(loaded_idle_s=30.0) as pair:
        id_ = await granted(pair)
        await pair.kill("alpha")
        power_off(pair, "alpha")
        await asyncio.sleep(120.0)
        assert await denied(pair, id_, RUNS, on="beta") == "not_the_source"
        assert await denied(pair, id_, FENCED, on="beta") == "not_the_source"
        pair.road.heal()
        pair.road.faults = losing("grant", Loss.REQUEST_LOST)  # type: ignore[assignment]  # Faults
        await pair.start("alpha")
        if pair.stands(id_, "beta")[0] == "loaded":
            answer = await say(pair, id_, USE, on="beta")
            assert answer.admission is Admission.DENIED
            assert answer.reason in ("source_answers", "not_needs_operator")
        pair.road.faults = lambda *_: None
        assert (await pair.until_over(id_)).phase in (Phase.SUCCEEDED, Phase.GUEST_LOST)


# Said again ---------------------------------------------------------------------------------------


async def test_the_same_word_again_is_carried_out_once() -> None:
    async with running_pair() as pair:
        id_ = await unanswered(pair)
        await pair.kill("beta")
        power_off(pair, "beta")
        first, second = await asyncio.gather(say(pair, id_, FENCED), say(pair, id_, FENCED))
        assert {first.admission, second.admission} == {Admission.QUEUED, Admission.ALREADY_SO}
        assert (await pair.until_over(id_)).phase == Phase.ROLLED_BACK
        assert (await say(pair, id_, FENCED)).admission is Admission.ALREADY_SO
        await pair.restart("alpha")
        assert (await say(pair, id_, FENCED)).admission is Admission.ALREADY_SO
        assert (await say(pair, id_, LOST)).reason == "not_needs_operator"
        assert len(words(pair, id_)) == 1
        assert pair.running_on() == "alpha"


# Durable first ------------------------------------------------------------------------------------

Scene = tuple[Resolution, str, str | None]
"""A word to the source, the phase it leads to, and where the guest runs then."""


async def _fenced(pair: Pair) -> str:
    id_ = await unanswered(pair)
    await pair.kill("beta")
    power_off(pair, "beta")
    return id_


async def _runs(pair: Pair) -> str:
    """It runs on beta, whose daemon is dead; a person has looked."""
    pair.plans["beta"] = OnCall("vmm.run_guest", Fault(after_effect=True))
    await pair.restart("beta")
    id_ = await pair.ask()
    await until(lambda: pair.beta.gate.is_dead, what="beta's daemon is killed at cont")
    await pair.kill("beta")
    await pair.until_phase(id_, Phase.NEEDS_OPERATOR)
    return id_


async def _copy(pair: Pair) -> str:
    """Alpha's QEMU died unwatched; beta holds a whole copy."""
    pair.ground.wire.swallows_ack = True
    id_ = await pair.ask()
    await pair.until_phase(id_, Phase.SWITCHOVER)
    await until(lambda: pair.hosts["beta"].qemu(VM).status is QemuStatus.COMPLETED)
    await pair.kill("alpha")
    power_off(pair, "alpha")
    await pair.start("alpha")
    await pair.until_phase(id_, Phase.NEEDS_OPERATOR)
    return id_


async def _lost(pair: Pair) -> str:
    id_ = await _fenced(pair)
    pair.guest().may_end = True
    return id_


SCENES = [
    pytest.param(FENCED, _fenced, Phase.ROLLED_BACK, "alpha", id="destination_fenced"),
    pytest.param(RUNS, _runs, Phase.SUCCEEDED, "beta", id="destination_runs"),
    pytest.param(USE, _copy, Phase.SUCCEEDED, "beta", id="use_destination_copy"),
    pytest.param(LOST, _lost, Phase.GUEST_LOST, None, id="guest_lost"),
]


@pytest.mark.parametrize(("said", "scene", "phase", "runs_on"), SCENES)
async def test_a_daemon_killed_between_the_record_and_the_act_carries_the_word_out_when_back(
    said: Resolution, scene: Callable[..., object], phase: Phase, runs_on: str | None
) -> None:
    async with running_pair() as pair:
        id_ = await scene(pair)  # type: ignore[misc]  # a coroutine function
        pair.alpha.gate.plan = OnCall("journal.add_resolution", Fault(after_effect=True))
        asking = asyncio.create_task(say(pair, id_, said))
        await until(lambda: pair.alpha.gate.is_dead, what="killed behind the record")
        asking.cancel()
        await asyncio.wait([asking])
        await pair.restart("alpha")
        assert (await pair.until_over(id_)).phase == phase
        (word,) = words(pair, id_)
        assert word.carried_out_wall_s is not None
        assert pair.running_on() == runs_on


@pytest.mark.parametrize(("said", "scene", "phase", "runs_on"), SCENES)
async def test_a_word_that_cannot_be_written_down_is_not_carried_out(
    said: Resolution, scene: Callable[..., object], phase: Phase, runs_on: str | None
) -> None:
    async with running_pair() as pair:
        id_ = await scene(pair)  # type: ignore[misc]  # a coroutine function
        before = pair.running_on()
        pair.alpha.journal.is_full = True
        with pytest.raises(JournalError):
            await say(pair, id_, said)
        await asyncio.sleep(30.0)
        assert pair.stands(id_)[0] == Phase.NEEDS_OPERATOR
        assert (words(pair, id_), pair.running_on()) == ((), before)
        pair.alpha.journal.is_full = False
        assert (await say(pair, id_, said)).admission is Admission.QUEUED
        assert (await pair.until_over(id_)).phase == phase
        assert pair.running_on() == runs_on


async def test_the_guest_does_not_run_on_a_word_whose_event_is_not_durable() -> None:
    """The record is, and then the disk is full: a daemon that dies now must find what it did."""
    async with running_pair() as pair:
        id_ = await _fenced(pair)
        pair.alpha.gate.plan = _full_after_the_record(pair)
        assert (await say(pair, id_, FENCED)).admission is Admission.QUEUED
        await asyncio.sleep(30.0)
        assert pair.running_on() is None
        assert words(pair, id_)[0].is_pending
        pair.alpha.journal.is_full = False
        assert (await pair.until_over(id_)).phase == Phase.ROLLED_BACK
        assert pair.running_on() == "alpha"


def _full_after_the_record(pair: Pair) -> Callable[[str, int], Fault | None]:
    left = ["journal.append_outgoing"]

    def plan(call: str, _: int) -> Fault | None:
        if call in left:
            left.remove(call)
            pair.alpha.journal.is_full = True
        return None

    return plan


async def test_a_word_that_proves_wrong_while_the_daemon_is_down_is_not_carried_out() -> None:
    """Beta's host was only unreachable, and its guest runs: what was said of it was not true."""
    async with running_pair() as pair:
        id_ = await _runs(pair)
        pair.alpha.gate.plan = OnCall("journal.add_resolution", Fault(after_effect=True))
        asking = asyncio.create_task(say(pair, id_, FENCED))
        await until(lambda: pair.alpha.gate.is_dead, what="killed behind the record")
        asking.cancel()
        await asyncio.wait([asking])
        pair.plans["beta"] = no_faults
        await pair.start("beta")
        await pair.restart("alpha")
        view = await pair.until_over(id_)
        assert view.phase == Phase.SUCCEEDED
        assert pair.running_on() == "beta"
        assert view.resolutions[0].carried_out_wall_s is None
        assert not view.resolutions[0].is_pending


@pytest.mark.parametrize("said", [USE, LOST])
async def test_a_word_to_the_destination_outlives_a_kill_before_its_act(said: Resolution) -> None:
    async with running_pair(loaded_idle_s=30.0) as pair:
        id_ = await granted(pair)
        await pair.kill("alpha")
        power_off(pair, "alpha")
        await asyncio.sleep(120.0)
        pair.guest().may_end = said is LOST
        pair.beta.gate.plan = OnCall("journal.add_resolution", Fault(after_effect=True))
        asking = asyncio.create_task(say(pair, id_, said, on="beta"))
        await until(lambda: pair.beta.gate.is_dead, what="killed behind the record")
        asking.cancel()
        await asyncio.wait([asking])
        await pair.restart("beta")
        ended = "running" if said is USE else "refused"
        await until(lambda: pair.stands(id_, "beta")[0] == ended, within_s=300.0)
        (word,) = words(pair, id_, on="beta")
        assert word.stored.role == "destination"
        assert word.carried_out_wall_s is not None
        assert pair.running_on() == ("beta" if said is USE else None)
