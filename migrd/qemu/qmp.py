"""One connection to one QMP monitor of a QEMU, as cheap per call as a bare protocol.

    caller ── execute ──> [ window ] ──> socket ──> QEMU        replies come back by id,
    caller <── future ── calls[id] <── data_received <──┘        events go to `on_event`

Rules of the server (QEMU docs/interop/qmp-spec; seen on 7.2 and 10.0):
- One client per monitor. A second one connects, but is greeted only once the first has left.
- Capabilities are negotiated anew on each connection. Events are never replayed.
- In-band commands run one after the other on QEMU's main loop: one that blocks (a device that
  saves its state, a socket that takes no byte) blocks them on *every* monitor of that QEMU.
- `exec-oob` runs beside them, for the few commands that allow it (`yank`, `migrate-pause`,
  `migrate-recover`), as long as fewer than eight in-band ones wait: hence the window.

Traps:
- A reply may come after its call has timed out or was cancelled. It is dropped and counted.
- A broken connection answers every call under way with AnswerLost: unknown, not failed.
- A line that is not JSON, or too long, closes the connection. The longest honest line is the
  answer to query-qmp-schema: 0.2 MB on 7.2 and 10.0; the cap leaves forty times that.
- A QEMU that ends may have said why (`SHUTDOWN`) a moment before. What we write then fails, and
  asyncio ends a connection at the first failed write: what had come is read all the same.
- A file descriptor rides on the first byte of its `getfd`. It is sent with sendmsg beside the
  transport, which is safe only while the transport has nothing buffered: others are held back.
"""

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson

from migrd.errors import VmmUnreachable
from migrd.qemu.calls import CallObserver as CallObserver
from migrd.qemu.calls import Calls
from migrd.qemu.sockets import open_socket, send_with_fd
from migrd.qemu.wire import (
    Arguments,
    MonitorBusy,
    QmpEvent,
    WireBroken,
    json_object,
)

LINE_LIMIT_BYTES = 8 * 1024 * 1024
CHUNK_BYTES = 64 * 1024
DEFAULT_DEADLINE_S = 2.0

log = logging.getLogger(__name__)


