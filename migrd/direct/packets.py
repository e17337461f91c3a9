"""One connection of the hand-over protocol: messages in and out of a SOCK_SEQPACKET socket.

asyncio has nothing that carries descriptors, so this waits for the socket with add_reader and
add_writer and makes the calls itself, non-blocking. Descriptors that come with a message that
cannot be read are closed here; the others are the caller's from then on.
"""

import array
import asyncio
import errno
import os
import socket
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from migrd.direct.messages import (
    MOST_PACKET_BYTES,
    WITH_FD,
    Answer,
    BadMessage,
    ErrorCode,
    ErrorMessage,
    Message,
    decode,
    encode,
)

_UCRED: Final = struct.Struct("3i")
_FD: Final = array.array("i").itemsize
_ROOM_FDS: Final = 4
"""For more than may come, so that too many are seen as such, and closed."""
_IN_A_ROW: Final = 16
"""Messages taken before others get their turn."""
_DRAINED: Final = 256


class ConnectionEnded(Exception):
    """The other side hung up, or its process ended."""


@dataclass(frozen=True)
class Received:
    """A message; `fd` (None where it has none) belongs to who received it."""

    serial: int
    message: Message
    fd: int | None = None

    def close_fd(self) -> None:
        if self.fd is not None:
            os.close(self.fd)


class PacketSocket:
    """Owns a connected, non-blocking socket. One task receives; any may send.

    Closed while somebody waits, both raise ConnectionEnded.
    """

    def __init__(self, plain: socket.socket) -> None:
        self._plain = plain
        self._sending = asyncio.Lock()
        self._in_a_row = 0
        self._waiting: set[asyncio.Future[None]] = set()

    @property
    def peer_pid(self) -> int:
        """Of the process that connected; 0: not told."""
        try:
            raw = self._plain.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        except OSError:
            return 0
        return int(_UCRED.unpack(raw)[0])

    async def receive(self) -> Received:
        """The next message. Raises ConnectionEnded, BadMessage."""
        self._in_a_row += 1
        if self._in_a_row >= _IN_A_ROW:
            self._in_a_row = 0
            await asyncio.sleep(0)
        while True:
            try:
                return self._take()
            except BlockingIOError:
                self._in_a_row = 0
                loop = asyncio.get_running_loop()
                await self._ready(loop.add_reader, loop.remove_reader)

    async def send(self, message: Message, serial: int = 0, fds: Sequence[int] = ()) -> None:
        """Raises ConnectionEnded. Waits while the other side does not read: give it a deadline."""
        packet = encode(message, serial)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        async with self._sending:
            while True:
                try:
                    self._plain.sendmsg([packet], rights, socket.MSG_NOSIGNAL)
                    return
                except BlockingIOError:
                    loop = asyncio.get_running_loop()
                    await self._ready(loop.add_writer, loop.remove_writer)
                except OSError as failure:
                    raise ConnectionEnded(_why(failure)) from failure

    def refuse(self, code: ErrorCode, text: str) -> None:
        """Tell the other side what is wrong and hang up, without waiting for anything.

        What it has sent meanwhile is read away: a socket closed with unread packets resets the
        connection, and the error might not be read for it.
        """
        try:
            self._plain.send(encode(ErrorMessage(code, text)), socket.MSG_NOSIGNAL)
            for _ in range(_DRAINED):
                self._take().close_fd()
        except (OSError, ConnectionEnded, BadMessage):
            pass
        finally:
            self.close()

    def close(self) -> None:
        if self._plain.fileno() >= 0:
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._plain)
            loop.remove_writer(self._plain)
            self._plain.close()
        for ready in self._waiting:
            settle(ready)

    async def _ready(
        self, add: Callable[..., None], remove: Callable[[socket.socket], bool]
    ) -> None:
        if self._plain.fileno() < 0:
            raise ConnectionEnded("it was closed here")
        ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        add(self._plain, settle, ready)
        self._waiting.add(ready)
        try:
            await ready
        finally:
            self._waiting.discard(ready)
            if self._plain.fileno() >= 0:
                remove(self._plain)

    def _take(self) -> Received:
        try:
            packet, ancillary, flags, _ = self._plain.recvmsg(
                MOST_PACKET_BYTES,
                socket.CMSG_SPACE(_ROOM_FDS * _FD),
                socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT,
            )
        except BlockingIOError:
            raise
        except OSError as failure:
            raise ConnectionEnded(_why(failure)) from failure
        fds = _descriptors(ancillary)
        try:
            if not packet:
                raise ConnectionEnded("the other side hung up")
            return _checked(packet, fds, flags)
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise


def settle(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


def _descriptors(ancillary: Sequence[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, raw in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(raw[: len(raw) - len(raw) % _FD])
    return list(fds)


def _checked(packet: bytes, fds: Sequence[int], flags: int) -> Received:
    if flags & socket.MSG_TRUNC:
        raise BadMessage(f"a packet of more than {MOST_PACKET_BYTES} bytes; send less at once")
    found = decode(packet)
    name = found.message.TYPE.name
    if flags & socket.MSG_CTRUNC:
        raise BadMessage(
            f"{name}: its descriptors did not all arrive; send one a message, and raise the "
            "daemon's limit of open files if it sent one"
        )
    if len(fds) > 1:
        raise BadMessage(f"{name}: {len(fds)} descriptors; send one a message")
    if type(found.message) in WITH_FD and not fds:
        raise BadMessage(f"{name}: its descriptor is missing; send it along by SCM_RIGHTS")
    if fds and type(found.message) not in WITH_FD and not isinstance(found.message, Answer):
        raise BadMessage(f"{name}: takes no descriptor, and one came; send none")
    return Received(found.serial, found.message, fds[0] if fds else None)


def _why(failure: OSError) -> str:
    if failure.errno in {errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN}:
        return "the other side hung up"
    return failure.strerror or str(failure)
