"""One connection of the memory stream, from one thread, with deadlines, and stopped from any other.

The socket never blocks; where it would, the thread polls it together with an event of its own, so
that `interrupt` ends any wait at once. With TLS the two directions share one OpenSSL object, which
is not made for two threads: only the thread that owns the channel touches the socket, also to say
why it hangs up (`refuse`).

    send      in pieces, as Pace allows; while it waits it also hears the other side, whose ABORT
              says why it no longer reads
    receive   exactly so many bytes into a buffer of the caller's
    records   header and body, numbered, digested and chained as stream_wire says

Errors: StreamError (broken, stalled, ended), PeerRefused (the other side said ABORT, with its
reason), ReceiveError (what it sent is no record).
"""

import contextlib
import errno
import math
import os
import select
import socket
import ssl
import time
from typing import Any, Final

from migrd.direct import stream_wire as wire
from migrd.direct.pace import Meter, Pace
from migrd.direct.stream_wire import Header, Type, WireError
from migrd.errors import MigrdError, PeerRefused, ReceiveError, StreamError

_WOULD_BLOCK: Final = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
Buffer = bytes | bytearray | memoryview

_LINGER_S: Final = 1.0
"""How long a side that hangs up with a reason lets the other one read it."""
_DISCARD_BYTES: Final = 1 << 16


