"""Server-sent events (WHATWG HTML, "Server-sent events"), with reconnection and Last-Event-ID.

    CONNECTED --event--> yields it, remembers its id
        | broken, or silent for longer than two keep-alives
    LOST --(pause grows to 2 s)--> asks again with Last-Event-ID; the daemon replays what was missed

Both changes of the connection are told too: a person who watches must know that what is on the
screen is old. A daemon that was restarted numbers its events anew, or says `events.lost`: events
are hints, the truth is in the resources.
"""

import asyncio
import json
from collections import deque
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

import aiohttp

from migrd.cli.client import Client, Problem
from migrd.cli.exits import CommandError, NoAnswer, Unreachable
from migrd.cli.seen import Seen

SILENCE_S: Final = 45.0
"""Longer than any keep-alive: a connection that says nothing for so long is taken for dead."""
CONNECT_S: Final = 10.0
_FIRST_PAUSE_S: Final = 0.1
_LONGEST_PAUSE_S: Final = 2.0
_LONGEST_LINE_BYTES: Final = 2**20


@dataclass(frozen=True)
class Event:
    """One event as it came."""

    id: str | None
    kind: str
    body: Seen


@dataclass(frozen=True)
class Connected:
    """The stream is open (again)."""

    again: bool


@dataclass(frozen=True)
class Lost:
    """The stream broke off; it is being asked for again."""

    error: CommandError


class Parser:
    """Lines in, events out; the rules of the standard, with a bound on the size of an event."""

    def __init__(self) -> None:
        self.last_id: str | None = None
        self._kind = ""
        self._lines: list[str] = []
        self._bytes = 0

    def feed(self, line: str) -> Event | None:
        """One line without its end. An event is complete at the empty line."""
        if not line:
            return self._complete()
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._bytes += len(value)
            if self._bytes <= _LONGEST_LINE_BYTES:
                self._lines.append(value)
        elif name == "event":
            self._kind = value
        elif name == "id" and "\0" not in value:
            self.last_id = value
        return None

    def _complete(self) -> Event | None:
        kind, lines = self._kind or "message", self._lines
        too_long = self._bytes > _LONGEST_LINE_BYTES
        self._kind, self._lines, self._bytes = "", [], 0
        if not lines or too_long:
            return None
        try:
            body = json.loads("\n".join(lines))
        except (ValueError, RecursionError):
            body = None
        return Event(self.last_id, kind, Seen(body))


class EventStream:
    """The daemon's events, one after the other, over as many connections as it takes.

    Use as `async with`. `next()` raises Problem where the daemon has no such stream, and
    Unreachable when it stayed away for `give_up_after_s`.
    """

    def __init__(
        self,
        client: Client,
        *,
        after_id: str | None = None,
        query: Mapping[str, str] | None = None,
        give_up_after_s: float,
    ) -> None:
        """`query` filters the events; `after_id` None means from now on."""
        self._client = client
        self._query = query
        self._give_up_after_s = give_up_after_s
        self._parser = Parser()
        self._parser.last_id = after_id
        self._connection = AsyncExitStack()
        self._response: aiohttp.ClientResponse | None = None
        self._ready: deque[Event] = deque()
        self._pending = b""
        self._connections = 0
        self._pause_s = _FIRST_PAUSE_S
        self._away_since_s: float | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._connection.aclose()

    async def next(self) -> Event | Connected | Lost:
        """The next thing to know; safe to cancel."""
        while self._response is None:
            try:
                return await self._connect()
            except (Unreachable, Problem) as error:
                if isinstance(error, Problem) and not error.retryable:
                    raise
                await self._pause(error)
        try:
            return await self._read(self._response)
        except Unreachable as error:
            await self._drop()
            return Lost(error)

    async def _connect(self) -> Connected:
        headers = {"Accept": "text/event-stream", "Cache-Control": "no-cache"}
        if self._parser.last_id is not None and self._parser.last_id.isdecimal():
            headers["Last-Event-ID"] = self._parser.last_id
        try:
            async with asyncio.timeout(CONNECT_S):
                response = await self._connection.enter_async_context(
                    self._client.opened("GET", "/v1/events", query=self._query, headers=headers)
                )
                if response.status != 200:
                    raise await _problem(response)
        except TimeoutError as error:
            await self._drop()
            raise NoAnswer(f"{self._client.address} does not open the event stream") from error
        except BaseException:
            await self._drop()
            raise
        self._response = response
        self._connections += 1
        self._pause_s, self._away_since_s = _FIRST_PAUSE_S, None
        return Connected(again=self._connections > 1)

    async def _drop(self) -> None:
        self._response, self._pending = None, b""
        connection, self._connection = self._connection, AsyncExitStack()
        await connection.aclose()

    async def _pause(self, error: CommandError) -> None:
        now_s = asyncio.get_running_loop().time()
        if self._away_since_s is None:
            self._away_since_s = now_s
        if now_s - self._away_since_s >= self._give_up_after_s:
            raise error
        await asyncio.sleep(self._pause_s)
        self._pause_s = min(_LONGEST_PAUSE_S, self._pause_s * 2)

    async def _read(self, response: aiohttp.ClientResponse) -> Event:
        while not self._ready:
            try:
                async with asyncio.timeout(SILENCE_S):
                    chunk = await response.content.readany()
            except TimeoutError as error:
                raise NoAnswer(f"{self._client.address} has gone silent") from error
            except (aiohttp.ClientError, ConnectionError) as error:
                raise NoAnswer(f"the connection to {self._client.address} broke") from error
            if not chunk:
                raise NoAnswer(f"{self._client.address} closed the event stream")
            self._take(chunk)
        return self._ready.popleft()

    def _take(self, chunk: bytes) -> None:
        *lines, self._pending = (self._pending + chunk).split(b"\n")
        if len(self._pending) > _LONGEST_LINE_BYTES:
            raise NoAnswer("the event stream sends a line without end")
        for line in lines:
            event = self._parser.feed(line.removesuffix(b"\r").decode("utf-8", "replace"))
            if event is not None:
                self._ready.append(event)


async def _problem(response: aiohttp.ClientResponse) -> Problem:
    content = await response.content.read(2**16)
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        body = None
    return Problem(response.status, Seen(body), response.reason or "error")
