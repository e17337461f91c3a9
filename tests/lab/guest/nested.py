"""QEMUs within a lab guest (TCG in TCG), with VFIO devices, and what they did as seen in traces.

    async with nested(path, Device("a", node_a), Device("b", node_b, iommufd="own")) as qemu: ...

Devices are attached in the order given; those that name one iommufd object share a container, and
with it QEMU's single choice of how dirty pages are found. Devices and iommufds are handed over as
open descriptors, as migrd does; the test keeps its own (`Nested.iommufds`).
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

from migrd.demo.image import GuestImage
from tests.lab.bare_qemu import BareQemu, until
from tests.lab.guest.raw import MIB, Iommufd
from tests.setup.debian import qemu_binaries

IOMMU_ONLY = "x-device-dirty-page-tracking=off"
"""The device's own log is left alone: mtty's would accept anything and report nothing."""

PAGES = 64 * MIB // 4096
"""Of a guest's memory."""

DETACHED = "iommufd_cdev_detach_ioas_hwpt"
_TRACES = (
    "iommufd_backend_alloc_hwpt",
    "iommufd_backend_set_dirty",
    "iommufd_backend_get_dirty_bitmap",
    "iommufd_cdev_attach_ioas_hwpt",
    DETACHED,
    "vfio_device_dirty_tracking_start",
    "vfio_get_dirty_bitmap",
)
_QUIET = GuestImage(working_set_pages=16, pages_per_s=100, heartbeat_interval_s=0.1)


@dataclass(frozen=True)
class Device:
    """A VFIO device for QEMU."""

    id: str
    node: Path
    iommufd: str = "iommufd0"
    properties: str = IOMMU_ONLY
    bus: str = ""
    sysfs: Path | None = None
    """Given by name instead: an emulated mdev must be, for QEMU takes what comes as a descriptor
    for a PCI device."""


@dataclass(frozen=True)
class Nested:
    """A running QEMU, and what it was given."""

    qemu: BareQemu
    iommufds: dict[str, Iommufd]
    trace_path: Path
    pluggable: dict[str, dict[str, str]]

    async def plug(self, device_id: str) -> None:
        await self.qemu.qmp("device_add", driver="vfio-pci", **self.pluggable[device_id])

    async def unplug(self, device_id: str) -> None:
        """Wait until it is gone, and off its page table, which comes a while after its name (RCU);
        its slot must be without power, for no guest takes part."""
        before = len(self.trace(DETACHED))
        await self.qemu.qmp("device_del", id=device_id)

        async def is_gone() -> bool:
            present = await self.qemu.qmp("qom-list", path="/machine/peripheral")
            is_off = len(self.trace(DETACHED)) > before
            return is_off and all(entry["name"] != device_id for entry in present)

        await until(is_gone, f"{device_id} is unplugged")

    async def blocked_reasons(self) -> list[str]:
        found = await self.qemu.qmp("query-migrate")
        return list(found.get("blocked-reasons", []))

    def trace(self, event: str) -> list[str]:
        """What QEMU wrote of one trace event, in order."""
        lines = self.trace_path.read_text().splitlines()
        return [line.partition(event)[2].strip() for line in lines if event + " " in line]


class _Given:
    """Descriptors for one QEMU, kept open here too, and the arguments that name them."""

    def __init__(self, held: contextlib.ExitStack) -> None:
        self._held = held
        self.iommufds: dict[str, Iommufd] = {}
        self.descriptors: list[int] = []
        self.arguments: list[str] = []

    def add(self, device: Device) -> dict[str, str]:
        """Open the device and its iommufd; returns the properties of the device."""
        if device.iommufd not in self.iommufds:
            iommufd = self.iommufds[device.iommufd] = Iommufd()
            self._held.callback(iommufd.close)
            self.descriptors.append(iommufd.fd)
            self.arguments += ["-object", f"iommufd,id={device.iommufd},fd={iommufd.fd}"]
        own = dict(word.split("=") for word in device.properties.split(",") if word)
        place = {"bus": device.bus} if device.bus else {}
        return {"id": device.id, **self._name(device), "iommufd": device.iommufd, **own, **place}

    def _name(self, device: Device) -> dict[str, str]:
        if device.sysfs is not None:
            return {"sysfsdev": str(device.sysfs)}
        fd = os.open(device.node, os.O_RDWR | os.O_CLOEXEC)
        self._held.callback(os.close, fd)
        self.descriptors.append(fd)
        return {"fd": str(fd)}


@contextlib.asynccontextmanager
async def nested(
    directory: Path,
    *devices: Device,
    later: tuple[Device, ...] = (),
    name: str = "qemu",
    incoming: bool = False,
    arguments: tuple[str, ...] = (),
    inherited: tuple[int, ...] = (),
) -> AsyncIterator[Nested]:
    """Start QEMU 10 with `devices`; it is not running its guest yet. `later` can be plugged in.

    `inherited`: descriptors that `arguments` name.
    """
    with contextlib.ExitStack() as held:
        given = _Given(held)
        for device in devices:
            properties = "".join(f",{key}={value}" for key, value in given.add(device).items())
            given.arguments += ["-device", f"vfio-pci{properties}"]
        pluggable = {device.id: given.add(device) for device in later}
        trace = directory / f"{name}.trace"
        traced = [word for event in _TRACES for word in ("-trace", event)]
        qemu = BareQemu(
            qemu_binaries()["10"],
            directory,
            _QUIET,
            name=name,
            machine="q35",
            incoming=incoming,
            arguments=("-D", str(trace), *traced, *arguments, *given.arguments),
            inherited=(*given.descriptors, *inherited),
        )
        async with qemu:
            yield Nested(qemu, given.iommufds, trace, pluggable)


def page_tables(qemu: Nested) -> list[bool]:
    """Those that QEMU allocated, in order: does it track?"""
    flags = [re.search(r"flags=0x(\w+)", line) for line in qemu.trace("iommufd_backend_alloc_hwpt")]
    return [bool(int(found.group(1), 16) & 2) for found in flags if found]


def tracked_tables(qemu: Nested) -> set[str]:
    """Page tables on which QEMU turned tracking on."""
    lines = qemu.trace("iommufd_backend_set_dirty")
    return {found.group(1) for line in lines if (found := re.search(r"hwpt=(\d+) enable=1", line))}


async def move(
    source: Nested, destination: Nested, meanwhile: Callable[[], object] = lambda: None
) -> int:
    """Migrate; returns how many pages were sent by the third dirty sync (PAGES is each once)."""
    ram: dict[str, int] = {}

    async def synced_thrice() -> bool:
        meanwhile()
        found = await source.qemu.qmp("query-migrate")
        ram.update(found.get("ram", {}))
        return bool(found["status"] == "completed" or ram.get("dirty-sync-count", 0) >= 3)

    async def completed() -> bool:
        found = await source.qemu.qmp("query-migrate")
        assert found["status"] != "failed", found
        return bool(found["status"] == "completed")

    if (await source.qemu.qmp("query-status"))["status"] != "paused":
        await source.qemu.qmp("cont")
    uri = f"unix:{source.qemu.qmp_path.parent}/migration"
    await destination.qemu.qmp("migrate-incoming", uri=uri)
    # Else all memory would go in the switchover, and only once.
    await source.qemu.qmp("migrate-set-parameters", downtime_limit=1)
    await source.qemu.qmp("migrate", uri=uri)
    await until(synced_thrice, "three dirty syncs", within_s=60)
    await source.qemu.qmp("migrate-set-parameters", downtime_limit=10_000)
    await until(completed, "the migration completes", within_s=60)
    return ram["normal"] + ram["duplicate"]