class Channel:
    """Made in the thread that uses it, or handed to it; `interrupt` may come from any thread."""

    def __init__(self, sock: socket.socket, *, name: str, stall_s: float) -> None:
        """Owns the socket from here on. OSError: no descriptor left; it is closed then."""
        sock.setblocking(False)
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _keep_alive(sock)
        self._sock = sock
        self.name = name
        """The other side, for messages."""
        try:
            self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except OSError:
            sock.close()
            raise
        self.stall_s = stall_s
        self.pace = Pace()
        self.meter = Meter()
        self.sent, self.received = Counted(), Counted()
        self._tls: ssl.SSLSocket | None = None
        self._poll = select.poll()
        self._poll.register(self._wake, select.POLLIN)
        self._interrupted: MigrdError | None = None
        self._is_closed = False
        self._is_parting = False

    # ---------------------------------------------------------------- from any thread

    def interrupt(self, why: MigrdError) -> None:
        """End whatever the channel's thread waits for: it raises `why`."""
        if not self._is_closed:
            self._interrupted = self._interrupted or why
            with contextlib.suppress(OSError):
                os.eventfd_write(self._wake, 1)

    @property
    def interruption(self) -> MigrdError | None:
        return self._interrupted

    # ---------------------------------------------------------------- opening and closing

    def encrypt(self, context: ssl.SSLContext, *, host: str | None, deadline_s: float) -> None:
        """TLS: as the server where `host` is None, else as the client of a server of that name.

        Raises PeerRefused (`tls_refused`) with what OpenSSL found, StreamError.
        """
        wrapped = context.wrap_socket(
            self._sock,
            server_side=host is None,
            server_hostname=host,
            do_handshake_on_connect=False,
        )
        self._sock = self._tls = wrapped
        while True:
            try:
                wrapped.do_handshake()
                return
            except ssl.SSLWantReadError:
                events = select.POLLIN
            except ssl.SSLWantWriteError:
                events = select.POLLOUT
            except (OSError, ValueError) as failure:
                raise self._broken(failure, "shaking hands") from failure
            self.wait(events, deadline_s - time.monotonic(), "a TLS handshake")

    def connect(self, address: Any, deadline_s: float) -> None:
        """OSError: refused, unreachable, or not in time."""
        failed = self._sock.connect_ex(address)
        if failed == errno.EINPROGRESS:
            try:
                self.wait(select.POLLOUT, deadline_s - time.monotonic(), "a connection")
            except StreamError as failure:
                if failure is self._interrupted:
                    raise
                raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)) from failure
            failed = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if failed:
            raise OSError(failed, os.strerror(failed))

    def peer_certificate(self) -> dict[str, object]:
        """As ssl.SSLSocket.getpeercert; empty without TLS."""
        found = self._tls.getpeercert() if self._tls is not None else None
        return dict(found or {})

    def close(self) -> None:
        """Idempotent; by the channel's thread, or when that has ended."""
        if not self._is_closed:
            self._is_closed = True
            self._sock.close()
            os.close(self._wake)

    def refuse(self, why: MigrdError) -> None:
        """Tell the other side why, as far as it listens, and hang up. Raises nothing.

        An interruption does not cut the words short, only the wait until they are read.
        """
        self._poll.unregister(self._wake)
        self._is_parting = True
        self.stall_s = _LINGER_S
        with contextlib.suppress(MigrdError, OSError, ValueError):
            self.send_record(Type.ABORT, wire.abort_body(why.code, why.message))
        with contextlib.suppress(OSError):  # and after a failed handshake there is TLS' own alert
            socket.socket.shutdown(self._sock, socket.SHUT_WR)
            self._discard(time.monotonic() + _LINGER_S)

    def _discard(self, until_s: float) -> None:
        """Read on: a connection closed over unread bytes would take our last words with it."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)  # what ended the transfer; the next one is to hurry
        self._poll.register(self._wake, select.POLLIN)
        rest = bytearray(_DISCARD_BYTES)
        while (left_s := until_s - time.monotonic()) > 0:
            try:
                if not os.readv(self._sock.fileno(), [rest]):
                    return
            except BlockingIOError:
                self._poll.register(self._sock, select.POLLIN)
                if self._wake in dict(self._poll.poll(left_s * 1000)):
                    return

    # ---------------------------------------------------------------- bytes

    def wait(self, events: int, within_s: float, doing: str) -> int:
        """Events of the socket. Raises StreamError (`stream_stalled`), or the interruption."""
        self._poll.register(self._sock, events)
        found = dict(self._poll.poll(max(0.0, within_s) * 1000))
        self._check()
        if not found:
            raise StreamError(
                f"{self.name}: no progress within {within_s:.3g} s while waiting for {doing}",
                code="stream_stalled",
            )
        return found.get(self._sock.fileno(), 0)

    def send(self, content: Buffer, *, more: bool = False) -> None:
        """All of it. `more`: the next bytes follow at once."""
        view = memoryview(content)
        flags = socket.MSG_MORE if more and self._tls is None else 0
        while view:
            allowed = self._allowed(len(view))
            piece, view = view[:allowed], view[allowed:]
            self.meter.add(allowed)
            while piece:
                try:
                    # TLS takes no flags; and after "would block" it wants the same bytes again
                    done = self._sock.send(piece, flags) if flags else self._sock.send(piece)
                except _WOULD_BLOCK:
                    self._until_writable()
                except (OSError, ValueError) as failure:
                    raise self._broken(failure, "sending") from failure
                else:
                    piece = piece[done:]

    def receive(
        self, buffer: memoryview, within_s: float, doing: str, *, until_s: float = math.inf
    ) -> None:
        """Fill it; each piece within `within_s`. StreamError also when the other side hung up."""
        receive_into = self._sock.recv_into
        while buffer:
            try:
                done = receive_into(buffer)
            except _WOULD_BLOCK:
                self.wait(select.POLLIN, min(within_s, until_s - time.monotonic()), doing)
            except (OSError, ValueError) as failure:
                raise self._broken(failure, "receiving") from failure
            else:
                if not done:
                    raise StreamError(f"{self.name} hung up in the middle of {doing}")
                buffer = buffer[done:]
                self.meter.add(done)

    def _check(self) -> None:
        if self._interrupted is not None and not self._is_parting:
            raise self._interrupted

    def _allowed(self, wanted_bytes: int) -> int:
        """How much may be sent now: at least something, once the pace permits it."""
        self._check()
        piece = min(wanted_bytes, self.pace.piece_bytes)
        while not self.pace.may_send(piece):
            self._check()
            self.hear()
            piece = min(wanted_bytes, self.pace.piece_bytes)
        return piece

    def _until_writable(self) -> None:
        """Also hears: who no longer reads may have said why."""
        until_s = time.monotonic() + self.stall_s
        while True:
            events = select.POLLIN | select.POLLOUT
            found = self.wait(events, until_s - time.monotonic(), "the other side to read")
            if found & select.POLLOUT:
                return
            self.hear()

    def hear(self) -> None:
        """Where the other side speaks out of turn it can only be ABORT: raises PeerRefused."""
        self._poll.register(self._sock, select.POLLIN)
        if not dict(self._poll.poll(0)).get(self._sock.fileno(), 0):
            return
        self.last_words()

    def last_words(self) -> None:
        """Raises what the other side has said, StreamError if it has hung up; else nothing."""
        head = bytearray(1)
        try:
            done = self._sock.recv_into(head)
        except _WOULD_BLOCK:
            return
        except (OSError, ValueError) as failure:
            raise self._broken(failure, "receiving") from failure
        if not done:
            raise StreamError(f"{self.name} hung up")
        rest = bytearray(wire.HEADER_BYTES - 1)
        self.receive(memoryview(rest), self.stall_s, "a record")
        header = self._numbered(head + rest)
        self._body(header)
        raise ReceiveError(f"{self.name} sent {header.type.name} out of turn")

    def _broken(self, failure: Exception, doing: str) -> MigrdError:
        """Our error for the socket's; raises what the other side said, where it did."""
        if isinstance(failure, ssl.SSLEOFError | ssl.SSLZeroReturnError):
            return StreamError(f"{self.name} hung up while {doing}")
        if isinstance(failure, ssl.SSLError):
            reason = (failure.reason or str(failure)).replace("_", " ").lower()
            why = getattr(failure, "verify_message", "") or reason
            return PeerRefused(f"{self.name}: TLS failed while {doing}: {why}", code="tls_refused")
        if doing == "sending":
            self._raise_reason()
        return StreamError(f"{self.name}: {failure} while {doing}")

    def _raise_reason(self) -> None:
        """Who hung up while we sent may have said why just before."""
        with contextlib.suppress(StreamError, ReceiveError):
            self.last_words()

    # ---------------------------------------------------------------- records

    def send_record(self, kind: Type, body: bytes = b"", *, flags: int = 0) -> None:
        header = self.next_header(kind, len(body), wire.digest_of(body), flags=flags)
        self.send(header + body)

    def next_header(
        self, kind: Type, body_bytes: int, digest: int, *, flags: int = 0, entries: int = 0
    ) -> bytes:
        """Numbered and chained: it must be sent next."""
        number = self.sent.records
        packed = Header(kind, flags, entries, body_bytes, number, digest).pack()
        self.sent.add(packed)
        return packed

    def receive_header(self, within_s: float) -> Header:
        """The next record's; not chained yet. Raises PeerRefused for ABORT, ReceiveError."""
        packed = bytearray(wire.HEADER_BYTES)
        first = memoryview(packed)[:1]
        self.receive(first, within_s, "the next record")
        self.receive(memoryview(packed)[1:], self.stall_s, "a record")
        return self._numbered(packed)

    def receive_record(self, within_s: float, *expected: Type) -> tuple[Header, bytes]:
        """A small record: header and body, checked. Raises as receive_header."""
        header = self.receive_header(within_s)
        if header.type not in expected:
            names = " or ".join(kind.name for kind in expected)
            raise ReceiveError(f"{self.name} sent {header.type.name} instead of {names}")
        return header, self._body(header)

    def receive_body(self, header: Header) -> bytes:
        """Of a record that is no MEMORY."""
        return self._body(header)

    def _numbered(self, packed: bytearray) -> Header:
        try:
            header = Header.unpack(packed)
        except WireError as failure:
            raise ReceiveError(f"{self.name}: {failure}") from failure
        if header.sequence != self.received.records:
            raise ReceiveError(
                f"{self.name}: record {header.sequence} came where {self.received.records} was due"
            )
        self.received.add(packed)
        if header.type is Type.ABORT:
            code, message = wire.abort_words(self._body(header))
            raise PeerRefused(f"{self.name} ended the transfer: {message}", code=code)
        return header

    def _body(self, header: Header) -> bytes:
        body = bytearray(header.body_bytes)
        self.receive(memoryview(body), self.stall_s, f"a {header.type.name} record")
        if wire.digest_of(body) != header.digest:
            raise ReceiveError(
                f"{self.name}: {header.type.name} arrived damaged: its checksum is not its own"
            )
        return bytes(body)


class Counted:
    """Records of one direction: how many, and their chain before and after the last one."""

    def __init__(self) -> None:
        self.records = 0
        self.chain = 0
        self.chain_before = 0

    def add(self, header: Buffer) -> None:
        self.chain_before, self.chain = self.chain, wire.chained(self.chain, header)
        self.records += 1


def _keep_alive(sock: socket.socket) -> None:
    """A host that vanished is noticed within half a minute, also between rounds."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
