"""A host of which nothing is known: stands in where nobody looks at hardware."""

import asyncio
from collections.abc import Callable, Sequence

from migrd.core.devices import Capability, Device, Inventory, KernelFacts, Unknown
from migrd.engine.device_ports import OpenDevices
from migrd.errors import KernelUnsupported

_NOT_LOOKED: Inventory = Inventory(
    kernel=KernelFacts(
        release="",
        iommufd=Capability.unknown(Unknown.NOT_PROBED),
        vfio_cdev=Capability.unknown(Unknown.NOT_PROBED),
    ),
    iommus={},
    devices={},
)


class NoInventory:
    """DeviceInventory without a device."""

    @property
    def current(self) -> Inventory:
        return _NOT_LOOKED

    async def rescan(self) -> Inventory:
        return _NOT_LOOKED

    async def watch(self, changed: Callable[[Inventory], None]) -> None:
        del changed  # nothing ever does
        await asyncio.Event().wait()

    def note_probed(self, device: Device) -> Inventory:
        del device
        return _NOT_LOOKED


class NoPassthrough:
    """Passthrough that gives nothing."""

    async def probe(self, device: Device) -> Device:
        return device

    async def open(self, devices: Sequence[Device], iommufds: int) -> OpenDevices:
        del devices, iommufds
        raise KernelUnsupported("this daemon passes no devices through", code="no_passthrough")
