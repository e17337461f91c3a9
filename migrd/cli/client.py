"""Calls to the daemon: one connection pool, one deadline per call, errors in our words.

What an error says about the request:

    Unreachable     it was not sent
    NoAnswer        it may or may not have taken effect: ask, or send it again where that is safe
    Problem         the daemon answered that it did not happen, and why
    NotUnderstood   whatever answered is not the API

Traps: a path is built from quoted segments, because a VM's name may hold `/` or `?`; the answer is
read up to a bound, because what listens there may be anything.
"""

import asyncio
import errno
import json
import ssl
import stat
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self
from urllib.parse import quote

import aiohttp
from yarl import URL

import migrd
from migrd.cli.address import Address, look_at, not_migrd, unreachable
from migrd.cli.exits import CommandError, NoAnswer, Usage, of_status
from migrd.cli.seen import Json, Seen
from migrd.cli.text import printable

DEADLINE_S: Final = 30.0
_CONNECT_S: Final = 10.0
_MOST_BYTES: Final = 64 * 2**20
_READ_BYTES: Final = 2**16


@dataclass(frozen=True)
class Reply:
    """A good answer: the body as it came, and the headers that matter."""

    status: int
    body: Json
    headers: Mapping[str, str]

    @property
    def seen(self) -> Seen:
        return Seen(self.body)


_CURES: Final[Mapping[str, str]] = {
    "already_migrating": "`migrd migrations` shows that migration, `migrd watch ID` follows it",
    "ambiguous_id": "give more of the id",
    "device_in_use": "`migrd vms` shows who has devices; stop that VM, or ask when it has gone",
    "no_such_route": "this daemon is older than this program: `migrd host` shows its version",
    "not_authenticated": "name the file with your token: --token-file FILE or MIGRD_TOKEN_FILE",
    "read_only": "use a token that may write",
    "unknown_destination": "`migrd host` lists the hosts of the roster",
    "unknown_device": "`migrd devices` lists those of this host",
    "unknown_migration": "`migrd migrations --all` lists them",
    "unknown_profile": "`migrd host` lists the launch profiles",
    "unknown_vm": "`migrd vms` lists the VMs of this host",
}
"""What to type next, where the daemon (which knows no command line) cannot say it."""


class Problem(CommandError):
    """The daemon refused: its problem details (RFC 9457), or what stands for them."""

    def __init__(self, status: int, details: Seen, reason: str) -> None:
        code = details.text("code", f"http_{status}")
        title = details.text("title", reason)
        super().__init__(
            details.text("detail", title),
            code=code,
            cure=details.text("cure", "") or _CURES.get(code, ""),
            exit_code=of_status(status, code),
        )
        self.status = status
        self.details = details
        self.retryable = details.flag("retryable") is True


def path(*segments: str, verb: str | None = None) -> str:
    """`/v1/vms/web%2F1:start` from its parts."""
    quoted = "/".join(quote(segment, safe="") for segment in segments)
    return f"/v1/{quoted}" + (f":{verb}" if verb else "")


