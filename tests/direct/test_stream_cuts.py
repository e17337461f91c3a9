"""A connection cut at every record: nothing half-moved counts, and the next attempt starts over."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial

import pytest

from migrd.core.bitmap import DirtyBitmap
from migrd.direct import stream_wire as wire
from migrd.direct.manifest import Manifest
from migrd.direct.receiver import Receiver, ReceiverStatus
from migrd.direct.sender import Sender
from migrd.errors import MigrdError
from tests.direct.stream_rig import (
    PAGE,
    Guest,
    Owner,
    arrived,
    guest,
    receiver,
    same_pages,
    sender,
    until,
)


@dataclass
class Road:
    """Passes connections on; cuts all when so many bytes went one way on channel 0."""

    to: tuple[str, int]
    cut_at: int | None = None
    from_destination: bool = False
    passed: bytearray = field(default_factory=bytearray)
    _writers: list[asyncio.StreamWriter] = field(default_factory=list)

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        onward_reader, onward = await asyncio.open_connection(*self.to)
        self._writers += [writer, onward]
        try:
            opening = await reader.readexactly(wire.OPENING_BYTES)
        except (OSError, asyncio.IncompleteReadError):
            return
        is_first = wire.Opening.unpack(opening).channel == 0
        async with asyncio.TaskGroup() as both:
            both.create_task(self._pass(reader, onward, opening, counts=is_first))
            both.create_task(self._pass(onward_reader, writer, counts=is_first, back=True))

    async def _pass(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        piece: bytes = b"",
        *,
        counts: bool,
        back: bool = False,
    ) -> None:
        with suppress(OSError):
            while piece := piece or await reader.read(1 << 16):
                if counts and back is self.from_destination:
                    room = len(piece) if self.cut_at is None else self.cut_at - len(self.passed)
                    self.passed += piece[:room]
                    writer.write(piece[:room])
                    if room < len(piece) or len(self.passed) == self.cut_at:
                        self.cut()
                        return
                else:
                    writer.write(piece)
                await writer.drain()
                piece = b""
        writer.close()

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()


@asynccontextmanager
async def carried_by(road: Road) -> AsyncIterator[tuple[str, int]]:
    server = await asyncio.start_server(road.carry, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[:2]
    finally:
        server.close()
        road.cut()
        await server.wait_closed()


async def transfer(of: Guest, source: Sender, pending: DirtyBitmap) -> None:
    """Two rounds, device data, state: a record of each type."""
    await source.connect(Manifest(of.memory, ("nic",)))
    await source.send(pending, stable=False)
    pending.mark(3, 2)
    await source.send(pending, stable=True)
    await source.send_device_data("nic", b"d" * 100)
    state = os.memfd_create("test-state")
    os.write(state, b"s" * 100)
    try:
        await source.send_state(state)
    finally:
        os.close(state)
    await source.finish()


def boundaries(passed: bytes, *, opening: bool) -> list[int]:
    """Where records end, and the middles of their headers and bodies."""
    at = wire.OPENING_BYTES if opening else 0
    found = [1, at]
    while at < len(passed):
        body = wire.Header.unpack(passed[at : at + wire.HEADER_BYTES]).body_bytes
        after = at + wire.HEADER_BYTES
        found += [at + 7, after, after + body // 2, after + body]
        at = after + body
    return sorted({cut for cut in found if 0 < cut < len(passed)})


async def cuts_of(of: Guest, channels: int, *, from_destination: bool) -> list[int]:
    async with receiver(Owner()) as destination:
        road = Road(destination.address, None, from_destination)
        async with carried_by(road) as address, sender(of, address, channels=channels) as source:
            await transfer(of, source, of.memory.full())
        return boundaries(bytes(road.passed), opening=not from_destination)


async def cut_transfer(of: Guest, road: Road, channels: int) -> MigrdError | None:
    pending = of.memory.full()
    async with carried_by(road) as address, sender(of, address, channels=channels) as source:
        try:
            await transfer(of, source, pending)
        except MigrdError as failure:
            # all of the round under way is back: everything, or the two pages of the second one
            assert same_pages(pending, of.memory.full()) or pending.count() in (0, 2)
            return failure
    return None


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("from_destination", [False, True], ids=["to", "back"])
async def test_a_connection_cut_at_every_record_costs_nothing_but_the_attempt(
    from_destination: bool, channels: int
) -> None:
    with guest(40, 5) as of:
        for page in (0, 3, 7, 64):
            of.write(page, os.urandom(PAGE))
        cuts = await cuts_of(of, channels, from_destination=from_destination)
        assert len(cuts) >= 10
        assert channels > 1 or from_destination or len(cuts) >= 25
        descriptors = len(os.listdir("/proc/self/fd"))
        for cut in cuts:
            owner = Owner()
            async with receiver(owner) as destination:
                road = Road(destination.address, cut, from_destination)
                failure = await cut_transfer(of, road, channels)
                if failure is None:
                    # the other channel took the pages, so this one was never cut
                    assert channels == 2
                    assert len(road.passed) < cut
                    continue
                if destination.status is ReceiverStatus.LOADED:
                    # only the last answer was lost: the other migrd must be asked
                    assert owner.loads == 1
                    continue
                assert failure.message
                await until(partial(is_waiting, destination))
                assert not destination.region_fds
                assert owner.loads == 0
                async with sender(of, destination.address) as source:
                    await transfer(of, source, of.memory.full())
                    assert arrived(destination) == of.read()
                assert owner.loads == 1
        assert len(os.listdir("/proc/self/fd")) <= descriptors


def is_waiting(destination: Receiver) -> bool:
    return destination.status is ReceiverStatus.WAITING


async def test_another_session_waits_until_the_old_one_is_gone() -> None:
    with guest(64) as of:
        async with receiver(Owner()) as destination:
            async with sender(of, destination.address) as old:
                await old.connect(Manifest(of.memory))
                async with sender(of, destination.address) as new:
                    with pytest.raises(MigrdError, match="another session") as told:
                        await new.connect(Manifest(of.memory))
                    assert told.value.code == "session_busy"
                await old.send(of.memory.full(), stable=False)
            await until(lambda: destination.status is ReceiverStatus.WAITING)
            async with sender(of, destination.address, channels=5) as new:
                await new.connect(Manifest(of.memory))
                await new.send(of.memory.full(), stable=True)
                await new.finish()
                assert arrived(destination) == of.read()
