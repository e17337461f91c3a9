"""With an arbiter: hosts that are gone for good, persons' words, and records behind the truth."""

from __future__ import annotations

import asyncio

import pytest

from migrd.core.migration import Policy, WhenNotConverging
from migrd.core.phases import Phase
from migrd.engine.service import Resolution
from migrd.errors import Conflict, Unavailable
from tests.engine.arbitrating import (
    AROUND,
    BLACKOUT_S,
    arbitrated,
    ends_well,
    once_at,
    power_off,
    record,
    says,
)
from tests.engine.test_steering import never_converges
from tests.fakes.arbiter import FakeArbiter, FakeArbiterStore
from tests.fakes.virtual_time import now_s, until
from tests.fakes.world import VM, Pair

# Hosts that are gone ------------------------------------------------------------------------------


@pytest.mark.parametrize("point", AROUND[:7])
async def test_a_destination_gone_before_it_said_started_needs_no_person(point: str) -> None:
    async with arbitrated() as (pair, store):
        before = len(store.writes)
        async with once_at(point, lambda: power_off(pair, "beta")) as struck:
            migration_id = await pair.ask()
            view = await pair.until_over(migration_id)
        assert view.phase == Phase.ROLLED_BACK, view.cause
        assert pair.running_on() == "alpha"
        assert pair.guest().runs[-1].from_s - struck[0] < BLACKOUT_S
        await until(lambda: says(store, "alpha"), what="the record is put right")
        assert len(store.writes) - before <= 6
        await pair.restart("beta")
        await ends_well(pair, store, migration_id)


@pytest.mark.parametrize("point", AROUND[8:11])
async def test_a_destination_gone_after_it_said_started_needs_a_proof(point: str) -> None:
    async with arbitrated() as (pair, store):
        before = len(store.writes)
        async with once_at(point, lambda: power_off(pair, "beta")):
            migration_id = await pair.ask()
            view = await pair.until_phase(migration_id, Phase.NEEDS_OPERATOR)
        await asyncio.sleep(120.0)
        assert pair.running_on() is None, "it may have run there: never guessed"
        assert says(store, "beta")
        await pair.kill("beta")
        await _fenced(pair, migration_id)
        view = await pair.until_over(migration_id)
        assert view.phase == Phase.ROLLED_BACK
        assert says(store, "alpha"), "written before the guest ran"
        assert pair.running_on() == "alpha"
        assert len(store.writes) - before <= 6
        await pair.start("beta")
        await ends_well(pair, store, migration_id)


async def _fenced(pair: Pair, migration_id: str) -> None:
    answer = await pair.alpha.service.resolve(
        migration_id, Resolution.DESTINATION_FENCED, evidence="IPMI says off", by="op"
    )
    assert answer.admission == "queued", answer


async def test_a_fence_waits_for_the_arbiter_before_the_guest_runs_and_survives_a_restart() -> None:
    async with arbitrated() as (pair, store):
        async with once_at("destination.mark_started.done", lambda: power_off(pair, "beta")):
            migration_id = await pair.ask()
            await pair.until_phase(migration_id, Phase.NEEDS_OPERATOR)
        await pair.kill("beta")
        store.is_stalled = True
        await _fenced(pair, migration_id)
        await asyncio.sleep(90.0)
        assert pair.running_on() is None
        view = pair.view(migration_id)
        assert "ArbiterUnreachable" in {c.type for c in view.conditions}
        assert "need not be said again" in (view.next_step or "")
        await pair.restart("alpha")
        await asyncio.sleep(30.0)
        assert pair.running_on() is None
        store.heal()
        view = await pair.until_over(migration_id)
        assert view.phase == Phase.ROLLED_BACK
        assert "IPMI says off" in (view.cause.message if view.cause else "") or view.cause
        assert says(store, "alpha")
        await pair.start("beta")
        await ends_well(pair, store, migration_id)


