"""The destination's side of one transfer: listens, takes exactly one migration's stream, rebuilds.

    WAITING ── a session's channels ──► RECEIVING ── FINISH ──► LOADING ──► LOADED
       ▲                                    │ │
       └──── connection lost: start over ───┘ └── wrong data, no room, owner's error ──► FAILED

- A connection that is not this migration's (id, epoch, certificate, one channel too many) is told
  so and closed; it does not disturb the one that is. At most CONNECTIONS are there at a time.
- The first channel's session counts. While any of its channels is there no other session is let in;
  when all are gone (the source's daemon restarted) its memory is given up, and a new session starts
  over with new memory: the owner's `rebuild` is called again.
- What cannot be right (ReceiveError), no room, and an error of the owner's end the transfer for
  good: every channel is told why with its last record, the memory is given up, `loaded` raises it.
- Silence: in the middle of a record `stall_s` ends the session; between records `idle_s`, and a
  source's host that has vanished is noticed by TCP keep-alive in half a minute.
- All socket and file I/O runs in a thread per connection, joined by `close`; the owner's coroutines
  run one at a time in a task of the Receiver's own.
- After LOADED the status stays, whatever becomes of the connections; `region_fds` until `close`.
"""

import asyncio
import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import StrEnum
from typing import Final, Self

import structlog

from migrd.core.certificate import identity
from migrd.direct import stream_wire as wire
from migrd.direct.accepting import accepted
from migrd.direct.channel import Channel
from migrd.direct.inflow import Inflow, Owner
from migrd.direct.manifest import Manifest
from migrd.direct.owner_calls import OwnerCalls
from migrd.direct.pace import Meter
from migrd.direct.session import Session
from migrd.direct.stream_limits import StreamLimits
from migrd.direct.stream_wire import Opening, Type, WireError
from migrd.engine.ports import PortRange
from migrd.engine.threads import in_executor, in_thread
from migrd.errors import MigrdError, PeerRefused, ReceiveError, StreamError, Unavailable

CONNECTIONS: Final = wire.CHANNELS_MAX + 8
_ACCEPT_AGAIN_S: Final = 0.1

log = structlog.get_logger(__name__)


class ReceiverStatus(StrEnum):
    """Where the destination's side of the stream stands."""

    WAITING = "waiting"
    RECEIVING = "receiving"
    LOADING = "loading"
    LOADED = "loaded"
    FAILED = "failed"
    CLOSED = "closed"


_ENDS: Final = (ReceiverStatus.LOADED, ReceiverStatus.FAILED, ReceiverStatus.CLOSED)


