"""A peer whose answer makes no sense has not refused: the outcome is not known."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from migrd.core.handover import DestinationPhase
from migrd.errors import PeerRefused, PeerTimedOut
from migrd.peer import messages
from tests.peer.fleet import Fleet, peer_at

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
        _http(VIEW + b" " * messages.MAX_ANSWER_BYTES),
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000,
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\nMigrd-Protocol: 1\r\n\r\nhalf",
    ],
)
async def test_an_answer_to_grant_that_makes_no_sense_means_not_known(
    fleet: Fleet, answer: bytes
) -> None:
    grant = messages.GrantRequest(migration_id="m1", epoch=1, run_guest=True)
    tls = await fleet.tls("host-a")
    async with _impostor(fleet, answer) as (port, _), peer_at(port, tls) as peer:
        with pytest.raises(PeerTimedOut) as unknown:
            await peer._ask_view("grant", grant, "m1", 1.0)
    assert "host-b" in unknown.value.message


async def test_the_same_answer_when_it_is_well_formed_is_understood(fleet: Fleet) -> None:
    newer, tls = _http(VIEW[:-1] + b',"mood":"good"}'), await fleet.tls("host-a")
    async with _impostor(fleet, newer) as (port, _), peer_at(port, tls) as peer:
        view = await peer.grant("m1", 1, run_guest=True)
    assert view.phase is DestinationPhase.RUNNING


async def test_a_later_migrd_that_refuses_us_is_named_with_both_versions(fleet: Fleet) -> None:
    refusal = _http(b"{}", status="409 Conflict", protocol="2")
    tls = await fleet.tls("host-a")
    async with _impostor(fleet, refusal) as (port, _), peer_at(port, tls) as peer:
        with pytest.raises(PeerRefused) as refused:
            await peer.grant("m1", 1, run_guest=True)
    assert refused.value.code == "protocol_mismatch"
    assert "version 2" in refused.value.message
    assert "this host 1" in refused.value.message


async def test_a_connection_cut_at_the_answer_is_tried_once_more_and_then_not_known(
    fleet: Fleet,
) -> None:
    tls = await fleet.tls("host-a")
    async with _impostor(fleet, None) as (port, asked), peer_at(port, tls) as peer:
        with pytest.raises(PeerTimedOut) as unknown:
            await peer.grant("m1", 1, run_guest=True)
    assert unknown.value.code == "peer_connection_lost"
    assert asked == ["hello", "grant", "grant"]
