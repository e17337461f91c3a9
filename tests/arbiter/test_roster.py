"""Who is there, by leases; and what `state` says."""

import asyncio
import contextlib
import json
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from migrd.arbiter.arbiter import EtcdArbiter, EtcdOptions, connect_arbiter
from migrd.engine.arbiter_port import ArbiterState
from migrd.engine.threads import in_thread
from tests.arbiter.etcd_server import Cluster
from tests.arbiter.odd_server import Odd, OddServer

PATIENCE_S = 40.0


@pytest.fixture
def prefix(request: pytest.FixtureRequest) -> str:
    return f"/{abs(hash(request.node.nodeid)):x}"


@contextlib.asynccontextmanager
async def joined(
    url: str,
    prefix: str,
    host: str = "alpha",
    *,
    about: dict[str, object] | None = None,
    looks: list[ArbiterState] | None = None,
    ttl_s: int = 5,
) -> AsyncIterator[EtcdArbiter]:
    options = EtcdOptions(
        host,
        (url,),
        prefix=prefix,
        within_s=1.5,
        lease_ttl_s=ttl_s,
        about=about or {},
        check_s=0.1,
    )
    on_look = None if looks is None else looks.append
    async with connect_arbiter(options, on_look=on_look) as arbiter:
        yield arbiter


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - as a reader of `state` would
            await asyncio.sleep(0.02)


def below(cluster: Cluster, prefix: str) -> dict[str, Any]:
    first, end = f"{prefix}/hosts/", f"{prefix}/hosts0"
    asked = {"key": b64(first), "range_end": b64(end)}
    answer: dict[str, Any] = cluster.members[0].ask("/v3/kv/range", asked)
    return answer


def b64(text: str) -> str:
    return b64encode(text.encode()).decode()


async def test_hosts_see_each_other_come_and_go(single: Cluster, prefix: str) -> None:
    url = single.urls[0]
    async with joined(url, prefix) as alpha:
        assert not alpha.state.is_reachable
        assert alpha.state.since_wall_s is None
        await until(lambda: alpha.state.hosts == ("alpha",))
        async with joined(url, prefix, "beta"):
            await until(lambda: alpha.state.hosts == ("alpha", "beta"))
        await until(lambda: alpha.state.hosts == ("alpha",))  # it gave its lease back
    assert "kvs" not in await in_thread(below, single, prefix)


async def test_an_entry_says_who_it_is(single: Cluster, prefix: str) -> None:
    about: dict[str, object] = {"migrd_version": "9.8.7", "peer": "192.0.2.1:7443", "api": None}
    async with joined(single.urls[0], prefix, about=about) as alpha:
        await until(lambda: alpha.state.hosts)
        kvs = (await in_thread(below, single, prefix))["kvs"]
    (kv,) = kvs
    told = json.loads(b64decode(kv["value"]))
    assert (told["host"], told["migrd_version"], told["peer"]) == (
        "alpha",
        "9.8.7",
        "192.0.2.1:7443",
    )
    assert int(kv["lease"])


async def test_a_lease_is_kept_alive_without_a_write(single: Cluster, prefix: str) -> None:
    async with joined(single.urls[0], prefix) as alpha:
        await until(lambda: alpha.state.hosts)
        first = (await in_thread(below, single, prefix))["kvs"][0]
        await asyncio.sleep(7)  # longer than the lease
        later = (await in_thread(below, single, prefix))["kvs"][0]
    assert first == later


async def test_a_lease_that_is_lost_is_taken_anew(single: Cluster, prefix: str) -> None:
    async with joined(single.urls[0], prefix) as alpha:
        await until(lambda: alpha.state.hosts)
        lease = (await in_thread(below, single, prefix))["kvs"][0]["lease"]
        await in_thread(single.members[0].ask, "/v3/lease/revoke", {"ID": lease})

        def is_back() -> bool:
            kvs = below(single, prefix).get("kvs", [{}])
            return kvs[0].get("lease") not in (None, lease)

        async with asyncio.timeout(PATIENCE_S):
            while not await in_thread(is_back):  # noqa: ASYNC110 - etcd tells nobody
                await asyncio.sleep(0.05)
        await until(lambda: alpha.state.hosts == ("alpha",))


