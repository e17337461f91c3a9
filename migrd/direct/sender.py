"""The source's side of one transfer: memory, device data and state, to the other host's migrd.

    connect ── send* ── send_device_data* ── send_state ── finish ──► LOADED
       └──────────┴── any failure: cut; the dirty pages are back in `pending`; make a new Sender

All socket and file I/O is done in one thread per channel (`crew`), which the event loop waits for
and always joins; flow control is TCP's: per channel, what the two sockets hold is in flight and one
batch more is in memory, whatever the guest's size. A receiver that does not read stalls the
channel's thread, never the loop, and after `stall_s` the transfer ends with StreamError.

Rules
1. `send` takes the pages out of `pending`; they are nobody else's until every channel has had its
   ROUND_END answered. Whatever comes instead (error, cancellation) puts all of them back: the
   destination starts over with a new session anyway. Nobody else may use `pending` meanwhile.
2. The pages of a round are told once, by whichever channel is free; no round begins before the one
   before it is acknowledged, so no older copy of a page can overtake a newer one.
3. A Sender that has failed stays so. A new one connects to the same Receiver, with a new session,
   and sends all pages again.
4. `finish` that breaks after FINISH was sent does not know whether the destination has loaded the
   guest: ask the other migrd.
"""

import asyncio
import os
import secrets
import socket
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Self

from migrd.core.bitmap import DirtyBitmap
from migrd.core.memory_map import MemoryMap
from migrd.direct import stream_wire as wire
from migrd.direct.channel import Channel
from migrd.direct.crew import Crew, interrupt_all
from migrd.direct.extents import ExtentFeed, RegionFile
from migrd.direct.manifest import Manifest
from migrd.direct.outflow import Carried, Outflow, RoundOrder
from migrd.direct.pace import Meter, Pace
from migrd.direct.stream_limits import StreamLimits
from migrd.direct.stream_wire import Finish, Opening, Tally, Type
from migrd.engine.threads import in_thread
from migrd.errors import MigrdError, PeerUnreachable, StreamError


@dataclass(frozen=True)
class Sent:
    """One round that has arrived."""

    extents: int
    bytes_on_wire: int
    pages: int
    """All that were dirty: with data, zero, and holes."""
    zero_pages: int
    took_s: float
    stable: bool
    """The guest stood still, so that nothing of it is dirty any more."""


@dataclass(frozen=True)
class Progress:
    """Where a transfer stands."""

    transferred_bytes: int
    """On the wire since `connect`, records' headers included, TLS not."""
    bandwidth_bytes_per_s: float
    """Over the last two seconds."""
    remaining_pages: int
    """Of the round being sent."""


