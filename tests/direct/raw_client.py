"""A connection that says whatever a test wants, packet by packet, right or wrong."""

from __future__ import annotations

import array
import asyncio
import fcntl
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
    fd = os.memfd_create("guest", os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, length_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        yield fd
    finally:
        os.close(fd)


@contextmanager
def page_map() -> Iterator[int]:
    fd = os.open("/proc/self/pagemap", os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))
