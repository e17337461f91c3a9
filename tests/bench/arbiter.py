"""etcd as the arbiter: what a read and a compare-and-swap take, beside the same request sent bare.

    alone    one client, one call after the other: ours and the bare request by turns
    crowd    many clients at once, each with records of its own: writes per second
    leases   keep-alives per second, which cost a leader no write

Of one member, and of three, all on this machine's loopback and disk: each write waits for that
disk's fsync (three times, with three members: on machines of their own they would wait once, and
for a network). The quantiles are what `tests/fleet` draws latencies from.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import tempfile
import time
from base64 import b64encode
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Final

import aiohttp

from migrd.arbiter.access import Access, AccessFiles
from migrd.arbiter.answers import Answer, KeepAliveAnswer, LeaseAnswer
from migrd.arbiter.etcd import EtcdStore
from migrd.arbiter.gateway import LEASE_GRANT, LEASE_KEEPALIVE, LEASE_REVOKE, Gateway
from migrd.arbiter.ownership import Ownerships
from migrd.engine.arbiter_port import Ownership
from migrd.engine.threads import in_thread
from tests.arbiter.etcd_server import Cluster
from tests.bench.figures import Figure, Judge, Table, median, percentile
from tests.setup import debian

CALLS_A_RUN: Final = 60
CLIENTS: Final = 32
CROWD_S: Final = 0.5
"""For each run."""
WITHIN_S: Final = 30.0
SHARES: Final = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999)
PREFIX: Final = "/bench"


async def run(runs: int, calls_a_run: int = CALLS_A_RUN) -> Table:
    binary = await in_thread(debian.etcd)
    table = Table()
    for members in (1, 3):
        table.add(await _cluster(binary, members, runs, calls_a_run))
    return table


async def _cluster(binary: Path, members: int, runs: int, calls_a_run: int) -> Table:
    with tempfile.TemporaryDirectory(prefix="migrd-bench-") as directory:
        cluster = Cluster(binary, Path(directory), members)
        try:
            await in_thread(cluster.start)
            return await _measured(cluster, runs, calls_a_run)
        finally:
            await in_thread(cluster.close)


async def _measured(cluster: Cluster, runs: int, calls_a_run: int) -> Table:
    named = f"etcd of {len(cluster.members)}"
    async with ours_of(cluster) as (arbiter, gateway), Bare.on(cluster) as bare:
        reads, swaps = await _alone(arbiter, bare, runs * calls_a_run)
        writes_per_s = await _crowd(arbiter, CROWD_S * runs)
        leases_per_s = await _leases(gateway, CROWD_S * runs)
    figures = []
    for what, (ours, theirs) in (("read", reads), ("compare-and-swap", swaps)):
        figures += [
            Figure(
                f"{named}: {what}, median",
                *("ms", median(ours), median(theirs), "the bare request", Judge.RATIO, 1.5),
            ),
            Figure(
                f"{named}: {what}, p99",
                *("ms", percentile(ours, 0.99), percentile(theirs, 0.99), "the bare request"),
                *(Judge.RATIO, 2.0),
            ),
        ]
    told = " ".join(f"{share:g}:{percentile(swaps[0], share):.2f}" for share in SHARES)
    notes = [
        f"{named}: compare-and-swap, quantiles in ms of {len(swaps[0])}: {told} "
        f"1:{max(swaps[0]):.2f}",
        f"{named}: {CLIENTS} clients at once: {writes_per_s:.0f} writes/s, "
        f"{leases_per_s:.0f} leases kept alive/s",
    ]
    return Table.of("arbiter", runs, figures, notes)


@contextlib.asynccontextmanager
async def ours_of(cluster: Cluster) -> AsyncIterator[tuple[Ownerships, Gateway]]:
    access = await Access.load(AccessFiles())
    gateway = Gateway(cluster.urls, access, within_s=WITHIN_S)
    try:
        yield Ownerships(EtcdStore(gateway), prefix=PREFIX, within_s=WITHIN_S), gateway
    finally:
        await gateway.close()


class Bare:
    """The same requests, as bytes, and nothing made of the answers but the next revision."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self._url = url
        self._key = b64encode(f"{PREFIX}/vms/bare".encode()).decode()
        value = '{"version":1,"vm":"bare","owner":"alpha","epoch":1,"started":true}' + " " * 50
        self._value = b64encode(value.encode()).decode()
        self._revision = "0"

    @classmethod
    @contextlib.asynccontextmanager
    async def on(cls, cluster: Cluster) -> AsyncIterator[Bare]:
        async with aiohttp.ClientSession() as session:
            yield cls(session, cluster.urls[0])

    async def read(self) -> None:
        await self._post("/v3/kv/range", {"key": self._key})

    async def swap(self) -> None:
        compare = {
            "key": self._key,
            "target": "MOD",
            "result": "EQUAL",
            "mod_revision": self._revision,
        }
        put = {"request_put": {"key": self._key, "value": self._value}}
        look = {"request_range": {"key": self._key}}
        message = {"compare": [compare], "success": [put], "failure": [look]}
        answer = json.loads(await self._post("/v3/kv/txn", message))
        assert answer["succeeded"]
        self._revision = answer["header"]["revision"]

    async def _post(self, path: str, message: object) -> bytes:
        async with self._session.post(f"{self._url}{path}", data=json.dumps(message)) as answer:
            assert answer.status == 200
            return await answer.read()


