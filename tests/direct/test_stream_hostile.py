"""Whatever a peer sends, it is told what is wrong, and no half-written destination is left."""

import asyncio
import errno
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from migrd.core.memory_map import MemoryMap
from migrd.direct import rebuilt_memory
from migrd.direct import stream_wire as wire
from migrd.direct.channel import Channel
from migrd.direct.manifest import Manifest
from migrd.direct.receiver import Receiver, ReceiverStatus
from migrd.direct.stream_limits import StreamLimits
from migrd.direct.stream_wire import Finish, Kind, Opening, RoundEnd, Tally, Type
from migrd.engine.threads import in_thread
from migrd.errors import MigrdError, PeerRefused, ReceiveError, StreamError
from tests.direct.stream_rig import EPOCH, ID, PAGE, Owner, receiver, until

MEMORY = MemoryMap.of([(4, 0, 16 * PAGE)])
OPENING = Opening(ID, EPOCH, b"s" * 16, 0, 1)
LIMITS = StreamLimits(connect_s=1, stall_s=1, memory_bytes=1 << 20, state_bytes=100)


class Peer:
    """A source that sends what a test tells it to; blocking."""

    def __init__(self, address: tuple[str, int], opening: Opening | bytes = OPENING) -> None:
        sock = socket.create_connection(address)
        self.channel = Channel(sock, name="the destination", stall_s=20)
        self.channel.send(opening if isinstance(opening, bytes) else opening.pack())

    def accepted(self) -> None:
        self.channel.receive_record(20, Type.ACCEPTED)

    def ready(self, manifest: Manifest | None = None) -> None:
        self.accepted()
        packed = (manifest or Manifest(MEMORY, ("nic",))).pack()
        self.channel.send_record(Type.MANIFEST, packed)
        self.channel.receive_record(20, Type.READY)

    def memory(
        self, *entries: tuple[int, int, int, int], payload: bytes = b"", spoil: int = 0
    ) -> None:
        table = b"".join(wire.ENTRY.pack(*entry) for entry in entries)
        digest = wire.memory_digest(table, payload) ^ spoil
        size = len(table) + len(payload)
        head = self.channel.next_header(Type.MEMORY, size, digest, entries=len(entries))
        self.channel.send(head + table + payload)

    def end_round(self, number: int = 1, data_pages: int = 0) -> None:
        tally = Tally(data_pages, 0, self.channel.sent.chain)
        self.channel.send_record(Type.ROUND_END, RoundEnd(number, tally).pack())

    def last_answer(self) -> None:
        """Raises what the destination says last."""
        while True:
            self.channel.receive_record(20, Type.ROUND_DONE)


@asynccontextmanager
async def hostile(
    act: Callable[[Peer], None], limits: StreamLimits = LIMITS
) -> AsyncIterator[tuple[Receiver, MigrdError]]:
    """The receiver after `act`, and what it told its peer."""
    owner = Owner()
    async with receiver(owner, limits=limits) as destination:
        peer = await in_thread(Peer, destination.address)

        def run() -> MigrdError:
            try:
                act(peer)
                peer.last_answer()
            except MigrdError as told:
                return told
            finally:
                peer.channel.close()
            raise AssertionError("unreachable")

        told = await in_thread(run)
        yield destination, told
        assert owner.loads == 0
        await until(lambda: not destination.region_fds)


def page_at(region: int = 4, offset: int = 0, length: int = PAGE, kind: int = Kind.DATA) -> object:
    def act(peer: Peer) -> None:
        peer.ready()
        peer.memory((region, kind, offset, length), payload=b"x" * min(length, 1 << 20))

    return act


def memory_too_early(peer: Peer) -> None:
    peer.accepted()
    peer.memory((4, 0, 0, PAGE), payload=b"x" * PAGE)


def bad_checksum(peer: Peer) -> None:
    peer.ready()
    peer.memory((4, 0, 0, PAGE), payload=b"x" * PAGE, spoil=1)


