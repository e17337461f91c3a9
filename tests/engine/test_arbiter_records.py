"""The arbiter's record against starts, removals and words that cross: it never names a host that
does not have the guest for good, and never keeps a VM from being started for ever."""

from __future__ import annotations

import asyncio

import pytest

from migrd.core.admission import Admission
from migrd.core.facts import RunState
from migrd.core.phases import Phase
from migrd.engine.service import Resolution
from migrd.errors import Conflict, Unavailable
from tests.engine.arbitrating import arbitrated, once_at, power_off, record, says
from tests.engine.test_arbiter_losses import _refused_behind_the_record
from tests.engine.test_taken_back import died_starting, given_back
from tests.fakes.arbiter import FakeArbiter, FakeArbiterStore
from tests.fakes.arbiter import Trouble as Lost
from tests.fakes.virtual_time import until
from tests.fakes.world import VM, Pair


def writes_come_late(store: FakeArbiterStore) -> None:
    store.faults = lambda host, call: Lost.REQUEST_LATE if call == "swap" else None


async def _stopped(pair: Pair, on: str = "alpha") -> None:
    pair.guest().may_end = True
    await pair.daemons[on].service.stop_vm(VM)


async def _end_and_forget(pair: Pair) -> None:
    await _stopped(pair)
    await pair.alpha.service.forget_vm(VM)


# A removal, or a start, whose write comes late ----------------------------------------------------


async def test_a_removal_that_lands_late_does_not_take_the_record_of_a_vm_started_since() -> None:
    async with arbitrated() as (pair, store):
        spec = pair.alpha.service.vm(VM).spec
        await _stopped(pair)
        writes_come_late(store)
        with pytest.raises(Unavailable):
            await pair.alpha.service.forget_vm(VM)
        store.heal()
        await pair.alpha.service.start_vm(VM)
        await asyncio.sleep(60.0)
        assert says(store, "alpha"), "it runs there"
        await pair.beta.service.define_vm(spec, dry_run=False)
        with pytest.raises(Conflict):
            await pair.beta.service.start_vm(VM)
        assert pair.running_on() == "alpha"


async def test_a_start_that_lands_after_the_vm_was_forgotten_is_cured_as_the_answer_says() -> None:
    async with arbitrated() as (pair, store):
        spec = pair.alpha.service.vm(VM).spec
        await _end_and_forget(pair)
        await pair.alpha.service.define_vm(spec, dry_run=False)
        writes_come_late(store)
        with pytest.raises(Unavailable):
            await pair.alpha.service.start_vm(VM)
        store.heal()
        await pair.alpha.service.forget_vm(VM)
        await asyncio.sleep(60.0)
        await pair.beta.service.define_vm(spec, dry_run=False)
        with pytest.raises(Conflict) as caught:
            await pair.beta.service.start_vm(VM)
        assert "define it there and forget it there" in caught.value.message
        await pair.alpha.service.define_vm(spec, dry_run=False)
        await pair.alpha.service.forget_vm(VM)
        await pair.beta.service.start_vm(VM)
        assert pair.running_on() == "beta"


@pytest.mark.parametrize("step", range(20, 30))
async def test_a_record_is_not_put_right_for_a_vm_that_is_being_forgotten(step: int) -> None:
    async with arbitrated() as (pair, store):
        await _refused_behind_the_record(pair, store)
        await asyncio.sleep(120.0)
        await _stopped(pair)
        before = len(store.log)
        await until(lambda: len(store.log) > before, within_s=100.0)  # it was tried just now
        await asyncio.sleep(10.0)
        store.heal()
        store._latency_s = lambda: 0.6
        await asyncio.sleep(step * 0.7)
        await pair.alpha.service.forget_vm(VM)
        await asyncio.sleep(120.0)
        assert record(store) is None


async def test_an_ended_migration_of_a_forgotten_vm_does_not_say_that_the_arbiter_is_away() -> None:
    async with arbitrated() as (pair, store):
        await _refused_behind_the_record(pair, store)
        old = pair.alpha.service.migrations()[1][0]
        await asyncio.sleep(120.0)
        await _stopped(pair)
        store.heal()
        await pair.alpha.service.forget_vm(VM)
        await asyncio.sleep(300.0)
        assert not pair.view(old.id).conditions


# A record that somebody removed -------------------------------------------------------------------


async def _owned_without_a_record(pair: Pair, store: FakeArbiterStore) -> str:
    """Beta owns the copy, the record is removed, and alpha burns."""

    def strike() -> None:
        power_off(pair, "alpha")
        store.entries.clear()

    async with once_at("destination.grant_received.journalled", strike):
        migration_id = await pair.ask()
        await until(lambda: pair.daemons["alpha"].gate.is_dead)
    await pair.kill("alpha")
    await asyncio.sleep(300.0)
    assert pair.stands(migration_id, "beta")[0] == "owned"
    return migration_id


