"""Addresses, certificates, tokens, and whether the other hosts can be reached."""

import asyncio
import grp
import os
import socket
import ssl
import stat
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from migrd.api.auth import load_tokens
from migrd.config import Settings, Tls
from migrd.config.checks import is_loopback
from migrd.doctor.finding import Check, Finding, fail, ok, warn
from migrd.errors import ConfigError
from migrd.peer.tls import PeerTls, TlsFiles

SOON_S: Final = 14 * 86400.0
PEER_DEADLINE_S: Final = 5.0
QEMU_TLS_FILES: Final = (
    "ca-cert.pem",
    "server-cert.pem",
    "server-key.pem",
    "client-cert.pem",
    "client-key.pem",
)


def checks(settings: Settings) -> list[Check]:
    return [
        Check("addresses", blocking=partial(look_at_addresses, settings)),
        Check("http interface", blocking=partial(look_at_api, settings)),
        Check("peer certificates", waiting=partial(look_at_peer_tls, settings)),
        Check("migration certificates", blocking=partial(look_at_migration_tls, settings)),
        Check("peers", waiting=partial(look_at_peers, settings)),
    ]


def look_at_addresses(settings: Settings) -> Iterable[Finding]:
    """Blocking: is each address that we listen on one of this host's?"""
    wanted = {
        "migration.listen_host": settings.migration.listen_host,
        "peer.listen_host": settings.peer.listen_host,
        "api.tcp.host": settings.api.tcp.host if settings.api.tcp else None,
    }
    for key, host in wanted.items():
        if host is None:
            continue
        problem = _cannot_listen(host)
        if problem:
            cure = f"set {key} to an address of this host: ip -brief address"
            yield fail("address", f"{key} = {host}: {problem}", cure)
        else:
            yield ok("address", f"{key} = {host}")


def _cannot_listen(host: str) -> str:
    """Any free port will do: our own may be in use by the daemon that runs already."""
    try:
        for family, kind, _, _, address in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM):
            with socket.socket(family, kind) as plain:
                plain.bind(address)
            return ""
    except OSError as failure:
        return failure.strerror or str(failure)
    return "has no address"


def look_at_api(settings: Settings) -> Iterable[Finding]:
    """Blocking."""
    api = settings.api
    if api.socket_group is not None:
        try:
            grp.getgrnam(api.socket_group)
            yield ok("socket group", f"{api.socket_group} may use {api.socket}")
        except KeyError:
            message = f"there is no group {api.socket_group} (api.socket_group)"
            yield fail("socket group", message, f"groupadd --system {api.socket_group}")
    if api.tcp is None:
        return
    if api.tcp.token_file is not None:
        try:
            tokens = load_tokens(api.tcp.token_file)
            yield ok("api tokens", f"{len(tokens)} in {api.tcp.token_file}")
        except ConfigError as error:
            cure = f"mend it, then: chmod 0600 {api.tcp.token_file}"
            yield fail("api tokens", error.message, cure)
    if api.tcp.tls_cert is not None and api.tcp.tls_key is not None:
        yield _look_at_pair("api certificate", api.tcp.tls_cert, api.tcp.tls_key)


def _look_at_pair(name: str, cert: Path, key: Path) -> Finding:
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(cert, key, password=lambda: "")
    except (OSError, ssl.SSLError) as failure:
        return fail(name, f"{cert}, {key}: {_why(failure)}", f"issue {cert} and {key} together")
    return ok(name, f"{cert} and its key belong together")


async def look_at_peer_tls(settings: Settings) -> Iterable[Finding]:
    peer = settings.peer
    if peer.cert is None or peer.key is None or peer.ca is None:
        return [ok("peer certificates", "none set: this host migrates nothing to or from others")]
    try:
        tls = await PeerTls.load(TlsFiles(peer.cert, peer.key, peer.ca), settings.host.name)
    except ConfigError as error:
        cure = "issue certificate and key for this host from the hosts' own authority"
        return [fail("peer certificates", error.message, cure)]
    names = ", ".join(tls.names)
    return [_expiry("peer certificates", f"{peer.cert} for {names}", tls.expires_wall_s)]


def _expiry(name: str, what: str, expires_wall_s: float) -> Finding:
    left_s = expires_wall_s - time.time()
    day = time.strftime("%Y-%m-%d", time.gmtime(expires_wall_s))
    if left_s < 0:
        return fail(name, f"{what}: expired on {day}", "issue a new one")
    if left_s < SOON_S:
        cure = "issue a new one; migrd takes it up without a restart"
        return warn(name, f"{what}: expires on {day}", cure)
    return ok(name, f"{what}, until {day}")