def table_and_payload_differ(peer: Peer) -> None:
    peer.ready()
    peer.memory((4, 0, 0, 2 * PAGE), payload=b"x" * PAGE)


def no_entries(peer: Peer) -> None:
    peer.ready()
    peer.memory()


def record_left_out(peer: Peer) -> None:
    peer.ready()
    peer.channel.sent.records += 1
    peer.end_round()


def unknown_type(peer: Peer) -> None:
    peer.ready()
    peer.channel.send(struct.pack("<HHIIIQQ", 77, 0, 0, 0, 0, peer.channel.sent.records, 0))


def endless_body(peer: Peer) -> None:
    peer.ready()
    peer.channel.send(struct.pack("<HHIIIQQ", Type.STATE, 0, 0, 1 << 31, 0, 1, 0))


def too_much_in_a_round(peer: Peer) -> None:
    peer.ready()
    for _ in range(17):
        peer.memory((4, 0, 0, PAGE), payload=b"x" * PAGE)


def round_out_of_order(peer: Peer) -> None:
    peer.ready()
    peer.end_round(number=3)


def miscounted_round(peer: Peer) -> None:
    peer.ready()
    peer.end_round(data_pages=5)


def two_manifests(peer: Peer) -> None:
    peer.ready()
    peer.channel.send_record(Type.MANIFEST, Manifest(MEMORY).pack())


def manifest_of(body: bytes) -> object:
    def act(peer: Peer) -> None:
        peer.accepted()
        peer.channel.send_record(Type.MANIFEST, body)

    return act


def unknown_device(peer: Peer) -> None:
    peer.ready()
    peer.channel.send_record(Type.DEVICE, wire.DEVICE.pack(1) + b"x")


def too_much_state(peer: Peer) -> None:
    peer.ready()
    peer.channel.send_record(Type.STATE, b"x" * 101, flags=wire.LAST)


def finish_in_the_middle_of_the_state(peer: Peer) -> None:
    peer.ready()
    peer.channel.send_record(Type.STATE, b"x")
    peer.channel.send_record(Type.FINISH, Finish(0, 0, 1, (Tally(),)).pack())


def wrong_totals(peer: Peer) -> None:
    peer.ready()
    peer.channel.send_record(Type.FINISH, Finish(0, 0, 0, (Tally(chain=5),)).pack())


def finish_without_device_data(peer: Peer) -> None:
    peer.ready()
    peer.channel.send_record(Type.FINISH, Finish(0, 9, 0, (Tally(),)).pack())


REGIONS = b'{"client":"","devices":[],"regions":%s}'
WRONG: dict[str, tuple[object, str]] = {
    "a region that is none": (page_at(region=5), "no such region"),
    "behind its region": (page_at(offset=16 * PAGE), "outside its region"),
    "beyond the end": (page_at(offset=1 << 63), "outside its region"),
    "unaligned": (page_at(offset=512), "not whole pages"),
    "half a page": (page_at(length=512), "not whole pages"),
    "nothing at all": (page_at(length=0), "not whole pages"),
    "unknown kind": (page_at(kind=9), "unknown kind 9"),
    "memory before the manifest": (memory_too_early, "before the manifest"),
    "a bad checksum": (bad_checksum, "checksum"),
    "a table that lies": (table_and_payload_differ, "its table says"),
    "no entries": (no_entries, "0 entries"),
    "a record left out": (record_left_out, "came where 1 was due"),
    "an unknown record": (unknown_type, "unknown type 77"),
    "a body without end": (endless_body, "at most"),
    "more than all pages in a round": (too_much_in_a_round, "more than all 16 pages"),
    "rounds out of order": (round_out_of_order, "round 3 ends where round 1"),
    "a miscounted round": (miscounted_round, "here arrived"),
    "two manifests": (two_manifests, "second manifest"),
    "no JSON": (manifest_of(b"{"), "no JSON"),
    "nested JSON": (manifest_of(b"[" * 50000), "JSON"),
    "no object": (manifest_of(b"[]"), "no JSON object"),
    "regions that are none": (manifest_of(REGIONS % b"[[1,2]]"), "is not"),
    "a region of strings": (manifest_of(REGIONS % b'[["a",0,4096]]'), "is not"),
    "no regions": (manifest_of(REGIONS % b"[]"), "0 regions"),
    "overlapping regions": (manifest_of(REGIONS % b"[[1,0,8192],[2,4096,4096]]"), "overlaps"),
    "a huge region": (manifest_of(REGIONS % b"[[1,0,1099511627776]]"), "may have 1 MiB"),
    "an impossible region": (manifest_of(REGIONS % b"[[1,0,4611686018427387904]]"), "beyond"),
    "an unknown device": (unknown_device, "data of device 1"),
    "too much state": (too_much_state, "beyond the limit of 100"),
    "half a state": (finish_in_the_middle_of_the_state, "in the middle"),
    "wrong totals": (wrong_totals, "totals differ"),
    "missing device data": (finish_without_device_data, "here arrived"),
}


