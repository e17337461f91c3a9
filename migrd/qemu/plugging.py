"""The passthrough devices of one running QEMU, as they come and go: `plug` and what belongs to it.

A device more may mean more memory to lock (migrd.qemu.memlock), and what QEMU says afterwards tells
by which name it knows the device (migrd.qemu.passthrough).
"""

import asyncio
import contextlib
import logging
import resource
from collections.abc import Callable
from typing import Final

from migrd.core.vfio_launch import VfioLaunchDevice
from migrd.engine.ports import PluggedFds
from migrd.errors import VmmRefused
from migrd.qemu import memlock, samples
from migrd.qemu.passthrough import KnownDevices, name_in_new_reason
from migrd.qemu.plug import Lane, plug, unplug
from migrd.qemu.process import WatchedProcess
from migrd.qemu.seen import Seen

MIB: Final = 1 << 20

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

    async def plug(self, device: VfioLaunchDevice, fds: PluggedFds) -> None:
        """As `Vmm.plug_device`."""
        async with self._one_at_a_time:
            before = samples.read_blocked_reasons(await self._lane.ask("query-migrate"))
            lower = await self._room_to_lock() if self._maps_anew(device, fds) else None
            try:
                await plug(self._lane, device, fds)
            except VmmRefused:
                if lower is not None:
                    lower()
                raise
            after = samples.read_blocked_reasons(await self._lane.ask("query-migrate"))
            self._known.add(device, name_in_new_reason(before, after))

    async def unplug(self, id_: str, *, within_s: float) -> None:
        """As `Vmm.unplug_device`."""
        await unplug(self._lane, id_, within_s=within_s)
        self._known.remove(id_)
        self._seen.forget_device(id_)

    def _maps_anew(self, device: VfioLaunchDevice, fds: PluggedFds) -> bool:
        """Whether the guest's memory will be mapped, and pinned, once more for it."""
        is_first = not self._known.launch.devices
        return fds.iommufd is not None or (device.iommufd is None and is_first)

    async def _room_to_lock(self) -> Callable[[], None] | None:
        """Raise the limit of a process that is ours; what undoes it. VmmRefused: not allowed to."""
        pid = self._process.pid
        if pid is None or not self._process.is_ours or self._process.is_dead:
            return None  # who launched it sees to its limits
        summary = await self._lane.ask("query-memory-size-summary")
        memory_bytes = samples.read_memory_bytes(summary) or 0
        try:
            before = resource.prlimit(pid, resource.RLIMIT_MEMLOCK)
            memlock.raise_limit(pid, memlock.needed_bytes(memory_bytes, 1))
        except OSError as failure:
            why = f"{failure.strerror}; {memlock.LIMIT_CURE}"
            text = f"QEMU (pid {pid}) cannot be given a device more: {why}"
            raise VmmRefused(text, code="memory_lock_limit") from failure

        def lower() -> None:
            with contextlib.suppress(OSError):
                if not self._process.is_dead:
                    resource.prlimit(pid, resource.RLIMIT_MEMLOCK, before)

        return lower