def look_at_migration_tls(settings: Settings) -> Finding:
    """Blocking: QEMU's own five files, tried against each other in memory."""
    name, migration = "migration certificates", settings.migration
    if migration.tls is Tls.OFF:
        if is_loopback(migration.listen_host):
            return ok(name, "off, on the loopback")
        message = f"off: guests' memory crosses the network to {migration.listen_host} in the clear"
        return warn(name, message, 'set migration.tls = "required" and migration.tls_dir')
    directory = migration.tls_dir
    if directory is None:
        return ok(name, "none set: this host migrates nothing to or from others")
    missing = [file for file in QEMU_TLS_FILES if not os.access(directory / file, os.R_OK)]
    if missing:
        message = f"{directory} lacks (or hides from this user): {', '.join(missing)}"
        return fail(name, message, "issue them from the hosts' own authority, names as given")
    for key in ("server-key.pem", "client-key.pem"):
        if (directory / key).stat().st_mode & (stat.S_IRWXO | stat.S_IWGRP):
            return fail(name, f"others may read {directory / key}", f"chmod 0600 {directory / key}")
    try:
        expires_wall_s = _try_out(directory)
    except (OSError, ssl.SSLError) as failure:
        message = f"{directory}: server and client certificate do not fit: {_why(failure)}"
        return fail(name, message, "issue all five files anew, from one authority")
    return _expiry(name, str(directory), expires_wall_s)


def _try_out(directory: Path) -> float:
    """A handshake of server and client in memory; the earlier end of the two, wall clock."""
    ca = directory / "ca-cert.pem"
    server, client = (
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER),
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
    )
    for context, role in ((server, "server"), (client, "client")):
        context.load_verify_locations(ca)
        cert, key = directory / f"{role}-cert.pem", directory / f"{role}-key.pem"
        context.load_cert_chain(cert, key, password=lambda: "")
    client.check_hostname = False
    server.verify_mode = ssl.CERT_REQUIRED
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (
        client.wrap_bio(to_client, to_server),
        server.wrap_bio(to_server, to_client, server_side=True),
    )
    for _ in range(4):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    seen: list[Any] = [end.getpeercert() or {} for end in ends]
    return min(float(ssl.cert_time_to_seconds(cert["notAfter"])) for cert in seen)


def _why(failure: OSError | ssl.SSLError) -> str:
    if isinstance(failure, ssl.SSLCertVerificationError):
        return failure.verify_message
    if isinstance(failure, ssl.SSLError):
        return failure.reason or str(failure)
    return failure.strerror or str(failure)


async def look_at_peers(settings: Settings) -> Iterable[Finding]:
    peer = settings.peer
    if not settings.peers or peer.cert is None or peer.key is None or peer.ca is None:
        return [ok("peers", "none on the roster")]
    try:
        tls = await PeerTls.load(TlsFiles(peer.cert, peer.key, peer.ca), settings.host.name)
    except ConfigError:
        return [warn("peers", "not asked: our own certificate cannot be used", "see above")]
    asked = (_look_at_peer(name, entry.url, tls.client) for name, entry in settings.peers.items())
    return await asyncio.gather(*asked)


async def _look_at_peer(name: str, url: str, tls: ssl.SSLContext) -> Finding:
    """TCP, then TLS with both certificates. A peer that is down is no fault of this host: warn."""
    where = f"peer {name}"
    parts = urlsplit(url)
    writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout(PEER_DEADLINE_S):
            reader, writer = await asyncio.open_connection(
                parts.hostname, parts.port or 443, ssl=tls, server_hostname=name
            )
            # TLS 1.3 tells only now whether the other side takes our certificate
            writer.write(b"OPTIONS / HTTP/1.1\r\nHost: peer\r\nConnection: close\r\n\r\n")
            await writer.drain()
            if not await reader.read(1):
                raise ConnectionResetError(0, "it closed the connection: does it trust our CA?")
    except TimeoutError:
        cure = f"is it up, and does a firewall let {parts.netloc} through?"
        return warn(where, f"{url}: no answer within {PEER_DEADLINE_S:g} s", cure)
    except (OSError, ssl.SSLError) as failure:
        cure = f"on {name}: systemctl status migrd; migrd doctor"
        return warn(where, f"{url}: {_why(failure)}", cure)
    finally:
        if writer is not None:
            writer.transport.abort()
    return ok(where, f"{url} answers")
