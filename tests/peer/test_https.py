"""HTTPS between two hosts: strangers, slowness, garbage, and connections that break."""

import asyncio
import contextlib
import ssl
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from structlog.testing import capture_logs

from migrd.core.facts import TransferSettings, VmSpec
from migrd.core.handover import DestinationPhase
from migrd.errors import ConfigError, PeerRefused, PeerTimedOut, PeerUnreachable
from migrd.peer import client, messages, server
from migrd.peer.client import HttpPeer, connect_peer
from migrd.peer.tls import PeerTls
from tests.fakes.peer import FakePeerService
from tests.lab.freezing_proxy import FreezingProxy, freezing_proxy
from tests.peer.fleet import Fleet, host

VM = VmSpec("web-1", "small", {"memory_mib": 64})
SETTINGS = TransferSettings(0.25, 0, peer_name="host-a")


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path / "pki")


@pytest.fixture
def service() -> FakePeerService:
    return FakePeerService()


@contextlib.asynccontextmanager
async def _peer(url_or_port: str | int, tls: PeerTls, **more: Any) -> AsyncIterator[HttpPeer]:
    """A peer that is not kept warm: the test decides when it speaks."""
    url = f"https://127.0.0.1:{url_or_port}" if isinstance(url_or_port, int) else url_or_port
    peer = HttpPeer("host-b", url, tls, **more)
    try:
        yield peer
    finally:
        await peer.close()


# Who may speak ------------------------------------------------------------------------------------


async def test_a_certificate_of_another_ca_delivers_nothing(
    fleet: Fleet, service: FakePeerService, tmp_path: Path
) -> None:
    other = Fleet(tmp_path / "pki", "other")
    files = other.issue("host-a")
    tls = await PeerTls.load(files, "host-a")
    # it does know our CA, so it is the listener alone that refuses
    tls.client.load_verify_locations(cafile=fleet.issue("x").ca)
    async with host(fleet, service) as listener, _peer(listener.port, tls) as peer:
        with pytest.raises(PeerUnreachable) as unreachable:
            await peer.prepare("m1", 1, VM, SETTINGS)
    assert "certificate" in unreachable.value.message
    assert service.calls == []


async def test_a_host_of_another_ca_is_not_believed(
    fleet: Fleet, service: FakePeerService, tmp_path: Path
) -> None:
    tls = await Fleet(tmp_path / "pki", "other").tls("host-a")
    async with host(fleet, service) as listener, _peer(listener.port, tls) as peer:
        with pytest.raises(PeerUnreachable) as unreachable:
            await peer.hello()
    assert "self-signed" in unreachable.value.message or "issuer" in unreachable.value.message


async def test_another_host_of_the_fleet_is_not_taken_for_the_peer(
    fleet: Fleet, service: FakePeerService
) -> None:
    tls = await fleet.tls("host-a")
    async with host(fleet, service, name="host-z") as listener, _peer(listener.port, tls) as peer:
        with pytest.raises(PeerUnreachable) as unreachable:
            await peer.prepare("m1", 1, VM, SETTINGS)
    assert "host-b" in unreachable.value.message
    assert service.calls == []


async def test_without_a_certificate_nobody_is_heard(
    fleet: Fleet, service: FakePeerService
) -> None:
    async with host(fleet, service) as listener:
        bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        bare.load_verify_locations(cafile=fleet.issue("x").ca)
        async with aiohttp.ClientSession() as session:
            with pytest.raises(aiohttp.ClientError):
                await session.post(
                    f"https://127.0.0.1:{listener.port}/peer/v1/hello",
                    ssl=bare,
                    server_hostname="host-b",
                )
    assert service.calls == []


async def test_tls_1_2_is_not_spoken(fleet: Fleet, service: FakePeerService) -> None:
    tls = await fleet.tls("host-a")
    tls.client.minimum_version = ssl.TLSVersion.TLSv1_2
    tls.client.maximum_version = ssl.TLSVersion.TLSv1_2
    async with host(fleet, service) as listener, _peer(listener.port, tls) as peer:
        with pytest.raises(PeerUnreachable):
            await peer.hello()


