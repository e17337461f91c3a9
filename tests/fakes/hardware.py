"""A host's passthrough hardware for the simulator: what the kernel knows, and who holds what.

    Hardware (outlives every daemon)
      ├── inventory   what sysfs shows: estimates, drivers, groups      port DeviceInventory
      └── kernel      what a bind answers: per IOMMU instance and device
    SimPassthrough (one daemon's life)                                  port Passthrough

The real rules: a device answers only to who can open it, and only one can; all of a set is opened,
or nothing; whoever holds an iommufd keeps the guest's memory pinned until he lets go, or dies. What
a test ends with is looked at: no daemon that lives may hold what belongs to a dead QEMU (`leaks`).
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from migrd.core.devices import Capability, Device, DeviceMigration, Inventory, Unknown
from migrd.engine.device_ports import DirtyPeek, HwptRef, OpenDevices
from migrd.errors import KernelBusy, KernelDenied, KernelGone
from tests.fakes.inventory import FakeInventory, inventory
from tests.fakes.launcher import FakeHost

PROBE_S = 0.002
OPEN_S = 0.001


@dataclass
class Hardware:
    """What one host has, and the truth about it."""

    host: FakeHost
    inventory: FakeInventory = field(default_factory=lambda: FakeInventory(inventory()))
    iommu_tracks: dict[str, bool] = field(default_factory=dict)
    """Name of an IOMMU instance -> what a bind finds; else its estimate is right."""
    answers: dict[str, Device] = field(default_factory=dict)
    """Address -> a device with what a bind finds of it; else as the inventory shows it."""
    foreign: dict[str, str] = field(default_factory=dict)
    """Address -> the process of somebody else that has it."""
    denied: bool = False
    """/dev/iommu may not be opened."""
    silent: set[str] = field(default_factory=set)
    """Devices whose driver does not come back from a bind."""
    opened: list[SimOpenDevices] = field(default_factory=list)
    probes: list[str] = field(default_factory=list)
    """Addresses, in the order they were asked."""

    def show(self, truth: Inventory) -> None:
        """All of sysfs is this from now on."""
        self.inventory.become(truth)

    def holder_of(self, address: str) -> str | None:
        """Who has the device: a process of others, a QEMU of this host, a daemon."""
        if address in self.foreign:
            return self.foreign[address]
        for qemu in self.host.qemus:
            if not qemu.is_dead and address in {d.address for d in qemu.devices.values()}:
                return f"QEMU {qemu.pid}"
        for one in self.opened:
            if address in one.addresses:
                return "migrd"
        return None

    def leaks(self) -> list[str]:
        """What is open for a QEMU that is dead, or for none."""
        return [str(one) for one in self.opened if one.pid is None or self._is_dead(one.pid)]

    def _is_dead(self, pid: int) -> bool:
        return all(qemu.is_dead for qemu in self.host.qemus if qemu.pid == pid)

    def asked(self, device: Device) -> Device:
        """What a bind of this device finds."""
        found = self.answers.get(device.address, device)
        told = self.iommu_tracks.get(device.iommu or "")
        guess = found.iommu_dirty_tracking.is_yes if told is None else told
        return replace(
            found,
            iommu_dirty_tracking=Capability.probed(guess, "IOMMU_GET_HW_INFO"),
            dma_logging=_asked(found.dma_logging),
            migration=replace(found.migration, can=_asked(found.migration.can)),
        )


def _asked(known: Capability) -> Capability:
    return Capability.probed(known.is_yes, known.detail or "asked")


class SimPassthrough:
    """Port Passthrough, for one daemon's life."""

    def __init__(self, hardware: Hardware) -> None:
        self._hardware = hardware
        self._mine: list[SimOpenDevices] = []

    def end(self) -> None:
        """The daemon has ended: the kernel closes what it held."""
        for one in self._mine:
            one.close_now()

    async def probe(self, device: Device) -> Device:
        hardware = self._hardware
        hardware.probes.append(device.address)
        if device.address in hardware.silent:
            await asyncio.sleep(3600.0)
        await asyncio.sleep(PROBE_S)
        unknown = None
        if hardware.denied:
            unknown = Capability.unknown(Unknown.NO_PERMISSION, "/dev/iommu: EACCES")
        elif (holder := hardware.holder_of(device.address)) is not None:
            unknown = Capability.unknown(Unknown.IN_USE, holder)
        if unknown is None:
            return hardware.asked(device)
        asked = DeviceMigration(unknown)
        return replace(device, iommu_dirty_tracking=unknown, dma_logging=unknown, migration=asked)

    async def open(self, devices: Sequence[Device], iommufds: int) -> OpenDevices:
        hardware = self._hardware
        await asyncio.sleep(OPEN_S)
        if hardware.denied:
            raise KernelDenied("/dev/iommu: permission denied; run migrd as root", errno=13)
        for device in devices:
            if device.address not in hardware.inventory.truth.devices:
                raise KernelGone(f"{device.address} is not there any more", errno=2)
            holder = hardware.holder_of(device.address)
            if holder is not None:
                raise KernelBusy(f"{device.address} is in use by {holder}", errno=16)
        one = SimOpenDevices(hardware, [device.address for device in devices], iommufds)
        hardware.opened.append(one)
        self._mine.append(one)
        return one


