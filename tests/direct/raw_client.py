"""A connection that says whatever a test wants, packet by packet, right or wrong."""

from __future__ import annotations

import array
import asyncio
import ctypes
import fcntl
import gc
import mmap
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from migrd.direct.messages import (
    MOST_PACKET_BYTES,
    ClientState,
    ErrorMessage,
    Hello,
    Message,
    OfferEnd,
    RangeMessage,
    RegionMessage,
    SourceKind,
    SourceMessage,
    Welcome,
    decode,
    encode,
)

HVA: Final = 1 << 40
MIB: Final = 1 << 20
HELLO: Final = Hello(ClientState.RUNNING, 0, "guest")
_MAP_FIXED: Final = 0x10
_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_mmap, _munmap = _LIBC.mmap, _LIBC.munmap
_mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_mmap.restype = ctypes.c_void_p
_munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class RawClient:
    """Descriptors that it passes stay the test's."""

    def __init__(self, path: Path) -> None:
        self.plain = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        self.plain.connect(os.fspath(path))

    def close(self) -> None:
        self.plain.close()

    def say(self, message: Message, serial: int = 0, *, fds: Sequence[int] = ()) -> None:
        self.send(encode(message, serial), fds)

    def send(self, packet: bytes, fds: Sequence[int] = ()) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.plain.sendmsg([packet], rights)

    async def hear(self) -> tuple[int, Message] | None:
        """None: the daemon hung up."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(30):
            while True:
                try:
                    packet = await loop.sock_recv(self.plain, MOST_PACKET_BYTES)
                    break
                except ConnectionResetError:
                    continue  # told once, before what was sent ahead of it
        if not packet:
            return None
        found = decode(packet)
        return found.serial, found.message

    async def error(self) -> ErrorMessage:
        """What the daemon says before it hangs up."""
        heard = await self.hear()
        while heard is not None and not isinstance(heard[1], ErrorMessage):
            heard = await self.hear()
        assert heard is not None, "it hung up without a word"
        assert isinstance(heard[1], ErrorMessage)
        assert await self.hear() is None
        return heard[1]

    async def hand_over(self, hello: Hello = HELLO, *, length_bytes: int = MIB) -> None:
        with memory(length_bytes) as fd, page_map() as pagemap:
            self.say(hello)
            for message in offer(length_bytes):
                fds = {RegionMessage: [fd], SourceMessage: [pagemap]}.get(type(message), [])
                self.say(message, fds=fds)
            heard = await self.hear()
        assert heard is not None
        assert isinstance(heard[1], Welcome), heard[1]


def offer(length_bytes: int = MIB) -> tuple[Message, ...]:
    return (
        RegionMessage(0, 0, length_bytes, 0, HVA),
        SourceMessage(SourceKind.PROCESS, 0, 4096, (RangeMessage(0, 0, HVA, length_bytes),)),
        OfferEnd(1, 1, 0),
    )


@contextmanager
def memory(length_bytes: int = MIB, *, seals: int = 0) -> Iterator[int]:
    """A memfd, which is mapped at HVA meanwhile (sealed against writing it cannot be)."""
    fd = os.memfd_create("guest", os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, length_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        if seals:
            yield fd
        else:
            with mapped(fd, length_bytes):
                yield fd
    finally:
        os.close(fd)


@contextmanager
def mapped(
    fd: int,
    length_bytes: int,
    *,
    flags: int = mmap.MAP_SHARED,
    protection: int = mmap.PROT_READ | mmap.PROT_WRITE,
    offset_bytes: int = 0,
    address: int = HVA,
) -> Iterator[None]:
    """At a place of one's own choice, in the place of what was mapped there."""
    flags |= _MAP_FIXED
    if _mmap(address, length_bytes, protection, flags, fd, offset_bytes) != address:
        raise OSError(ctypes.get_errno(), f"mmap at {address:#x}")
    try:
        yield
    finally:
        assert _munmap(address, length_bytes) == 0


@contextmanager
def page_map() -> Iterator[int]:
    fd = os.open("/proc/self/pagemap", os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


def open_descriptors() -> int:
    """How many there are; what earlier tests have left to the garbage collector is not among them,
    or has it been: compare with `<=`."""
    gc.collect()
    return len(os.listdir("/proc/self/fd"))
