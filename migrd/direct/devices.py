"""The state of all devices of one guest, from the one host to the other, by the kernel's states.

    source        RUNNING ─ begin ─► PRE_COPY ─ precopy ─► … ─ quiesce ─► STOP_COPY ─ stop ─► (sent)
                     ▲                                  all P2P, then                  │
                     └───────────────────── abandon: all P2P, then all RUNNING ◄───────┘
    destination   RUNNING ─ begin ─► RESUMING ─ take … ─ finish ─► STOP ─ run: all P2P, then RUNNING

Rules
1. Peers first: no device is stopped, or started, before all others are P2P quiescent, for their
   peer DMA could meet a device that does not answer. More than one device, and one of them without
   P2P, is refused before anything is touched.
2. A device may write guest memory until it is in STOP_COPY; P2P states forbid its peers' only. So
   the last harvest comes after `quiesce`, which returns when none writes any more.
3. What was read of a session arrives in order, without a gap, or not at all: after any failure, a
   cancellation too, either side takes no other order than `abandon`.
4. On a source nothing is ever reset: that would lose what the guest has in its device. `abandon`
   brings back all that can be, and then tells of the others.
5. `abandon` and `run` go by the states that the kernel tells, so they finish what a daemon that
   died has begun, and may be repeated.

Traps
- A call that hangs in the kernel cannot be broken off (direct.device_lane). It counts as failed
  when its deadline is over; `abandon` waits for it once more, and else says that the state of this
  device is unknown: the guest must not be resumed on a guess.
- A device that dirties its data faster than it is read would keep `precopy` busy for ever: it reads
  what was there when it was called, and no more.
- Closing a device does not change its state.

Source: linux/vfio.h (enum vfio_device_mig_state).
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

from migrd.core.device_state import DeviceState
from migrd.core.devices import MigrationFlag
from migrd.direct.all_devices import LIMITS, AllDevices, again, all_ended, run_devices
from migrd.direct.device_frames import LARGEST_CHUNK_BYTES, FrameReader, FrameWriter
from migrd.direct.passed_device import DeviceLimits, Offered, PassedDevice
from migrd.engine.device_state_ports import OpenDevice
from migrd.errors import DeviceNeedsReset, DeviceRefused, MigrdError

__all__ = [
    "DestinationDevices",
    "DeviceLimits",
    "DeviceSize",
    "Emit",
    "SourceDevices",
    "run_devices",
]

Emit = Callable[[str, bytes], Awaitable[object]]
"""Takes (device id, frame) to the other side's `take`, frames of one device in their order. It is
awaited before more is read: that is the flow control."""
_S = DeviceState
_SAVING_P2P: Final = {_S.PRE_COPY: _S.PRE_COPY_P2P, _S.RUNNING: _S.RUNNING_P2P}
_UNTOLD_BYTES: Final = 16 * LARGEST_CHUNK_BYTES
"""Read at once of a device that does not tell how much it has in PRE_COPY."""


@dataclass(frozen=True)
class DeviceSize:
    """What a device has to send, by its own estimate; None: it cannot tell."""

    id: str
    stop_copy_bytes: int | None
    """If it were stopped now: what the guest stands still for."""
    initial_bytes: int | None = None
    """While it runs; None also when it sends nothing while it runs."""
    dirty_bytes: int | None = None


class SourceDevices(AllDevices):
    """The devices of a guest that leaves. Each call may also raise DeviceTimedOut."""

    def __init__(
        self,
        offered: Sequence[Offered],
        open_device: OpenDevice,
        limits: DeviceLimits = LIMITS,
    ) -> None:
        """Raises DeviceRefused for ids that are there twice, or too many."""
        super().__init__(offered, open_device, limits)
        self._writers = {one: FrameWriter() for one in self.devices}
        self._reading = asyncio.Semaphore(limits.streams)
        self._emitting = asyncio.Lock()

    async def begin(self) -> None:
        """Devices that can send data while they run begin to; the others stay as they are.

        What another migration left behind is ended first. Raises DeviceRefused
        (`device_cannot_migrate`, `device_no_p2p`: nothing was touched), DeviceError, KernelError.
        """
        await self.open_all()
        await self.run_all()
        self._writers = {one: FrameWriter() for one in self.devices}
        self.failed = None
        with self.unbroken():
            await all_ended(one.move(_S.PRE_COPY) for one in self._with(MigrationFlag.PRE_COPY))

    async def precopy(self, emit: Emit) -> int:
        """Emit what devices have to send while they run, as much as there is now; returns bytes.

        Raises DeviceError, KernelError, and what `emit` raises.
        """
        running = [one for one in self.devices.values() if one.state == _S.PRE_COPY]
        with self.unbroken():
            return sum(await all_ended(self._send_some(one, emit) for one in running))

    async def sizes(self) -> Sequence[DeviceSize]:
        """What they have to send: of the estimate of the blackout, the devices' part."""
        return await all_ended(self._size(one) for one in self.devices.values())

    async def quiesce(self) -> None:
        """Stop them. None writes to guest memory any more when this returns; idempotent.

        Raises DeviceError (each device that failed has fallen back by its arc), KernelError.
        """
        devices = self.devices.values()
        with self.unbroken():
            await all_ended(one.look() for one in devices)
            await all_ended(self._hold_peers(one) for one in self._with(MigrationFlag.P2P))
            await all_ended(one.move(_S.STOP_COPY) for one in devices)

    async def stop(self, emit: Emit) -> int:
        """`quiesce`, then emit the rest of all data, until its end; returns its bytes.

        How much that is only the devices know, so the caller sets a deadline. Raises DeviceError,
        KernelError, and what `emit` raises.
        """
        await self.quiesce()
        with self.unbroken():
            return sum(await all_ended(self._send_rest(one, emit) for one in self.devices.values()))

    async def abandon(self) -> None:
        """All back to RUNNING, wherever they stand; what they had sent is void. May be repeated.

        Raises DeviceError when some device does not run again, once all others do:
        DeviceNeedsReset when only that is left for it, DeviceTimedOut when its state is not known.
        """
        self.failed = self.failed or DeviceRefused("it was abandoned")
        await self.run_all()

    def _with(self, flag: MigrationFlag) -> list[PassedDevice]:
        return [one for one in self.devices.values() if flag in one.can]

    async def _hold_peers(self, device: PassedDevice) -> None:
        if (target := _SAVING_P2P.get(device.state or _S.ERROR)) is not None:
            await device.move(target)

    async def _size(self, device: PassedDevice) -> DeviceSize:
        left = await device.precopy_left() if device.state == _S.PRE_COPY else None
        return DeviceSize(
            device.id,
            await device.stop_copy_bytes(),
            None if left is None else left.initial_bytes,
            None if left is None else left.dirty_bytes,
        )

    async def _send_some(self, device: PassedDevice, emit: Emit) -> int:
        async with self._reading:
            left = await device.precopy_left()
            there = _UNTOLD_BYTES if left is None else left.initial_bytes + left.dirty_bytes
            sent = 0
            while sent < there and (chunk := await device.read()):
                await self._emit(emit, device, self._writers[device.id].pack(chunk))
                sent += len(chunk)
            return sent

    async def _send_rest(self, device: PassedDevice, emit: Emit) -> int:
        """One chunk is read while the one before is emitted."""
        writer = self._writers[device.id]
        before = writer.sent_bytes
        async with self._reading:
            reading = asyncio.create_task(device.read())
            try:
                while chunk := await reading:
                    reading = asyncio.create_task(device.read())
                    await self._emit(emit, device, writer.pack(chunk))
            finally:
                reading.cancel()
                await asyncio.gather(reading, return_exceptions=True)
            await self._emit(emit, device, writer.end())
        return writer.sent_bytes - before

    async def _emit(self, emit: Emit, device: PassedDevice, frame: bytes) -> None:
        async with self._emitting:
            await emit(device.id, frame)