@pytest.mark.parametrize("what", WRONG)
async def test_what_cannot_be_right_ends_the_transfer_on_both_sides(what: str) -> None:
    act, reason = WRONG[what]
    assert callable(act)
    async with hostile(act) as (destination, told):
        assert isinstance(told, PeerRefused), told
        assert reason in told.message
        with pytest.raises(MigrdError) as raised:
            await destination.loaded()
        assert reason in raised.value.message
        assert destination.status is ReceiverStatus.FAILED


async def test_bytes_with_a_bad_checksum_never_touch_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written: list[int] = []
    monkeypatch.setattr(rebuilt_memory, "_write", lambda fd, view, offset: written.append(offset))
    async with hostile(bad_checksum):
        assert not written


async def test_a_page_told_twice_is_what_it_was_told_last() -> None:
    def act(peer: Peer) -> None:
        peer.ready()
        peer.memory((4, 0, 0, PAGE), payload=b"a" * PAGE)
        peer.memory((4, 0, 0, PAGE), payload=b"b" * PAGE)
        peer.end_round(data_pages=2)
        peer.channel.receive_record(20, Type.ROUND_DONE)

    async with receiver(Owner()) as destination:
        peer = await in_thread(Peer, destination.address)
        await in_thread(act, peer)
        assert os.pread(destination.region_fds[4], PAGE, 0) == b"b" * PAGE
        peer.channel.close()


# ---------------------------------------------------------------------- connections turned away

STRANGERS: dict[str, tuple[Opening | bytes, str]] = {
    "another migration": (replace(OPENING, migration_id="else"), "expected here is"),
    "another epoch": (replace(OPENING, epoch=EPOCH + 1), "epoch 8"),
    "another session": (replace(OPENING, session=b"t" * 16, channel=0), "another session"),
    "the same channel again": (replace(OPENING, channel=0, channels=2), "connected already"),
    "another number of channels": (replace(OPENING, channel=1, channels=3), "says there are 3"),
    "another protocol": (b"GET / HTTP/1.1\r\n" * 20, "does not begin"),
    "another version": (OPENING.pack()[:8] + b"\x09" + OPENING.pack()[9:], "version 9"),
    "too many channels": (replace(OPENING, channels=40), "at most 16"),
}


@pytest.mark.parametrize("who", STRANGERS)
async def test_a_stranger_is_turned_away_and_disturbs_nobody(who: str) -> None:
    opening, reason = STRANGERS[who]
    async with receiver(Owner()) as destination:
        peer = await in_thread(Peer, destination.address, replace(OPENING, channels=2))
        await in_thread(peer.ready)
        stranger = await in_thread(Peer, destination.address, opening)
        with pytest.raises(PeerRefused, match=reason):
            await in_thread(stranger.accepted)
        stranger.channel.close()
        second = await in_thread(Peer, destination.address, replace(OPENING, channel=1, channels=2))
        await in_thread(second.accepted)
        assert destination.status is ReceiverStatus.RECEIVING
        assert destination.refused_connections == 1
        for one in (peer, second):
            one.channel.close()


