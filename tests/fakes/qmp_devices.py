"""The passthrough devices of a fake QEMU, by the real one's rules (seen on QEMU 7.2 and 10.0).

    getfd ─► object-add iommufd ─► device_add ─► device_del ··· the guest lets go ─► DEVICE_DELETED

- 7.2 knows no iommufd and takes no descriptor;
- a descriptor's name is used up by whoever takes it; an iommufd object's is never closed again;
- device_del only asks; asked twice it says so. A reset of the machine takes the device out;
- neither is allowed while a migration runs, and objects with devices on them stay;
- a device tells each of its states; one that cannot be saved is reset, which only the migration's
  error says, and only when the migration is continued.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tests.fakes.qmp_server import Refusal, Reply

if TYPE_CHECKING:
    from tests.fakes.qmp_vm import FakeVm

DEVICE_BYTES = 1 << 20
_COMMON = {"host": "str", "sysfsdev": "str", "x-pre-copy-dirty-page-tracking": "OnOffAuto"}
_PROPERTIES: Mapping[str, Mapping[str, Mapping[str, str]]] = {
    "7.2": {"vfio-pci": {**_COMMON, "x-enable-migration": "bool"}},
    "10.0": {
        "vfio-pci": {
            **_COMMON,
            "fd": "str",
            "iommufd": "link<iommufd>",
            "enable-migration": "OnOffAuto",
            "migration-events": "bool",
            "x-device-dirty-page-tracking": "OnOffAuto",
            "x-migration-multifd-transfer": "OnOffAuto",
        },
        "iommufd": {"type": "string", "fd": "string"},
    },
}


@dataclass
class Device:
    iommufd: str | None
    fd: int | None
    slot: int
    tells: bool
    is_leaving: bool = False


class FakeDevices:
    """Commands about devices, found by their names; `vm` is the rest of the QEMU."""

    def __init__(self, vm: FakeVm) -> None:
        self._vm = vm
        self.plugged: dict[str, Device] = {}
        self.guest_keeps: bool = False
        """The guest says no to an unplug."""
        self.cannot_migrate: bool = False
        self.cannot_be_saved: bool = False
        self.was_reset: str | None = None
        self._taken: list[int] = []
        self._slots = iter(range(4, 32))

    def close(self) -> None:
        """The process has ended."""
        fds = [device.fd for device in self.plugged.values() if device.fd is not None]
        for fd in (*fds, *self._taken):
            os.close(fd)
        self.plugged.clear()
        self._taken.clear()

    @property
    def blocked_reasons(self) -> list[str]:
        text = "VFIO migration is not supported in kernel"
        devices = self.plugged.values() if self.cannot_migrate else ()
        return [f"VFIO_FD{device.fd}: {text}" for device in devices]

    # Commands

    async def qom_list_properties(self, typename: str) -> Reply:
        known = _PROPERTIES[self._vm.version].get(typename)
        if known is None:
            raise Refusal(f"Class '{typename}' not found", "DeviceNotFound")
        return [{"name": name, "type": kind} for name, kind in known.items()]

    async def closefd(self, fdname: str) -> Reply:
        if fdname not in self._vm.qmp.fds:
            raise Refusal(f"File descriptor named '{fdname}' not found")
        os.close(self._vm.qmp.fds.pop(fdname))
        return {}

    async def device_add(
        self, driver: str, id: str, bus: str | None = None, fd: str = "", **more: Any
    ) -> Reply:
        if self._vm.is_migrating:
            raise Refusal("device_add not allowed while migrating")
        if bus is not None:
            raise Refusal(f"Bus '{bus}' not found")
        if id in self.plugged:
            raise Refusal(f"Duplicate device ID '{id}'")
        kinds = _PROPERTIES[self._vm.version][driver]
        iommufd = more.get("iommufd")
        if iommufd is not None and iommufd not in self._vm.objects:
            raise Refusal(f"Device '{iommufd}' not found")
        taken = self._take_fd(fd) if fd else None
        for name, value in more.items():
            kind = kinds.get(name.replace("_", "-"))
            if kind == "bool" and not isinstance(value, bool):
                name = name.replace("_", "-")
                raise Refusal(f"Invalid parameter type for '{name}', expected: boolean")
        tells = more.get("migration_events") is True
        self.plugged[id] = Device(iommufd, taken, next(self._slots), tells)
        return {}

    async def device_del(self, id: str) -> Reply:
        device = self.plugged.get(id)
        if device is None:
            raise Refusal(f"Device '{id}' not found", "DeviceNotFound")
        if self._vm.is_migrating:
            raise Refusal("device_del not allowed while migrating")
        if device.is_leaving:
            raise Refusal(f"Device {id} is already in the process of unplug")
        if self.guest_keeps:
            told = {"device": id, "path": f"/machine/peripheral/{id}"}
            await self._vm.qmp.emit("DEVICE_UNPLUG_GUEST_ERROR", told)
        else:
            device.is_leaving = True
        return {}

    async def system_reset(self) -> Reply:
        for id_, device in list(self.plugged.items()):
            if device.is_leaving:
                del self.plugged[id_]
                if device.fd is not None:
                    os.close(device.fd)
                path = f"/machine/peripheral/{id_}"
                await self._vm.qmp.emit("DEVICE_DELETED", {"device": id_, "path": path})
        return {}

    def take_iommufd(self, arguments: Mapping[str, Any]) -> None:
        """For object-add."""
        if "iommufd" not in _PROPERTIES[self._vm.version]:
            raise Refusal("Parameter 'qom-type' does not accept value 'iommufd'")
        if arguments.get("fd"):
            self._taken.append(self._take_fd(str(arguments["fd"])))

    def uses(self, object_id: str) -> bool:
        return any(device.iommufd == object_id for device in self.plugged.values())

    def property_of(self, id_: str, name: str) -> object:
        """None: there is no such property."""
        device = self.plugged.get(id_)
        if device is None:
            return None
        link = None if device.iommufd is None else f"/objects/{device.iommufd}"
        values = {"iommufd": link, "parent_bus": "/machine/i440fx/pci.0", "addr": device.slot << 3}
        return values.get(name)

    def _take_fd(self, name: str) -> int:
        if name not in self._vm.qmp.fds:
            raise Refusal(f"File descriptor named '{name}' has not been found")
        return self._vm.qmp.fds.pop(name)

    # Migration

    async def tell(self, *states: str) -> None:
        """Each device goes through these states."""
        for id_, device in self.plugged.items():
            for state in states if device.tells else ():
                path = f"/machine/peripheral/{id_}"
                told = {"device-id": id_, "qom-path": path, "device-state": state}
                await self._vm.qmp.emit("VFIO_MIGRATION", told)

    async def stop_for_the_switchover(self) -> None:
        await self.tell("pre-copy-p2p")
        if self.cannot_be_saved and self.plugged:
            device = next(iter(self.plugged.values()))
            self.was_reset = (
                f"VFIO_FD{device.fd}: Failed setting device state to STOP_COPY. "
                "Recover state is ERROR. Resetting device: Input/output error"
            )
            await self.tell("running")
        else:
            self.was_reset = None
            await self.tell("stop-copy")