class QmpConnection(asyncio.Protocol):
    """Open with `connect_qmp`. One per socket, for one life of that socket; not reusable."""

    def __init__(
        self,
        on_event: Callable[[QmpEvent], None],
        *,
        observe: CallObserver | None = None,
        line_limit_bytes: int = LINE_LIMIT_BYTES,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_event = on_event
        self._calls = Calls(observe)
        self._line_limit_bytes = line_limit_bytes
        self._partial = bytearray()
        self._fd_lock = asyncio.Lock()
        self._drained: asyncio.Future[None] | None = None
        self._is_buffering = False
        self._transport: asyncio.Transport | None = None
        self._greeting: asyncio.Future[dict[str, Any]] = self._loop.create_future()
        self._unknown_seen: set[str] = set()
        self._failure: Exception | None = None
        self.closed: asyncio.Future[Exception | None] = self._loop.create_future()
        """Done when the connection has ended; the result is the reason, None at end of file."""
        self.greeting: dict[str, Any] = {}
        self.has_oob = False
        self.unknown_messages = 0

    # What callers do

    async def execute(
        self,
        command: str,
        arguments: Arguments | None = None,
        *,
        deadline_s: float = DEFAULT_DEADLINE_S,
    ) -> Any:
        """Run one in-band command and return what it returns, as decoded JSON.

        Raises CommandRefused, NotSent, AnswerLost or ReplyLate (see migrd.qemu.wire for what each
        of them proves). Cancelling the caller leaves the command with QEMU: it may take effect.
        """
        return await self._calls.submit(command, arguments, deadline_s, True)

    def begin(
        self, command: str, arguments: Arguments | None = None, *, deadline_s: float
    ) -> asyncio.Future[Any]:
        """`execute`, sent now and awaited later: several questions cost one journey."""
        return self._calls.submit(command, arguments, deadline_s, True)

    async def execute_oob(
        self,
        command: str,
        arguments: Arguments | None = None,
        *,
        deadline_s: float = DEFAULT_DEADLINE_S,
    ) -> Any:
        """As `execute`, beside all in-band commands. NotSent where the server offers no `oob`."""
        if not self.has_oob:
            raise self._calls.not_sent(command, "this monitor has no out-of-band lane")
        return await self._calls.submit(command, arguments, deadline_s, False)

    async def send_fd(self, name: str, fd: int, *, deadline_s: float = DEFAULT_DEADLINE_S) -> None:
        """Hand a duplicate of `fd` to QEMU under `name` (`getfd`); the caller keeps its own.

        Raises as `execute` does.
        """
        try:
            async with asyncio.timeout(deadline_s), self._fd_lock:
                self._calls.hold()
                try:
                    call_id = await self._send_with_fd({"fdname": name}, fd)
                    future = self._calls.expect(call_id, "getfd", deadline_s)
                finally:
                    self._calls.release()
        except TimeoutError:
            why = f"QEMU has read nothing for {deadline_s} s"
            raise self._calls.not_sent("getfd", why) from None
        await future

    def close(self, reason: Exception | None = None) -> None:
        """End the connection now; calls under way end with AnswerLost. `closed` follows."""
        if self._failure is None:
            self._failure = reason
        self._calls.write = None
        if self._transport is not None:
            self._transport.abort()

    async def end(self) -> None:
        """`close`, and return once nothing of the connection is left."""
        self.close()
        self._greeting.cancel()
        if self._transport is not None:
            await asyncio.wait([self.closed])

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self.closed.done()

    @property
    def unanswered(self) -> int:
        """Commands sent and not answered, given-up ones included: > 0 for long means blocked."""
        return self._calls.unanswered

    @property
    def late_replies(self) -> int:
        """Replies that came when nobody waited for them any more."""
        return self._calls.late_replies

    # Sending a descriptor

    async def _send_with_fd(self, arguments: Arguments, fd: int) -> int:
        while self._is_buffering:
            self._drained = self._loop.create_future()
            await self._drained
        transport = self._transport
        if transport is None or transport.is_closing():
            raise self._calls.not_sent("getfd", "the connection is closed")
        call_id, payload = self._calls.encode("execute", "getfd", arguments)
        sent = await send_with_fd(self._socket, payload, fd)
        if sent < len(payload):
            transport.write(payload[sent:])
        return call_id

    # Receiving (called by the event loop)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.set_write_buffer_limits(high=0)  # pause_writing tells of the first byte buffered
        self._transport = transport
        self._calls.write = transport.write

    def pause_writing(self) -> None:
        self._is_buffering = True

    def resume_writing(self) -> None:
        self._is_buffering = False
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)

    def data_received(self, chunk: bytes) -> None:
        partial = self._partial
        if not partial and chunk.find(b"\n") == len(chunk) - 1:
            self._receive(chunk)  # nearly always: one chunk, one whole line
            return
        searched = len(partial)
        partial += chunk
        begin = 0
        end = partial.find(b"\n", searched)
        while end >= 0 and self._failure is None:
            self._receive(bytes(partial[begin:end]))
            begin = end + 1
            end = partial.find(b"\n", begin)
        del partial[:begin]
        if len(partial) > self._line_limit_bytes:
            partial.clear()
            self.close(WireBroken(f"a line of more than {self._line_limit_bytes} bytes"))

    def _receive(self, line: bytes) -> None:
        try:
            message = orjson.loads(line)
        except orjson.JSONDecodeError:
            if line.strip():
                self.close(WireBroken(f"not JSON: {line[:60]!r}"))
            return
        if type(message) is not dict:
            self.close(WireBroken(f"not a QMP message: {line[:60]!r}"))
        elif "event" in message:
            self._receive_event(message)
        elif "return" in message or "error" in message:
            if not self._calls.answer(message):
                self._receive_unknown("a reply to no command of ours")
        elif "QMP" in message and not self._greeting.done():
            self._greeting.set_result(message["QMP"])
        else:
            self._receive_unknown("keys " + ", ".join(sorted(message)[:5]))

    def _receive_event(self, message: dict[str, Any]) -> None:
        event = QmpEvent.of(message, time.monotonic())
        try:
            self._on_event(event)
        except Exception:  # a subscriber's bug must not end the reading of replies
            log.exception("event %s could not be delivered", event.name)

    def _receive_unknown(self, what: str) -> None:
        self.unknown_messages += 1
        if what not in self._unknown_seen and len(self._unknown_seen) < 16:
            self._unknown_seen.add(what)
            log.warning("QMP message ignored: %s", what)

    def connection_lost(self, exc: Exception | None) -> None:
        if isinstance(exc, OSError) and self._failure is None:
            self._read_what_is_left()
        failure = self._failure or exc
        self._calls.end(failure)
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
        if not self._greeting.done():
            self._greeting.set_exception(failure or WireBroken("closed before the greeting"))
        self.closed.set_result(failure)

    def _read_what_is_left(self) -> None:
        """A write has failed; what QEMU said before it closed is still there, and is no more than
        its socket's buffer held."""
        left_bytes = self._line_limit_bytes
        with contextlib.suppress(OSError):  # nothing more, or not readable
            while left_bytes > 0 and (chunk := self._socket.recv(CHUNK_BYTES)):
                left_bytes -= len(chunk)
                self.data_received(chunk)

    # Opening

    async def open(self, plain: socket.socket, *, deadline_s: float, want_oob: bool) -> None:
        """Greet and negotiate over `plain`, which is owned here from now on."""
        self._socket = plain
        try:
            async with asyncio.timeout(deadline_s):
                await self._loop.create_connection(lambda: self, sock=plain)
                self.greeting = json_object(await self._greeting)
        except TimeoutError:
            text = f"no greeting within {deadline_s} s: another client holds it, or QEMU is stuck"
            raise MonitorBusy(text) from None
        except OSError as failure:
            raise VmmUnreachable(f"no greeting: {failure}", code="qmp_no_socket") from failure
        offered = self.greeting.get("capabilities")
        has_oob = want_oob and isinstance(offered, list) and "oob" in offered
        enable: dict[str, object] = {"enable": ["oob"]} if has_oob else {}
        await self.execute("qmp_capabilities", enable, deadline_s=deadline_s)
        self.has_oob = has_oob


async def connect_qmp(
    path: Path,
    on_event: Callable[[QmpEvent], None],
    *,
    deadline_s: float = DEFAULT_DEADLINE_S,
    want_oob: bool = True,
    observe: CallObserver | None = None,
    line_limit_bytes: int = LINE_LIMIT_BYTES,
) -> QmpConnection:
    """Connect, wait for the greeting, negotiate. `on_event` is called from the reader: be quick.

    Raises MonitorBusy (no greeting within `deadline_s`), WireBroken, VmmUnreachable (no socket,
    nobody listens), or what `execute` raises for the negotiation.
    """
    plain = open_socket(path)
    connection = QmpConnection(on_event, observe=observe, line_limit_bytes=line_limit_bytes)
    try:
        await connection.open(plain, deadline_s=deadline_s, want_oob=want_oob)
    except BaseException:
        await connection.end()
        plain.close()
        raise
    return connection