@pytest.mark.parametrize("restarts", [False, True])
async def test_an_owned_copy_without_a_record_is_used_by_a_persons_word(restarts: bool) -> None:
    async with arbitrated() as (pair, store):
        id_ = await _owned_without_a_record(pair, store)
        step = pair.view(id_, on="beta").next_step
        assert step is not None
        assert "use_destination_copy" in step
        if restarts:
            await pair.restart("beta")
            await asyncio.sleep(5.0)
        answer = await pair.beta.service.resolve(
            id_, Resolution.USE_DESTINATION_COPY, evidence="it burnt", by="op"
        )
        assert answer.admission is Admission.QUEUED, answer
        await until(lambda: pair.running_on() == "beta")
        assert says(store, "beta")
        (word,) = pair.view(id_, on="beta").resolutions
        assert word.carried_out_wall_s is not None
        await pair.start("alpha")
        await asyncio.sleep(100.0)
        assert pair.stands(id_)[0] == "succeeded"
        assert pair.running_on() == "beta"


async def test_an_owned_copy_without_a_record_is_given_up_by_a_persons_word() -> None:
    async with arbitrated() as (pair, store):
        id_ = await _owned_without_a_record(pair, store)
        pair.guest().may_end = True
        answer = await pair.beta.service.resolve(
            id_, Resolution.GUEST_LOST, evidence="restored from a backup", by="op"
        )
        assert answer.admission is Admission.QUEUED, answer
        await until(lambda: pair.stands(id_, "beta")[0] == "refused")
        assert pair.running_on() is None


async def test_the_word_on_an_owned_copy_does_not_pass_over_a_record_made_since() -> None:
    """The VM was made anew elsewhere while the word was on its way."""
    async with arbitrated() as (pair, store):
        id_ = await _owned_without_a_record(pair, store)
        await FakeArbiter(store, "gamma").claim(VM, "gamma", 0, None)
        await pair.beta.service.resolve(
            id_, Resolution.USE_DESTINATION_COPY, evidence="it burnt", by="op"
        )
        await asyncio.sleep(60.0)
        assert says(store, "gamma")
        assert pair.running_on() is None
        (condition,) = pair.view(id_, on="beta").conditions
        assert "gamma" in condition.message
        pair.guest().may_end = True
        await pair.beta.service.resolve(
            id_, Resolution.GUEST_LOST, evidence="it runs on gamma", by="op"
        )
        await until(lambda: pair.stands(id_, "beta")[0] == "refused")


async def test_an_owned_copy_is_given_up_when_the_vm_was_made_anew_on_a_third_host() -> None:
    async with arbitrated() as (pair, store):

        def part() -> None:
            pair.road.part("alpha", "beta")
            store.down.add("beta")

        async with once_at("destination.grant_received.journalled", part):
            migration_id = await pair.ask()
            view = await pair.until_over(migration_id)
        assert view.phase == Phase.ROLLED_BACK, view.cause
        assert pair.stands(migration_id, "beta")[0] == "owned"
        await _end_and_forget(pair)
        assert record(store) is None
        await FakeArbiter(store, "gamma").claim(VM, "gamma", 0, None)
        store.heal()
        pair.road.heal()
        await asyncio.sleep(600.0)
        assert pair.stands(migration_id, "beta")[0] == "refused"


async def test_a_paused_guest_stays_paused_though_its_record_was_removed() -> None:
    async with arbitrated() as (pair, store):
        pair.hosts["alpha"].qemu(VM).stop(RunState.PAUSED)

        def strike() -> None:
            pair.hosts["alpha"].qemu(VM).die("killed")
            store.entries.clear()
            pair.road.part("alpha", "beta")

        async with once_at("source.assign.deciding", strike):
            migration_id = await pair.ask()
            await asyncio.sleep(20.0)
            assert pair.stands(migration_id, "beta")[0] == "running"
            pair.road.heal()
            view = await pair.until_over(migration_id)
        assert view.phase == Phase.SUCCEEDED, view.cause
        assert pair.running_on() is None


# What was settled while a daemon was down ---------------------------------------------------------


@pytest.mark.parametrize("has_arbiter", [True, False])
async def test_one_that_died_starting_is_settled_though_its_vm_was_deleted(
    has_arbiter: bool,
) -> None:
    """Its daemon was down when the source took the guest back, and deleted it."""
    async with arbitrated() as (pair, _):
        if not has_arbiter:
            pair.arbiter = None
            await pair.restart("alpha")
            await pair.restart("beta")
        migration_id = await died_starting(pair)
        await pair.kill("beta")
        await given_back(pair, migration_id)
        spec = pair.alpha.service.vm(VM).spec
        await _end_and_forget(pair)
        await pair.start("beta")
        await until(lambda: pair.stands(migration_id, "beta")[0] == "refused", within_s=100.0)
        await pair.beta.service.forget_vm(VM)
        await pair.beta.service.define_vm(spec, dry_run=False)
        await pair.beta.service.start_vm(VM)
        assert pair.running_on() == "beta"


