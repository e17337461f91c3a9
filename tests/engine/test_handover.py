"""From GRANT to the end: nothing is taken for an answer but an answer."""

from __future__ import annotations

import asyncio

import pytest

from migrd import failpoints
from migrd.core.phases import Phase
from migrd.engine.service import Resolution, Whereabouts
from migrd.errors import Conflict, NotFound
from tests.fakes.gate import Fault
from tests.fakes.road import Loss
from tests.fakes.virtual_time import until
from tests.fakes.world import VM, Pair, running_pair
from tests.sweep import scenarios


def losing(call: str, loss: Loss, times: int = 10**6) -> object:
    """Faults: so many messages of that kind are lost in that way."""
    left = [times]

    def faults(caller: str, callee: str, name: str) -> Loss | None:
        if name != call or left[0] <= 0:
            return None
        left[0] -= 1
        return loss

    return faults


async def granted(pair: Pair, loss: Loss = Loss.UNREACHABLE) -> str:
    """A migration whose GRANT does not get through."""
    pair.road.faults = losing("grant", loss)  # type: ignore[assignment]  # it is a Faults
    migration_id = await pair.ask()
    await pair.until_phase(migration_id, Phase.GRANTED)
    return migration_id


@pytest.mark.parametrize("loss", list(Loss))
@pytest.mark.parametrize("times", [1, 3])
async def test_a_grant_lost_late_or_repeated_a_few_times_succeeds(loss: Loss, times: int) -> None:
    async with running_pair(grant_deadline_s=200.0) as pair:
        pair.road.faults = losing("grant", loss, times)  # type: ignore[assignment]  # as above
        view = await pair.migrate()
        assert view.phase == Phase.SUCCEEDED
        assert [run.host for run in pair.guest().runs] == ["alpha", "beta"]
        await asyncio.sleep(60.0)  # what is late has arrived
        assert pair.running_on() == "beta"
        pair.road.heal()
        await pair.migrates_again()


async def test_without_an_answer_the_operator_is_called_and_it_is_asked_on() -> None:
    async with running_pair() as pair:
        migration_id = await granted(pair)
        view = await pair.until_phase(migration_id, Phase.NEEDS_OPERATOR)
        assert (view.cause and view.cause.code) == "grant_unanswered"
        assert view.guest_runs_on is Whereabouts.UNKNOWN
        assert "beta" in (view.next_step or "")
        assert not view.is_terminal
        await asyncio.sleep(300.0)
        assert pair.running_on() is None, "never guessed"
        pair.road.heal()
        view = await pair.until_over(migration_id)
        assert view.phase == Phase.SUCCEEDED
        assert view.cause is None
        await pair.migrates_again()


async def test_a_destination_that_refuses_after_the_grant_gives_the_guest_back() -> None:
    async with running_pair() as pair:
        migration_id = await granted(pair)
        pair.beta.engine.migrations.incoming[migration_id].want_refusal("somebody said so")
        await until(lambda: pair.stands(migration_id, "beta")[0] == "refused")
        pair.road.heal()
        view = await pair.until_over(migration_id)
        assert view.phase == Phase.ROLLED_BACK
        assert "somebody said so" in (view.cause.message if view.cause else "")
        assert pair.running_on() == "alpha"
        await pair.migrates_again()


async def test_a_loaded_destination_that_hears_nothing_keeps_its_copy_and_says_so() -> None:
    """It may be the last one: silence is no reason to throw it away."""
    async with running_pair(loaded_idle_s=60.0) as pair:
        migration_id = await granted(pair)
        pair.road.part("alpha", "beta")
        await asyncio.sleep(600.0)
        view = pair.view(migration_id, on="beta")
        assert view.phase == "loaded"
        assert "silent" in view.conditions[0].message
        assert pair.hosts["beta"].living(VM)
        await pair.restart("beta")
        pair.road.heal()
        view = await pair.until_over(migration_id)
        assert view.phase == Phase.SUCCEEDED
        await pair.migrates_again()


async def test_a_person_may_start_the_loaded_copy_when_the_sources_host_is_gone() -> None:
    async with running_pair(loaded_idle_s=30.0) as pair:
        migration_id = await granted(pair)
        await pair.kill("alpha")
        pair.hosts["alpha"].qemu(VM).die("power off")
        service = pair.beta.service
        early = await service.resolve(
            migration_id, Resolution.USE_DESTINATION_COPY, evidence="", by="op"
        )
        assert early.admission == "denied"
        await asyncio.sleep(120.0)
        answer = await service.resolve(
            migration_id, Resolution.USE_DESTINATION_COPY, evidence="it burnt", by="op"
        )
        assert answer.admission == "queued"
        await until(lambda: pair.running_on() == "beta")
        await pair.start("alpha")
        pair.road.heal()
        assert (await pair.until_over(migration_id)).phase == Phase.SUCCEEDED


