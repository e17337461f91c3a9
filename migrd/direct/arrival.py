"""A guest that comes: a Receiver that listens for it, and a waiting process that is given it.

    listen ─► (a session's memory, into files that we made) ─► all is there:
              GIVE_REGION ... , devices, LOAD_STATE ─► loaded; the engine's word alone runs it

The process gets nothing before everything has arrived and was found right: where the source's
daemon is restarted its new session starts over with new memory, and a process takes one guest in
its life. That costs a mapping within the blackout, and spares a half-written guest.

A connection that breaks without a word may be a daemon that is restarted: for a while another
session is waited for. A source that says that it has ended the transfer is believed at once.
"""

import asyncio
import contextlib
import ssl
import time
from collections.abc import Callable, Mapping
from typing import Final

from migrd.core.facts import QemuStatus, RunState, TransferAddress, TransferSample, TransferSettings
from migrd.core.memory_map import PAGE_BYTES, MemoryMap
from migrd.direct.devices import DestinationDevices
from migrd.direct.guest import RECONNECT_S, Guest
from migrd.direct.manifest import Manifest
from migrd.direct.parts import KernelParts
from migrd.direct.receiver import Receiver, ReceiverStatus
from migrd.direct.stream_limits import StreamLimits
from migrd.engine.ports import PortRange
from migrd.errors import MigrdError, PeerRefused, ReceiveError, Unavailable, VmmRefused

TICK_S: Final = 0.1
ANOTHER_SESSION_S: Final = 45.0
"""So long the source's daemon may be away before what it had sent is given up."""
ENDED: Final = "the transfer was ended by the destination"
ANY_PORT: Final = (0, 0)
STATUSES: Final = {
    ReceiverStatus.WAITING: QemuStatus.SETUP,
    ReceiverStatus.RECEIVING: QemuStatus.ACTIVE,
    ReceiverStatus.LOADING: QemuStatus.ACTIVE,
    ReceiverStatus.LOADED: QemuStatus.COMPLETED,
    ReceiverStatus.FAILED: QemuStatus.FAILED,
    ReceiverStatus.CLOSED: QemuStatus.FAILED,
}


