"""Connections of slow, silent, greedy and broken clients."""

import asyncio
import random
from pathlib import Path

import pytest

from migrd.api.auth import Scope, Token
from migrd.api.table import Limits
from migrd.errors import (
    JournalError,
    MigrdError,
    PeerTimedOut,
    Unavailable,
    VmmTimedOut,
)
from tests.api.running import Api, parse_http, running, until


@pytest.fixture
def known_tokens() -> tuple[Token, ...]:
    return (Token("any", Scope.READ, b"0" * 32),)


async def test_a_head_that_trickles_is_answered_408_and_closed(tmp_path: Path) -> None:
    async with running(tmp_path, limits=Limits(head_within_s=0.2)) as api, api.wire() as wire:
        got = parse_http(await wire.trickled(b"GET /healthz HTTP/1.1\r\n", b"X: y\r\n"))
        assert got is not None
        got.problem(408, "too_slow")


async def test_a_second_head_on_the_same_connection_has_a_limit_too(tmp_path: Path) -> None:
    async with running(tmp_path, limits=Limits(head_within_s=0.2)) as api, api.wire() as wire:
        await wire.send(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"200 OK" in await wire.some()
        await asyncio.sleep(0.3)  # idle between requests is no offence
        await wire.send(b"GET /healthz HTTP/1.1\r\nHost: x\r\n")
        assert b"408" in await wire.to_the_end()


async def test_a_body_that_nobody_reads_does_not_start_the_clock_of_a_head(tmp_path: Path) -> None:
    limits = Limits(head_within_s=0.2)
    async with running(tmp_path, limits=limits) as api, api.wire() as wire:
        id_ = await api.begun()
        head = f"POST /v1/migrations/{id_}:cancel HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n"
        await wire.send(head.encode())
        assert b"HTTP/1.1 202" in await wire.some()
        await wire.send(b"{}")  # the answer has been sent already
        await asyncio.sleep(0.4)
        await wire.send(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"HTTP/1.1 200" in await wire.some()


async def test_a_client_that_says_nothing_is_closed(tmp_path: Path) -> None:
    async with running(tmp_path, limits=Limits(head_within_s=0.2)) as api:
        got = await api.raw(b"")
        assert got is not None
        got.problem(408, "too_slow")


async def test_an_idle_connection_is_closed_after_the_keep_alive(tmp_path: Path) -> None:
    async with running(tmp_path, limits=Limits(keepalive_s=0.2)) as api:
        got = await api.raw(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")  # reads to the close
        assert got is not None
        assert got.status == 200


async def test_a_client_that_does_not_read_is_cut_off(tmp_path: Path) -> None:
    async with running(tmp_path, limits=Limits(unread_within_s=0.2)) as api:
        for number in range(50):
            api.service.add_vm(f"vm-{number}")
        _, writer = await asyncio.open_unix_connection(str(api.path), limit=1)
        transport = writer.transport
        transport.pause_reading()  # type: ignore[attr-defined]  # a transport that reads
        writer.write(b"GET /v1/vms HTTP/1.1\r\nHost: x\r\n\r\n" * 30)
        server = api.server._runner.server
        assert server is not None
        await until(lambda: server.connections)
        await until(lambda: not server.connections)
        transport.abort()


async def test_there_are_only_so_many_connections(tmp_path: Path) -> None:
    async with running(tmp_path, limits=Limits(max_connections=3)) as api:
        held = [await asyncio.open_unix_connection(str(api.path)) for _ in range(3)]
        server = api.server._runner.server
        assert server is not None
        await until(lambda: len(server.connections) == 3)
        got = await api.raw(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert got is not None
        assert got.problem(503, "too_many_connections").retryable
        for _, writer in held:
            writer.close()
        await until(lambda: not server.connections)
        assert (await api("GET", "/healthz")).status == 200


async def test_a_flood_on_tcp_does_not_lock_out_the_unix_socket(
    tmp_path: Path, known_tokens: tuple[Token, ...]
) -> None:
    async with running(tmp_path, limits=Limits(max_connections=4)) as api:
        port = await api.server.serve_tcp("127.0.0.1", 0, tokens=known_tokens)
        held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(4)]
        refused = [await reader.read(12) for reader, _ in held[2:]]
        assert refused == [b"HTTP/1.1 503"] * 2
        assert (await api("GET", "/healthz")).status == 200
        for _, writer in held:
            writer.close()


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(64)) + b"\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost x\r\n\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
        b"GET / HTTP/1.1\r\nX: " + b"a" * 20_000 + b"\r\n\r\n",
        b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 500 + b"\r\n",
    ],
)
async def test_bytes_that_are_not_http_are_a_problem_and_the_end(api: Api, sent: bytes) -> None:
    got = await api.raw(sent)
    assert got is not None
    got.problem(400, "bad_http")