async def test_a_host_that_is_not_on_the_roster_is_refused_by_name(
    fleet: Fleet, service: FakePeerService
) -> None:
    tls = await fleet.tls("host-x")
    async with host(fleet, service) as listener, _peer(listener.port, tls) as peer:
        with capture_logs() as logged, pytest.raises(PeerRefused) as refused:
            await peer.prepare("m1", 1, VM, SETTINGS)
    assert refused.value.code == "not_on_roster"
    assert "host-x" in refused.value.message
    assert logged[0]["event"] == "peer.stranger"
    assert service.calls == []


async def test_a_host_taken_off_the_roster_is_shut_out_at_once(
    fleet: Fleet, service: FakePeerService
) -> None:
    roster = {"host-a"}
    tls = await fleet.tls("host-a")
    async with host(fleet, service, roster=roster) as listener, _peer(listener.port, tls) as peer:
        await peer.hello()
        roster.clear()
        with capture_logs(), pytest.raises(PeerRefused):
            await peer.hello()  # on the same connection


# Bad messages -------------------------------------------------------------------------------------


async def _post(
    fleet: Fleet, port: int, call: str, body: Any, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, Any], str | None]:
    """As host-a, but saying whatever the test likes."""
    tls = await fleet.tls("host-a")
    async with (
        aiohttp.ClientSession() as session,
        session.post(
            f"https://127.0.0.1:{port}/peer/v1/{call}",
            data=body,
            headers={"Migrd-Protocol": "1"} if headers is None else headers,
            ssl=tls.client,
            server_hostname="host-b",
        ) as response,
    ):
        assert response.content_type == "application/problem+json"
        return response.status, await response.json(), response.headers.get("Migrd-Protocol")


@pytest.mark.parametrize(
    ("call", "body", "status", "code"),
    [
        ("grant", b"", 422, "bad_message"),
        ("grant", b"\xff\xfe", 422, "bad_message"),
        ("grant", b"[" * 100_000, 422, "bad_message"),
        ("grant", b'{"migration_id": "m1", "epoch": 1}', 422, "bad_message"),
        ("grant", b'{"migration_id":"m1","epoch":"1","run_guest":true}', 422, "bad_message"),
        ("grant", b'{"migration_id":"../m","epoch":1,"run_guest":true}', 422, "bad_message"),
        ("grant", b'{"migration_id":"m1","epoch":-1,"run_guest":true}', 422, "bad_message"),
        ("grant", b'{"migration_id":"m1","epoch":1,"run_guest":1}', 422, "bad_message"),
        ("view", b'{"migration_id":"m1","newer_than":0,"wait_s":NaN}', 422, "bad_message"),
        ("teleport", b"{}", 404, "unknown_call"),
        ("a/b", b"{}", 404, "bad_request"),
        ("grant", b"x" * (messages.MAX_REQUEST_BYTES + 1), 413, "message_too_large"),
    ],
)
async def test_a_message_that_is_wrong_is_answered_with_a_problem(
    fleet: Fleet, service: FakePeerService, call: str, body: bytes, status: int, code: str
) -> None:
    async with host(fleet, service) as listener:
        found, problem, protocol = await _post(fleet, listener.port, call, body)
    assert (found, problem["code"], protocol) == (status, code, "1")
    assert service.calls == []


async def test_fields_from_the_future_are_ignored(fleet: Fleet, service: FakePeerService) -> None:
    async with host(fleet, service) as listener:
        body = b'{"migration_id":"m9","epoch":1,"run_guest":true,"warmth":7}'
        status, problem, _ = await _post(fleet, listener.port, "grant", body)
    assert (status, problem["code"]) == (404, "unknown_migration")  # understood


async def test_a_body_that_trickles_is_given_up(
    fleet: Fleet, service: FakePeerService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "BODY_S", 0.2)

    async def trickle() -> AsyncIterator[bytes]:
        with contextlib.suppress(ConnectionError):
            while True:
                yield b"{"
                await asyncio.sleep(0.02)

    async with host(fleet, service) as listener:
        started_s = time.monotonic()
        status, problem, _ = await _post(fleet, listener.port, "grant", trickle())
    assert status == 408
    assert "body" in problem["detail"]
    assert time.monotonic() - started_s < 5


