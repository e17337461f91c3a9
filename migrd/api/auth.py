"""Who asks, and what they may.

    unix socket   the kernel says who connected (SO_PEERCRED); the socket's mode and group decide
                  who can connect at all. Identity: "uid:1000/alice".
    TCP           a bearer token, of which migrd keeps the SHA-256 alone. Identity: "token:<name>".

Rules
- Root and the daemon's own user always may use the unix socket: they could change the list anyway.
- Peer credentials are those of the moment of connect(2); a group list also looks at the
  supplementary groups (SO_PEERGROUPS, Linux 4.13).
- Every known token is compared, in constant time, so an answer's timing says nothing.
- Names of users come from /etc/passwd alone, read in a thread: a directory service that hangs must
  not hang an API call. Who is not there is called by number.

A token file has one token per line, in either form; `#` begins a comment:

    <name> read|write sha256:<64 hex digits>     made by `new_token`
    <token>                                       plain, at least 16 characters, may write; then the
                                                  file must not be readable by others
"""

import asyncio
import hashlib
import hmac
import os
import re
import secrets
import socket
import stat
import struct
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Final
from weakref import WeakKeyDictionary

from aiohttp import web

from migrd.api.problems import NotAuthenticated
from migrd.engine.threads import in_thread
from migrd.errors import ConfigError, NotAuthorized

_UCRED: Final = struct.Struct("3i")
_SO_PEERGROUPS: Final = 59
_MOST_GROUP_BYTES: Final = 1024
_MOST_NAMES: Final = 1024
_TOKEN_CHARACTERS: Final = re.compile(r"[A-Za-z0-9._~+/=-]{16,512}")
_HASHED: Final = re.compile(
    r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]{0,63})\s+(?P<scope>read|write)\s+"
    r"sha256:(?P<digest>[0-9a-f]{64})"
)


class Scope(StrEnum):
    """What a caller may."""

    OPEN = "open"
    """Needed by nobody: /healthz."""
    READ = "read"
    WRITE = "write"


@dataclass(frozen=True)
class Identity:
    """Who asks; `label` is what the journal keeps."""

    label: str
    scope: Scope

    def require(self, needed: Scope) -> None:
        """Raises NotAuthorized when this is not allowed to it."""
        if needed is Scope.WRITE and self.scope is not Scope.WRITE:
            raise NotAuthorized(f"{self.label} may read, but not change anything", code="read_only")


@dataclass(frozen=True)
class Token:
    """One token as it is kept: never the token itself."""

    name: str
    scope: Scope
    digest: bytes


def new_token(name: str, scope: Scope) -> tuple[str, str]:
    """(a fresh token of 256 bits, the line for the token file)."""
    token = secrets.token_urlsafe(32)
    digest = hashlib.sha256(token.encode()).hexdigest()
    return token, f"{name} {scope.value} sha256:{digest}"


def load_tokens(path: Path) -> tuple[Token, ...]:
    """The tokens of a file. Blocking. Raises ConfigError naming the file and line."""
    try:
        with path.open(encoding="utf-8") as file:
            mode = os.fstat(file.fileno()).st_mode
            lines = file.read(1 << 20).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the token file {path}: {error}") from error
    tokens = tuple(
        _token_of(line, f"{path}:{number}", mode)
        for number, line in enumerate(lines, start=1)
        if line.strip() and not line.lstrip().startswith("#")
    )
    if not tokens:
        raise ConfigError(f"the token file {path} holds no token")
    if mode & stat.S_IWOTH:
        raise ConfigError(f"anybody may write the token file {path}: chmod it to 0600")
    names = [token.name for token in tokens]
    if len(set(names)) != len(names):
        raise ConfigError(f"the token file {path} has two tokens of the same name")
    return tokens


