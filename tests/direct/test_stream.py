"""Guest memory, device data and state arrive as they were, whatever the guest writes meanwhile."""

import asyncio
import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migrd.core.bitmap import DirtyBitmap
from migrd.direct.manifest import Manifest
from migrd.direct.receiver import ReceiverStatus
from migrd.direct.sender import Sender
from migrd.errors import MigrdError, PeerRefused, PeerUnreachable, StreamError, VmmRefused
from tests.direct.stream_rig import (
    PAGE,
    QUICK,
    Guest,
    Owner,
    arrived,
    connected,
    guest,
    receiver,
    same_pages,
    sender,
    until,
)


def state_file(content: bytes) -> int:
    fd = os.memfd_create("test-state")
    os.write(fd, content)
    return fd


async def test_memory_device_data_and_state_arrive_as_they_were() -> None:
    owner = Owner()
    with guest(700, 3, 129) as of:
        for page in range(0, of.memory.pages, 2):
            of.write(page, os.urandom(PAGE))
        async with connected(of, owner, devices=("nic", "gpu")) as (source, destination):
            pending = of.memory.full()
            first = await source.send(pending, stable=False)
            assert pending.count() == 0
            of.write(1, b"\1" * PAGE)
            pending.mark(1, 1)
            second = await source.send(pending, stable=True)
            await source.send_device_data("gpu", b"one")
            await source.send_device_data("nic", b"two")
            await source.send_device_data("gpu", b"")
            state = state_file(b"where it stood")
            await source.send_state(state)
            os.close(state)
            await source.finish()
            await destination.loaded()
            assert destination.status is ReceiverStatus.LOADED
            assert arrived(destination) == of.read()
    assert (first.pages, second.pages) == (832, 1)
    assert owner.device_data == [("gpu", b"one"), ("nic", b"two"), ("gpu", b"")]
    assert owner.state == b"where it stood"
    assert owner.loads == 1
    assert owner.rebuilt[0].devices == ("nic", "gpu")


async def test_zero_pages_cost_nothing_at_first_and_are_told_later() -> None:
    with guest(2048) as of:
        of.write(5, b"\7" * PAGE)
        of.write(9, b"\0" * PAGE)
        async with connected(of, Owner()) as (source, destination):
            pending = of.memory.full()
            sent = await source.send(pending, stable=False)
            assert (sent.pages, sent.zero_pages) == (2048, 2047)
            assert sent.bytes_on_wire < 2 * PAGE
            of.write(5, b"\0" * PAGE)
            pending.mark(4, 3)
            sent = await source.send(pending, stable=True)
            assert sent.bytes_on_wire < PAGE
            await source.finish()
            assert arrived(destination) == of.read()
            (fd,) = destination.region_fds.values()
            assert os.fstat(fd).st_blocks == 0, "a page that is zero again takes memory"


async def test_a_round_of_nothing_is_a_round() -> None:
    with guest(64) as of:
        async with connected(of, Owner(), channels=16) as (source, destination):
            pending = of.memory.full()
            pending.clear()
            assert (await source.send(pending, stable=False)).pages == 0
            await source.finish()
            assert arrived(destination) == of.read()


async def test_a_region_may_begin_inside_its_file() -> None:
    with guest(8) as of:
        (region,) = of.memory.regions
        fd = os.memfd_create("test-guest")
        content = os.urandom(8 * PAGE)
        os.pwrite(fd, b"before" * 1000, 0)
        os.pwrite(fd, content, 3 * PAGE)
        async with receiver(Owner()) as destination:
            moved = Guest(of.memory, {region.id: fd}, of.views)
            offsets = {region.id: 3 * PAGE}
            async with sender(moved, destination.address, region_offsets=offsets) as source:
                await source.connect(Manifest(of.memory))
                await source.send(of.memory.full(), stable=True)
                await source.finish()
                assert arrived(destination) == {region.id: content}
        os.close(fd)


def test_seeking_for_holes_leaves_the_position_of_the_guests_own_descriptor() -> None:
    with guest(300) as of:
        of.write(100, b"x" * PAGE)
        (fd,) = of.fds.values()
        os.lseek(fd, 1234, os.SEEK_SET)

        async def move() -> None:
            async with connected(of, Owner()) as (source, destination):
                await source.send(of.memory.full(), stable=True)
                await source.finish()
                assert arrived(destination) == of.read()

        asyncio.run(move())
        assert os.lseek(fd, 0, os.SEEK_CUR) == 1234