async def test_a_source_gone_after_it_gave_the_record_away_is_not_needed() -> None:
    """The destination reads by itself that the guest is its own."""
    async with arbitrated() as (pair, store):
        async with once_at("source.assign.done", lambda: power_off(pair, "alpha")):
            migration_id = await pair.ask()
            await until(lambda: pair.running_on() == "beta", what="it starts by itself")
        assert says(store, "beta")
        await pair.kill("alpha")
        await pair.start("alpha")
        assert (await pair.until_over(migration_id)).phase == Phase.SUCCEEDED
        await pair.migrates_again()


async def test_a_source_gone_before_the_grant_leaves_the_copy_to_a_persons_word() -> None:
    async with arbitrated(loaded_idle_s=30.0) as (pair, store):
        async with once_at("source.assign.deciding", lambda: power_off(pair, "alpha")):
            migration_id = await pair.ask()
            await until(lambda: pair.daemons["alpha"].gate.is_dead)
        await pair.kill("alpha")
        await asyncio.sleep(120.0)
        assert pair.view(migration_id, on="beta").phase == "loaded"
        store.is_stalled = True
        answer = await pair.beta.service.resolve(
            migration_id, Resolution.USE_DESTINATION_COPY, evidence="it burnt", by="op"
        )
        assert answer.admission == "queued", answer
        await asyncio.sleep(20.0)
        assert pair.running_on() is None, "not before the record says so"
        assert "ArbiterUnreachable" in {
            c.type for c in pair.view(migration_id, on="beta").conditions
        }
        store.heal()
        await until(lambda: pair.running_on() == "beta")
        assert says(store, "beta")
        await pair.start("alpha")
        assert (await pair.until_over(migration_id)).phase == Phase.SUCCEEDED


async def test_a_word_that_the_record_stands_against_says_so_and_runs_nothing() -> None:
    """The source is gone, and somebody has started the VM on a third host meanwhile."""
    async with arbitrated(loaded_idle_s=30.0) as (pair, store):
        async with once_at("source.assign.deciding", lambda: power_off(pair, "alpha")):
            migration_id = await pair.ask()
            await until(lambda: pair.daemons["alpha"].gate.is_dead)
        await pair.kill("alpha")
        await asyncio.sleep(120.0)
        found = record(store)
        assert found is not None
        gamma = FakeArbiter(store, "gamma")
        await gamma.assign(found, "gamma", epoch=found.epoch + 1, started=True)
        service = pair.beta.service
        said = Resolution.USE_DESTINATION_COPY
        await service.resolve(migration_id, said, evidence="it burnt", by="op")
        await asyncio.sleep(20.0)
        assert pair.running_on() is None
        assert any("says gamma" in c.message for c in service.migration(migration_id).conditions)
        assert pair.hosts["beta"].living(VM), "the copy is kept"
        await pair.start("alpha")


# Records that are behind the truth ----------------------------------------------------------------


async def _refused_behind_the_record(pair: Pair, store: FakeArbiterStore) -> None:
    """The guest runs on alpha, beta has durably refused it, and the record still says beta."""
    async with once_at("source.assign.done", lambda: store.down.add("alpha")):
        migration_id = await pair.ask()
        await pair.until_phase(migration_id, Phase.GRANTED)
        i = pair.beta.engine.migrations.incoming[migration_id]
        i.want_refusal("somebody said so")
        view = await pair.until_over(migration_id)
    assert view.phase == Phase.ROLLED_BACK, "else the refusal came too late to be of use here"
    assert pair.running_on() == "alpha"
    assert says(store, "beta", started=False), "behind the truth"


async def test_a_stale_record_after_a_durable_refusal_never_blocks_the_next_migration() -> None:
    async with arbitrated() as (pair, store):
        await _refused_behind_the_record(pair, store)
        await pair.restart("alpha")
        store.heal()
        await pair.migrates_again()


async def test_a_host_that_refused_a_guest_does_not_start_it_because_the_record_is_behind() -> None:
    async with arbitrated() as (pair, store):
        await _refused_behind_the_record(pair, store)
        await pair.restart("beta")
        await pair.beta.service.define_vm(pair.alpha.service.vm(VM).spec, dry_run=False)
        with pytest.raises(Conflict) as caught:
            await pair.beta.service.start_vm(VM)
        assert caught.value.code == "owned_elsewhere"
        assert "ask migrd on alpha" in caught.value.message
        await pair.beta.service.forget_vm(VM)
        assert record(store) is not None, "else anybody could start a guest that runs"
        store.heal()
        await pair.migrates_again()


