"""The simulated arbiter keeps the rules, and its network is as bad as a test asks for."""

import asyncio
import contextlib
from collections.abc import Iterable

import pytest

from migrd.engine.arbiter_port import Arbiter, Ownership
from migrd.errors import ArbiterConflict, ArbiterError, ArbiterUnavailable
from tests.arbiter.rules import MIGRATION, VM, Rules
from tests.fakes.arbiter import LATE_S, FakeArbiter, FakeArbiterStore, Trouble, seeded_troubles
from tests.fakes.virtual_time import now_s


class SimulatedParty:
    """Hosts with one store."""

    def __init__(self) -> None:
        self.store = FakeArbiterStore()
        self.arbiters: dict[str, FakeArbiter] = {}

    def host(self, name: str) -> Arbiter:
        if name not in self.arbiters:
            self.arbiters[name] = FakeArbiter(self.store, name)
        return self.arbiters[name]

    def lose_answers(self, host: str) -> None:
        self.store.faults = lambda caller, call: Trouble.ANSWER_LOST if caller == host else None

    def cut(self, host: str) -> None:
        self.store.down.add(host)

    def heal(self) -> None:
        self.store.heal()

    async def writes(self, vm: str) -> int:
        return self.store.writes_of(f"/{vm}")


@pytest.fixture
def party() -> SimulatedParty:
    return SimulatedParty()


class TestRules(Rules):
    pass


def _once(*troubles: Trouble) -> Iterable[Trouble | None]:
    yield from troubles
    while True:
        yield None


def _strike(store: FakeArbiterStore, *troubles: Trouble) -> None:
    """The next requests meet these, then all is well."""
    coming = iter(_once(*troubles))
    store.faults = lambda host, call: next(coming)


async def _claimed(store: FakeArbiterStore) -> tuple[FakeArbiter, Ownership]:
    alpha = FakeArbiter(store, "alpha")
    return alpha, await alpha.claim(VM, "alpha", 1, MIGRATION)


@pytest.mark.parametrize(
    "trouble", [Trouble.ANSWER_LOST, Trouble.BROKEN, Trouble.REQUEST_LOST, Trouble.REPEATED]
)
async def test_what_one_lost_message_hides_is_found_out_within_the_call(trouble: Trouble) -> None:
    store = FakeArbiterStore()
    alpha, claimed = await _claimed(store)
    _strike(store, trouble)
    given = await alpha.assign(claimed, "beta", epoch=1, started=False, migration_id=MIGRATION)
    assert given.owner == "beta"
    await asyncio.sleep(2 * LATE_S)
    assert await alpha.read(VM) == given
    assert store.writes_of(VM) == 2


async def test_a_late_write_is_ruled_out_by_a_newer_revision() -> None:
    store = FakeArbiterStore()
    alpha, claimed = await _claimed(store)
    store.faults = lambda host, call: Trouble.REQUEST_LATE if call == "swap" else None
    with pytest.raises(ArbiterUnavailable):
        await alpha.assign(claimed, "beta", epoch=1, started=False, migration_id=MIGRATION)
    store.heal()
    kept = await alpha.assign(claimed, "alpha", epoch=1, started=True, migration_id=MIGRATION)
    await asyncio.sleep(2 * LATE_S)
    assert await alpha.read(VM) == kept
    assert store.writes_of(VM) == 2


async def test_a_late_write_takes_effect_where_nobody_ruled_it_out() -> None:
    store = FakeArbiterStore()
    alpha, claimed = await _claimed(store)
    store.faults = lambda host, call: Trouble.REQUEST_LATE if call == "swap" else None
    with pytest.raises(ArbiterUnavailable):
        await alpha.assign(claimed, "beta", epoch=1, started=False, migration_id=MIGRATION)
    store.heal()
    assert await alpha.read(VM) == claimed
    await asyncio.sleep(2 * LATE_S)
    late = await alpha.read(VM)
    assert late is not None
    assert late.owner == "beta"
    assert store.writes_of(VM) == 2