_FDS = itertools.count(100)


class SimOpenDevices:
    """Port OpenDevices."""

    def __init__(self, hardware: Hardware, addresses: Sequence[str], iommufds: int) -> None:
        self._hardware = hardware
        self.iommufds: Sequence[int] = [next(_FDS) for _ in range(iommufds)]
        self.addresses = set(addresses)
        """Of devices that nobody else may have, whoever has their descriptors."""
        self.device_fds: Mapping[str, int] = {address: next(_FDS) for address in addresses}
        self.pid: int | None = None
        """Of the QEMU whose end is waited for."""
        self.is_closed = False

    def __str__(self) -> str:
        return f"open devices of {self.pid}: {list(self.device_fds)}, {len(self.iommufds)} iommufds"

    async def hand_over(self) -> None:
        self.device_fds = {}

    async def find_hwpts(self) -> Sequence[HwptRef]:
        return [HwptRef(n, 1) for n in range(len(self.iommufds))]

    async def peek(
        self, hwpt: HwptRef, iova: int, length_bytes: int, page_size_bytes: int
    ) -> DirtyPeek | None:
        return DirtyPeek(hwpt, iova, length_bytes, page_size_bytes, 0, 0.0)

    async def is_mapped(self, hwpt: HwptRef, iova: int, length_bytes: int) -> bool:
        return iova + length_bytes <= self._hardware.host.ground.load.memory_bytes

    def let_go_of(self, address: str) -> None:
        self.addresses.discard(address)

    async def close_at_exit(self, pidfd: int) -> None:
        self.pid = PIDS[pidfd]
        gone = asyncio.Event()
        for qemu in self._hardware.host.qemus:
            if qemu.pid == self.pid and not qemu.is_dead:
                qemu.on_death.append(gone.set)
                await gone.wait()
        await self.close()

    async def close(self) -> None:
        await asyncio.sleep(0)
        self.close_now()

    def close_now(self) -> None:
        self.is_closed = True
        self.iommufds, self.device_fds, self.addresses = [], {}, set()
        if self in self._hardware.opened:
            self._hardware.opened.remove(self)


PIDS: dict[int, int] = {}
"""pidfd -> pid."""


def pidfds_of(host: FakeHost) -> Callable[[int], int]:
    """`World.open_pidfd` of a host: a real descriptor, that stands for a simulated process."""

    def open_pidfd(pid: int) -> int:
        if not any(qemu.pid == pid for qemu in host.qemus):
            raise ProcessLookupError(pid)
        pidfd = os.eventfd(0)
        PIDS[pidfd] = pid
        return pidfd

    return open_pidfd