async def test_a_host_that_a_guest_left_does_not_start_it_because_the_record_is_behind() -> None:
    """It left by postcopy while the arbiter was away; the host forgets it and defines it anew."""
    async with arbitrated() as (pair, store):
        never_converges(pair)
        async with once_at(
            "source.transfer_completed.deciding", lambda: store.down.update(pair.hosts)
        ):
            view = await pair.migrate(policy=Policy(when_not_converging=WhenNotConverging.POSTCOPY))
        assert view.phase == Phase.SUCCEEDED, view.cause
        store.heal()
        assert says(store, "alpha"), "behind the truth"
        await pair.alpha.service.forget_vm(VM)
        await pair.alpha.service.define_vm(pair.beta.service.vm(VM).spec, dry_run=False)
        with pytest.raises(Conflict) as caught:
            await pair.alpha.service.start_vm(VM)
        assert caught.value.code == "owned_elsewhere"
        assert "ask migrd on beta" in caught.value.message
        await pair.alpha.service.forget_vm(VM)
        assert record(store) is not None, "else anybody could start a guest that runs"
        pair.ground.calm()
        await pair.migrates_again()
        assert pair.running_on() == "beta"


async def test_what_was_taken_back_is_not_given_again_by_a_daemon_whose_journal_missed_it() -> None:
    """The guest has run here since; then its process dies; the copy over there is old."""
    async with arbitrated() as (pair, store):

        def part() -> None:
            pair.road.part("alpha", "beta")
            store.down.add("beta")
            pair.alpha.journal.is_full = True

        async with once_at("source.assign.done", part):
            migration_id = await pair.ask()
            await until(lambda: pair.stands(migration_id)[0] == Phase.ROLLING_BACK)
            await until(lambda: pair.running_on() == "alpha", within_s=BLACKOUT_S)
        await asyncio.sleep(10.0)
        await pair.kill("alpha")
        pair.hosts["alpha"].qemu(VM).die("killed")
        await pair.start("alpha")
        assert pair.stands(migration_id)[0] == Phase.GRANTED, "as far as its journal goes"
        await asyncio.sleep(5.0)
        store.heal()
        pair.road.heal()
        await asyncio.sleep(60.0)
        assert pair.running_on() is None
        assert pair.view(migration_id).phase != Phase.SUCCEEDED


async def test_a_guest_that_leaves_by_postcopy_waits_for_no_arbiter() -> None:
    async with arbitrated() as (pair, store):
        never_converges(pair)
        async with once_at(
            "source.transfer_completed.deciding", lambda: setattr(store, "is_stalled", True)
        ):
            view = await pair.migrate(policy=Policy(when_not_converging=WhenNotConverging.POSTCOPY))
        assert view.phase == Phase.SUCCEEDED, view.cause
        assert max(pair.guest().blackouts_s) < 1.0
        assert not says(store, "beta")
        store.heal()
        await pair.migrates_again()


async def test_a_guest_that_left_by_postcopy_has_its_record_afterwards() -> None:
    async with arbitrated() as (pair, store):
        never_converges(pair)
        before = len(store.writes)
        view = await pair.migrate(policy=Policy(when_not_converging=WhenNotConverging.POSTCOPY))
        assert view.phase == Phase.SUCCEEDED, view.cause
        assert says(store, "beta")
        assert len(store.writes) - before <= 6


