"""Who may speak between daemons, and what becomes of a message that is wrong."""

import asyncio
import contextlib
import ssl
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from structlog.testing import capture_logs

from migrd.errors import PeerRefused, PeerUnreachable
from migrd.peer import messages, server
from migrd.peer.tls import PeerTls
from tests.fakes.peer import FakePeerService
from tests.peer.fleet import SETTINGS, VM, Fleet, host, peer_at


async def test_a_certificate_of_another_ca_delivers_nothing(
    fleet: Fleet, service: FakePeerService, tmp_path: Path
) -> None:
    other = Fleet(tmp_path / "pki", "other")
    files = other.issue("host-a")
    tls = await PeerTls.load(files, "host-a")
    # it does know our CA, so it is the listener alone that refuses
    tls.client.load_verify_locations(cafile=fleet.issue("x").ca)
    async with host(fleet, service) as listener, peer_at(listener.port, tls) as peer:
        with pytest.raises(PeerUnreachable) as unreachable:
            await peer.prepare("m1", 1, VM, SETTINGS)
    assert "certificate" in unreachable.value.message
    assert service.calls == []


async def test_a_host_of_another_ca_is_not_believed(
    fleet: Fleet, service: FakePeerService, tmp_path: Path
) -> None:
    tls = await Fleet(tmp_path / "pki", "other").tls("host-a")
    async with host(fleet, service) as listener, peer_at(listener.port, tls) as peer:
        with pytest.raises(PeerUnreachable) as unreachable:
            await peer.hello()
    assert "self-signed" in unreachable.value.message or "issuer" in unreachable.value.message


async def test_another_host_of_the_fleet_is_not_taken_for_thepeer_at(
    fleet: Fleet, service: FakePeerService
) -> None:
    tls = await fleet.tls("host-a")
    async with host(fleet, service, name="host-z") as listener, peer_at(listener.port, tls) as peer:
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
    async with host(fleet, service) as listener, peer_at(listener.port, tls) as peer:
        with pytest.raises(PeerUnreachable):
            await peer.hello()


async def test_a_host_that_is_not_on_the_roster_is_refused_by_name(
    fleet: Fleet, service: FakePeerService
) -> None:
    tls = await fleet.tls("host-x")
    async with host(fleet, service) as listener, peer_at(listener.port, tls) as peer:
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
    async with host(fleet, service, roster=roster) as listener, peer_at(listener.port, tls) as peer:
        await peer.hello()
        roster.clear()
        with capture_logs(), pytest.raises(PeerRefused):
            await peer.hello()  # on the same connection


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