class DestinationDevices(AllDevices):
    """The devices of a guest that arrives. Each call may also raise DeviceTimedOut."""

    def __init__(
        self,
        offered: Sequence[Offered],
        open_device: OpenDevice,
        limits: DeviceLimits = LIMITS,
    ) -> None:
        """Raises DeviceRefused for ids that are there twice, or too many."""
        super().__init__(offered, open_device, limits)
        self._readers = {one: FrameReader(f"device {one}") for one in self.devices}
        self._has_begun = False

    async def begin(self) -> None:
        """Make them ready to be loaded. What is found anywhere but RUNNING is reset first.

        Raises DeviceRefused (`device_cannot_migrate`, `device_no_p2p`), DeviceNeedsReset (it has
        no reset), DeviceError, KernelError.
        """
        await self.open_all()
        await all_ended(self._clear(one) for one in self.devices.values())
        self._readers = {one: FrameReader(f"device {one}") for one in self.devices}
        self.failed, self._has_begun = None, True
        with self.unbroken():
            await all_ended(one.move(_S.RESUMING) for one in self.devices.values())

    async def take(self, device_id: str, frame: bytes) -> None:
        """Load one frame into its device; returns when the device has it.

        Raises DeviceRefused when it is not the device's next one, or there is no such device;
        KernelRejected when it is not this kind of device's data.
        """
        with self.unbroken():
            device = self.devices.get(device_id)
            if device is None:
                known = ", ".join(sorted(self.devices)) or "none"
                raise DeviceRefused(
                    f"state of a device {device_id} came; the guest's devices here: {known}",
                    code="no_such_device",
                )
            if chunk := self._readers[device_id].unpack(frame):
                await device.write(chunk)

    async def finish(self) -> None:
        """All data is there: the devices check it and stand in STOP, ready to run.

        Raises DeviceRefused (`device_state_incomplete`), DeviceNeedsReset when a device does not
        accept what it was given, DeviceError, KernelError.
        """
        with self.unbroken():
            for one, reader in self._readers.items():
                if not reader.has_ended:
                    raise DeviceRefused(
                        f"{self.devices[one].name}: its state did not arrive whole"
                        f" ({reader.taken_bytes} bytes, and no end)",
                        code="device_state_incomplete",
                    )
            await all_ended(one.move(_S.STOP) for one in self.devices.values())

    async def run(self) -> None:
        """All to RUNNING, before the process resumes the guest. May be repeated.

        Raises DeviceError when some device does not run, once all others do.
        """
        self.refuse_broken()
        await self.run_all()

    async def abandon(self) -> None:
        """Nothing of the guest's is left in them. May be repeated.

        Raises DeviceNeedsReset for those that could not be reset: never give them to a guest.
        """
        self.failed = self.failed or DeviceRefused("it was abandoned")
        await all_ended(self._clear(one) for one in self.devices.values())
        self._has_begun = False

    async def _clear(self, device: PassedDevice) -> None:
        """Reset it, unless it is as it came."""

        async def reset() -> None:
            if await device.look() != _S.RUNNING or self._has_begun:
                await device.reset()

        try:
            await again(reset)
        except MigrdError as failure:
            stands = "an unknown state" if device.state is None else device.state.name
            raise DeviceNeedsReset(
                f"{device.name} stands in {stands} and was not reset: {failure.message}"
            ) from failure
