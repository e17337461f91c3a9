"""What comes back is strange, and nothing is concluded from it."""

import asyncio
import contextlib
import json
from base64 import b64encode
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from migrd.arbiter.access import Access, AccessFiles
from migrd.arbiter.etcd import EtcdStore
from migrd.arbiter.gateway import Gateway
from migrd.arbiter.ownership import Ownerships
from migrd.engine.arbiter_port import Ownership
from migrd.errors import ArbiterConflict, ArbiterUnavailable
from tests.arbiter.etcd_server import Cluster
from tests.arbiter.odd_server import Odd, OddServer
from tests.arbiter.rules import MIGRATION, VM

PREFIX = "/odd"
KEY = f"{PREFIX}/vms/{VM}"
HEADER = {"cluster_id": "7", "member_id": "1", "revision": "9"}
RECORD = Ownership(VM, "alpha", 1, True, 9, migration_id=MIGRATION)


def b64(text: str | bytes) -> str:
    return b64encode(text.encode() if isinstance(text, str) else text).decode()


def record_text(**changed: Any) -> bytes:
    known = {
        "version": 1,
        "vm": VM,
        "owner": "alpha",
        "epoch": 1,
        "started": True,
        "run_guest": True,
        "migration_id": None,
    }
    return json.dumps({k: v for k, v in (known | changed).items() if v is not ...}).encode()


def range_of(record: bytes, **changed: Any) -> dict[str, Any]:
    kv = {"key": b64(KEY), "mod_revision": "9", "version": "1", "value": b64(record)} | changed
    return {"header": HEADER, "kvs": [kv], "count": "1"}


@contextlib.asynccontextmanager
async def client(*urls: str, within_s: float = 1.5, **more: Any) -> AsyncIterator[Ownerships]:
    gateway = Gateway(urls, await Access.load(AccessFiles(**more)), within_s=within_s)
    # from the first endpoint on, whichever hash
    gateway._preferred = 0
    try:
        yield Ownerships(EtcdStore(gateway), prefix=PREFIX, within_s=within_s)
    finally:
        await gateway.close()


@pytest.fixture
async def server() -> AsyncIterator[OddServer]:
    async with OddServer() as odd:
        yield odd


ODD_ANSWERS = {
    "nothing": Odd(body=b""),
    "garbage": Odd(body=b"\xff\x00garbage"),
    "half": Odd(body=b'{"header": {"cluster_id": "7", "rev'),
    "cut": Odd(body=b'{"header": {"cluster_id"', is_cut=True),
    "silent": Odd(is_silent=True),
    "a list": Odd(body=b"[]"),
    "a number": Odd(body=b"7"),
    "null": Odd(body=b"null"),
    "deep": Odd(body=b"[" * 100_000),
    "deep objects": Odd(body=b'{"header":' * 50_000),
    "no header": Odd(body=b'{"kvs": []}'),
    "a header of text": Odd(body=b'{"header": "x"}'),
    "revision as a number": Odd(body=b'{"header": {"cluster_id": "7", "revision": 9}}'),
    "revision of zero": Odd(body=b'{"header": {"cluster_id": "7", "revision": "0"}}'),
    "revision too large": Odd(
        body=b'{"header": {"cluster_id": "7", "revision": "99999999999999999999"}}'
    ),
    "revision in words": Odd(body=b'{"header": {"cluster_id": "7", "revision": "nine"}}'),
    "keys of text": Odd(body=json.dumps({"header": HEADER, "kvs": "x"}).encode()),
    "a key of another": Odd(body=json.dumps(range_of(record_text(), key=b64("/x"))).encode()),
    "not base64": Odd(body=json.dumps(range_of(record_text(), value="&&&")).encode()),
    "two keys": Odd(
        body=json.dumps({"header": HEADER, "kvs": range_of(record_text())["kvs"] * 2}).encode()
    ),
    "too long": Odd(body=b" " * (9 << 20)),
    "500": Odd(status=500, body=b"Internal Server Error"),
    "503": Odd(status=503, body=b'{"error":"x","message":"no leader","code":14}'),
    "a page": Odd(status=404, body=b"<html>nginx</html>"),
    "a redirect": Odd(status=302, body=b""),
    "codes of text": Odd(status=400, body=b'{"message": 7, "code": "x"}'),
    "permission": Odd(status=403, body=b'{"message":"etcdserver: permission denied","code":7}'),
    "words to the terminal": Odd(status=400, body=b'{"message":"\\u001b[31m\\n\\n","code":3}'),
}


