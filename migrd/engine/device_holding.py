"""migrd's own references to the iommufds of the VMs that it launched, and when they are let go.

    opened at a start or a plug ──hold──► kept for peeking ──► the QEMU has exited (its pidfd)
                                                          ├──► release: stop, forget, discard
                                                          └──► the daemon ends

A reference keeps the guest's memory pinned, so none outlives its QEMU. After a restart of the
daemon there is none: the VM runs on, its dirty DMA cannot be peeked at, and `is_held` says so.
"""

import asyncio
import contextlib
import os
from collections.abc import Iterator, Sequence
from weakref import WeakKeyDictionary

import structlog

from migrd.core.dma_rate import SampledRate
from migrd.engine.device_ports import OpenDevices
from migrd.engine.ports import Vmm
from migrd.engine.world import World

log = structlog.get_logger(__name__)


class DeviceHolding:
    """What is held, by instance (one QEMU process)."""

    def __init__(self, world: World, group: asyncio.TaskGroup) -> None:
        self._world = world
        self._group = group
        self._held: dict[str, dict[asyncio.Task[None], OpenDevices]] = {}
        self._objects: WeakKeyDictionary[OpenDevices, tuple[str, ...]] = WeakKeyDictionary()
        self._rates: dict[str, tuple[SampledRate, ...]] = {}

    def of(self, instance: str) -> Sequence[OpenDevices]:
        """The open devices of a QEMU, for peeking; empty when none are held."""
        return tuple(self._held.get(instance, {}).values())

    def is_held(self, instance: str) -> bool:
        return instance in self._held

    def objects_of(self, opened: OpenDevices) -> tuple[str, ...]:
        """QEMU's ids of the iommufd objects that `opened.iommufds` are, in that order."""
        return self._objects.get(opened, ())

    def note_rates(self, instance: str, rates: Sequence[SampledRate]) -> None:
        """What its devices were last seen to write (engine.dma_sampling)."""
        if instance in self._held:  # else it went while it was sampled
            self._rates[instance] = tuple(rates)

    def rates_of(self, instance: str) -> tuple[SampledRate, ...]:
        """The last sample; empty before the first."""
        return self._rates.get(instance, ())

    def hold(self, vmm: Vmm, opened: OpenDevices, objects: Sequence[str] = ()) -> None:
        """Keep `opened` until the process has exited; it is this object's to close from here on.
        `objects`: see `objects_of`. Does not wait, so that nobody who has a QEMU is cancelled
        before he can say so."""
        for before in self.of(vmm.instance):  # an id may be used again when its object is gone
            names = self._objects.get(before, ())
            self._objects[before] = tuple("" if name in objects else name for name in names)
        self._objects[opened] = tuple(objects)
        instance = vmm.instance
        task = self._group.create_task(
            self._until_exit(vmm, opened), name=f"devices-{vmm.vm}-{instance}"
        )
        self._held.setdefault(instance, {})[task] = opened

    async def _until_exit(self, vmm: Vmm, opened: OpenDevices) -> None:
        try:
            await _hand_over(vmm, opened)
            with _pidfd_of(vmm, self._world) as pidfd:
                if pidfd is not None:
                    await opened.close_at_exit(pidfd)
        except Exception as exc:  # whatever it is, the devices are let go of
            log.error("waiting for a QEMU's end failed", vm=vmm.vm, exc_info=exc)
        finally:
            await self._close(vmm.instance, opened)

    async def _close(self, instance: str, opened: OpenDevices) -> None:
        await opened.close()
        tasks = self._held.get(instance, {})
        for task in [task for task, one in tasks.items() if one is opened]:
            del tasks[task]
        if not tasks:
            self._held.pop(instance, None)
            self._rates.pop(instance, None)

    def let_go_of(self, instance: str, address: str) -> None:
        """This QEMU has a device no longer: others may have it. The iommufds stay with the rest."""
        for opened in self.of(instance):
            opened.let_go_of(address)

    async def release(self, instance: str) -> None:
        """Let go now: the process is gone, or nobody is to hold its devices any more."""
        held = dict(self._held.get(instance, {}))
        for task in held:
            task.cancel()
        if held:
            await asyncio.wait(held)
        for opened in held.values():  # a task that was cancelled before it began closes nothing
            await self._close(instance, opened)

    async def close(self) -> None:
        """The daemon ends: let go of everything."""
        for instance in list(self._held):
            await self.release(instance)


async def _hand_over(vmm: Vmm, opened: OpenDevices) -> None:
    """What cannot be closed now is closed with the rest."""
    try:
        await opened.hand_over()
    except Exception as exc:
        log.error("descriptors of devices are kept for longer", vm=vmm.vm, cause=str(exc))


@contextlib.contextmanager
def _pidfd_of(vmm: Vmm, world: World) -> Iterator[int | None]:
    """A descriptor of the process; None when it is gone already."""
    fd: int | None = None
    if vmm.pid is not None:
        with contextlib.suppress(ProcessLookupError):
            fd = world.open_pidfd(vmm.pid)
    try:
        yield None if vmm.is_dead else fd  # the pid of a dead one may be somebody else's by now
    finally:
        if fd is not None:
            os.close(fd)