def times_open(fd: int) -> int:
    """How often this process holds the same file open."""
    inode = os.fstat(fd).st_ino
    count = 0
    for other in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the descriptor of this very listing
            count += os.fstat(int(other)).st_ino == inode
    return count


async def test_a_round_that_was_broken_off_holds_no_memory() -> None:
    """It is not freed, else, when its process ends: the daemon lives on."""
    with guest(4000) as of:
        for page in range(4000):
            of.write(page, b"x" * PAGE)
        (fd,) = of.fds.values()
        held = times_open(fd)
        async with connected(of, Owner()) as (source, _):
            source.limit(2 << 20)
            sending = asyncio.create_task(source.send(of.memory.full(), stable=True))
            async with asyncio.timeout(20):
                while times_open(fd) == held:  # noqa: ASYNC110 - other threads open it
                    await asyncio.sleep(0.005)
            source.break_round()
            source.limit(None)
            await sending
            assert times_open(fd) == held


# --------------------------------------------------------------------------- a guest that writes


class Writer:
    """A thread that writes pages by a schedule and notes each one after it was written."""

    def __init__(self, of: Guest, schedule: list[tuple[int, int]]) -> None:
        self._guest, self._schedule = of, schedule
        self._lock = threading.Lock()
        self._dirty = DirtyBitmap(of.memory.pages)
        self._pause = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._pause.is_set():
            for page, value in self._schedule:
                content = bytes([value]) * PAGE
                # in two halves: a copy taken between them is torn, and must be told again
                self._guest.write(page, content[: PAGE // 2])
                self._guest.write(page, content)
                with self._lock:
                    self._dirty.mark(page, 1)
            time.sleep(0)

    def harvest(self, into: DirtyBitmap) -> None:
        with self._lock:
            self._dirty.move_into(into)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        self._thread.start()
        try:
            yield
        finally:
            self.stop()

    def stop(self) -> None:
        self._pause.set()
        self._thread.join()


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 199), st.integers(0, 255)), min_size=1, max_size=60),
    st.integers(1, 4),
    st.integers(1, 5),
)
def test_after_the_final_round_memory_is_the_same_byte_for_byte(
    schedule: list[tuple[int, int]], rounds: int, channels: int
) -> None:
    async def move() -> None:
        with guest(150, 50) as of:
            writer = Writer(of, [(page if page < 150 else page + 42, v) for page, v in schedule])
            async with connected(of, Owner(), channels=channels) as (source, destination):
                pending = of.memory.full()
                with writer.writing():
                    for _ in range(rounds):
                        await source.send(pending, stable=False)
                        writer.harvest(pending)
                writer.harvest(pending)
                await source.send(pending, stable=True)
                await source.finish()
                assert arrived(destination) == of.read()

    asyncio.run(move())


# ------------------------------------------------------------------------------ pace and ending


async def test_a_limit_holds_and_its_change_takes_effect_in_the_middle_of_a_round() -> None:
    with guest(8192) as of:
        for view in of.views.values():
            view[:] = os.urandom(1 << 20) * 32
        async with connected(of, Owner()) as (source, _):
            source.limit(8_000_000)
            round_ = asyncio.create_task(source.send(of.memory.full(), stable=True))
            await until(lambda: source.progress.transferred_bytes > 3 << 20)
            began_s, before = time.monotonic(), source.progress.transferred_bytes
            await asyncio.sleep(0.5)
            moved = source.progress.transferred_bytes - before
            assert moved <= 8_000_000 * (time.monotonic() - began_s) + (1 << 18)
            assert 0 < source.progress.remaining_pages < 8192
            assert source.progress.bandwidth_bytes_per_s < 20_000_000
            source.limit(20_000)
            before = source.progress.transferred_bytes
            await asyncio.sleep(0.5)
            assert source.progress.transferred_bytes - before <= 1 << 17
            left_s = (of.memory.bytes - source.progress.transferred_bytes) / 20_000
            began_s = time.monotonic()
            source.limit(None)
            sent = await round_
            assert time.monotonic() - began_s < left_s / 20
            assert sent.pages == 8192
            assert source.progress.remaining_pages == 0