class Client:
    """Speaks with one daemon. Use as `async with`."""

    def __init__(self, address: Address, *, deadline_s: float = DEADLINE_S) -> None:
        self.address = address
        self.deadline_s = deadline_s
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        headers = {"User-Agent": f"migrd/{migrd.__version__}", "Accept": "application/json"}
        if self.address.token:
            headers["Authorization"] = f"Bearer {self.address.token}"
        self._session = aiohttp.ClientSession(
            connector=await _connector(self.address),
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S),
            auto_decompress=False,
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def call(
        self,
        method: str,
        where: str,
        *,
        body: Json = None,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        deadline_s: float | None = None,
    ) -> Reply:
        """One request and its whole answer.

        Raises Problem, Unreachable, NoAnswer, NotUnderstood.
        """
        limit_s = self.deadline_s if deadline_s is None else deadline_s
        try:
            async with (
                asyncio.timeout(limit_s),
                self.opened(method, where, body=body, query=query, headers=headers) as response,
            ):
                content = await self._content(response)
        except TimeoutError as error:
            raise NoAnswer(
                f"{self.address} did not answer {method} {where} within {limit_s:g} s",
                cure="it may or may not have taken effect: look before you repeat it",
            ) from error
        return self._judged(response, content)

    @asynccontextmanager
    async def opened(
        self,
        method: str,
        where: str,
        *,
        body: Json = None,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The answer with its body still to be read; the caller brings the deadline."""
        assert self._session is not None, "use Client as `async with`"
        url = URL(self.address.base + where, encoded=True).with_query(query or None)
        sent = dict(headers or {})
        content = None
        if body is not None:
            content = json.dumps(body).encode()
            sent["Content-Type"] = "application/json"
        try:
            async with self._session.request(
                method, url, data=content, headers=sent, allow_redirects=False
            ) as response:
                yield response
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            looked = await asyncio.to_thread(look_at, self.address.socket)
            raise unreachable(self.address, error, looked) from error
        except aiohttp.ClientResponseError as error:
            raise not_migrd(self.address, error.message or type(error).__name__) from error
        except (aiohttp.ClientError, OSError) as error:
            if getattr(error, "errno", None) == errno.ENOTCONN:
                raise unreachable(self.address, error, stat.S_IFSOCK) from error
            raise NoAnswer(
                f"{self.address} broke off in the middle of {method} {where}: "
                f"{printable(str(error) or type(error).__name__)}",
                cure="it may or may not have taken effect: look before you repeat it",
            ) from error

    async def _content(self, response: aiohttp.ClientResponse) -> bytes:
        content = bytearray()
        async for chunk in response.content.iter_chunked(_READ_BYTES):
            content += chunk
            if len(content) > _MOST_BYTES:
                raise not_migrd(self.address, f"an answer of more than {_MOST_BYTES} bytes")
        return bytes(content)

    def _judged(self, response: aiohttp.ClientResponse, content: bytes) -> Reply:
        body = self._parsed(response, content)
        if response.status >= 400:
            raise Problem(response.status, Seen(body), printable(response.reason or "error"))
        if response.status >= 300:
            raise not_migrd(self.address, f"it answered {response.status}")
        return Reply(response.status, body, dict(response.headers))

    def _parsed(self, response: aiohttp.ClientResponse, content: bytes) -> Json:
        if not content:
            return None
        try:
            body: Json = json.loads(content)
        except (ValueError, RecursionError) as error:
            if response.status >= 400:  # a proxy's own page: the status still says enough
                return {"title": f"{response.status} {response.reason or ''}".strip()}
            raise not_migrd(self.address, "the answer is not JSON") from error
        return body

    async def get(self, *segments: str, query: Mapping[str, str] | None = None) -> Reply:
        return await self.call("GET", path(*segments), query=query)

    async def migrate(self, request: Mapping[str, Json], *, idempotency_key: str) -> Reply:
        """Ask for a migration. A lost answer is asked again with the same key: that is safe."""
        headers = {"Idempotency-Key": idempotency_key}
        for last in (False, False, True):
            try:
                return await self.call("POST", path("migrations"), body=request, headers=headers)
            except NoAnswer as error:
                if last:
                    error.cure = (
                        f"repeat the command with --idempotency-key {idempotency_key}: "
                        "that finds the migration if it was begun, and never begins a second"
                    )
                    raise
        raise AssertionError("unreachable")


async def _connector(address: Address) -> aiohttp.BaseConnector:
    if address.url is None:
        return aiohttp.UnixConnector(path=str(address.socket))
    if not address.url.startswith("https:"):
        return aiohttp.TCPConnector()
    return aiohttp.TCPConnector(ssl=await asyncio.to_thread(_trust, address.cacert))


def _trust(cacert: Path | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=None if cacert is None else str(cacert))
    except (OSError, ssl.SSLError) as error:
        where = printable(str(cacert))
        raise Usage(f"cannot read the certificates in {where}: {error}") from error