async def test_a_late_discard_takes_nothing_back_that_may_have_run() -> None:
    """The source asks for a refusal while it does not know of the record; that is no fence."""
    async with arbitrated() as (pair, store):
        async with once_at(
            "destination.cont.deciding", lambda: pair.hosts["beta"].qemu(VM).die("abort")
        ):
            migration_id = await pair.ask()
            await pair.until_phase(migration_id, Phase.NEEDS_OPERATOR)
        epoch = pair.engine_state(migration_id).epoch
        reception = pair.beta.engine.reception
        view = await reception.discard("alpha", migration_id, epoch, "the arbiter is silent")
        assert view.phase == "starting"
        store.is_stalled = True
        with pytest.raises(Unavailable):
            await reception.discard("alpha", migration_id, epoch, "the arbiter is silent")
        store.heal()
        await asyncio.sleep(60.0)
        assert pair.running_on() is None
        await _fenced(pair, migration_id)
        assert (await pair.until_over(migration_id)).phase == Phase.ROLLED_BACK
        await pair.migrates_again()


async def test_a_grant_that_is_not_answered_is_taken_back_within_seconds() -> None:
    """The destination is cut off from both: nobody waits half a minute for it."""
    async with arbitrated() as (pair, store):

        def part() -> None:
            pair.road.part("alpha", "beta")
            store.down.add("beta")

        async with once_at("source.assign.done", part) as struck:
            migration_id = await pair.ask()
            await until(lambda: struck)
            await until(lambda: pair.running_on() == "alpha", within_s=BLACKOUT_S)
            stood_still_s = now_s() - struck[0]
        assert stood_still_s < 5.0
        view = await pair.until_over(migration_id)
        assert view.cause is not None
        assert view.cause.code == "taken_back"
        await asyncio.sleep(30.0)
        store.heal()
        pair.road.heal()
        await until(lambda: pair.stands(migration_id, "beta")[0] == "refused", within_s=200.0)
        await pair.migrates_again()


async def test_the_record_of_a_forgotten_vm_stays_away_though_it_was_to_be_put_right() -> None:
    async with arbitrated() as (pair, store):
        await _refused_behind_the_record(pair, store)
        await asyncio.sleep(120.0)
        pair.guest().may_end = True
        await pair.alpha.service.stop_vm(VM)
        store.heal()
        await pair.alpha.service.forget_vm(VM)
        assert record(store) is None
        await asyncio.sleep(120.0)
        assert record(store) is None, "nobody would know of it, nor could start the VM elsewhere"


async def test_a_record_that_a_newer_migration_put_right_is_no_trouble_of_the_old_one() -> None:
    async with arbitrated() as (pair, store):
        await _refused_behind_the_record(pair, store)
        await asyncio.sleep(120.0)
        store.heal()
        old, new = pair.alpha.service.migrations()[1][0], await pair.migrate()
        assert new.phase == Phase.SUCCEEDED, new.cause
        await asyncio.sleep(120.0)
        assert not pair.view(old.id).conditions


async def test_a_record_removed_by_hand_is_there_again_once_the_guest_is_back() -> None:
    async with arbitrated() as (pair, store):
        async with once_at("source.assign.deciding", store.entries.clear):
            view = await pair.migrate()
        assert view.phase == Phase.ROLLED_BACK, view.cause
        await until(lambda: says(store, "alpha"), what="nobody else can start the VM")
        await pair.migrates_again()


async def test_the_only_copy_is_not_granted_before_its_record_though_postcopy_was_chosen() -> None:
    """All of it had arrived before postcopy began, so the destination goes by the record. Then the
    source's process dies, and its host is cut off from the arbiter."""
    async with arbitrated() as (pair, store):
        never_converges(pair)
        async with once_at(
            "source.postcopy_chosen.journalled", lambda: pair.alpha.gate.crash()
        ) as struck:
            policy = Policy(when_not_converging=WhenNotConverging.POSTCOPY)
            migration_id = await pair.ask(policy=policy)
            await until(lambda: struck)
        pair.ground.calm()
        await asyncio.sleep(30.0)

        def strike() -> None:
            pair.hosts["alpha"].qemu(VM).die("killed")
            store.down.add("alpha")

        async with once_at("source.transfer_completed.journalled", strike) as struck:
            await pair.restart("alpha")
            await until(lambda: struck)
            await asyncio.sleep(10.0)
        assert pair.stands(migration_id, "beta")[0] == "loaded"
        store.heal()
        assert (await pair.until_over(migration_id)).phase == Phase.SUCCEEDED
        await pair.migrates_again()
