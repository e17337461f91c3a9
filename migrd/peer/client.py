"""Exchanges with one peer over HTTPS, quick enough for a GRANT: its guest stands still meanwhile.

    quick   everything short; two connections kept warm, so that a GRANT finds one open
    held    views that wait there for news; they would take the warm connections away

What a failure proves
- A connection that could not be made delivered nothing. But in TLS 1.3 a server that does not
  believe our certificate says so only after the client thinks it is connected. So as long as this
  peer has not answered since its last failure, `hello` goes first: when that fails, the message
  itself was certainly not sent (PeerUnreachable).
- A kept connection may be closed by the other side just as we use it. All calls are idempotent, so
  it is tried once more on another connection; should that fail in whatever way, the outcome is not
  known (PeerTimedOut), for the first message may have arrived.
- All calls are POST: aiohttp repeats a GET by itself and loses that distinction.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Final

import aiohttp
from yarl import URL

from migrd.engine.peer_service import PEER_PROTOCOL
from migrd.errors import ConfigError, MigrdError, PeerTimedOut, PeerUnreachable
from migrd.peer.answering import Reply
from migrd.peer.asking import WirePeer
from migrd.peer.messages import MAX_ANSWER_BYTES, PATH, PROTOCOL_HEADER, Observe
from migrd.peer.tls import PeerTls

CONNECT_S: Final = 3.0
WARM_EVERY_S: Final = 15.0
_WARM_CONNECTIONS: Final = 2
_IDLE_S: Final = 75.0
_CONNECTIONS_AT_MOST: Final = 64
"""Per lane: more calls than that at once wait for each other."""
_HEADERS: Final = {
    PROTOCOL_HEADER: str(PEER_PROTOCOL),
    "Content-Type": "application/json",
    "Accept-Encoding": "identity",
}


@dataclass(frozen=True)
class PeerStatus:
    """How the peer was when it was last asked."""

    up: bool | None = None
    """None: not asked yet."""
    checked_wall_s: float | None = None
    error: str | None = None
    migrd_version: str | None = None


@dataclass
class _Attempt:
    """How far one try came; filled in by aiohttp's tracing."""

    has_connection: bool = False
    is_reused: bool = False


class HttpPeer(WirePeer):
    """Made by `connect_peer`."""

    def __init__(
        self, name: str, url: str, tls: PeerTls, *, observe: Observe | None = None
    ) -> None:
        super().__init__(name.lower())
        self._url = _base_of(name, url)
        self._tls = tls
        self._observe = observe
        self._quick = _lane()
        self._held = _lane()
        self._has_answered = False
        self.status = PeerStatus()

    async def warm(self) -> PeerStatus:
        """Say hello on as many connections as are kept warm. Raises nothing: see `status`."""
        hellos = [self.hello() for _ in range(_WARM_CONNECTIONS)]
        found = (await asyncio.gather(*hellos, return_exceptions=True))[0]
        now_s = time.time()
        if isinstance(found, MigrdError):
            self.status = PeerStatus(False, now_s, found.message, self.status.migrd_version)
        elif isinstance(found, BaseException):
            raise found
        else:
            self.status = PeerStatus(True, now_s, None, found.migrd_version)
        return self.status

    async def keep_warm(self, every_s: float = WARM_EVERY_S) -> None:
        """For ever: keep connections open and `status` fresh. The caller owns the task."""
        while True:
            await self.warm()
            await asyncio.sleep(every_s)

    async def close(self) -> None:
        await self._quick.close()
        await self._held.close()

    async def _exchange(self, call: str, body: bytes, *, within_s: float) -> Reply:
        started_s = time.monotonic()
        if not self._has_answered and call != "hello":
            await self._prove()
        try:
            reply = await self._twice(call, body, within_s)
        except (PeerUnreachable, PeerTimedOut) as failure:
            self._has_answered = False
            self._tell(
                call, "timed_out" if isinstance(failure, PeerTimedOut) else "unreachable", started_s
            )
            raise
        self._has_answered = True
        self._tell(call, "ok" if reply.status == 200 else "problem", started_s)
        return reply

    def _tell(self, call: str, outcome: str, started_s: float) -> None:
        if self._observe is not None:
            self._observe(self.name, call, outcome, time.monotonic() - started_s)

    async def _prove(self) -> None:
        try:
            await self.hello()
        except PeerTimedOut as failure:
            raise PeerUnreachable(failure.message, code=failure.code) from failure

    async def _twice(self, call: str, body: bytes, within_s: float) -> Reply:
        deadline_s = time.monotonic() + within_s
        first = _Attempt()
        try:
            return await self._once(call, body, within_s, first)
        except PeerTimedOut:
            left_s = deadline_s - time.monotonic()
            if not first.is_reused or left_s <= 0:
                raise
        try:
            return await self._once(call, body, left_s, _Attempt())
        except PeerUnreachable as failure:
            raise PeerTimedOut(
                f"{failure.message}; and the connection before it broke after the message was sent",
                code="peer_connection_lost",
            ) from failure

    async def _once(self, call: str, body: bytes, within_s: float, attempt: _Attempt) -> Reply:
        lane = self._held if call == "view" else self._quick
        try:
            async with asyncio.timeout(within_s):
                return await self._post(lane, call, body, attempt)
        except (aiohttp.ClientError, OSError, ValueError) as failure:  # TimeoutError is an OSError
            raise self._meaning(call, within_s, attempt, failure) from failure

    async def _post(
        self, lane: aiohttp.ClientSession, call: str, body: bytes, attempt: _Attempt
    ) -> Reply:
        async with lane.post(
            self._url.joinpath(call),
            data=body,
            headers=_HEADERS,
            ssl=self._tls.client,
            server_hostname=self.name,
            allow_redirects=False,
            trace_request_ctx=attempt,
        ) as response:
            answer = bytearray()
            async for chunk in response.content.iter_any():
                answer += chunk
                if len(answer) > MAX_ANSWER_BYTES:
                    raise ValueError(f"the answer has more than {MAX_ANSWER_BYTES} bytes")
            return Reply(response.status, bytes(answer), response.headers.get(PROTOCOL_HEADER))

    def _meaning(
        self, call: str, within_s: float, attempt: _Attempt, failure: Exception
    ) -> PeerTimedOut | PeerUnreachable:
        why = _why(failure)
        if not attempt.has_connection:
            if isinstance(failure, TimeoutError):
                why = "no connection in time"
            return PeerUnreachable(f"{self.name} ({self._url.origin()}): {why}")
        if isinstance(failure, TimeoutError):
            return PeerTimedOut(f"{self.name}: no answer to {call} within {within_s:g} s")
        hint = ""
        if not self._has_answered:
            hint = (
                "; it may not believe this host's certificate: both need the same CA, and this"
                " host's name must be on its roster"
            )
        return PeerTimedOut(
            f"{self.name}: the connection broke before the answer to {call}: {why}{hint}",
            code="peer_connection_lost",
        )