def _token_of(line: str, where: str, mode: int) -> Token:
    text = line.strip()
    if match := _HASHED.fullmatch(text):
        return Token(match["name"], Scope(match["scope"]), bytes.fromhex(match["digest"]))
    if not _TOKEN_CHARACTERS.fullmatch(text):
        raise ConfigError(
            f"{where} is neither `<name> read|write sha256:<64 hex digits>` nor a token of "
            "16 to 512 letters, digits and ._~+/=-"
        )
    if mode & (stat.S_IROTH | stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(f"{where} is a plain token that others may read: chmod it to 0600")
    digest = hashlib.sha256(text.encode()).digest()
    return Token(f"plain-{digest[:4].hex()}", Scope.WRITE, digest)


@dataclass(frozen=True)
class Credentials:
    """The other end of a unix socket, when it connected."""

    uid: int
    gids: frozenset[int]


def credentials_of(sock: socket.socket) -> Credentials:
    """SO_PEERCRED and, where the kernel tells, SO_PEERGROUPS. Raises OSError."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    _, uid, gid = _UCRED.unpack(raw)
    try:
        more = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _MOST_GROUP_BYTES)
    except OSError:  # more groups than fit (ERANGE), or an older kernel: the primary group counts
        more = b""
    groups = struct.unpack(f"{len(more) // 4}I", more[: len(more) // 4 * 4])
    return Credentials(uid & 0xFFFFFFFF, frozenset((gid & 0xFFFFFFFF, *groups)))


@dataclass
class Gate:
    """Tells who a request comes from, or refuses it."""

    allow_uids: frozenset[int] = frozenset()
    allow_gids: frozenset[int] = frozenset()
    tokens: tuple[Token, ...] = ()
    """Set by the TCP listener: without tokens there is none."""
    _names: dict[int, str] = field(default_factory=dict)
    _connected: MutableMapping[asyncio.BaseTransport, Identity] = field(
        default_factory=WeakKeyDictionary
    )
    """Who is at the other end of a unix socket does not change while it is connected."""

    async def identify(self, request: web.Request) -> Identity:
        """Raises NotAuthenticated, or NotAuthorized for somebody known but not on the lists."""
        transport = request.transport
        if transport is None:
            raise NotAuthenticated("the connection is gone")
        known = self._connected.get(transport)
        if known is not None:
            return known
        sock = transport.get_extra_info("socket")
        if sock is None:
            raise NotAuthenticated("the connection is gone")
        if sock.family != socket.AF_UNIX:
            return self._of_token(request)
        identity = await self._of_unix(sock)
        self._connected[transport] = identity
        return identity

    async def _of_unix(self, sock: socket.socket) -> Identity:
        try:
            who = credentials_of(sock)
        except OSError as error:
            raise NotAuthenticated("the kernel does not say who is connected") from error
        if not self._is_listed(who):
            raise NotAuthorized(f"uid {who.uid} is not on the list of this socket")
        return Identity(await self._label(who.uid), Scope.WRITE)

    def _is_listed(self, who: Credentials) -> bool:
        if not self.allow_uids and not self.allow_gids:
            return True  # the socket's mode has decided
        if who.uid in (0, os.getuid()) or who.uid in self.allow_uids:
            return True
        return bool(who.gids & self.allow_gids)

    async def _label(self, uid: int) -> str:
        if uid not in self._names:
            if len(self._names) >= _MOST_NAMES:
                self._names.clear()
            self._names[uid] = await in_thread(_label_of, uid)
        return self._names[uid]

    def _of_token(self, request: web.Request) -> Identity:
        kind, _, token = request.headers.get("Authorization", "").partition(" ")
        if kind.lower() != "bearer" or not token:
            raise NotAuthenticated("send Authorization: Bearer <token>")
        digest = hashlib.sha256(token.strip().encode("utf-8", "surrogateescape")).digest()
        found: Token | None = None
        for known in self.tokens:  # all of them: no early end
            if hmac.compare_digest(known.digest, digest):
                found = known
        if found is None:
            raise NotAuthenticated("this token is not known here")
        return Identity(f"token:{found.name}", found.scope)


def _label_of(uid: int, passwd: str = "/etc/passwd") -> str:
    """`uid:0/root`; the number alone for whoever is not in the local file. Blocking."""
    try:
        with open(passwd, encoding="utf-8", errors="replace") as file:
            for line in file:
                fields: Sequence[str] = line.split(":")
                if len(fields) > 2 and fields[2] == str(uid) and fields[0].isprintable():
                    return f"uid:{uid}/{fields[0]}"
    except OSError:
        pass  # no such file in a container: the number says enough
    return f"uid:{uid}"
