"""The passthrough devices of one running QEMU, as they come and go: `plug` and what belongs to it.

A device more may mean more memory to lock (migrd.qemu.memlock), and what QEMU says afterwards tells
by which name it knows the device (migrd.qemu.passthrough).
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable

from migrd.core.vfio_launch import VfioLaunchDevice
from migrd.engine.ports import PluggedFds
from migrd.errors import VmmRefused
from migrd.processes import memlock
from migrd.processes.process import WatchedProcess
from migrd.qemu import samples
from migrd.qemu.passthrough import KnownDevices, name_in_new_reason
from migrd.qemu.plug import Lane, plug, unplug
from migrd.qemu.seen import Seen
from migrd.qemu.wire import QmpEvent

log = logging.getLogger(__name__)


class Plugging:
    """Of one machine; one plug at a time."""

    def __init__(
        self, lane: Lane, process: WatchedProcess, known: KnownDevices, seen: Seen
    ) -> None:
        self._lane = lane
        self._process = process
        self._known = known
        self._seen = seen
        self._one_at_a_time = asyncio.Lock()
        self._leaving: set[str] = set()

    async def plug(self, device: VfioLaunchDevice, fds: PluggedFds) -> None:
        """As `Vmm.plug_device`."""
        async with self._one_at_a_time:
            if device.id in self._leaving:
                text = f"{device.id} is being unplugged, and the guest has not let go of it yet"
                raise VmmRefused(text, code="unplug_pending")
            before = samples.read_blocked_reasons(await self._lane.ask("query-migrate"))
            lower = await self._room_to_lock() if self._maps_anew(device, fds) else None
            try:
                await plug(self._lane, device, fds)
            except VmmRefused as refusal:
                if lower is not None:
                    lower()
                if memlock.NO_MEMORY in refusal.message:
                    text = f"{refusal.message}; {memlock.CURE}"
                    raise VmmRefused(text, code=refusal.code) from refusal
                raise
            after = samples.read_blocked_reasons(await self._lane.ask("query-migrate"))
            self._known.add(device, name_in_new_reason(before, after))

    async def unplug(self, id_: str, *, within_s: float) -> None:
        """As `Vmm.unplug_device`."""
        self._leaving.add(id_)  # until it is known how it ended
        try:
            iommufd = self._known.iommufd(id_)
            await unplug(self._lane, id_, within_s=within_s, iommufd=iommufd)
        except VmmRefused:
            self._leaving.discard(id_)
            raise
        self._leaving.discard(id_)
        self._known.remove(id_)
        self._seen.forget_device(id_)

    def take(self, event: QmpEvent) -> None:
        """The guest may let go of a device when nobody waits for it, and without being asked."""
        if event.name == "DEVICE_DELETED":
            id_ = str(event.data.get("device"))
            self._leaving.discard(id_)
            self._seen.forget_device(id_)

    def _maps_anew(self, device: VfioLaunchDevice, fds: PluggedFds) -> bool:
        """Whether the guest's memory will be mapped, and pinned, once more for it."""
        is_first = not self._known.launch.devices
        return fds.iommufd is not None or (device.iommufd is None and is_first)

    async def _room_to_lock(self) -> Callable[[], None] | None:
        """Raise the limit of a process that is ours; what undoes it."""
        pid = self._process.pid
        if pid is None or not self._process.is_ours or self._process.is_dead:
            return None  # who launched it sees to its limits
        summary = await self._lane.ask("query-memory-size-summary")
        memory_bytes = samples.read_memory_bytes(summary) or 0
        try:
            before = memlock.raise_limit(pid, memlock.needed_bytes(memory_bytes, 1))
        except OSError as failure:
            log.warning("pid %d: its limit of locked memory stays: %s", pid, failure.strerror)
            return None  # the kernel will say whether it was needed

        def lower() -> None:
            with contextlib.suppress(OSError):
                if not self._process.is_dead:
                    memlock.restore(pid, before)

        return lower