async def test_two_hosts_of_one_name_are_told(single: Cluster, prefix: str) -> None:
    url = single.urls[0]
    async with joined(url, prefix, about={"peer": "192.0.2.1:7443"}) as first:
        await until(lambda: first.state.hosts)
        assert first.state.problem is None
        async with joined(url, prefix, about={"peer": "192.0.2.2:7443"}):
            await until(lambda: first.state.problem)
            assert first.state.is_reachable
            assert "192.0.2.2:7443" in str(first.state.problem)
            assert "host.name must be another one" in str(first.state.problem)
        await until(lambda: first.state.problem is None)


async def test_entries_of_others_may_be_anything(single: Cluster, prefix: str) -> None:
    for name in ("gamma", "../x", "", "ü", "a" * 300):
        put = {"key": b64(f"{prefix}/hosts/{name}"), "value": b64("{")}
        await in_thread(single.members[0].ask, "/v3/kv/put", put)
    async with joined(single.urls[0], prefix) as alpha:
        await until(lambda: alpha.state.hosts == ("alpha", "gamma"))


async def test_an_arbiter_that_is_not_there_keeps_nobody_waiting(prefix: str) -> None:
    looks: list[ArbiterState] = []
    async with joined("http://127.0.0.1:9", prefix, looks=looks) as alpha:
        await until(lambda: looks)
        state = alpha.state
    assert (state.is_reachable, state.hosts, state.kind) == (False, None, "etcd")
    assert state.endpoints == ("http://127.0.0.1:9",)
    assert state.since_wall_s is not None
    assert state.problem is not None
    assert "Connection refused" in state.problem
    assert "etcdctl endpoint health" in state.problem


async def test_odd_answers_to_the_roster_are_told_and_end_nothing(prefix: str) -> None:
    header = {"cluster_id": "7", "revision": "9"}
    lease = {"header": header, "ID": "77", "TTL": "5"}
    own = {"key": b64(f"{prefix}/hosts/alpha"), "mod_revision": "3", "value": b64("x")}
    odd: dict[str, Any] = {
        "/v3/lease/grant": lease,
        "/v3/kv/put": {"header": header},
        "/v3/kv/range": {"header": header, "kvs": [own]},
        "/v3/lease/revoke": {"header": header},
        "/v3/lease/keepalive": {"result": lease},
    }
    async with OddServer() as server:
        server.answers = lambda path, body: Odd(body=json.dumps(odd[path]).encode())
        async with joined(server.url, prefix) as alpha:
            await until(lambda: alpha.state.is_reachable)
            assert "another migrd is on the roster as alpha: x" in str(alpha.state.problem)
            for path, answer in (
                ("/v3/kv/range", {"header": header, "kvs": [own, own]}),
                ("/v3/lease/keepalive", {"result": 7}),
                ("/v3/lease/keepalive", {"error": {"message": "x"}}),
            ):
                good, odd[path] = odd[path], answer
                await until(lambda: not alpha.state.is_reachable)
                assert "not an answer" in str(alpha.state.problem)
                odd[path] = good
                await until(lambda: alpha.state.is_reachable)


async def test_a_large_fleet_is_listed_whole(single: Cluster, prefix: str) -> None:
    names = [f"host-{n:04}" for n in range(1200)]

    def fill() -> None:
        for first in range(0, len(names), 100):
            puts = [
                {"request_put": {"key": b64(f"{prefix}/hosts/{name}"), "value": b64("{}")}}
                for name in names[first : first + 100]
            ]
            single.members[0].ask("/v3/kv/txn", {"success": puts}, within_s=20)

    await in_thread(fill)
    async with joined(single.urls[0], prefix) as alpha:
        await until(lambda: alpha.state.hosts)
        assert alpha.state.hosts == ("alpha", *names)


async def test_among_thousands_of_hosts_each_looks_less_often(single: Cluster, prefix: str) -> None:
    names = [f"h{n:04}" for n in range(2000)]
    for first in range(0, len(names), 100):
        puts = [
            {"request_put": {"key": b64(f"{prefix}/hosts/{name}"), "value": b64("{}")}}
            for name in names[first : first + 100]
        ]
        await in_thread(single.members[0].ask, "/v3/kv/txn", {"success": puts})
    looks: list[ArbiterState] = []
    async with joined(single.urls[0], prefix, looks=looks, ttl_s=60) as arbiter:
        await until(lambda: len(arbiter.state.hosts or ()) > len(names))
        seen = len(looks)
        await asyncio.sleep(3.0)
        assert len(looks) == seen  # the next one is due 8 s after the first