class Receiver:
    """`async with` it. Methods are for the event loop; `status` and the figures for any thread."""

    def __init__(
        self,
        listen_host: str,
        ports: PortRange,
        *,
        tls: ssl.SSLContext | None,
        peer_name: str | None,
        migration_id: str,
        epoch: int,
        owner: Owner,
        limits: StreamLimits | None = None,
    ) -> None:
        """`peer_name`: what the source's certificate must name; None: any the CA has signed."""
        self._listen_host, self._ports = listen_host, ports
        self._tls, self._peer_name = tls, peer_name
        self._migration_id, self._epoch = migration_id, epoch
        self._owner = owner
        self._limits = limits or StreamLimits()
        self._threads = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="migrd-receive")
        self._calls = OwnerCalls()
        self._meter = Meter()
        self._loop = asyncio.get_running_loop()
        self._own_tasks: list[asyncio.Task[None]] = []
        self._connections: set[asyncio.Task[None]] = set()
        self._lock = threading.Lock()
        self._channels: set[Channel] = set()
        self._session: Session | None = None
        self._listener: socket.socket | None = None
        self._over = asyncio.Event()
        self._failure: MigrdError | None = None
        self.status = ReceiverStatus.WAITING
        self.refused_connections = 0
        self.last_loss: MigrdError | None = None
        """Why the last session ended that was lost; a new one may come."""

    # ---------------------------------------------------------------- the owner's side

    async def __aenter__(self) -> Self:
        """Raises Unavailable: no port of the range is free."""
        self._listener = _listen(self._listen_host, self._ports)
        self._own_tasks = [
            asyncio.create_task(self._calls.run()),
            asyncio.create_task(self._accept(self._listener)),
        ]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens."""
        assert self._listener is not None
        host, port = self._listener.getsockname()[:2]
        return host, port

    @property
    def manifest(self) -> Manifest | None:
        """Of the present session."""
        return self._session.manifest if self._session else None

    @property
    def region_fds(self) -> Mapping[int, int]:
        """The guest's memory by region id, until `close`; empty where there is none."""
        memory = self._session.memory if self._session else None
        return dict(memory.fds) if memory else {}

    @property
    def received_bytes(self) -> int:
        """On all channels of all sessions."""
        return self._meter.total_bytes

    @property
    def bandwidth_bytes_per_s(self) -> float:
        """Over the last two seconds."""
        return self._meter.bytes_per_s

    async def loaded(self) -> None:
        """Wait until the owner has loaded the guest. Raises what ended the transfer for good."""
        await self._over.wait()
        if self._failure is not None:
            raise self._failure

    async def close(self, reason: str = "the destination has ended the transfer") -> None:
        """End everything that is under way, join the threads, give the memory up. Idempotent."""
        why = StreamError(reason, code="stream_ended")
        self._end(ReceiverStatus.CLOSED, why)
        with self._lock:
            channels = list(self._channels)
        for channel in channels:
            channel.interrupt(why)
        for task in self._own_tasks:
            task.cancel()
        try:
            await joined([*self._own_tasks, *self._connections])
        finally:
            if self._listener is not None:
                self._listener.close()
            await in_thread(self._dismiss)

    # ---------------------------------------------------------------- connections

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, address = await accepted(listener)
            except OSError as failure:  # out of descriptors, or it was gone before we looked
                log.warning("direct.accept_failed", error=str(failure))
                await asyncio.sleep(_ACCEPT_AGAIN_S)
                continue
            if len(self._connections) >= CONNECTIONS:
                self.refused_connections += 1
                sock.close()
                continue
            name = f"{address[0]}:{address[1]}"
            task = asyncio.create_task(in_executor(self._threads, self._serve, sock, name))
            self._connections.add(task)
            task.add_done_callback(self._connections.discard)

    def _dismiss(self) -> None:
        self._threads.shutdown(wait=True)
        session, self._session = self._session, None
        if session is not None:
            session.give_up()

    # ---------------------------------------------------------------- in a connection's thread

    def _serve(self, sock: socket.socket, name: str) -> None:
        try:
            channel = Channel(sock, name=f"the source ({name})", stall_s=self._limits.stall_s)
        except OSError as failure:  # out of descriptors: the source hears it hang up
            log.warning("direct.accept_failed", error=str(failure))
            return
        channel.meter = self._meter
        with self._lock:
            self._channels.add(channel)
        try:
            if self.status is ReceiverStatus.CLOSED:
                return
            try:
                opening = self._opened(channel)
                session = self._admitted(opening, channel)
            except MigrdError as failure:
                self._turn_away(channel, failure)
                return
            self._receive(opening.channel, channel, session)
        finally:
            with self._lock:
                self._channels.discard(channel)
            channel.close()

    def _opened(self, channel: Channel) -> Opening:
        until_s = time.monotonic() + self._limits.connect_s
        if self._tls is not None:
            channel.encrypt(self._tls, host=None, deadline_s=until_s)
            names = identity(channel.peer_certificate())
            if self._peer_name is not None and self._peer_name.lower() not in names:
                raise ReceiveError(
                    f"the certificate names {', '.join(names) or 'nobody'}, and not"
                    f" {self._peer_name}, from which the guest comes",
                    code="wrong_certificate",
                )
        packed = bytearray(wire.OPENING_BYTES)
        within_s = self._limits.connect_s
        channel.receive(memoryview(packed), within_s, "an opening", until_s=until_s)
        try:
            return Opening.unpack(bytes(packed))
        except WireError as failure:
            raise ReceiveError(str(failure)) from failure

    def _admitted(self, opening: Opening, channel: Channel) -> Session:
        expected = (self._migration_id, self._epoch)
        if (opening.migration_id, opening.epoch) != expected:
            raise ReceiveError(
                f"this is for migration {opening.migration_id!r}, epoch {opening.epoch}; expected"
                f" here is {expected[0]!r}, epoch {expected[1]}",
                code="wrong_migration",
            )
        with self._lock:
            if self.status not in (ReceiverStatus.WAITING, ReceiverStatus.RECEIVING):
                raise ReceiveError(f"the transfer is {self.status} here", code="not_expected")
            session = self._session or Session(opening)
            if session.id != opening.session:
                raise ReceiveError(
                    "another session of this migration is still connected: try again when its"
                    " connections have ended",
                    code="session_busy",
                )
            session.join(opening, channel)
            self._session, self.status = session, ReceiverStatus.RECEIVING
        return session

    def _receive(self, number: int, channel: Channel, session: Session) -> None:
        flow = Inflow(
            number, channel, session, self._owner, self._calls.ask, self._limits, self._loading
        )
        try:
            channel.send_record(Type.ACCEPTED)
            flow.run()
            if number == 0:
                self._tell_loaded(channel)
        except MigrdError as failure:
            self._went_wrong(channel, session, failure)
        except Exception as failure:
            log.exception("direct.receive_failed")
            wrapped = ReceiveError(f"the destination failed: {failure!r}", code="internal_error")
            wrapped.__cause__ = failure
            self._went_wrong(channel, session, wrapped)
        finally:
            self._left(number, session)

    def _tell_loaded(self, channel: Channel) -> None:
        """First the status, then the source, then `loaded`: who waits there may close at once."""
        with self._lock:
            if self.status in _ENDS:
                return
            self.status = ReceiverStatus.LOADED
        try:
            channel.send_record(Type.LOADED)
        finally:
            self._wake()

    def _left(self, number: int, session: Session) -> None:
        with self._lock:
            if not session.leave(number) or session.is_loaded:
                return
            self._session = None
            if self.status in (ReceiverStatus.RECEIVING, ReceiverStatus.LOADING):
                self.status = ReceiverStatus.WAITING
        session.give_up()  # which takes long for a large guest

    def _turn_away(self, channel: Channel, why: MigrdError) -> None:
        with self._lock:
            self.refused_connections += 1
        log.warning("direct.connection_refused", who=channel.name, code=why.code, error=why.message)
        channel.refuse(why)

    def _went_wrong(self, channel: Channel, session: Session, failure: MigrdError) -> None:
        if session.is_loaded:
            return  # the source may hang up then, and need not say so
        if isinstance(failure, StreamError | PeerRefused):
            self.last_loss = failure
        else:
            self._end(ReceiverStatus.FAILED, failure)
        session.fail(failure)
        channel.refuse(failure)

    def _loading(self) -> None:
        """Raises what has ended the transfer meanwhile: then nothing is loaded any more."""
        with self._lock:
            if self._failure is not None:
                raise self._failure
            self.status = ReceiverStatus.LOADING

    def _end(self, status: ReceiverStatus, failure: MigrdError) -> None:
        """The first end counts."""
        with self._lock:
            if self.status in _ENDS:
                return
            self.status, self._failure = status, failure
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits
            self._loop.call_soon_threadsafe(self._over.set)


async def joined(tasks: Sequence[asyncio.Task[None]]) -> None:
    """All of them have ended when this does, also when it is cancelled."""
    cancelled: asyncio.CancelledError | None = None
    while left := [task for task in tasks if not task.done()]:
        try:
            await asyncio.wait(left)
        except asyncio.CancelledError as exc:
            cancelled = exc
    if cancelled is not None:
        raise cancelled


def _listen(host: str, ports: PortRange) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    failure: OSError | None = None
    for port in range(ports[0], ports[1] + 1):
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((host, port))
            sock.listen(CONNECTIONS)
            sock.setblocking(False)
            return sock
        except OSError as refused:
            failure = refused
            sock.close()
    raise Unavailable(
        f"no port of {ports[0]}..{ports[1]} can be listened on at {host}: {failure}",
        code="no_free_port",
    ) from failure
