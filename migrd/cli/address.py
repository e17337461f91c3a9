"""Where the daemon is, and why it cannot be reached.

The answer to "connection refused" at 3 a.m. is: which address, why, and what to do. All of that is
said here, once.
"""

import errno
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import aiohttp

from migrd.cli.exits import CommandError, NotUnderstood, Unreachable, Usage
from migrd.cli.text import printable

DEFAULT_SOCKET: Final = Path("/run/migrd/api.sock")


@dataclass(frozen=True)
class Address:
    """A unix socket, or a URL with what proves who we are."""

    socket: Path = DEFAULT_SOCKET
    url: str | None = None
    token: str | None = None
    cacert: Path | None = None

    def __str__(self) -> str:
        return printable(self.url if self.url is not None else str(self.socket))

    @property
    def base(self) -> str:
        """What request paths are appended to; the host is ignored on a unix socket."""
        return "http://migrd" if self.url is None else self.url.rstrip("/")


def locate(
    socket: str | None, url: str | None, token_file: str | None, cacert: str | None
) -> Address:
    """The address from options (or their environment variables). Raises Usage."""
    if socket and url:
        raise Usage("--socket and --url are two different addresses", cure="give one of them")
    if not url:
        return Address(socket=Path(socket) if socket else DEFAULT_SOCKET)
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise Usage(
            f"{printable(url)} is not an address of the API",
            cure="write --url https://host:port",
        )
    if parts.username or parts.password:
        raise Usage(
            "a password in --url would be seen by every user of this machine",
            cure="put the token into a file and name it with --token-file",
        )
    return Address(
        url=url,
        token=_token(token_file) if token_file else None,
        cacert=Path(cacert) if cacert else None,
    )


def _token(path: str) -> str:
    try:
        token = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise Usage(f"cannot read the token file {printable(path)}: {error}") from error
    if not token or not token.isprintable() or not token.isascii():
        raise Usage(f"the token file {printable(path)} does not hold one line of plain text")
    return token


_WHY_UNIX: Final = {
    errno.ENOENT: (
        "there is no such socket",
        "is the daemon running? `systemctl status migrd`; "
        "another address: --socket PATH or MIGRD_SOCKET",
    ),
    errno.EACCES: (
        "you may not open it",
        "run as root, or as a member of the socket's group (`ls -l` shows it)",
    ),
    errno.ECONNREFUSED: (
        "nobody listens on it: a daemon that ran here has ended",
        "`journalctl -u migrd` says why; `migrd doctor` checks the host",
    ),
    errno.EPROTOTYPE: (
        "it is a socket of another kind (not a stream)",
        "give the API's socket with --socket PATH or MIGRD_SOCKET",
    ),
    # connect(2) says EAGAIN, asyncio takes that for a connection, and the first write fails
    errno.ENOTCONN: ("it takes no more connections now", "is the daemon hung? try again"),
}
_WHY_TCP: Final = {
    errno.ECONNREFUSED: (
        "nobody listens there",
        "is the daemon running there, and is its TCP listener configured?",
    ),
    errno.EHOSTUNREACH: ("the host cannot be reached", "check the network and the address"),
    errno.ENETUNREACH: ("the network cannot be reached", "check the network and the address"),
}


Looked = int | OSError
"""The mode of what stands at a path, or why it cannot be seen."""


def look_at(path: Path) -> Looked:
    """Blocking."""
    try:
        return os.stat(path).st_mode
    except OSError as error:
        return error


def unreachable(address: Address, error: BaseException, looked: Looked) -> CommandError:
    """The connection was not made (so nothing was asked): say where, why, and what to do.

    `looked`: what `look_at` says of the socket; connect(2) says "refused" of a plain file, too.
    """
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return Unreachable(
            f"cannot trust {address}: {printable(str(error.certificate_error))}",
            cure="name the certificate authority of this host with --cacert FILE",
        )
    if isinstance(error, aiohttp.ClientSSLError):
        return Unreachable(
            f"cannot speak TLS with {address}: {_reason(error)}",
            cure="is it an http:// address? does the server ask for a newer TLS?",
        )
    number = getattr(error, "errno", None)
    number = number if isinstance(number, int) else None
    if address.url is None:
        why, cure = _why_unix(looked, number, error)
    else:
        why, cure = _WHY_TCP.get(number or 0, (_reason(error), "check the address"))
    return Unreachable(f"cannot connect to the daemon at {address}: {why}", cure=cure)


def _why_unix(looked: Looked, number: int | None, error: BaseException) -> tuple[str, str]:
    if isinstance(looked, OSError):
        number = looked.errno or number
    elif not stat.S_ISSOCK(looked):
        return "it is not a socket", "give the API's socket with --socket PATH or MIGRD_SOCKET"
    return _WHY_UNIX.get(number or 0, (_reason(error), "`migrd doctor` checks the host"))


def _reason(error: BaseException) -> str:
    if isinstance(error, aiohttp.ClientConnectorError):
        return printable(error.os_error.strerror or str(error.os_error))
    if isinstance(error, TimeoutError):
        return "no connection in time"
    return printable(str(error) or type(error).__name__)


def not_migrd(address: Address, why: str) -> NotUnderstood:
    """Something answered, but not in our words."""
    return NotUnderstood(
        f"what answers at {address} is not migrd's API: {printable(why, limit=200)}",
        cure="check the address (--socket, --url, MIGRD_SOCKET, MIGRD_URL)",
    )