@pytest.mark.parametrize("odd", ODD_ANSWERS.values(), ids=ODD_ANSWERS)
async def test_an_odd_answer_is_no_answer(server: OddServer, odd: Odd) -> None:
    server.answers = lambda path, body: odd
    async with client(server.url, within_s=0.9) as arbiter:
        for call in (
            arbiter.read(VM),
            arbiter.claim(VM, "alpha", 1, None),
            arbiter.assign(RECORD, "beta", epoch=1, started=False),
            arbiter.forget(RECORD),
        ):
            with pytest.raises(ArbiterUnavailable) as unavailable:
                await call
            assert unavailable.value.message.isprintable()
            assert len(unavailable.value.message) < 2000


ODD_RECORDS = {
    "empty": b"",
    "garbage": b"\xff\xfe",
    "a list": b"[]",
    "deep": b"[" * 5000,
    "no owner": record_text(owner=...),
    "empty owner": record_text(owner=""),
    "owner null": record_text(owner=None),
    "epoch as text": record_text(epoch="1"),
    "epoch as truth": record_text(epoch=True),
    "epoch below zero": record_text(epoch=-1),
    "epoch too large": record_text(epoch=2**63),
    "epoch a fraction": record_text(epoch=1.5),
    "started as number": record_text(started=1),
    "started as text": record_text(started="false"),
    "of another VM": record_text(vm="web-2"),
    "with a field more": record_text(colour="blue"),
    "without version": record_text(version=...),
    "version as truth": record_text(version=True),
    "of a newer migrd": record_text(version=2, colour="blue"),
    "too long": record_text(owner="x" * 5000),
}


@pytest.mark.parametrize("value", ODD_RECORDS.values(), ids=ODD_RECORDS)
async def test_a_record_that_is_not_understood_is_not_used_and_not_written_over(
    server: OddServer, value: bytes
) -> None:
    server.answers = lambda path, body: Odd(body=json.dumps(range_of(value)).encode())
    async with client(server.url) as arbiter:
        with pytest.raises(ArbiterUnavailable) as unavailable:
            await arbiter.read(VM)
        assert unavailable.value.code == "arbiter_record_unreadable"
        assert KEY in unavailable.value.message
        with pytest.raises(ArbiterUnavailable):
            await arbiter.claim(VM, "alpha", 9, None)
    assert "/v3/kv/txn" not in server.paths


async def test_a_record_of_a_newer_migrd_says_what_to_do(server: OddServer) -> None:
    value = record_text(version=2, colour="blue")
    server.answers = lambda path, body: Odd(body=json.dumps(range_of(value)).encode())
    async with client(server.url) as arbiter:
        with pytest.raises(ArbiterUnavailable, match=r"version is 2.*upgrade migrd"):
            await arbiter.read(VM)


async def test_a_good_member_makes_up_for_an_odd_one(server: OddServer, single: Cluster) -> None:
    server.answers = lambda path, body: Odd(status=500)
    async with client(server.url, single.urls[0]) as arbiter:
        claimed = await arbiter.claim("good", "alpha", 1, None)
        assert await arbiter.read("good") == claimed
    assert server.paths == ["/v3/kv/range"], "asked once, then the other one is preferred"


def _odd_txn(odd: Odd) -> Callable[[str, bytes], Odd | None]:
    return lambda path, body: odd if path == "/v3/kv/txn" else None


