"""A monitor that stays: reconnects by itself, and says when something may have been missed.

                 ┌──────────── wait (50 ms … 2 s) ◄───────────┐
                 ▼                                            │
    connecting ──┴── greeting, negotiation ──► connected ── connection ends

- One task per Monitor, owned by it: `async with Monitor(path)` (or `start`/`close`).
- `execute` never waits for a connection: without one it raises NotSent at once, which is a certain
  "no effect". Waiting is the caller's decision (`wait_connected`).
- Each subscriber has a bounded queue of its own. When it is full, what comes is counted in one
  Gap(OVERFLOW) at the very place where it is missing: never silent, never blocking the reader.
- QEMU repeats no event. A Gap (overflow, or a connection that ended or came back) therefore means:
  ask for the state (`query-migrate`, `query-status`) before believing the next event.
"""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from migrd.errors import VmmError
from migrd.qemu.calls import CallObserver
from migrd.qemu.qmp import DEFAULT_DEADLINE_S, QmpConnection, connect_qmp
from migrd.qemu.wire import Arguments, NotSent, QmpEvent

FIRST_RETRY_S = 0.05
LAST_RETRY_S = 2.0
SETTLED_S = 1.0
"""A connection that lived this long was a good one: the next retry starts short again."""
EVENTS_BOUND = 256

log = logging.getLogger(__name__)


class GapKind(Enum):
    OVERFLOW = "overflow"
    """The subscriber was too slow."""
    DISCONNECTED = "disconnected"
    """Nothing will come until RECONNECTED."""
    RECONNECTED = "reconnected"
    """What happened while the connection was down is unknown."""


@dataclass(frozen=True, slots=True)
class Gap:
    """Stands in the stream where events are, or may be, missing."""

    kind: GapKind
    lost_events: int | None
    """How many, where it is known."""


class EventStream:
    """One subscriber's view of a monitor, in order. Get it from `Monitor.subscribe`."""

    def __init__(self, names: frozenset[str] | None, bound: int) -> None:
        self._names = names
        self._bound = bound
        self._queue: deque[QmpEvent | Gap] = deque()
        self._waiter: asyncio.Future[None] | None = None

    async def get(self) -> QmpEvent | Gap:
        """The next item. One reader per stream."""
        while not self._queue:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._queue.popleft()

    async def within(self, seconds: float) -> QmpEvent | Gap | None:
        """The next item, or None when none came within `seconds`."""
        if self._queue:
            return self._queue.popleft()
        try:
            async with asyncio.timeout(seconds):
                return await self.get()
        except TimeoutError:
            return None

    def put(self, event: QmpEvent) -> None:
        if self._names is not None and event.name not in self._names:
            return
        if len(self._queue) < self._bound:
            self._append(event)
        else:
            self.put_gap(Gap(GapKind.OVERFLOW, 1))

    def put_gap(self, gap: Gap) -> None:
        last = self._queue[-1] if self._queue else None
        if not isinstance(last, Gap):
            self._append(gap)
            return
        counts = (last.lost_events, gap.lost_events)
        lost = None if None in counts else sum(n for n in counts if n is not None)
        kind = last.kind if gap.kind is GapKind.OVERFLOW else gap.kind
        self._queue[-1] = Gap(kind, lost)

    def _append(self, item: QmpEvent | Gap) -> None:
        self._queue.append(item)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


@dataclass(frozen=True, slots=True)
class MonitorState:
    """Whether a monitor is connected, since when, and if not, why not."""

    is_connected: bool
    since_s: float
    """time.monotonic() of the change."""
    connections: int
    """How many times a connection was made so far."""
    reason: str


