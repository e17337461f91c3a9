"""Two daemons with an arbiter: its record decides, whatever is slow, lost, cut off or killed."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from migrd.core.phases import Phase
from migrd.errors import Conflict, Unavailable
from tests.engine.arbitrating import (
    AROUND,
    BLACKOUT_S,
    arbitrated,
    ends_well,
    once_at,
    record,
    restarted_when_killed,
    says,
)
from tests.engine.test_steering import never_converges
from tests.fakes.arbiter import FakeArbiter, FakeArbiterStore
from tests.fakes.arbiter import Trouble as Lost
from tests.fakes.virtual_time import until
from tests.fakes.world import VM


async def test_a_migration_ends_with_the_record_saying_so_in_three_writes() -> None:
    async with arbitrated() as (pair, store):
        assert says(store, "alpha"), "a started VM is claimed"
        before = len(store.writes)
        view = await pair.migrate()
        assert view.phase == Phase.SUCCEEDED, view.cause
        assert says(store, "beta")
        await asyncio.sleep(60.0)
        assert len(store.writes) - before == 3, "claimed, granted, started"
        found = record(store)
        assert found is not None
        assert (found.epoch, found.migration_id) == (view.epoch, view.id)
        await pair.migrates_again()


# Before anything moves ----------------------------------------------------------------------------


async def test_without_the_arbiter_a_migration_is_refused_and_the_plan_says_so() -> None:
    async with arbitrated() as (pair, store):
        store.down.add("alpha")
        view = await pair.migrate()
        assert view.phase == Phase.REFUSED
        assert [refusal.code for refusal in view.refusals] == ["arbiter_unavailable"]
        assert "arbiter" in (view.next_step or "")
        assert not pair.hosts["beta"].living(VM), "nothing was touched"
        assert pair.guest().blackouts_s == []
        store.heal()
        await pair.migrates_again()


async def test_a_vm_that_another_host_has_by_the_record_is_refused_with_its_name() -> None:
    async with arbitrated() as (pair, store):
        await _given_to(store, "gamma")
        view = await pair.migrate()
        assert view.phase == Phase.REFUSED
        assert view.refusals[0].code == "owned_elsewhere"
        assert "gamma" in view.refusals[0].message


async def test_a_record_that_is_lost_to_another_host_meanwhile_rolls_back() -> None:
    async with arbitrated() as (pair, store):
        took: list[asyncio.Task[None]] = []

        def take() -> None:
            took.append(asyncio.get_running_loop().create_task(_given_to(store, "gamma")))

        async with once_at("destination.launch.deciding", take):
            pair.options["alpha"] = replace(pair.options["alpha"])
            store.faults = lambda host, call: Lost.REQUEST_LOST if call == "swap" else None
            migration_id = await pair.ask()
            await until(lambda: took, what="the record is lost")
            store.heal()
            view = await pair.until_over(migration_id)
        assert view.phase == Phase.ROLLED_BACK
        assert view.cause is not None
        assert view.cause.code in ("owned_elsewhere", "arbiter_unavailable")
        assert pair.running_on() == "alpha"


async def _given_to(store: FakeArbiterStore, host: str) -> None:
    found = record(store)
    assert found is not None
    arbiter = FakeArbiter(store, "somebody")
    await arbiter.assign(found, host, epoch=found.epoch + 1, started=True)


async def test_hosts_that_do_not_have_the_same_arbiter_do_not_migrate() -> None:
    async with arbitrated() as (pair, store):
        pair.arbiter = None
        await pair.restart("beta")
        view = await pair.migrate()
        assert view.phase == Phase.REFUSED
        assert "arbiter_differs" in [refusal.code for refusal in view.refusals]
        pair.arbiter = store
        await pair.restart("beta")
        pair.arbiter = None
        await pair.restart("alpha")
        view = await pair.migrate()
        assert view.phase == Phase.REFUSED
        pair.arbiter = store
        await pair.restart("alpha")
        await pair.migrates_again()


async def test_a_vm_is_started_only_where_the_record_has_it() -> None:
    async with arbitrated() as (pair, store):
        pair.guest().may_end = True
        await pair.alpha.service.stop_vm(VM)
        await pair.beta.service.define_vm(pair.alpha.service.vm(VM).spec, dry_run=False)
        with pytest.raises(Conflict) as caught:
            await pair.beta.service.start_vm(VM)
        assert caught.value.code == "owned_elsewhere"
        assert "alpha" in caught.value.message
        store.down.add("alpha")
        with pytest.raises(Unavailable) as away:
            await pair.alpha.service.start_vm(VM)
        assert away.value.code == "arbiter_unavailable"
        with pytest.raises(Unavailable):
            await pair.alpha.service.forget_vm(VM)
        store.heal()
        await pair.alpha.service.forget_vm(VM)
        assert record(store) is None
        await pair.beta.service.start_vm(VM)
        assert says(store, "beta")


# While the guest is copied, and at the switchover -------------------------------------------------


async def test_while_the_arbiter_is_away_the_guest_is_copied_on_and_not_stopped() -> None:
    async with arbitrated() as (pair, store):
        never_converges(pair)
        migration_id = await pair.ask()
        await pair.until_phase(migration_id, Phase.PRECOPY)
        store.is_stalled = True
        await asyncio.sleep(2.0)
        pair.ground.calm()
        await asyncio.sleep(60.0)
        view = pair.view(migration_id)
        assert view.phase == Phase.PRECOPY, view.cause
        assert "ArbiterUnreachable" in {c.type for c in view.conditions}
        assert pair.running_on() == "alpha"
        store.heal()
        view = await pair.until_over(migration_id)
        assert view.phase == Phase.SUCCEEDED, view.cause
        assert not view.conditions, "said while it lasts, and then no more"
        assert max(pair.guest().blackouts_s) < 1.0


@pytest.mark.parametrize("point", AROUND)
@pytest.mark.parametrize("trouble", ["stalled", "alpha cut off", "beta cut off", "slow"])
async def test_an_arbiter_away_at_any_step_costs_a_few_seconds_and_no_person(
    point: str, trouble: str
) -> None:
    async with arbitrated() as (pair, store):
        slow = [0.002]
        store._latency_s = lambda: slow[0]

        def strike() -> None:
            store.is_stalled = trouble == "stalled"
            store.down.update({trouble.split()[0]} & {"alpha", "beta"})
            slow[0] = 0.8 if trouble == "slow" else 0.002

        async with once_at(point, strike) as struck:
            migration_id = await pair.ask()
            await until(lambda: struck, what=point)
            await until(lambda: pair.running_on() is not None, within_s=BLACKOUT_S)
            await asyncio.sleep(30.0)
        slow[0] = 0.002
        store.heal()
        await ends_well(pair, store, migration_id)


@pytest.mark.parametrize("trouble", list(Lost))
async def test_a_request_lost_late_or_repeated_does_no_harm(trouble: Lost) -> None:
    for number in range(1, 9):
        async with arbitrated() as (pair, store):
            before = len(store.log)

            def nth(host: str, call: str, n: int = number, b: int = before) -> Lost | None:
                return trouble if len(pair.arbiter.log) - b == n else None  # type: ignore[union-attr]  # it has one

            store.faults = nth
            migration_id = await pair.ask()
            await pair.until_over(migration_id)
            await asyncio.sleep(60.0)  # what is late has arrived
            assert max(pair.guest().blackouts_s, default=0.0) < BLACKOUT_S
            if pair.view(migration_id).phase != Phase.REFUSED:
                await ends_well(pair, store, migration_id)


@pytest.mark.parametrize("point", AROUND)
@pytest.mark.parametrize("side", ["alpha", "beta"])
@pytest.mark.parametrize("away_s", [0.0, 60.0])
async def test_a_daemon_killed_at_any_step_goes_on_when_it_is_back(
    point: str, side: str, away_s: float
) -> None:
    async with arbitrated() as (pair, store):
        async with once_at(point, lambda: pair.daemons[side].gate.crash()):
            keeper = asyncio.create_task(restarted_when_killed(pair, side, after_s=away_s))
            migration_id = await pair.ask()
            await keeper
        await ends_well(pair, store, migration_id)