@contextlib.contextmanager
def deaf_destination() -> Iterator[tuple[str, int]]:
    """Takes connections and never reads them."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[:2]


async def test_abort_ends_a_transfer_that_waits_and_the_loop_goes_on() -> None:
    with guest(64) as of, deaf_destination() as address:
        source = sender(of, address)
        connecting = asyncio.create_task(source.connect(Manifest(of.memory)))
        await asyncio.sleep(0.2)
        assert not connecting.done()
        await source.abort("enough")
        with pytest.raises(StreamError, match="enough"):
            await connecting
        await source.abort()


async def test_a_cancelled_round_gives_its_pages_back() -> None:
    with guest(4096) as of:
        of.views[10][:] = os.urandom(4096 * PAGE)
        async with connected(of, Owner()) as (source, destination):
            source.limit(1_000_000)
            pending = of.memory.full()
            round_ = asyncio.create_task(source.send(pending, stable=False))
            await until(lambda: source.progress.transferred_bytes > 1 << 19)
            round_.cancel()
            with pytest.raises(asyncio.CancelledError):
                await round_
            assert same_pages(pending, of.memory.full())
            with pytest.raises(StreamError, match="has ended before"):
                await source.send(pending, stable=False)
            await until(lambda: destination.status is ReceiverStatus.WAITING)


async def test_who_ends_the_transfer_between_rounds_says_why() -> None:
    with guest(64) as of:
        async with connected(of, Owner()) as (source, destination):
            await source.send(of.memory.full(), stable=False)
            await source.abort("the operator cancelled it")
            await until(lambda: destination.last_loss is not None)
            assert "the operator cancelled it" in str(destination.last_loss)
        async with connected(of, Owner()) as (source, destination):
            await destination.close("the host goes down")
            with pytest.raises(MigrdError, match="the host goes down"):
                await source.send(of.memory.full(), stable=False)


async def test_a_stalled_destination_is_given_up_on() -> None:
    with guest(64) as of, deaf_destination() as address:
        limits = type(QUICK)(connect_s=0.3)
        async with sender(of, address, limits=limits) as source:
            with pytest.raises(StreamError, match="no progress") as told:
                await source.connect(Manifest(of.memory))
            assert told.value.code == "stream_stalled"


async def test_nobody_there_is_said_as_such() -> None:
    with guest(64) as of:
        with socket.create_server(("127.0.0.1", 0)) as gone:
            address = gone.getsockname()[:2]
        async with sender(of, address) as source:
            with pytest.raises(PeerUnreachable, match="refused"):
                await source.connect(Manifest(of.memory))


@pytest.mark.parametrize("at", ["rebuild", "device", "load"])
async def test_what_the_owner_cannot_do_ends_the_transfer_and_the_source_is_told(at: str) -> None:
    owner = Owner(fails_at=at, failure=VmmRefused("the process has no room", code="no_room"))
    with guest(64) as of:
        async with receiver(owner) as destination, sender(of, destination.address) as source:
            with pytest.raises(PeerRefused, match="the process has no room") as told:
                await whole_transfer(of, source)
            assert told.value.code == "no_room"
            with pytest.raises(VmmRefused):
                await destination.loaded()
            await until(lambda: not destination.region_fds)
            assert destination.status is ReceiverStatus.FAILED


async def whole_transfer(of: Guest, source: Sender) -> None:
    await source.connect(Manifest(of.memory, ("nic",)))
    await source.send(of.memory.full(), stable=True)
    await source.send_device_data("nic", b"x")
    await source.finish()


@pytest.mark.parametrize("pages_left", [0, 5, 63])
async def test_memory_that_was_cut_short_is_no_hole(pages_left: int) -> None:
    """Its pages would arrive as zeros."""
    with guest(64) as here:
        here.write(0, b"there")
        async with connected(here, Owner()) as (source, _):
            (fd,) = here.fds.values()
            os.ftruncate(fd, pages_left * PAGE)
            with pytest.raises(StreamError, match="cut short"):
                await source.send(here.memory.full(), stable=False)
