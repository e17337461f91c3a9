"""The client library's end of one connection: blocking, in the library's own thread.

What the daemon says last, before it hangs up, is ERROR: it is read even where sending failed first.
Standard library alone: this is part of the client library for authors of VMMs.
"""

import array
import errno
import fcntl
import os
import select
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from migrd.direct.messages import (
    MOST_PACKET_BYTES,
    WITH_FD,
    BadMessage,
    ErrorMessage,
    Message,
    decode,
    encode,
    printable,
)

_SEND_S: Final = 30
"""For the daemon to read what is sent; then it is taken for stuck."""
_SEALS: Final = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_FD: Final = array.array("i").itemsize


class LinkEnded(Exception):
    """The connection is over; the text says why, for people."""


@dataclass
class FromDaemon:
    serial: int
    message: Message
    _fd: int | None

    def take_fd(self) -> int | None:
        """The descriptor that came along: the caller's from now on."""
        fd, self._fd = self._fd, None
        return fd

    def close_fd(self) -> None:
        fd = self.take_fd()
        if fd is not None:
            os.close(fd)


class ClientLink:
    """A connection to the daemon; `receive` returns None once `wake_fd` can be read."""

    def __init__(self, path: Path, wake_fd: int) -> None:
        """Raises LinkEnded: nobody listens."""
        self._wake_fd = wake_fd
        self._plain = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._plain.settimeout(_SEND_S)
            self._plain.connect(os.fspath(path))
        except OSError as failure:
            self._plain.close()
            raise LinkEnded(f"{path}: {failure.strerror or failure}") from failure

    def close(self) -> None:
        self._plain.close()

    def send(self, message: Message, serial: int = 0, *, fd: int | None = None) -> None:
        """Raises LinkEnded."""
        level = socket.SOL_SOCKET
        rights = [] if fd is None else [(level, socket.SCM_RIGHTS, array.array("i", [fd]))]
        try:
            self._plain.sendmsg([encode(message, serial)], rights, socket.MSG_NOSIGNAL)
        except OSError as failure:
            self._hear_last_words()
            raise LinkEnded(f"the daemon hung up: {failure.strerror or failure}") from failure

    def receive(self, *, within_s: float | None) -> FromDaemon | None:
        """The next message; None: woken. Raises LinkEnded, BadMessage."""
        poll = select.poll()  # unlike select(2), for descriptors above 1023 too
        poll.register(self._plain, select.POLLIN)
        poll.register(self._wake_fd, select.POLLIN)
        ready = poll.poll(None if within_s is None else within_s * 1000)
        if not ready:
            raise LinkEnded(f"the daemon did not answer within {within_s} s")
        if self._plain.fileno() not in dict(ready):
            return None
        received = self._take()
        if isinstance(received.message, ErrorMessage):
            raise LinkEnded(f"refused: {printable(received.message.text)}")
        return received

    def _hear_last_words(self) -> None:
        """Raises LinkEnded when there are any."""
        poll = select.poll()
        poll.register(self._plain, select.POLLIN)
        while poll.poll(0):
            received = self._take()
            received.close_fd()
            if isinstance(received.message, ErrorMessage):
                raise LinkEnded(f"refused: {printable(received.message.text)}")

    def _take(self) -> FromDaemon:
        try:
            packet, fds = self._packet()
        except OSError as failure:
            if failure.errno != errno.ECONNRESET:
                raise LinkEnded(f"the daemon hung up: {failure.strerror or failure}") from failure
            packet, fds = self._packet()  # a reset is told once, before what was sent ahead of it
        try:
            if not packet:
                raise LinkEnded("the daemon hung up")
            found = decode(packet)
            if len(fds) != (type(found.message) in WITH_FD):
                raise BadMessage(f"{found.message.TYPE.name}: {len(fds)} descriptors came along")
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        return FromDaemon(found.serial, found.message, fds[0] if fds else None)

    def _packet(self) -> tuple[bytes, list[int]]:
        packet, ancillary, _, _ = self._plain.recvmsg(
            MOST_PACKET_BYTES, socket.CMSG_SPACE(2 * _FD), socket.MSG_CMSG_CLOEXEC
        )
        fds = array.array("i")
        for level, kind, raw in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(raw[: len(raw) - len(raw) % _FD])
        return packet, list(fds)


def sealed(state: bytes) -> int:
    """A memfd with these bytes that nobody can change; the caller's. Raises OSError."""
    fd = os.memfd_create("migrd-state", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        left = memoryview(state)
        while left:
            left = left[os.write(fd, left) :]
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        os.lseek(fd, 0, os.SEEK_SET)
    except BaseException:
        os.close(fd)
        raise
    return fd