class Arrival:
    """One transfer to here. `listen`, and `close` at the end."""

    def __init__(
        self,
        guest: Guest,
        settings: TransferSettings,
        tls: ssl.SSLContext | None,
        parts: KernelParts,
        limits: StreamLimits,
        tell: Callable[[], None],
    ) -> None:
        """`tell` is called when the sample has changed."""
        self.address: TransferAddress | None = None
        self.memory: MemoryMap | None = None
        """Of the guest, once its source has said."""
        self._guest, self._settings, self._tls = guest, settings, tls
        self._parts, self._limits, self._tell = parts, limits, tell
        self._receiver: Receiver | None = None
        self._devices: DestinationDevices | None = None
        self._watching: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._error: str | None = None
        self._ended: QemuStatus | None = None

    async def listen(self, host: str, ports: PortRange | None) -> TransferAddress:
        """At a free port. Raises VmmRefused: there is none."""
        settings = self._settings
        receiver = Receiver(
            host,
            ports or ANY_PORT,
            tls=self._tls,
            peer_name=settings.peer_name or None,
            migration_id=settings.migration_id,
            epoch=settings.epoch,
            owner=self,
            limits=self._limits,
        )
        try:
            await receiver.__aenter__()
        except Unavailable as failure:
            raise VmmRefused(failure.message, code=failure.code) from failure
        self._receiver = receiver
        self._watching = asyncio.create_task(self._watch(receiver), name="arrival")
        self.address = TransferAddress(host, receiver.address[1])
        return self.address

    @property
    def is_listening(self) -> bool:
        waits = (ReceiverStatus.WAITING, ReceiverStatus.RECEIVING)
        receiver = self._receiver
        return self._ended is None and receiver is not None and receiver.status in waits

    @property
    def status(self) -> QemuStatus:
        if self._ended is not None:
            return self._ended
        return QemuStatus.NONE if self._receiver is None else STATUSES[self._receiver.status]

    def sample(self, run_state: RunState) -> TransferSample:
        """As it stands now."""
        receiver = self._receiver
        sample = TransferSample(time.monotonic(), self.status, run_state, error=self._error)
        if receiver is None:
            return sample
        return TransferSample(
            sample.at_s,
            sample.qemu_status,
            run_state,
            total_bytes=None if self.memory is None else self.memory.bytes,
            transferred_bytes=receiver.received_bytes,
            page_size_bytes=PAGE_BYTES,
            bandwidth_bytes_per_s=receiver.bandwidth_bytes_per_s,
            error=self._error,
        )

    async def run_devices(self) -> None:
        """Before the guest is resumed. Raises DeviceError."""
        if self._devices is not None:
            await self._devices.run()

    def part(self, why: str = ENDED) -> None:
        """Give up what was needed to get the guest here, in the background: it runs, or it never
        will, and then the source is told why."""
        if self._closing is None:
            self._closing = asyncio.create_task(self._close(why), name="arrival-close")

    async def close(self) -> None:
        """End it, whatever goes on; the process keeps what it was given. Idempotent."""
        self.part()
        assert self._closing is not None
        await asyncio.wait([self._closing])

    async def _close(self, why: str) -> None:
        if self._ended is None:
            completed = self.status is QemuStatus.COMPLETED
            self._ended = QemuStatus.COMPLETED if completed else QemuStatus.FAILED
            self._error = self._error or (None if completed else why)
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        if self._receiver is not None:
            await self._receiver.close(why)
        if self._devices is not None:
            with contextlib.suppress(MigrdError):  # the next who takes them clears them
                if self._ended is not QemuStatus.COMPLETED:
                    await self._devices.abandon()
            await self._devices.close()

    async def _watch(self, receiver: Receiver) -> None:
        """Tell of what changes; end it when no other session comes."""
        over = asyncio.create_task(receiver.loaded(), name="arrival-loaded")
        lost_s: float | None = None
        try:
            while not over.done():
                await asyncio.wait([over], timeout=TICK_S)
                lost_s = self._waiting_again_since(receiver, lost_s)
                loss = receiver.last_loss
                if lost_s is not None and loss is not None:
                    is_said = isinstance(loss, PeerRefused)
                    if is_said or time.monotonic() - lost_s > ANOTHER_SESSION_S:
                        self._fail(loss.message)
                        return
                self._tell()
            failure = over.exception()
            if failure is not None:
                self._fail(failure.message if isinstance(failure, MigrdError) else str(failure))
            self._tell()
        finally:
            over.cancel()
            await asyncio.gather(over, return_exceptions=True)

    @staticmethod
    def _waiting_again_since(receiver: Receiver, since_s: float | None) -> float | None:
        """Since when a session that was lost has had no successor."""
        if receiver.status is not ReceiverStatus.WAITING or receiver.last_loss is None:
            return None
        return time.monotonic() if since_s is None else since_s

    def _fail(self, why: str) -> None:
        self._ended, self._error = QemuStatus.FAILED, why
        self._tell()

    # What the Receiver asks of the owner of the process ----------------------------------------

    async def rebuild(self, manifest: Manifest, region_fds: Mapping[int, int]) -> None:
        """A source has said what is to come. Raises ReceiveError."""
        kind = self._guest.about.kind
        if manifest.client and kind and manifest.client != kind:
            raise ReceiveError(
                f"the guest is of kind {manifest.client}, and the process here takes {kind}",
                code="other_kind",
            )
        client = await self._guest.connected(within_s=RECONNECT_S)
        offered = client.devices if "devices" in client.features else ()
        missing = sorted(set(manifest.devices) - {device.id for device in offered})
        if missing:
            raise ReceiveError(
                f"the guest has devices {', '.join(missing)}, and the process here has handed over "
                "none of these",
                code="devices_missing",
            )
        self.memory = manifest.memory
        before, self._devices = self._devices, None
        if before is not None:  # of a session that was lost
            await before.close()
        if manifest.devices:
            with client.held():
                wanted = [device for device in offered if device.id in manifest.devices]
                self._devices = DestinationDevices(wanted, self._parts.open_device)
                await self._devices.begin()
        self._tell()

    async def take_device_data(self, device: str, chunk: bytes) -> None:
        if self._devices is None:
            raise ReceiveError(f"data of device {device} came, and the guest has none")
        await self._devices.take(device, chunk)

    async def load(self, state_fd: int | None) -> None:
        """All is there. Raises what the process refuses it with."""
        receiver, memory = self._receiver, self.memory
        if state_fd is None or receiver is None or memory is None:
            raise ReceiveError("no state of the process came with the guest", code="no_state")
        client = await self._guest.connected(within_s=RECONNECT_S)
        await client.give_regions(memory, receiver.region_fds)
        if self._devices is not None:
            await self._devices.finish()
        await client.load_state(state_fd)