@pytest.mark.parametrize(
    "odd",
    [
        Odd(is_silent=True, is_delivered=True),
        Odd(body=b"garb", is_delivered=True),
        Odd(body=b"garb", is_cut=True, is_delivered=True),
        Odd(status=503, is_delivered=True),
        Odd(status=503, body=b'{"message":"no leader","code":14}', is_delivered=True),
    ],
    ids=["silent", "garbage", "cut", "503", "no leader"],
)
async def test_a_write_that_took_effect_without_an_answer_is_found_and_not_repeated(
    single: Cluster, odd: Odd
) -> None:
    vm = f"lost-{odd.status}-{len(odd.body)}-{odd.is_cut}"
    async with (
        OddServer(single.urls[0]) as server,
        OddServer(single.urls[0]) as other,
        client(server.url, other.url, within_s=3.0) as arbiter,
    ):
        server.answers = other.answers = lambda path, body: None
        claimed = await arbiter.claim(vm, "alpha", 1, MIGRATION)
        server.answers = _odd_txn(odd)
        server.paths.clear()
        given = await arbiter.assign(
            claimed, "beta", epoch=1, started=False, migration_id=MIGRATION
        )
        assert given.revision > claimed.revision
        assert server.paths == ["/v3/kv/txn"]
        assert other.paths == ["/v3/kv/range"], "read, and found to be there"
        assert await arbiter.read(vm) == given


async def test_a_write_that_never_arrived_is_made_on_another_member(single: Cluster) -> None:
    vm = "never-arrived"
    async with (
        OddServer(single.urls[0]) as server,
        client(server.url, single.urls[0], within_s=3.0) as arbiter,
    ):
        server.answers = lambda path, body: None
        claimed = await arbiter.claim(vm, "alpha", 1, MIGRATION)
        server.answers = _odd_txn(Odd(is_silent=True))
        given = await arbiter.assign(
            claimed, "beta", epoch=1, started=False, migration_id=MIGRATION
        )
        assert await arbiter.read(vm) == given
        with pytest.raises(ArbiterConflict):
            await arbiter.assign(claimed, "gamma", epoch=1, started=False)


async def test_members_of_two_clusters_are_not_believed_both(server: OddServer) -> None:
    async with OddServer() as other:
        server.answers = lambda path, body: Odd(body=json.dumps(range_of(record_text())).encode())
        foreign = range_of(record_text(owner="mallory")) | {"header": {**HEADER, "cluster_id": "8"}}
        other.answers = lambda path, body: Odd(body=json.dumps(foreign).encode())
        async with client(server.url, other.url) as arbiter:
            record = await arbiter.read(VM)
            assert record is not None
            assert record.owner == "alpha"
            server.answers = lambda path, body: Odd(status=500)
            with pytest.raises(ArbiterUnavailable, match="of cluster 8, and another one, 7"):
                await arbiter.read(VM)


async def test_a_cluster_that_went_back_in_time_is_not_believed(server: OddServer) -> None:
    server.answers = lambda path, body: Odd(body=json.dumps(range_of(record_text())).encode())
    async with client(server.url) as arbiter:
        await arbiter.read(VM)
        restored = range_of(record_text(), mod_revision="5")
        restored["header"] = {**HEADER, "revision": "6"}
        server.answers = lambda path, body: Odd(body=json.dumps(restored).encode())
        with pytest.raises(ArbiterUnavailable, match="went back from 9 to 6: it was restored"):
            await arbiter.read(VM)


async def test_a_call_ends_by_its_deadline_whatever_the_members_do(server: OddServer) -> None:
    server.answers = lambda path, body: Odd(is_silent=True)
    loop = asyncio.get_running_loop()
    async with client(*[server.url] * 9, within_s=0.6) as arbiter:
        started_s = loop.time()
        with pytest.raises(ArbiterUnavailable, match=r"within 0.6 s, to read the record of web-1"):
            await arbiter.read(VM)
        quick_s = loop.time() - started_s
    async with client(*[server.url] * 9, within_s=2.4) as arbiter:
        started_s = loop.time()
        with pytest.raises(ArbiterUnavailable):
            await arbiter.read(VM)
        assert quick_s < loop.time() - started_s