Times = tuple[list[float], list[float]]
"""Ours and theirs, in ms."""


async def _alone(arbiter: Ownerships, bare: Bare, calls: int) -> tuple[Times, Times]:
    record = await arbiter.claim("ours", "alpha", 1, "m")
    await bare.swap()
    reads: Times = ([], [])
    swaps: Times = ([], [])
    for number in range(calls):
        reads[0].append(await _ms(lambda: arbiter.read("ours")))
        reads[1].append(await _ms(bare.read))
        before_s = time.perf_counter()
        record = await _given(arbiter, record, number)
        swaps[0].append((time.perf_counter() - before_s) * 1e3)
        swaps[1].append(await _ms(bare.swap))
    return reads, swaps


async def _given(arbiter: Ownerships, record: Ownership, number: int) -> Ownership:
    return await arbiter.assign(
        record, "alpha", epoch=number + 2, started=True, migration_id="m-7f3a9c"
    )


async def _ms(call: Callable[[], Awaitable[object]]) -> float:
    before_s = time.perf_counter()
    await call()
    return (time.perf_counter() - before_s) * 1e3


async def _crowd(arbiter: Ownerships, for_s: float) -> float:
    """Writes per second of CLIENTS, each of which waits for its own answers only."""
    until_s = time.perf_counter() + for_s
    written = itertools.count()

    async def one(name: str) -> None:
        record = await arbiter.claim(name, "alpha", 1, "m")
        while time.perf_counter() < until_s:
            record = await _given(arbiter, record, next(written))

    await asyncio.gather(*(one(f"crowd-{n}") for n in range(CLIENTS)))
    return next(written) / for_s


async def _leases(gateway: Gateway, for_s: float) -> float:
    wanted = {"TTL": "600"}
    leases: list[LeaseAnswer] = [
        await gateway.call(LEASE_GRANT, wanted, LeaseAnswer) for _ in range(CLIENTS)
    ]
    until_s = time.perf_counter() + for_s
    kept = itertools.count()

    async def one(lease: LeaseAnswer) -> None:
        while time.perf_counter() < until_s:
            await gateway.call(LEASE_KEEPALIVE, {"ID": str(lease.id)}, KeepAliveAnswer)
            next(kept)

    await asyncio.gather(*map(one, leases))
    for lease in leases:
        await gateway.call(LEASE_REVOKE, {"ID": str(lease.id)}, Answer)
    return next(kept) / for_s
