"""Who may speak at all: certificates of one private CA, both ways, TLS 1.3.

    files (cert, key, ca) --read in a thread--> TlsContexts --swapped whole--> PeerTls
                                                                server: new handshakes
                                                                client: new connections

- A renewed certificate, or another CA, takes effect without a restart: the listener's context
  asks, in its SNI callback, for the newest one. Files that do not fit together (a renewal half
  done) leave the old ones in place, and `problem` says so.
- New files are tried before they are used: both roles shake hands in memory. OpenSSL then says
  itself what the other hosts would: expired, not signed by the CA, not meant for servers.
- There are no revocation lists: a host is shut out by taking its name off the roster.
"""

import os
import ssl
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import structlog

from migrd.core.certificate import identity
from migrd.engine.threads import in_thread
from migrd.errors import ConfigError

_FORBIDDEN_KEY_BITS: Final = stat.S_IWGRP | stat.S_IXGRP | stat.S_IRWXO

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class TlsFiles:
    """PEM files: this host's certificate (chain), its key, and the CA of all hosts."""

    cert: Path
    key: Path
    ca: Path


@dataclass(frozen=True)
class TlsContexts:
    """What one set of files makes."""

    server: ssl.SSLContext
    client: ssl.SSLContext
    names: tuple[str, ...]
    expires_wall_s: float


class PeerTls:
    """The newest usable contexts. Made by `load`."""

    def __init__(self, files: TlsFiles, host: str, contexts: TlsContexts, stamp: object) -> None:
        self._files = files
        self._host = host
        self._contexts = contexts
        self._stamp = stamp
        self.problem: str | None = None
        """Why newer files are not in use; None when the newest are."""
        self._listening = contexts.server
        self._listening.sni_callback = self._swap

    @classmethod
    async def load(cls, files: TlsFiles, host: str) -> "PeerTls":
        """Raises ConfigError naming file and cure. `host` must be named in the certificate."""
        stamp, contexts = await in_thread(_load, files, host)
        return cls(files, host, contexts, stamp)

    @property
    def server(self) -> ssl.SSLContext:
        """For the listener; stays the same object."""
        return self._listening

    @property
    def client(self) -> ssl.SSLContext:
        """For the next connection; changes with the files."""
        return self._contexts.client

    @property
    def expires_wall_s(self) -> float:
        """End of this host's certificate, seconds since 1970."""
        return self._contexts.expires_wall_s

    @property
    def names(self) -> tuple[str, ...]:
        """What this host's certificate calls it."""
        return self._contexts.names

    async def reload_if_changed(self) -> bool:
        """Look at the files; True when newer ones are in use now. Raises nothing: see `problem`."""
        try:
            if await in_thread(_stamp_of, self._files) == self._stamp:
                return False
            stamp, contexts = await in_thread(_load, self._files, self._host)
        except ConfigError as failure:
            if failure.message != self.problem:
                log.error("peer.tls_not_reloaded", error=failure.message)
            self.problem = failure.message
            return False
        self._stamp, self._contexts, self.problem = stamp, contexts, None
        log.info("peer.tls_reloaded", expires_wall_s=contexts.expires_wall_s)
        return True

    def _swap(self, connection: Any, name: str | None, context: ssl.SSLContext) -> None:
        """During a handshake, in the event loop: no file is touched here."""
        connection.context = self._contexts.server


def _stamp_of(files: TlsFiles) -> tuple[object, ...]:
    stamps: list[object] = []
    for path in (files.cert, files.key, files.ca):
        try:
            seen = path.stat()
        except OSError as failure:
            raise _unreadable(path, failure) from failure
        stamps.append((seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns))
    return tuple(stamps)


def _load(files: TlsFiles, host: str) -> tuple[object, TlsContexts]:
    stamp = _stamp_of(files)  # before reading: a change meanwhile is then seen as one
    _check_files(files)
    server = _context(ssl.PROTOCOL_TLS_SERVER, files)
    server.verify_mode = ssl.CERT_REQUIRED
    server.num_tickets = 0  # connections are kept; nothing is resumed
    client = _context(ssl.PROTOCOL_TLS_CLIENT, files)
    cert = _try_out(files, server, client)
    names = identity(cert)
    if host.lower() not in names:
        raise ConfigError(
            f"{files.cert}: names {', '.join(names) or 'nobody'}, but this host is {host}: the"
            " other hosts would not believe it; issue a certificate with that DNS name"
        )
    expires_wall_s = float(ssl.cert_time_to_seconds(cert["notAfter"]))
    return stamp, TlsContexts(server, client, names, expires_wall_s)


def _check_files(files: TlsFiles) -> None:
    for path in (files.cert, files.key, files.ca):
        try:
            with path.open("rb") as file:
                is_pem = b"-----BEGIN" in file.read(1 << 20)
        except OSError as failure:
            raise _unreadable(path, failure) from failure
        if not is_pem:
            raise ConfigError(f"{path}: no PEM file: convert it (openssl ... -outform PEM)")
    mode = files.key.stat().st_mode
    if mode & _FORBIDDEN_KEY_BITS:
        raise ConfigError(
            f"{files.key}: mode {stat.S_IMODE(mode):04o} lets others at this host's key:"
            f" chmod 0600 {files.key}"
        )


def _unreadable(path: Path, failure: OSError) -> ConfigError:
    return ConfigError(
        f"{path}: {failure.strerror}: user {os.geteuid()}, as which migrd runs, must be able to"
        " read it"
    )


def _context(protocol: int, files: TlsFiles) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        # without the password function OpenSSL would ask on the terminal
        context.load_cert_chain(files.cert, files.key, password=_no_password(files.key))
    except ssl.SSLError as failure:
        if failure.reason == "KEY_VALUES_MISMATCH":
            raise ConfigError(
                f"{files.key}: not the key of {files.cert}: they must be issued together"
            ) from failure
        raise ConfigError(
            f"{files.cert}, {files.key}: not usable ({failure.reason or failure})"
        ) from failure
    try:
        context.load_verify_locations(cafile=files.ca)
    except ssl.SSLError as failure:
        raise ConfigError(f"{files.ca}: not usable ({failure.reason or failure})") from failure
    return context


def _no_password(key: Path) -> Callable[[], str]:
    def ask() -> str:
        raise ConfigError(f"{key}: protected by a passphrase, which a daemon cannot be asked for")

    return ask


def _try_out(files: TlsFiles, server: ssl.SSLContext, client: ssl.SSLContext) -> Any:
    """Both ends of a handshake in memory; returns the certificate as the other side sees it."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    try:
        client.check_hostname = False
        ends = [
            client.wrap_bio(to_client, to_server),
            server.wrap_bio(to_server, to_client, server_side=True),
        ]
        for _ in range(4):  # flights of TLS 1.3, and one to spare
            for end in ends:
                try:
                    end.do_handshake()
                except ssl.SSLWantReadError:
                    continue
        return ends[1].getpeercert()
    except ssl.SSLCertVerificationError as failure:
        raise ConfigError(
            f"{files.cert}: not valid under {files.ca}: {failure.verify_message}"
            f" (now is {time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime())} UTC)"
        ) from failure
    except ssl.SSLError as failure:
        raise ConfigError(f"{files.cert}: not usable ({failure.reason or failure})") from failure
    finally:
        client.check_hostname = True