@contextlib.asynccontextmanager
async def connect_peer(
    name: str,
    url: str,
    tls: PeerTls,
    *,
    observe: Observe | None = None,
    warm_every_s: float = WARM_EVERY_S,
) -> AsyncIterator[HttpPeer]:
    """A peer whose connections are kept warm for as long as the context lasts.

    The peer need not be up. `url` is https://host:port; the certificate found there must carry
    `name`. Raises ConfigError for any other url.
    """
    peer = HttpPeer(name, url, tls, observe=observe)
    warming = asyncio.create_task(peer.keep_warm(warm_every_s), name=f"peer.warm.{name}")
    try:
        yield peer
    finally:
        warming.cancel()
        try:
            await asyncio.wait([warming])
        finally:
            await peer.close()


def _base_of(name: str, url: str) -> URL:
    base = URL(url)
    if base.scheme != "https" or not base.host or base.path not in ("", "/"):
        raise ConfigError(f"peer {name}: {url!r} is no address of a peer: https://host:port")
    return base.with_path(PATH.rstrip("/"))


def _why(failure: Exception) -> str:
    """Without aiohttp's wrapping, which names objects instead of hosts."""
    if isinstance(failure, aiohttp.ClientConnectorCertificateError):
        wrong = failure.certificate_error
        return getattr(wrong, "verify_message", "") or str(wrong)
    if isinstance(failure, aiohttp.ClientConnectorError):
        wrong_os = failure.os_error
        number = wrong_os.errno or 0  # negative for name look-ups, whose text is good
        return os.strerror(number) if number > 0 else wrong_os.strerror or str(wrong_os)
    return str(failure) or type(failure).__name__


def _lane() -> aiohttp.ClientSession:
    trace = aiohttp.TraceConfig()
    trace.on_connection_create_end.append(_connected)
    trace.on_connection_reuseconn.append(_reused)
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(
            limit=_CONNECTIONS_AT_MOST, keepalive_timeout=_IDLE_S, ttl_dns_cache=30
        ),
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S),
        trace_configs=[trace],
        auto_decompress=False,
        trust_env=False,
    )


async def _connected(_: aiohttp.ClientSession, trace: SimpleNamespace, __: object) -> None:
    trace.trace_request_ctx.has_connection = True


async def _reused(_: aiohttp.ClientSession, trace: SimpleNamespace, __: object) -> None:
    trace.trace_request_ctx.has_connection = trace.trace_request_ctx.is_reused = True