async def test_a_lost_write_that_another_followed_is_not_called_a_conflict() -> None:
    """A conflict says that nothing was changed; here something was."""
    store = FakeArbiterStore()
    alpha, claimed = await _claimed(store)
    beta = FakeArbiter(store, "beta")

    def lose_the_swap(host: str, call: str) -> Trouble | None:
        return Trouble.ANSWER_LOST if (host, call) == ("alpha", "swap") else None

    store.faults = lose_the_swap
    granting = asyncio.create_task(
        alpha.assign(claimed, "beta", epoch=1, started=False, migration_id=MIGRATION)
    )
    await asyncio.sleep(0.1)
    record = await beta.read(VM)
    assert record is not None
    await beta.assign(record, "beta", epoch=1, started=True, migration_id=MIGRATION)
    with pytest.raises(ArbiterUnavailable, match="it says beta"):
        await granting


async def test_without_a_quorum_nothing_is_known_and_a_write_may_come_later() -> None:
    store = FakeArbiterStore()
    alpha, claimed = await _claimed(store)
    store.is_stalled = True
    assert not alpha.state.is_reachable
    started_s = now_s()
    with pytest.raises(ArbiterUnavailable):
        await alpha.assign(claimed, "beta", epoch=1, started=False, migration_id=MIGRATION)
    with pytest.raises(ArbiterUnavailable):
        await alpha.read(VM)
    assert now_s() - started_s < 10
    assert store.writes_of(VM) == 1
    store.heal()
    assert alpha.state.is_reachable
    found = await alpha.read(VM)
    assert found is not None
    assert found.owner == "beta"
    assert store.writes_of(VM) == 2


async def test_what_a_killed_daemon_had_sent_takes_effect() -> None:
    store = FakeArbiterStore()
    alpha, claimed = await _claimed(store)
    task = asyncio.create_task(alpha.assign(claimed, "beta", epoch=1, started=False))
    await asyncio.sleep(store.latency_s() / 4)
    task.cancel()
    await asyncio.wait([task])
    await asyncio.sleep(1)
    found = await alpha.read(VM)
    assert found is not None
    assert found.owner == "beta"


@pytest.mark.parametrize("seed", range(300))
async def test_in_any_trouble_each_revision_is_won_once(seed: int) -> None:
    """Source and destination fight for a granted guest, each with as many tries as it takes."""
    store = FakeArbiterStore()
    alpha, claimed = await _claimed(store)
    beta = FakeArbiter(store, "beta")
    record = await alpha.assign(claimed, "beta", epoch=1, started=False, migration_id=MIGRATION)
    store.faults = seeded_troubles(seed, share=0.6)

    async def fight(arbiter: FakeArbiter, name: str) -> bool:
        for _ in range(200):
            try:
                await arbiter.assign(record, name, epoch=1, started=True, migration_id=MIGRATION)
            except ArbiterConflict:
                return False
            except ArbiterUnavailable:
                continue
            return True
        raise AssertionError("no answer in 200 tries")

    won = await asyncio.gather(fight(alpha, "alpha"), fight(beta, "beta"))
    assert sorted(won) == [False, True]
    await asyncio.sleep(2 * LATE_S)
    store.heal()
    final = await alpha.read(VM)
    assert final is not None
    assert final.owner == ("alpha" if won[0] else "beta")
    assert store.writes_of(VM) == 3


async def test_the_same_seed_is_the_same_trouble() -> None:
    first, again = seeded_troubles(7), seeded_troubles(7)
    drawn = [first("alpha", "get") for _ in range(200)]
    assert drawn == [again("alpha", "get") for _ in range(200)]
    assert {None, *Trouble} == set(drawn)


async def test_a_lease_says_who_is_there() -> None:
    store = FakeArbiterStore()
    alpha, _ = await _claimed(store)
    FakeArbiter(store, "beta")
    seen = [alpha.state.hosts]
    store.hosts.discard("beta")
    seen.append(alpha.state.hosts)
    store.down.add("alpha")
    seen.append(alpha.state.hosts)
    assert seen == [("alpha", "beta"), ("alpha",), None]


@pytest.mark.parametrize("trouble", Trouble)
async def test_every_failure_is_an_error_of_the_arbiter(trouble: Trouble) -> None:
    store = FakeArbiterStore()
    alpha, claimed = await _claimed(store)
    store.faults = lambda host, call: trouble
    for call in (
        alpha.read(VM),
        alpha.claim(VM, "alpha", 1, None),
        alpha.assign(claimed, "alpha", epoch=1, started=True),
        alpha.forget(claimed),
    ):
        with contextlib.suppress(ArbiterError):
            await call
