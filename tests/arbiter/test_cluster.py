"""Three members of etcd, killed and stopped under the arbiter's hands."""

import asyncio
import contextlib
from base64 import b64encode
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from migrd.arbiter.arbiter import EtcdArbiter, EtcdOptions, connect_arbiter
from migrd.engine.arbiter_port import ArbiterState, Ownership
from migrd.engine.threads import in_thread
from migrd.errors import ArbiterConflict, ArbiterUnavailable
from tests.arbiter.etcd_server import Cluster
from tests.arbiter.rules import MIGRATION, VM

WITHIN_S = 3.0
PATIENCE_S = 60.0
FIGHTERS = ("alpha", "beta", "gamma", "delta")


@contextlib.asynccontextmanager
async def joined(
    cluster: Cluster,
    host: str = "alpha",
    *,
    check_s: float = 3600.0,
    on_change: Callable[[ArbiterState], None] | None = None,
) -> AsyncIterator[EtcdArbiter]:
    options = EtcdOptions(host, cluster.urls, within_s=WITHIN_S, check_s=check_s)
    async with connect_arbiter(options, on_change=on_change) as arbiter:
        yield arbiter


async def until_it_answers(call: Callable[[], Awaitable[Ownership | None]]) -> Ownership | None:
    """While a leader is elected, calls fail by their deadline; the caller tries again."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            with contextlib.suppress(ArbiterUnavailable):
                return await call()


async def until_state(arbiter: EtcdArbiter, *, is_reachable: bool) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while arbiter.state.is_reachable is not is_reachable:  # noqa: ASYNC110 - as a reader would
            await asyncio.sleep(0.05)


def _preferred(arbiter: EtcdArbiter, cluster: Cluster) -> int:
    return cluster.urls.index(arbiter._gateway.endpoints[arbiter._gateway._preferred])


@pytest.mark.parametrize("how", ["killed", "stopped"])
async def test_with_one_member_gone_all_goes_on(trio: Cluster, how: str) -> None:
    async with joined(trio) as arbiter:
        claimed = await arbiter.claim(VM, "alpha", 1, MIGRATION)
        leader = await in_thread(trio.leader)
        member = trio.members[_preferred(arbiter, trio)]
        if member is leader:  # this test is about losing one that does not lead
            arbiter._gateway._avoid(member.url)
            member = trio.members[_preferred(arbiter, trio)]
        await in_thread(member.kill if how == "killed" else member.stop)
        given = await arbiter.assign(
            claimed, "beta", epoch=1, started=False, migration_id=MIGRATION
        )
        assert (await arbiter.read(VM)) == given
        if how == "stopped":
            member.resume()
            assert (await arbiter.read(VM)) == given


@pytest.mark.parametrize("how", ["killed", "stopped"])
async def test_without_a_quorum_nothing_is_known_and_nothing_is_doubled(
    trio: Cluster, how: str
) -> None:
    async with joined(trio) as arbiter:
        claimed = await arbiter.claim(VM, "alpha", 1, MIGRATION)
        for member in trio.members[:2]:
            await in_thread(member.kill if how == "killed" else member.stop)

        async def give() -> Ownership:
            return await arbiter.assign(
                claimed, "beta", epoch=1, started=False, migration_id=MIGRATION
            )

        for call in (arbiter.read(VM), give(), arbiter.claim(VM, "alpha", 1, None)):
            with pytest.raises(ArbiterUnavailable):
                await call
        for member in trio.members[:2]:
            if how == "stopped":
                member.resume()
        await in_thread(trio.start)
        found = await until_it_answers(lambda: arbiter.read(VM))
        assert found is not None
        assert found.owner in ("alpha", "beta"), "before, or as was written; nothing else"
        given = await until_it_answers(give)
        assert given is not None
        assert given.owner == "beta"
        assert await arbiter.read(VM) == given


async def test_state_says_when_the_quorum_is_lost_and_when_it_is_back(trio: Cluster) -> None:
    told: list[ArbiterState] = []
    async with joined(trio, check_s=0.2, on_change=told.append) as arbiter:
        await until_state(arbiter, is_reachable=True)
        assert arbiter.state.hosts == ("alpha",)
        for member in trio.members[1:]:
            await in_thread(member.kill)
        await until_state(arbiter, is_reachable=False)
        state = arbiter.state
        assert state.hosts is None
        assert state.problem is not None
        assert trio.urls[1] in state.problem
        await in_thread(trio.start)
        await until_state(arbiter, is_reachable=True)
    seen = [state.is_reachable for state in told]
    assert seen == [True, False] * (len(seen) // 2) + [True], "one event for each change"
    assert False in seen


async def _fight(
    arbiter: EtcdArbiter, host: str, until: asyncio.Event
) -> tuple[dict[int, str], int]:
    """Take the record again and again: revision -> migration of each that was won, and of how
    many tries nothing is known."""
    won: dict[int, str] = {}
    unknown, tries = 0, 0
    while not until.is_set():
        tries += 1
        migration = f"{host}-{tries}"
        try:
            record = await arbiter.read(VM)
            assert record is not None
            mine = await arbiter.assign(record, host, epoch=1, started=True, migration_id=migration)
        except ArbiterConflict:
            continue
        except ArbiterUnavailable:
            unknown += 1
            continue
        assert (mine.owner, mine.migration_id) == (host, migration)
        assert mine.revision not in won
        won[mine.revision] = migration
    return won, unknown


async def test_when_the_leader_is_killed_amid_writes_each_revision_is_won_once(
    trio: Cluster,
) -> None:
    async with contextlib.AsyncExitStack() as stack:
        arbiters = {host: await stack.enter_async_context(joined(trio, host)) for host in FIGHTERS}
        first = await arbiters["alpha"].claim(VM, "alpha", 1, "first")
        over = asyncio.Event()
        fights = [
            asyncio.create_task(_fight(arbiter, host, over)) for host, arbiter in arbiters.items()
        ]
        for _ in range(2):
            await asyncio.sleep(1.0)
            leader = await in_thread(trio.leader)
            await in_thread(leader.kill)
            await until_it_answers(lambda: arbiters["alpha"].read(VM))
            await in_thread(trio.start)
        await asyncio.sleep(0.5)
        over.set()
        results = await asyncio.gather(*fights)
        last = await until_it_answers(lambda: arbiters["alpha"].read(VM))
    everybody: dict[int, str] = {first.revision: "first"}
    for won, _ in results:
        assert not everybody.keys() & won.keys(), "two clients won one revision"
        everybody |= won
    unknown = sum(count for _, count in results)
    assert last is not None
    assert len(everybody) > 10, "they did fight"
    if last.revision in everybody:
        assert everybody[last.revision] == last.migration_id
    puts = await in_thread(_version, trio)
    assert len(everybody) <= puts <= len(everybody) + unknown


def _version(cluster: Cluster) -> int:
    """How many times the record has been put, by etcd's own count."""
    key = b64encode(f"/migrd/vms/{VM}".encode()).decode()
    return int(cluster.members[0].ask("/v3/kv/range", {"key": key})["kvs"][0]["version"])