class Sender:
    """Methods are for the event loop that made it, one at a time but for `limit` and `abort`."""

    def __init__(
        self,
        memory: MemoryMap,
        region_fds: Mapping[int, int],
        *,
        address: tuple[str, int],
        channels: int,
        tls: ssl.SSLContext | None,
        peer_name: str,
        migration_id: str,
        epoch: int,
        limits: StreamLimits | None = None,
        region_offsets: Mapping[int, int] | None = None,
    ) -> None:
        """The descriptors stay the caller's and must outlive the Sender; `region_offsets` says
        where in its file a region begins (default 0). `peer_name` is what the destination's
        certificate must name. ValueError: not 1 to 16 channels."""
        if not 1 <= channels <= wire.CHANNELS_MAX:
            raise ValueError(f"{channels} channels: 1 to {wire.CHANNELS_MAX}")
        self._files = _files_of(memory, region_fds, region_offsets or {})
        self._memory = memory
        self._address = address
        self._tls = tls
        self._peer_name = peer_name
        self._limits = limits or StreamLimits()
        session = secrets.token_bytes(wire.SESSION_BYTES)
        self._openings = [
            Opening(migration_id, epoch, session, number, channels) for number in range(channels)
        ]
        self._pace, self._meter = Pace(), Meter()
        self._crew = Crew(channels, "migrd-send")
        self._channels: dict[int, Channel] = {}
        self._outflows: list[Outflow] = []
        self._taken = DirtyBitmap(memory.pages)
        self._round = _Round()
        self._devices: tuple[str, ...] = ()
        self._device_bytes = self._state_bytes = self._rounds = 0
        self._busy = asyncio.Lock()
        self._ended: MigrdError | None = None
        self._is_loaded = False

    # ---------------------------------------------------------------- the transfer

    async def connect(self, manifest: Manifest) -> None:
        """All channels, then the manifest; returns when the destination is READY for memory.

        Raises PeerUnreachable (no connection), PeerRefused (with the destination's reason),
        StreamError, ReceiveError.
        """
        packed = manifest.pack()
        self._devices = manifest.devices
        async with self._busy:
            await self._together([partial(self._open, one) for one in self._openings])
            in_order = [self._channels[one.channel] for one in self._openings]
            self._outflows = [Outflow(one) for one in in_order]
            await self._on_first(self._send_manifest, packed)

    async def send(self, pending: DirtyBitmap, *, stable: bool) -> Sent:
        """One round: all pages of `pending`, acknowledged when it returns.

        `stable`: the guest stands still, for the record. Raises PeerRefused, StreamError,
        ReceiveError; the pages are back in `pending` then, as they are when it is cancelled.
        """
        async with self._busy:
            self._check_usable()
            try:
                return await self._send(pending, stable=stable)
            finally:
                await in_thread(self._taken.move_into, pending)

    async def send_device_data(self, device: str, chunk: bytes) -> None:
        """In order, between rounds, at most CHUNK_BYTES; ValueError: more, or no such device."""
        index = self._devices.index(device)
        if len(chunk) > wire.CHUNK_BYTES:
            raise ValueError(f"device data of {len(chunk)} bytes: at most {wire.CHUNK_BYTES}")
        async with self._busy:
            body = wire.DEVICE.pack(index) + chunk
            await self._on_first(self._send_small, Type.DEVICE, body, 0)
            self._device_bytes += len(chunk)

    async def send_state(self, state_fd: int, length_bytes: int | None = None) -> None:
        """The opaque state of the process, from the file's beginning. OSError: unreadable."""
        async with self._busy:
            await self._on_first(self._send_state, state_fd, length_bytes)

    async def finish(self) -> None:
        """Compare totals and chains; returns only when the destination has loaded the guest.

        Raises as `send`; rule 4 says what is known then.
        """
        async with self._busy:
            tallies = [
                Tally(one.tally.data_pages, one.tally.zero_pages, one.channel.sent.chain)
                for one in self._outflows
            ]
            told = Finish(self._rounds, self._device_bytes, self._state_bytes, tuple(tallies))
            await self._on_first(self._send_finish, told.pack())
            self._is_loaded = True

    def limit(self, bytes_per_s: float | None) -> None:
        """Of all channels together, from now on; None: as fast as it goes. Thread-safe."""
        self._pace.limit(bytes_per_s)

    @property
    def progress(self) -> Progress:
        """Thread-safe, at any time."""
        return Progress(
            self._meter.total_bytes, self._meter.bytes_per_s, self._round.remaining_pages
        )

    def break_round(self) -> None:
        """Let the round that is being sent end early: what no channel has begun with is back in
        `pending` when `send` returns. Nothing happens between rounds."""
        if self._round.feed is not None:
            self._round.feed.stop()

    async def abort(
        self, reason: str = "the source has ended the transfer", *, is_told: bool = True
    ) -> None:
        """Hang up at once, whatever is going on, and join the threads. Idempotent.

        `is_told`: between rounds the destination is told why, and waits for no other session."""
        why = StreamError(reason, code="stream_ended")
        is_idle = is_told and not (self._busy.locked() or self._ended or self._is_loaded)
        self._ended = self._ended or why
        self._interrupt(why)
        async with self._busy:
            await in_thread(self._close, why if is_idle else None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.abort()

    # ---------------------------------------------------------------- one round

    async def _send(self, pending: DirtyBitmap, *, stable: bool) -> Sent:
        began_s, before = time.monotonic(), self._meter.total_bytes
        pages = await in_thread(self._take, pending)
        is_first = self._rounds == 0
        order = RoundOrder(self._rounds + 1, is_first=is_first)
        feed = ExtentFeed(self._memory, self._files, self._taken, leave_holes=is_first)
        for outflow in self._outflows:
            outflow.carried = Carried()
        self._round = _Round(pages, feed, tuple(one.carried for one in self._outflows))
        try:
            await self._together([partial(one.send_round, feed, order) for one in self._outflows])
        finally:
            feed.close()
        self._rounds += 1
        await in_thread(self._taken.unmark, 0, feed.end_page)
        carried = self._round.carried
        return Sent(
            extents=sum(one.extents for one in carried),
            bytes_on_wire=self._meter.total_bytes - before,
            pages=pages,
            zero_pages=feed.hole_pages + sum(one.zero_pages for one in carried),
            took_s=time.monotonic() - began_s,
            stable=stable,
        )

    def _take(self, pending: DirtyBitmap) -> int:
        pending.move_into(self._taken)
        return self._taken.count()

    async def _together(self, calls: Sequence[Callable[[], None]]) -> None:
        self._check_usable()
        try:
            await self._crew.together(calls, self._interrupt)
        except BaseException as failure:
            if isinstance(failure, MigrdError):
                self._ended = failure
            self._interrupt(StreamError("the transfer was ended here", code="stream_ended"))
            await in_thread(self._hang_up)  # at once: the destination waits for it
            raise

    async def _on_first(self, call: Callable[..., None], *arguments: object) -> None:
        self._check_usable()
        await self._together([partial(call, self._channels[0], *arguments)])

    def _check_usable(self) -> None:
        if self._ended is not None:
            raise StreamError(
                f"this transfer has ended before: {self._ended.message}", code="stream_ended"
            ) from self._ended

    def _interrupt(self, why: MigrdError) -> None:
        self._ended = self._ended or why
        interrupt_all(list(self._channels.values()), why)

    def _close(self, why: MigrdError | None) -> None:
        if why is not None and 0 in self._channels:
            self._channels[0].refuse(why)
        self._hang_up()
        self._crew.dismiss()

    def _hang_up(self) -> None:
        for channel in self._channels.values():
            channel.close()

    # ---------------------------------------------------------------- in the channels' threads

    def _open(self, opening: Opening) -> None:
        until_s = time.monotonic() + self._limits.connect_s
        channel = self._connected(opening.channel, until_s)
        if self._tls is not None:
            channel.encrypt(self._tls, host=self._peer_name, deadline_s=until_s)
        channel.send(opening.pack())
        channel.receive_record(until_s - time.monotonic(), Type.ACCEPTED)

    def _connected(self, number: int, until_s: float) -> Channel:
        host, port = self._address
        name = f"{self._peer_name} ({host}:{port})"
        failure: OSError = OSError("no address")
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as unknown:
            raise PeerUnreachable(f"{name}: {unknown}") from unknown
        for family, kind, _, _, address in found:
            sock = socket.socket(family, kind)
            channel = Channel(sock, name=name, stall_s=self._limits.stall_s)
            channel.pace, channel.meter = self._pace, self._meter
            self._channels[number] = channel
            if self._ended is not None:
                raise self._ended
            try:
                channel.connect(address, until_s)
                return channel
            except OSError as refused:
                failure = refused
                channel.close()
        raise PeerUnreachable(f"{name}: {failure.strerror or failure}") from failure

    def _send_manifest(self, channel: Channel, packed: bytes) -> None:
        channel.send_record(Type.MANIFEST, packed)
        channel.receive_record(self._limits.rebuild_s, Type.READY)

    @staticmethod
    def _send_small(channel: Channel, kind: Type, body: bytes, flags: int) -> None:
        channel.hear()
        channel.send_record(kind, body, flags=flags)

    def _send_state(self, channel: Channel, state_fd: int, length_bytes: int | None) -> None:
        length = os.fstat(state_fd).st_size if length_bytes is None else length_bytes
        at = 0
        while True:
            chunk = os.pread(state_fd, min(wire.CHUNK_BYTES, length - at), at)
            if not chunk and at < length:
                raise StreamError(f"the state file ends at {at} of {length} bytes")
            at += len(chunk)
            self._send_small(channel, Type.STATE, chunk, wire.LAST if at == length else 0)
            if at == length:
                break
        self._state_bytes += length

    def _send_finish(self, channel: Channel, body: bytes) -> None:
        channel.hear()
        channel.send_record(Type.FINISH, body)
        channel.receive_record(self._limits.load_s, Type.LOADED)


def _files_of(
    memory: MemoryMap, fds: Mapping[int, int], offsets: Mapping[int, int]
) -> dict[int, RegionFile]:
    return {one.id: RegionFile(one, fds[one.id], offsets.get(one.id, 0)) for one in memory.regions}


@dataclass(frozen=True)
class _Round:
    """The round being sent, as the event loop sees it."""

    pages: int = 0
    feed: ExtentFeed | None = None
    carried: tuple[Carried, ...] = ()

    @property
    def remaining_pages(self) -> int:
        done = sum(one.data_pages + one.zero_pages for one in self.carried)
        return max(0, self.pages - done - (self.feed.hole_pages if self.feed else 0))