async def test_one_that_died_starting_is_not_settled_by_silence_or_by_a_source_that_waits() -> None:
    async with arbitrated() as (pair, store):
        migration_id = await died_starting(pair)
        store.entries.clear()
        await asyncio.sleep(100.0)
        assert pair.stands(migration_id, "beta")[0] == "starting"
        await pair.kill("alpha")
        await asyncio.sleep(100.0)
        assert pair.stands(migration_id, "beta")[0] == "starting"


async def test_a_source_that_comes_back_sees_that_its_copy_was_used_by_a_persons_word() -> None:
    async with arbitrated(loaded_idle_s=30.0) as (pair, _):
        point = "source.transfer_completed.deciding"
        async with once_at(point, lambda: power_off(pair, "alpha")):
            migration_id = await pair.ask()
            await until(lambda: pair.daemons["alpha"].gate.is_dead)
        await pair.kill("alpha")
        await asyncio.sleep(120.0)
        assert pair.stands(migration_id, "beta")[0] == "loaded"
        await pair.beta.service.resolve(
            migration_id, Resolution.USE_DESTINATION_COPY, evidence="it burnt", by="op"
        )
        await until(lambda: pair.running_on() == "beta")
        await pair.start("alpha")
        assert (await pair.until_over(migration_id)).phase == Phase.SUCCEEDED


async def test_a_record_from_before_a_time_without_an_arbiter_does_not_strand_the_vm() -> None:
    async with arbitrated() as (pair, store):
        pair.arbiter = None
        await pair.restart("alpha")
        await pair.restart("beta")
        assert (await pair.migrate()).phase == Phase.SUCCEEDED
        pair.arbiter = store
        await pair.restart("alpha")
        await pair.restart("beta")
        assert says(store, "alpha"), "behind the truth"
        await pair.alpha.service.forget_vm(VM)
        await pair.alpha.service.define_vm(pair.beta.service.vm(VM).spec, dry_run=False)
        with pytest.raises(Conflict, match="ask migrd on beta"):
            await pair.alpha.service.start_vm(VM)
        await pair.alpha.service.forget_vm(VM)
        view = await pair.migrate(source="beta")
        assert view.phase == Phase.SUCCEEDED, view.refusals


@pytest.mark.parametrize("asks", ["start", "forget"])
async def test_two_hosts_do_not_send_a_person_to_each_other_for_ever(asks: str) -> None:
    """The record is alpha's, from before a time without an arbiter; the guest has ended on beta."""
    async with arbitrated() as (pair, store):
        pair.arbiter = None
        await pair.restart("alpha")
        await pair.restart("beta")
        assert (await pair.migrate()).phase == Phase.SUCCEEDED
        await _stopped(pair, "beta")
        pair.arbiter = store
        await pair.restart("alpha")
        await pair.restart("beta")
        with pytest.raises(Conflict, match="ask migrd on alpha"):
            await pair.beta.service.start_vm(VM)
        await pair.alpha.service.forget_vm(VM)
        await pair.alpha.service.define_vm(pair.beta.service.vm(VM).spec, dry_run=False)
        if asks == "start":
            with pytest.raises(Conflict, match="ask migrd on beta"):
                await pair.alpha.service.start_vm(VM)
        else:
            await pair.alpha.service.forget_vm(VM)
        assert says(store, "beta"), "alpha's journal knows whose it is"
        await pair.beta.service.start_vm(VM)
        assert pair.running_on() == "beta"


async def test_a_vm_made_anew_is_no_proof_against_the_record_of_one_that_runs() -> None:
    """It came to beta without an arbiter, ended there, and was made anew on alpha."""
    async with arbitrated() as (pair, store):
        pair.arbiter = None
        await pair.restart("alpha")
        await pair.restart("beta")
        assert (await pair.migrate()).phase == Phase.SUCCEEDED
        spec = pair.beta.service.vm(VM).spec
        await _stopped(pair, "beta")
        await pair.beta.service.forget_vm(VM)
        pair.arbiter = store
        await pair.restart("alpha")
        await pair.restart("beta")
        store.entries.clear()
        await FakeArbiter(store, "alpha").claim(VM, "alpha", 0, None)
        await pair.beta.service.define_vm(spec, dry_run=False)
        with pytest.raises(Conflict, match="on alpha"):
            await pair.beta.service.start_vm(VM)
