"""What one thread of the destination does with one channel: read a record, check it, apply it.

    MEMORY ─► bounded buffer ─► checksum ─► table ─► budget and barrier ─► pwrite

Nothing of a record is believed before its checksum was found right, and nothing touches memory
before its whole table was. Each channel has one buffer, of one record's greatest length. What
concerns the process that is to run the guest (regions, device data, state) is the owner's: its
coroutines run on the event loop while this thread waits, and so hold the source back.
"""

import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

from migrd.direct import stream_wire as wire
from migrd.direct.channel import Channel
from migrd.direct.manifest import Manifest
from migrd.direct.rebuilt_memory import Entry
from migrd.direct.session import Session
from migrd.direct.stream_limits import StreamLimits
from migrd.direct.stream_wire import ENTRY, Finish, Header, RoundEnd, Tally, Type, WireError
from migrd.errors import ReceiveError

_TABLE_BYTES: Final = wire.ENTRIES_MAX * ENTRY.size


class Owner(Protocol):
    """Who starts the guest's new process. A MigrdError that it raises ends the transfer, and the
    source is told its message."""

    async def rebuild(self, manifest: Manifest, region_fds: Mapping[int, int]) -> None:
        """Give the process its (empty) memory. Again, with other files, if the source starts over.

        The descriptors are the Receiver's; duplicate what is to be kept."""

    async def take_device_data(self, device: str, chunk: bytes) -> None:
        """In order; the source is held back meanwhile."""

    async def load(self, state_fd: int | None) -> None:
        """All memory and device data are there and right: load devices and the process's state.

        `state_fd` (None: none came) is closed when this returns; it is at its beginning."""


class Ask(Protocol):
    """Runs one of the owner's coroutines on the event loop; the calling thread waits for it."""

    def __call__(self, call: Callable[[], Awaitable[None]], /) -> None: ...