async def test_who_never_says_anything_is_hung_up_on() -> None:
    async with receiver(Owner(), limits=StreamLimits(connect_s=0.2)) as destination:
        silent = await in_thread(Peer, destination.address, b"MIG")
        with pytest.raises(PeerRefused, match="no progress"):
            await in_thread(silent.accepted)
        silent.channel.close()
        assert destination.status is ReceiverStatus.WAITING


async def test_connections_beyond_the_bound_are_closed() -> None:
    async with receiver(Owner()) as destination:
        socks = [await in_thread(socket.create_connection, destination.address) for _ in range(40)]
        await until(lambda: destination.refused_connections >= 16)
        for sock in socks:
            sock.close()


async def test_a_source_that_stops_in_the_middle_of_a_record_loses_its_session() -> None:
    def act(peer: Peer) -> None:
        peer.ready()
        peer.channel.send(b"\1\2\3")

    async with hostile(act, replace(LIMITS, stall_s=0.2)) as (destination, told):
        assert "no progress" in told.message
        await until(lambda: destination.status is ReceiverStatus.WAITING)
        assert isinstance(destination.last_loss, StreamError)
        assert destination.last_loss.code == "stream_stalled"


async def test_a_channel_may_not_run_ahead_of_the_others() -> None:
    def act(first: Peer, second: Peer) -> str:
        first.ready()
        second.accepted()
        first.end_round()
        first.channel.receive_record(20, Type.ROUND_DONE)
        first.memory((4, Kind.ZERO, 0, PAGE))
        with pytest.raises(PeerRefused) as told:
            first.last_answer()
        with pytest.raises(PeerRefused):  # every channel is told
            second.last_answer()
        return told.value.message

    async with receiver(Owner()) as destination:
        peers = [
            await in_thread(Peer, destination.address, replace(OPENING, channel=n, channels=2))
            for n in range(2)
        ]
        assert "before channel 1 has ended round 1" in await in_thread(act, *peers)
        for peer in peers:
            peer.channel.close()


# ------------------------------------------------------------------------------- out of memory


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.ENOMEM])
@pytest.mark.parametrize("reserve", [False, True])
async def test_a_host_without_room_says_so_on_both_sides(
    number: int, reserve: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate" if reserve else "pwrite", no_room)
    act = page_at()
    assert callable(act)
    async with hostile(act, replace(LIMITS, reserve=reserve)) as (destination, told):
        assert (told.code, "no room" in told.message) == ("out_of_memory", True)
        with pytest.raises(ReceiveError, match="no room"):
            await destination.loaded()


async def test_reserved_memory_is_there_before_the_first_page() -> None:
    async with receiver(Owner(), limits=StreamLimits(reserve=True)) as destination:
        peer = await in_thread(Peer, destination.address)
        await in_thread(peer.ready)
        assert os.fstat(destination.region_fds[4]).st_blocks * 512 == 16 * PAGE
        await in_thread(peer.memory, (4, Kind.ZERO, 0, 16 * PAGE))
        await in_thread(peer.end_round)
        await asyncio.sleep(0)
        assert os.fstat(destination.region_fds[4]).st_blocks * 512 == 16 * PAGE
        peer.channel.close()


async def test_without_a_descriptor_left_the_source_is_hung_up_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def none_left(*_: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    async with receiver(Owner()) as destination:
        with monkeypatch.context() as patch:
            patch.setattr(os, "eventfd", none_left)
            with await in_thread(socket.create_connection, destination.address) as sock:
                assert await in_thread(sock.recv, 1) == b""
        assert destination.status is ReceiverStatus.WAITING
