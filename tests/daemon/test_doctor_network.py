"""The doctor on addresses, certificates, tokens, and the other hosts."""

import asyncio
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trustme

from migrd.doctor import network
from migrd.doctor.finding import Finding, Status
from tests.daemon.hosts import Host, bad


def test_an_address_of_another_host_is_told(host: Host) -> None:
    host.more = 'listen_host = "192.0.2.77"\n'
    (finding,) = bad(network.look_at_addresses(host.settings()))
    assert finding.status is Status.FAIL
    assert "migration.listen_host = 192.0.2.77" in finding.message


def test_a_group_that_is_not_there_and_a_bad_token_are_told(host: Host) -> None:
    host.token.write_text("short\n")
    host.more = '[api]\nsocket_group = "no-such-group"\n'
    group, token = bad(network.look_at_api(host.settings()))
    assert group.cure == "groupadd --system no-such-group"
    assert str(host.token) in token.message


def test_an_api_certificate_without_its_key_is_told(host: Host) -> None:
    tls = host.root / "tls"
    finding = network._look_at_pair("x", tls / "server-cert.pem", tls / "client-key.pem")
    assert finding.status is Status.FAIL
    assert "KEY_VALUES_MISMATCH" in finding.message


async def test_a_peer_certificate_of_another_host_is_told(host: Host) -> None:
    host.name = "host-x"
    (finding,) = bad(await network.look_at_peer_tls(await asyncio.to_thread(host.settings)))
    assert finding.status is Status.FAIL
    assert "host-a" in finding.message


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda h: (h.root / "tls/client-key.pem").unlink(), "lacks (or hides"),
        (lambda h: (h.root / "tls/server-key.pem").chmod(0o644), "others may read"),
        (lambda h: (h.root / "tls/ca-cert.pem").write_text("x"), "do not fit"),
        (
            lambda h: (h.root / "tls/client-cert.pem").write_bytes(
                (h.root / "tls/server-cert.pem").read_bytes()
            ),
            "KEY_VALUES_MISMATCH",
        ),
    ],
)
def test_certificates_of_qemu_that_do_not_fit_are_told(
    host: Host, wrong: Callable[[Host], object], said: str
) -> None:
    assert bad(network.look_at_migration_tls(host.settings())) == []
    wrong(host)
    finding = network.look_at_migration_tls(host.settings())
    assert finding.status is Status.FAIL
    assert said in finding.message


def test_a_client_certificate_of_a_strange_authority_is_told(host: Host) -> None:
    host.issue(trustme.CA(), "client")
    host.authority.cert_pem.write_to_path(str(host.root / "tls" / "ca-cert.pem"))
    finding = network.look_at_migration_tls(host.settings())
    assert finding.status is Status.FAIL


def test_a_certificate_that_ends_soon_is_told_before_it_does() -> None:
    now = time.time()
    assert network._expiry("x", "c", now - 1).status is Status.FAIL
    assert network._expiry("x", "c", now + 86400).status is Status.WARN
    assert network._expiry("x", "c", now + 100 * 86400).status is Status.OK


def test_a_stream_in_the_clear_is_told_unless_it_stays_on_the_host(host: Host) -> None:
    host.more = 'tls = "off"\n'
    assert network.look_at_migration_tls(host.settings()).status is Status.OK
    host.more = 'tls = "off"\nlisten_host = "192.0.2.1"\n'
    assert "in the clear" in network.look_at_migration_tls(host.settings()).message


@asynccontextmanager
async def listening(
    host: Host, authority: trustme.CA, *, answers: bool = True
) -> AsyncIterator[int]:
    """A peer's listener: mutual TLS under `authority`, as host-b."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("host-b").configure_cert(context)
    authority.configure_trust(context)
    context.verify_mode = ssl.CERT_REQUIRED

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if await reader.readline() and answers:
            writer.write(b"HTTP/1.1 404 Not Found\r\n\r\n")
            await writer.drain()
        elif not answers:
            await reader.read()
        writer.transport.abort()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def peer_finding(host: Host, port: int) -> Finding:
    host.more = f'[peers.host-b]\nurl = "https://127.0.0.1:{port}"\n'
    settings = await asyncio.to_thread(host.settings)
    (finding,) = await network.look_at_peers(settings)
    return finding


async def test_a_peer_that_answers_is_found(host: Host) -> None:
    async with listening(host, host.authority) as port:
        assert (await peer_finding(host, port)).status is Status.OK


async def test_a_peer_of_another_authority_is_told(host: Host) -> None:
    async with listening(host, trustme.CA()) as port:
        finding = await peer_finding(host, port)
    assert finding.status is Status.WARN
    assert "certificate" in finding.message


async def test_a_peer_that_does_not_trust_us_is_told(host: Host) -> None:
    stranger = trustme.CA()
    async with listening(host, host.authority) as port:
        # our certificate comes from elsewhere, while we trust theirs
        host.issue(stranger, "server")
        both = host.authority.cert_pem.bytes() + stranger.cert_pem.bytes()
        (host.root / "tls" / "ca-cert.pem").write_bytes(both)
        finding = await peer_finding(host, port)
    assert finding.status is Status.WARN


async def test_a_peer_that_is_down_or_silent_is_told(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as plain:
        plain.bind(("127.0.0.1", 0))
        port = plain.getsockname()[1]
    finding = await peer_finding(host, port)
    assert finding.status is Status.WARN
    assert "systemctl status migrd" in finding.cure
    monkeypatch.setattr(network, "PEER_DEADLINE_S", 0.3)
    async with listening(host, host.authority, answers=False) as silent:
        finding = await peer_finding(host, silent)
    assert "no answer within 0.3 s" in finding.message