@dataclass
class Inflow:
    """One channel that has been let in. `run` returns when the guest is loaded."""

    number: int
    channel: Channel
    session: Session
    owner: Owner
    ask: Ask
    limits: StreamLimits
    loading: Callable[[], None]
    """Called when all has arrived, before the owner is to load it."""
    _tally: Tally = field(default_factory=Tally)
    _device_bytes: int = 0
    _state_bytes: int = 0
    _state_fd: int | None = None
    _state_is_whole: bool = False
    _buffer: bytearray = field(default_factory=lambda: bytearray(_TABLE_BYTES + wire.PAYLOAD_BYTES))

    def run(self) -> None:
        """Raises ReceiveError, PeerRefused, StreamError, and what the owner raises."""
        try:
            while not self.session.is_loaded:
                self._record(self.channel.receive_header(self.limits.idle_s))
        finally:
            if self._state_fd is not None:
                os.close(self._state_fd)

    def _record(self, header: Header) -> None:
        if header.type is Type.MEMORY:
            self._memory(header)
            return
        body = self.channel.receive_body(header)
        try:
            match header.type:
                case Type.ROUND_END:
                    self._round_end(RoundEnd.unpack(body))
                case Type.MANIFEST if self.number == 0:
                    self._manifest(Manifest.unpack(body))
                case Type.DEVICE if self.number == 0:
                    self._device(body)
                case Type.STATE if self.number == 0:
                    self._state(body, is_last=bool(header.flags & wire.LAST))
                case Type.FINISH if self.number == 0:
                    self._finish(Finish.unpack(body))
                case _:
                    raise ReceiveError(f"{header.type.name} has no place on channel {self.number}")
        except WireError as failure:
            raise ReceiveError(str(failure)) from failure

    # ---------------------------------------------------------------- memory

    def _memory(self, header: Header) -> None:
        table_bytes = header.entries * ENTRY.size
        memory = self.session.memory
        if memory is None:
            raise ReceiveError("memory came before the manifest")
        if not header.entries or header.entries > wire.ENTRIES_MAX:
            raise ReceiveError(f"a record of {header.entries} entries: 1 to {wire.ENTRIES_MAX}")
        payload_bytes = header.body_bytes - table_bytes
        if not 0 <= payload_bytes <= wire.PAYLOAD_BYTES:
            raise ReceiveError(
                f"a record of {header.body_bytes} bytes with {header.entries} entries"
            )
        body = memoryview(self._buffer)[: header.body_bytes]
        self.channel.receive(body, self.channel.stall_s, "a MEMORY record")
        table, payload = body[:table_bytes], body[table_bytes:]
        if wire.memory_digest(table, payload) != header.digest:
            raise ReceiveError("memory arrived damaged: its checksum is not its own")
        entries: list[Entry] = list(ENTRY.iter_unpack(table))
        data_pages, zero_pages = memory.pages_in(entries, payload_bytes)
        self.session.count(self.number, data_pages + zero_pages)
        memory.apply(entries, payload)
        tally = self._tally
        self._tally = Tally(tally.data_pages + data_pages, tally.zero_pages + zero_pages)

    def _round_end(self, end: RoundEnd) -> None:
        if self.session.memory is None:
            raise ReceiveError("a round ended before the manifest")
        before = self.channel.received.chain_before
        ours = RoundEnd(end.round, Tally(self._tally.data_pages, self._tally.zero_pages, before))
        if ours != end:
            raise ReceiveError(
                f"round {end.round}: the source sent {end.tally}, here arrived {ours.tally}",
                code="count_mismatch",
            )
        after = Tally(self._tally.data_pages, self._tally.zero_pages, self.channel.received.chain)
        self.session.end_round(self.number, end.round, after)
        self.channel.send_record(Type.ROUND_DONE, ours.pack())

    # ---------------------------------------------------------------- what the owner is told

    def _manifest(self, manifest: Manifest) -> None:
        memory = self.session.take_memory(manifest, self.limits)
        self.ask(lambda: self.owner.rebuild(manifest, memory.fds))
        self.session.check()
        self.channel.send_record(Type.READY)

    def _device(self, body: bytes) -> None:
        devices = self.session.manifest.devices if self.session.manifest else ()
        if len(body) < wire.DEVICE.size:
            raise ReceiveError("device data without a device")
        (index,) = wire.DEVICE.unpack_from(body)
        if index >= len(devices):
            raise ReceiveError(f"data of device {index}; the manifest has {len(devices)}")
        chunk = body[wire.DEVICE.size :]
        self._device_bytes += len(chunk)
        if self._device_bytes > self.limits.device_bytes:
            raise ReceiveError(
                f"device data beyond the limit of {self.limits.device_bytes} bytes",
                code="device_data_too_large",
            )
        self.ask(lambda: self.owner.take_device_data(devices[index], chunk))

    def _state(self, chunk: bytes, *, is_last: bool) -> None:
        if self._state_is_whole or self.session.memory is None:
            raise ReceiveError("state came where none was due")
        self._state_bytes += len(chunk)
        if self._state_bytes > self.limits.state_bytes:
            raise ReceiveError(
                f"the process's state is beyond the limit of {self.limits.state_bytes} bytes",
                code="state_too_large",
            )
        if self._state_fd is None:
            self._state_fd = os.memfd_create("guest-state", os.MFD_CLOEXEC)
        view = memoryview(chunk)
        while view:
            view = view[os.write(self._state_fd, view) :]
        self._state_is_whole = is_last

    def _finish(self, told: Finish) -> None:
        if self._state_fd is not None and not self._state_is_whole:
            raise ReceiveError("the transfer finishes in the middle of the process's state")
        counted = (self._device_bytes, self._state_bytes)
        if (told.device_bytes, told.state_bytes) != counted:
            raise ReceiveError(
                f"device data and state of {told.device_bytes} and {told.state_bytes} bytes were"
                f" sent, here arrived {counted}",
                code="count_mismatch",
            )
        before = self.channel.received.chain_before
        self.session.check_totals(told.rounds, told.channels, before)
        state_fd = self._state_fd
        if state_fd is not None:
            os.lseek(state_fd, 0, os.SEEK_SET)
        self.loading()
        self.ask(lambda: self.owner.load(state_fd))
        self.session.check()
        self.session.is_loaded = True