async def test_a_stranger_that_never_shakes_hands_is_let_go(
    fleet: Fleet, service: FakePeerService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "HANDSHAKE_S", 0.2)
    async with host(fleet, service) as listener, asyncio.timeout(5):
        reader, writer = await asyncio.open_connection("127.0.0.1", listener.port)
        assert await reader.read() == b""
        writer.close()


@pytest.mark.parametrize("spoken", [None, "2", "x" * 500])
async def test_another_protocol_is_refused_naming_both_versions(
    fleet: Fleet, service: FakePeerService, spoken: str | None
) -> None:
    headers = {} if spoken is None else {"Migrd-Protocol": spoken}
    async with host(fleet, service) as listener:
        _, problem, protocol = await _post(fleet, listener.port, "hello", b"{}", headers)
    assert (problem["code"], protocol) == ("protocol_mismatch", "1")
    assert "version 1" in problem["detail"]
    assert "none" in problem["detail"] if spoken is None else spoken[:20] in problem["detail"]
    assert service.calls == []


# Bad answers --------------------------------------------------------------------------------------

HELLO = b'{"host":"host-b","migrd_version":"1","protocol":1}'


def _http(body: bytes, status: str = "200 OK", protocol: str | None = "1") -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n"
    head += "" if protocol is None else f"Migrd-Protocol: {protocol}\r\n"
    return f"{head}\r\n".encode() + body