async def test_a_late_grant_after_a_refusal_changes_nothing() -> None:
    async with running_pair() as pair:
        await scenarios.a_late_grant_after_a_refusal(pair)


async def test_a_grant_of_another_epoch_or_before_the_guest_is_there_changes_nothing() -> None:
    async with running_pair() as pair:
        pair.ground.load.device_s = 0.5
        migration_id = await pair.ask()
        await pair.until_phase(migration_id, Phase.SWITCHOVER)
        reception = pair.beta.engine.reception
        epoch = pair.engine_state(migration_id).epoch
        with pytest.raises(Conflict) as caught:
            await reception.grant("alpha", migration_id, epoch, run_guest=True)
        assert caught.value.code == "not_loaded"
        for stale in (epoch - 1, epoch + 1):
            with pytest.raises(Conflict) as caught:
                await reception.grant("alpha", migration_id, stale, run_guest=True)
            assert caught.value.code == "stale_epoch"
            with pytest.raises(Conflict):
                await reception.discard("alpha", migration_id, stale, "no")
        with pytest.raises(NotFound):
            await reception.grant("alpha", "never-heard-of", epoch, run_guest=True)
        assert (await pair.until_over(migration_id)).phase == Phase.SUCCEEDED


async def test_a_discard_after_the_start_changes_nothing() -> None:
    async with running_pair() as pair:
        view = await pair.migrate()
        answer = await pair.beta.engine.reception.discard("alpha", view.id, view.epoch, "late")
        assert answer.phase == "running"
        await asyncio.sleep(10.0)
        assert pair.running_on() == "beta"


async def test_an_old_prepare_that_arrives_late_is_refused_by_its_epoch() -> None:
    async with running_pair() as pair:
        first = losing("prepare", Loss.REQUEST_LATE, 1)
        pair.options["alpha"] = pair.alpha.options
        pair.road.faults = first  # type: ignore[assignment]  # it is a Faults
        view = await pair.migrate()
        assert view.phase == Phase.ROLLED_BACK
        second = await pair.migrate()
        assert second.phase == Phase.SUCCEEDED
        await asyncio.sleep(90.0)
        assert pair.running_on() == "beta"
        assert len(pair.all_living()) == 1


async def test_a_fenced_destination_gives_the_guest_back_on_the_operators_word() -> None:
    async with running_pair() as pair:
        migration_id = await granted(pair)
        await pair.until_phase(migration_id, Phase.NEEDS_OPERATOR)
        await pair.kill("beta")  # the host is dead for good
        for qemu in pair.hosts["beta"].living(VM):
            qemu.die("power off")
        answer = await pair.alpha.service.resolve(
            migration_id, Resolution.DESTINATION_FENCED, evidence="IPMI says off", by="op"
        )
        assert answer.admission == "queued"
        view = await pair.until_over(migration_id)
        assert view.phase == Phase.ROLLED_BACK
        assert view.cause is not None
        assert "IPMI says off" in view.cause.message
        assert pair.running_on() == "alpha"
        pair.road.heal()
        await pair.start("beta")
        await pair.migrates_again()


async def test_the_operators_word_that_it_runs_there_ends_the_copy_here() -> None:
    async with running_pair() as pair:
        pair.road.faults = losing("grant", Loss.ANSWER_LOST)  # type: ignore[assignment]  # Faults
        migration_id = await pair.ask()
        await pair.until_phase(migration_id, Phase.NEEDS_OPERATOR)
        assert pair.running_on() == "beta"
        service = pair.alpha.service
        await service.resolve(
            migration_id, Resolution.DESTINATION_RUNS, evidence="I see it", by="op"
        )
        view = await pair.until_over(migration_id)
        assert view.phase == Phase.SUCCEEDED
        assert not pair.hosts["alpha"].living(VM)


async def test_a_guest_given_up_by_the_operator_is_lost_and_the_vm_starts_anew() -> None:
    async with running_pair() as pair:
        migration_id = await granted(pair)
        await pair.until_phase(migration_id, Phase.NEEDS_OPERATOR)
        await pair.kill("beta")
        for qemu in pair.hosts["beta"].living(VM):
            qemu.die("burnt")
        service = pair.alpha.service
        await service.resolve(migration_id, Resolution.GUEST_LOST, evidence="gone", by="op")
        assert (await pair.until_over(migration_id)).phase == Phase.GUEST_LOST
        pair.guest().may_end = True
        await pair.alpha.service.stop_vm(VM)
        await pair.alpha.service.start_vm(VM)
        assert pair.running_on() == "alpha"
        pair.road.heal()
        await pair.start("beta")
        await pair.migrates_again()


