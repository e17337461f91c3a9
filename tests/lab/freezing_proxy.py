"""A proxy for one TCP or unix socket whose wire can be frozen, slowed and cut.

    client --> listening address --> [ wire ] --> target address
                                       |
        freeze()   bytes stop, both connections stay up: a partition as TCP sees it at first
        delay_s    each piece waits before it goes on
        cut()      all connections end: with FIN, or with RST (`abruptly`)
        refuse     new connections are closed at once

Each direction is its own wire (`to_target`, `to_client`), so a link can be half open. While
frozen nothing is read either: the sender's window fills up, as on a dead link.

No root is needed, and what happens is decided by the test, not by a timer: prefer it to
network namespaces.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

Address = Path | tuple[str, int]
_PIECE_BYTES = 64 * 1024
_BUFFER_BYTES = 128 * 1024
"""What the proxy's own ends hold back. The kernel would let megabytes gather in them, and then a
sender is done long before what it sent has passed."""


@dataclass
class Wire:
    """One direction."""

    passed_bytes: int = 0
    delay_s: float = 0.0
    freeze_after_bytes: int | None = None
    """Freeze by itself once so many bytes have passed: to stop in the middle of a message."""
    _open: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._open.set()

    @property
    def is_frozen(self) -> bool:
        return not self._open.is_set()

    def freeze(self) -> None:
        self._open.clear()

    def resume(self) -> None:
        self.freeze_after_bytes = None
        self._open.set()

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Until the end of the stream, which is passed on too."""
        while True:
            await self._open.wait()
            piece = await reader.read(_PIECE_BYTES)
            await self._open.wait()  # frozen while it was read: it has not passed yet
            if not piece:
                break
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
            await self._pass(piece, writer)
        if writer.can_write_eof():
            writer.write_eof()

    async def _pass(self, piece: bytes, writer: asyncio.StreamWriter) -> None:
        while piece:
            await self._open.wait()
            length = len(piece)
            if self.freeze_after_bytes is not None:
                length = min(length, max(0, self.freeze_after_bytes - self.passed_bytes))
            writer.write(piece[:length])
            await writer.drain()
            self.passed_bytes += length
            piece = piece[length:]
            if self.passed_bytes == self.freeze_after_bytes or not length:
                self.freeze()


class FreezingProxy:
    """Use as `async with freezing_proxy(listen, target) as proxy`."""

    def __init__(self, target: Address) -> None:
        self.target = target
        self.to_target = Wire()
        self.to_client = Wire()
        self.refuse = False
        self.accepted = 0
        self.address: Address = ("", 0)
        """Where it listens; a port of 0 is replaced by the one that was chosen."""
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def connections(self) -> int:
        """Connections that are up now."""
        return len(self._writers) // 2

    def freeze(self) -> None:
        self.to_target.freeze()
        self.to_client.freeze()

    def resume(self) -> None:
        self.to_target.resume()
        self.to_client.resume()

    def cut(self, *, abruptly: bool = False) -> None:
        """End all connections at both ends: with FIN, or with RST if `abruptly` (TCP)."""
        for writer in self._writers:
            if abruptly:
                _close_with_reset(writer)
            writer.transport.abort()

    async def close(self) -> None:
        """End all connections and wait for their tasks."""
        self.resume()
        self.cut()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A new client; its connection is a task of this proxy."""
        self.accepted += 1
        if self.refuse:
            writer.transport.abort()
            return
        task = asyncio.create_task(self._connect(reader, writer), name="freezing proxy")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there = await _dial(self.target)
        except OSError:
            writer.transport.abort()  # the target is down, and so the client is turned away
            return
        pair = {writer, there[1]}
        self._writers |= pair
        try:
            # An error of either end ends the other, as a broken link would.
            with contextlib.suppress(ConnectionError, ExceptionGroup):
                async with asyncio.TaskGroup() as both:
                    both.create_task(self.to_target.carry(reader, there[1]))
                    both.create_task(self.to_client.carry(there[0], writer))
        finally:
            self._writers -= pair
            for one in pair:
                one.close()


async def _dial(target: Address) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if isinstance(target, Path):
        return await asyncio.open_unix_connection(str(target))
    sock = socket.socket()
    sock.setblocking(False)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
        await asyncio.get_running_loop().sock_connect(sock, target)
        return await asyncio.open_connection(sock=sock, limit=_PIECE_BYTES)
    except BaseException:
        sock.close()
        raise


def _listening_socket(address: tuple[str, int]) -> socket.socket:
    sock = socket.socket()
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)  # before `listen`
        sock.bind(address)
    except BaseException:
        sock.close()
        raise
    return sock


def _close_with_reset(writer: asyncio.StreamWriter) -> None:
    sock = writer.get_extra_info("socket")
    if sock is not None and sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@contextlib.asynccontextmanager
async def freezing_proxy(listen: Address, target: Address) -> AsyncIterator[FreezingProxy]:
    """A proxy that listens at `listen` (a port of 0: any) and forwards to `target`.

    The target need not exist yet: it is dialled for each client.
    """
    proxy = FreezingProxy(target)
    if isinstance(listen, Path):
        server = await asyncio.start_unix_server(proxy.accept, str(listen))
        proxy.address = listen
    else:
        sock = _listening_socket(listen)
        server = await asyncio.start_server(proxy.accept, sock=sock, limit=_PIECE_BYTES)
        proxy.address = server.sockets[0].getsockname()[:2]
    try:
        yield proxy
    finally:
        server.close()
        await proxy.close()
        await server.wait_closed()
        if isinstance(listen, Path):
            listen.unlink(missing_ok=True)