@pytest.mark.parametrize(
    "target",
    [
        "/v1/vms/..%2f..%2fetc%2fpasswd",
        "/v1/vms/%00",
        "/v1/vms/%ff%fe",
        "/v1/vms/%E2%98%83",
        "/v1/vms/" + "a" * 500,
        "/v1/vms/-rf",
        "/v1/migrations/;ls",
        "/v1/migrations/'%20or%201=1",
        "/v1/migrations/%0d%0aX-Evil=yes",
    ],
)
async def test_a_name_that_cannot_be_one_is_refused_and_never_looked_up(
    api: Api, target: str
) -> None:
    got = await api.raw(f"GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    assert got is not None
    got.problem(422, "invalid")
    assert "X-Evil" not in got.headers


@pytest.mark.parametrize(
    "target",
    [
        "/v1/../../etc/passwd",
        "//v1/vms",
        "/v1/vms/",
        "/v1/vms/a/b",
        "/%2e%2e/",
        "*",
        "http://[bad/",
        "http://other.example/v1/nothing",
        "/v1/vms/a{b}",
        "/\u2603",
        "/v2/vms",
    ],
)
async def test_a_path_that_does_not_exist_is_a_problem_of_the_clients(
    api: Api, target: str
) -> None:
    sent = f"GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    got = await api.raw(sent.encode())
    assert got is not None
    assert got.status in (400, 404), got
    assert got.headers["Content-Type"] == "application/problem+json"


async def test_random_bytes_never_make_the_server_fail_inside(tmp_path: Path) -> None:
    limits = Limits(keepalive_s=0.1, head_within_s=0.1)
    dice = random.Random(20261123)
    whole = b"POST /v1/migrations?dry_run=1 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    async with running(tmp_path, limits=limits) as api:
        for _ in range(150):
            broken = bytearray(whole)
            for _ in range(dice.randrange(1, 6)):
                broken[dice.randrange(len(broken) - 4)] = dice.randrange(256)
            got = await api.raw(bytes(broken))
            assert got is not None, bytes(broken)
            assert got.status < 500, (bytes(broken), got)


async def test_an_unknown_expectation_is_a_417_on_every_path(api: Api) -> None:
    for where in ("/v1/host", "/nowhere"):
        sent = f"GET {where} HTTP/1.1\r\nHost: x\r\nExpect: miracles\r\nConnection: close\r\n\r\n"
        got = await api.raw(sent.encode())
        assert got is not None
        got.problem(417, "unexpected_expectation")


async def test_a_client_is_told_to_go_on_only_when_nothing_speaks_against_it(api: Api) -> None:
    head = b"POST /v1/migrations HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n"
    async with api.wire() as wire:
        await wire.send(head + b"Content-Type: application/json\r\nContent-Length: 2\r\n\r\n")
        assert await wire.some() == b"HTTP/1.1 100 Continue\r\n\r\n"
        await wire.send(b"{}")
        assert (await wire.some()).startswith(b"HTTP/1.1 422 ")
    got = await api.raw(head + b"Content-Type: text/plain\r\nContent-Length: 2\r\n\r\n")
    assert got is not None
    got.problem(415, "wrong_media_type")


async def test_a_method_that_is_not_possible_is_answered_with_those_that_are(api: Api) -> None:
    got = await api("DELETE", "/v1/migrations")
    got.problem(405, "method_not_allowed")
    assert got.headers["Allow"] == "GET, HEAD, POST"
    assert (await api("GET", "/v1/vms/web-1:start")).headers["Allow"] == "POST"
    (await api("OPTIONS", "/v1/host")).problem(405, "method_not_allowed")


async def test_head_answers_like_get_without_a_body(api: Api) -> None:
    got = await api("HEAD", "/v1/host")
    assert (got.status, got.body) == (200, b"")
    assert (await api("HEAD", "/v1/events")).status == 405


async def test_an_error_inside_says_nothing_of_the_inside(api: Api) -> None:
    api.service.failures["host"] = RuntimeError("/secret/path leaked")
    got = await api("GET", "/v1/host")
    problem = got.problem(500, "internal_error")
    assert b"secret" not in got.body
    assert problem.request_id in problem.detail
    assert problem.request_id == got.headers["X-Request-Id"]


async def test_the_clients_request_id_is_kept_when_it_is_plain(api: Api) -> None:
    assert (await api("GET", "/healthz", X_Request_Id="r-1.a")).headers["X-Request-Id"] == "r-1.a"
    got = await api("GET", "/healthz", X_Request_Id="a b <script>")
    assert "<" not in got.headers["X-Request-Id"]


@pytest.mark.parametrize(
    ("error", "status", "retryable"),
    [
        (VmmTimedOut("no answer in 5 s"), 504, True),
        (PeerTimedOut("no answer in 5 s"), 504, True),
        (Unavailable("no slot", code="queue_full"), 503, True),
        (JournalError("disk full"), 503, True),
    ],
)
async def test_errors_of_the_engine_keep_their_code_and_meaning(
    api: Api, error: MigrdError, status: int, retryable: bool
) -> None:
    api.service.failures["create_migration"] = error
    got = await api("POST", "/v1/migrations", {"vm": "web-1", "destination": "host-b"})
    assert got.problem(status, error.code).retryable is retryable
    assert ("Retry-After" in got.headers) == (status == 503)


async def test_a_call_that_takes_too_long_is_not_broken_off_halfway(tmp_path: Path) -> None:
    async with running(tmp_path, limits=Limits(answer_within_s=0.1)) as api:
        api.service.add_vm("web-1")
        api.service.delays_s["create_migration"] = 0.3
        got = await api("POST", "/v1/migrations", {"vm": "web-1", "destination": "host-b"})
        assert got.problem(504, "timed_out").retryable
        await until(lambda: len(api.service.known) == 1)


async def test_a_deadline_inside_the_engine_is_no_internal_error(api: Api) -> None:
    api.service.failures["plan"] = TimeoutError()
    body = {"destination": "host-b"}
    (await api("POST", "/v1/vms/web-1:plan", body)).problem(504, "timed_out")