async def _request(reader: asyncio.StreamReader) -> str:
    """Read one request; returns the call."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    length = next(
        int(line.split(":")[1])
        for line in head.splitlines()
        if line.lower().startswith("content-length")
    )
    await reader.readexactly(length)
    return head.split()[1].rsplit("/", 1)[1]


@contextlib.asynccontextmanager
async def _impostor(fleet: Fleet, grant: bytes | None) -> AsyncIterator[tuple[int, list[str]]]:
    """A host-b that greets well and answers everything else with `grant`; None: it hangs up."""
    asked: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                asked.append(await _request(reader))
                if asked[-1] == "hello":
                    writer.write(_http(HELLO))
                elif grant is None:
                    break
                else:
                    writer.write(grant)
                await writer.drain()
        writer.close()

    tls = await fleet.tls("host-b")
    listening = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls.server)
    try:
        yield listening.sockets[0].getsockname()[1], asked
    finally:
        listening.close()
        await listening.wait_closed()


VIEW = (
    b'{"migration_id":"m1","epoch":1,"phase":"running","generation":4,"address":null,'
    b'"reason":null,"vmm_died":false,"transfer_completed":true,"guest_running":true}'
)


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH\r\n",
        _http(b"<html>"),
        _http(b""),
        _http(b"{}"),
        _http(b"[" * 200_000),
        _http(VIEW.replace(b"m1", b"m2")),
        _http(VIEW.replace(b"running", b"dreaming")),
        _http(VIEW.replace(b'"epoch":1', b'"epoch":"1"')),
        _http(VIEW, protocol=None),
        _http(VIEW, protocol="2"),
        _http(VIEW, status="302 Found"),
        _http(b"<html>Bad gateway", status="502 Bad Gateway"),
        _http(b"{}", status="404 Not Found"),
        _http(b" " * (messages.MAX_ANSWER_BYTES + 1)),
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000,
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\nMigrd-Protocol: 1\r\n\r\nhalf",
    ],
)
async def test_an_answer_to_grant_that_makes_no_sense_means_not_known(
    fleet: Fleet, answer: bytes
) -> None:
    grant = messages.GrantRequest(migration_id="m1", epoch=1, run_guest=True)
    tls = await fleet.tls("host-a")
    async with _impostor(fleet, answer) as (port, _), _peer(port, tls) as peer:
        with pytest.raises(PeerTimedOut) as unknown:
            await peer._ask_view("grant", grant, "m1", 1.0)
    assert "host-b" in unknown.value.message


async def test_the_same_answer_when_it_is_well_formed_is_understood(fleet: Fleet) -> None:
    newer, tls = _http(VIEW[:-1] + b',"mood":"good"}'), await fleet.tls("host-a")
    async with _impostor(fleet, newer) as (port, _), _peer(port, tls) as peer:
        view = await peer.grant("m1", 1, run_guest=True)
    assert view.phase is DestinationPhase.RUNNING


async def test_a_later_migrd_that_refuses_us_is_named_with_both_versions(fleet: Fleet) -> None:
    refusal = _http(b"{}", status="409 Conflict", protocol="2")
    tls = await fleet.tls("host-a")
    async with _impostor(fleet, refusal) as (port, _), _peer(port, tls) as peer:
        with pytest.raises(PeerRefused) as refused:
            await peer.grant("m1", 1, run_guest=True)
    assert refused.value.code == "protocol_mismatch"
    assert "version 2" in refused.value.message
    assert "this host 1" in refused.value.message


async def test_a_connection_cut_at_the_answer_is_tried_once_more_and_then_not_known(
    fleet: Fleet,
) -> None:
    tls = await fleet.tls("host-a")
    async with _impostor(fleet, None) as (port, asked), _peer(port, tls) as peer:
        with pytest.raises(PeerTimedOut) as unknown:
            await peer.grant("m1", 1, run_guest=True)
    assert unknown.value.code == "peer_connection_lost"
    assert asked == ["hello", "grant", "grant"]


def _port_of(proxy: FreezingProxy) -> int:
    assert isinstance(proxy.address, tuple)
    return proxy.address[1]


# Connections --------------------------------------------------------------------------------------


async def test_connections_are_kept_and_a_grant_finds_one_open(
    fleet: Fleet, service: FakePeerService
) -> None:
    async with (
        host(fleet, service) as listener,
        freezing_proxy(("127.0.0.1", 0), (listener.host, listener.port)) as proxy,
        _peer(_port_of(proxy), await fleet.tls("host-a")) as peer,
    ):
        await peer.warm()
        await peer.prepare("m1", 1, VM, SETTINGS)
        waiting = [
            asyncio.create_task(peer.view("m1", newer_than=9, wait_s=20.0)) for _ in range(3)
        ]
        async with asyncio.timeout(10):
            while proxy.accepted < 5:  # noqa: ASYNC110 - a proxy tells nobody
                await asyncio.sleep(0.005)
        for _ in range(20):
            await peer.grant("m1", 1, run_guest=False)
            await peer.hello()
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)
        assert proxy.accepted == 5  # two kept warm, three held by views


@pytest.mark.parametrize("abruptly", [False, True])
async def test_a_kept_connection_that_was_closed_meanwhile_is_replaced(
    fleet: Fleet, service: FakePeerService, abruptly: bool
) -> None:
    async with (
        host(fleet, service) as listener,
        freezing_proxy(("127.0.0.1", 0), (listener.host, listener.port)) as proxy,
        _peer(_port_of(proxy), await fleet.tls("host-a")) as peer,
    ):
        await peer.prepare("m1", 1, VM, SETTINGS)
        proxy.cut(abruptly=abruptly)  # and at once, before the client can have noticed
        view = await peer.grant("m1", 1, run_guest=True)
    assert view.phase is DestinationPhase.RUNNING


async def test_a_peer_that_restarts_is_found_again(fleet: Fleet, service: FakePeerService) -> None:
    tls = await fleet.tls("host-a")
    async with host(fleet, service) as listener:
        port = listener.port
        async with _peer(port, tls) as peer:
            await peer.hello()
    async with _peer(port, tls) as peer:
        with pytest.raises(PeerUnreachable):
            await peer.prepare("m1", 1, VM, SETTINGS)
        async with host(fleet, service, port=port):
            await peer.prepare("m1", 1, VM, SETTINGS)
        with pytest.raises((PeerUnreachable, PeerTimedOut)):
            await peer.hello()
        with pytest.raises(PeerUnreachable):
            await peer.hello()
        async with host(fleet, service, port=port):
            assert (await peer.view("m1")).phase is DestinationPhase.RECEIVING


async def test_a_host_name_that_nobody_knows_is_unreachable(fleet: Fleet) -> None:
    async with _peer("https://no-such-host.invalid:7441", await fleet.tls("host-a")) as peer:
        with pytest.raises(PeerUnreachable):
            await peer.hello()


async def test_a_port_where_nobody_listens_is_unreachable(fleet: Fleet) -> None:
    async with _peer(1, await fleet.tls("host-a")) as peer:
        with pytest.raises(PeerUnreachable) as unreachable:
            await peer.grant("m1", 1, run_guest=True)
    assert "refused" in unreachable.value.message.lower()
    assert "object at" not in unreachable.value.message


async def test_a_host_that_does_not_complete_a_handshake_is_unreachable(
    fleet: Fleet, service: FakePeerService
) -> None:
    async with (
        host(fleet, service) as listener,
        freezing_proxy(("127.0.0.1", 0), (listener.host, listener.port)) as proxy,
        _peer(_port_of(proxy), await fleet.tls("host-a")) as peer,
    ):
        proxy.freeze()
        with pytest.raises(PeerUnreachable):
            await peer._exchange("hello", b"{}", within_s=0.3)


async def test_a_closing_listener_lets_a_grant_end(fleet: Fleet, service: FakePeerService) -> None:
    tls = await fleet.tls("host-a")
    async with host(fleet, service) as listener:
        peer = HttpPeer("host-b", f"https://127.0.0.1:{listener.port}", tls)
        await peer.prepare("m1", 1, VM, SETTINGS)
        service.slow_s = 0.3
        granting = asyncio.create_task(peer.grant("m1", 1, run_guest=True))
        async with asyncio.timeout(10):
            while ("host-a", "grant") not in service.calls:  # noqa: ASYNC110 - nobody is told
                await asyncio.sleep(0.005)
    await asyncio.wait([granting])
    await peer.close()
    assert service.incoming["m1"].view.phase is DestinationPhase.RUNNING


async def test_the_status_of_a_peer_is_kept_fresh(fleet: Fleet, service: FakePeerService) -> None:
    tls = await fleet.tls("host-a")
    async with host(fleet, service) as listener, _peer(listener.port, tls) as peer:
        assert peer.status.up is None
        assert (await peer.warm()).up is True
        assert peer.status.migrd_version == "9.8.7"
    async with _peer(listener.port, tls) as peer:
        status = await peer.warm()
    assert status.up is False
    assert "host-b" in str(status.error)


async def test_each_call_is_told_to_the_metrics(fleet: Fleet, service: FakePeerService) -> None:
    told: list[tuple[str, str, str, float]] = []

    def observe(*one: Any) -> None:
        told.append(one)

    tls = await fleet.tls("host-a")
    async with host(fleet, service) as listener, _peer(listener.port, tls, observe=observe) as peer:
        await peer.hello()
        with pytest.raises(PeerRefused):
            await peer.view("m9")
    assert [one[:3] for one in told] == [
        ("host-b", "hello", "ok"),
        ("host-b", "view", "problem"),
    ]


@pytest.mark.parametrize(
    "url", ["http://host-b:1", "host-b:1", "https://", "https://h:1/path", "unix:///x"]
)
async def test_an_address_that_is_none_is_a_mistake_of_the_configuration(
    fleet: Fleet, url: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        async with connect_peer("host-b", url, await fleet.tls("host-a")):
            pass
    assert repr(url) in refused.value.message


async def test_an_address_in_use_is_a_mistake_of_the_configuration(
    fleet: Fleet, service: FakePeerService
) -> None:
    async with host(fleet, service) as listener:
        with pytest.raises(ConfigError) as refused:
            async with host(fleet, service, port=listener.port):
                pass
    assert str(listener.port) in refused.value.message


def test_idle_connections_are_closed_by_the_client_first() -> None:
    """Else the server's close would cross a GRANT on its way."""
    assert client._IDLE_S < server.KEEP_ALIVE_S / 1.5
    assert client.WARM_EVERY_S * 4 < client._IDLE_S


async def test_a_message_for_each_field_of_the_settings(fleet: Fleet) -> None:
    """A field added to the settings and forgotten in the message would be lost in silence."""
    odd = replace(
        SETTINGS,
        multifd_channels=3,
        auto_converge=True,
        postcopy=True,
        postcopy_preempt=True,
        tls=False,
    )
    assert messages.WireSettings.of(odd).value() == odd