async def test_a_word_of_the_operator_survives_a_restart() -> None:
    async with running_pair() as pair:
        migration_id = await granted(pair)
        await pair.until_phase(migration_id, Phase.NEEDS_OPERATOR)
        await pair.restart("alpha")
        assert pair.view(migration_id).phase == Phase.NEEDS_OPERATOR
        await pair.kill("beta")
        for qemu in pair.hosts["beta"].living(VM):
            qemu.die("power off")
        service = pair.alpha.service
        await service.resolve(
            migration_id, Resolution.DESTINATION_FENCED, evidence="it is off", by="op"
        )
        await until(lambda: pair.stands(migration_id)[0] == Phase.ROLLED_BACK)
        await pair.restart("alpha")
        assert pair.view(migration_id).phase == Phase.ROLLED_BACK
        assert pair.running_on() == "alpha"


@pytest.mark.parametrize("side", ["alpha", "beta"])
async def test_a_disk_that_is_full_from_some_record_on_never_costs_the_guest(side: str) -> None:
    """Whatever the record, the guest runs on one side when there is room again."""
    for first_lost in range(1, 7):
        async with running_pair() as pair:
            journal = pair.daemons[side].journal
            wanted = journal.writes + first_lost + (1 if side == "alpha" else 0)

            async def fill(journal: object = journal, wanted: int = wanted) -> None:
                await until(lambda: journal.writes >= wanted, within_s=1e9)  # type: ignore[attr-defined]  # a FakeJournal
                journal.is_full = True  # type: ignore[attr-defined]  # a FakeJournal

            filling = asyncio.create_task(fill())
            migration_id = await pair.ask()
            await asyncio.sleep(45.0)
            filling.cancel()
            await asyncio.wait([filling])
            pair.daemons[side].journal.is_full = False
            view = await pair.until_over(migration_id)
            assert view.phase in (Phase.SUCCEEDED, Phase.ROLLED_BACK), view.cause
            there = "beta" if view.phase == Phase.SUCCEEDED else "alpha"
            assert pair.running_on() == there
            assert all(check.ok for check in pair.daemons[side].service.readiness())
            await pair.migrates_again()


async def test_a_full_journal_makes_the_daemon_unready_and_refuses_new_migrations() -> None:
    async with running_pair() as pair:
        migration_id = await granted(pair)
        pair.alpha.journal.is_full = True
        pair.road.heal()
        await until(lambda: not all(c.ok for c in pair.alpha.service.readiness()))
        assert "JournalFailing" in {c.type for c in pair.view(migration_id).conditions}
        assert pair.running_on() == "beta"
        assert pair.hosts["alpha"].living(VM), "nothing is ended before it is durable"
        pair.alpha.journal.is_full = False
        assert (await pair.until_over(migration_id)).phase == Phase.SUCCEEDED


async def test_a_destination_that_cannot_run_the_guest_yet_is_asked_until_it_can() -> None:
    async with running_pair() as pair:
        pair.plans["beta"] = scenarios.OnCall("vmm.run_guest", Fault(after_effect=False))
        await pair.restart("beta")
        migration_id = await pair.ask()
        await until(lambda: pair.beta.gate.is_dead)
        pair.hosts["beta"].qemu(VM).refuses_cont = 'Failed to get "write" lock'
        await pair.restart("beta")
        await asyncio.sleep(5.0)
        notes = pair.view(migration_id, on="beta").conditions
        assert "does not run the guest" in notes[0].message
        pair.hosts["beta"].qemu(VM).refuses_cont = None
        assert (await pair.until_over(migration_id)).phase == Phase.SUCCEEDED


async def test_a_host_that_was_off_while_its_guest_was_given_back_takes_the_vm_again() -> None:
    """It died as it was started there: the host, when it is back, asks the source about it."""
    async with running_pair() as pair:

        def dies(point: str) -> None:
            if point == "destination.cont.deciding":
                pair.hosts["beta"].qemu(VM).die("power off")
                pair.beta.gate.crash()

        with failpoints.observing(dies):
            migration_id = await pair.ask()
            await pair.until_phase(migration_id, Phase.NEEDS_OPERATOR)
        await pair.kill("beta")
        await pair.alpha.service.resolve(
            migration_id, Resolution.DESTINATION_FENCED, evidence="it is off", by="op"
        )
        assert (await pair.until_over(migration_id)).phase == Phase.ROLLED_BACK
        await pair.start("beta")
        await pair.migrates_again()
        assert pair.view(migration_id, on="beta").phase == "refused"