class Monitor:
    """One QMP monitor of one QEMU, over as many connections as it takes."""

    def __init__(
        self,
        path: Path,
        *,
        greeting_deadline_s: float = DEFAULT_DEADLINE_S,
        observe: CallObserver | None = None,
        on_event: Callable[[QmpEvent], None] | None = None,
    ) -> None:
        self.path = path
        self._greeting_deadline_s = greeting_deadline_s
        self._observe = observe
        self._on_event = on_event
        self._streams: set[EventStream] = set()
        self._connection: QmpConnection | None = None
        self._task: asyncio.Task[None] | None = None
        self._changed: asyncio.Future[None] | None = None
        self.state = MonitorState(False, time.monotonic(), 0, "not started")

    # Life

    def start(self) -> None:
        """Start connecting; `close` ends it. Needs a running loop."""
        if self._task is None:
            self._task = asyncio.create_task(self._keep_connected(), name=f"monitor {self.path}")

    async def close(self) -> None:
        """Disconnect for good; calls under way end with AnswerLost."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
            if not task.cancelled() and (bug := task.exception()) is not None:
                log.error("monitor %s had stopped by a bug", self.path, exc_info=bug)

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    # Use

    async def execute(
        self,
        command: str,
        arguments: Arguments | None = None,
        *,
        deadline_s: float = DEFAULT_DEADLINE_S,
    ) -> Any:
        """`QmpConnection.execute` on the present connection; NotSent at once where there is none.

        Raises CommandRefused, NotSent, AnswerLost, ReplyLate.
        """
        return await self._connected(command).execute(command, arguments, deadline_s=deadline_s)

    async def execute_all(
        self, *questions: tuple[str, Arguments | None], deadline_s: float = DEFAULT_DEADLINE_S
    ) -> list[Any]:
        """Ask all at once, on one connection; the answers in order. Raises as `execute`, for the
        first that goes wrong."""
        connection = self._connected(questions[0][0])
        begun = [connection.begin(*question, deadline_s=deadline_s) for question in questions]
        return await asyncio.gather(*begun)

    async def execute_oob(
        self,
        command: str,
        arguments: Arguments | None = None,
        *,
        deadline_s: float = DEFAULT_DEADLINE_S,
    ) -> Any:
        """As `execute`, out of band: answers even while in-band commands are blocked."""
        connection = self._connected(command)
        return await connection.execute_oob(command, arguments, deadline_s=deadline_s)

    async def send_fd(self, name: str, fd: int, *, deadline_s: float = DEFAULT_DEADLINE_S) -> None:
        await self._connected("getfd").send_fd(name, fd, deadline_s=deadline_s)

    @property
    def is_connected(self) -> bool:
        return self._connection is not None and self._connection.is_open

    @property
    def has_oob(self) -> bool:
        return self._connection is not None and self._connection.has_oob

    @property
    def greeting(self) -> dict[str, Any]:
        """What QEMU said when it was connected to; empty while it is not."""
        return self._connection.greeting if self._connection is not None else {}

    @property
    def unanswered(self) -> int:
        """Commands sent and not answered yet, those given up included."""
        return self._connection.unanswered if self._connection is not None else 0

    async def wait_connected(self, *, within_s: float) -> None:
        """Return once connected. Raises NotSent, with the last reason, after `within_s`."""
        try:
            async with asyncio.timeout(within_s):
                while not self.is_connected:
                    if self._changed is None or self._changed.done():
                        self._changed = asyncio.get_running_loop().create_future()
                    await asyncio.shield(self._changed)
        except TimeoutError:
            text = f"{self.path}: not connected within {within_s} s: {self.state.reason}"
            raise NotSent(text) from None

    async def wait_disconnected(self, *, within_s: float) -> None:
        """Return once the present connection, if any, has been read to its end, or time is up."""
        connection = self._connection
        if connection is not None:
            await asyncio.wait([connection.closed], timeout=within_s)

    @contextlib.contextmanager
    def subscribe(
        self, names: Iterable[str] | None = None, *, bound: int = EVENTS_BOUND
    ) -> Iterator[EventStream]:
        """Events from now on, of these names or all, with Gaps where some are missing."""
        stream = EventStream(None if names is None else frozenset(names), bound)
        self._streams.add(stream)
        try:
            yield stream
        finally:
            self._streams.discard(stream)

    # The task

    def _connected(self, command: str) -> QmpConnection:
        if self._connection is None:
            raise NotSent(f"{command} not sent: {self.path}: {self.state.reason}")
        return self._connection

    async def _keep_connected(self) -> None:
        retry_s = FIRST_RETRY_S
        while True:
            started_s = time.monotonic()
            try:
                await self._connect_and_serve()
            except VmmError as failure:
                self._set_state(False, failure.message)
            except Exception as bug:  # must not leave the VM unreachable for good
                log.exception("monitor %s", self.path)
                self._set_state(False, f"a bug: {bug!r}")
            if time.monotonic() - started_s >= SETTLED_S + self._greeting_deadline_s:
                retry_s = FIRST_RETRY_S
            await asyncio.sleep(retry_s)
            retry_s = min(retry_s * 2, LAST_RETRY_S)

    async def _connect_and_serve(self) -> None:
        connection = await connect_qmp(
            self.path, self._deliver, deadline_s=self._greeting_deadline_s, observe=self._observe
        )
        try:
            await self._serve(connection)
        finally:
            await connection.end()

    async def _serve(self, connection: QmpConnection) -> None:
        """From a new connection to its end."""
        self._connection = connection
        self._set_state(True, "connected")
        if self.state.connections > 1:
            self._tell(Gap(GapKind.RECONNECTED, None))
        reason = "closed here"
        try:
            failure = await asyncio.shield(connection.closed)
            reason = str(failure) if failure is not None else "QEMU closed the connection"
        finally:
            self._connection = None
            self._set_state(False, reason)
            log.info("monitor %s: disconnected: %s", self.path, reason)
            self._tell(Gap(GapKind.DISCONNECTED, None))

    def _set_state(self, is_connected: bool, reason: str) -> None:
        before = self.state
        if before.is_connected == is_connected and before.reason == reason:
            return  # one more failed try: `since_s` stays
        since_s = before.since_s if before.is_connected == is_connected else time.monotonic()
        connections = before.connections + is_connected
        self.state = MonitorState(is_connected, since_s, connections, reason)
        if self._changed is not None and not self._changed.done():
            self._changed.set_result(None)

    def _tell(self, gap: Gap) -> None:
        for stream in self._streams:
            stream.put_gap(gap)

    def _deliver(self, event: QmpEvent) -> None:
        if self._on_event is not None:
            self._on_event(event)
        for stream in self._streams:
            stream.put(event)
