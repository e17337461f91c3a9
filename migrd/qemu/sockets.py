"""Unix sockets as QMP needs them: connected without waiting, and able to carry a descriptor.

A connect to a unix socket never has to wait: it succeeds, or the queue of the listener is full
(EAGAIN: others wait for this monitor already). Asyncio's own sock_connect takes that EAGAIN for
"in progress" and reports a success that is none.
"""

import array
import asyncio
import os
import socket
from pathlib import Path

from migrd.errors import VmmUnreachable
from migrd.qemu.wire import MonitorBusy, NotSent

_SUN_PATH_BYTES = 107


def open_socket(path: Path) -> socket.socket:
    """Connect to `path` at once, non-blocking from the start.

    Raises MonitorBusy when the listener's queue is full, VmmUnreachable when nobody listens.
    """
    try:
        plain = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    except OSError as failure:  # no descriptor left, for one
        raise VmmUnreachable(f"{path}: {failure.strerror}", code="qmp_no_socket") from failure
    try:
        _connect(plain, path)
    except BlockingIOError:
        plain.close()
        raise MonitorBusy(f"{path}: other clients wait for this monitor already") from None
    except OSError as failure:
        plain.close()
        why = failure.strerror or str(failure)  # "AF_UNIX path too long" has no errno
        raise VmmUnreachable(f"{path}: {why}", code="qmp_no_socket") from failure
    return plain


def _connect(plain: socket.socket, path: Path) -> None:
    if len(os.fsencode(path)) <= _SUN_PATH_BYTES:
        plain.connect(os.fspath(path))
        return
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:  # the kernel's limit is on the text of the path, not on where it leads
        plain.connect(f"/proc/self/fd/{directory}/{path.name}")
    finally:
        os.close(directory)


async def send_with_fd(plain: socket.socket, payload: bytes, fd: int) -> int:
    """Send `payload` with `fd` attached to its first byte; returns the bytes sent, at least one.

    The caller sees to it that nobody else writes meanwhile. Raises NotSent: nothing went out.
    """
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
    while True:
        try:
            return plain.sendmsg([payload], rights)
        except BlockingIOError:
            await _writable(plain)
        except OSError as failure:
            raise NotSent(f"descriptor {fd} not sent: {failure}") from failure


async def _writable(plain: socket.socket) -> None:
    """Wait for room in the kernel's buffer, on a duplicate: the loop keeps the first to itself."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    duplicate = os.dup(plain.fileno())

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    try:
        loop.add_writer(duplicate, wake)
        await ready
    finally:
        loop.remove_writer(duplicate)
        os.close(duplicate)
