"""A host's passthrough hardware as a test makes it: ports DeviceInventory and Passthrough.

    FakeInventory.truth    what sysfs would say; the test changes it (`plug`, `unplug`, ...)
    FakeInventory.current  the last snapshot: follows a change by a uevent, or by the next rescan
                           when the uevent was lost

The real rules: a snapshot is replaced as a whole, its generation grows with each change that is
seen, a probed answer stays until its device goes or changes its driver, and an instance learns
from the device that was probed behind it.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from migrd.core.devices import (
    Capability,
    Device,
    DeviceKind,
    DeviceMigration,
    Evidence,
    Inventory,
    IommuInstance,
    IommuKind,
    KernelFacts,
    MigrationFlag,
    Unknown,
)
from migrd.engine.device_ports import OpenDevices
from migrd.errors import KernelError, KernelUnsupported

KERNEL = KernelFacts(
    release="6.12.117",
    iommufd=Capability.probed(True, "/dev/iommu"),
    vfio_cdev=Capability.probed(True, "/dev/vfio/devices"),
    unsafe_interrupts=False,
)
CAN = IommuInstance(
    name="dmar0",
    kind=IommuKind.INTEL_VTD,
    dirty_tracking=Capability.estimated(True, "ecap 0x3ee9e86f050df: SSADS"),
    registers={"cap": 0x19ED008C40780C66, "ecap": 0x3EE9E86F050DF},
    hardware_type=1,
    capability_bits=0x5,
    unknown_capability_bits=0x4,
)
CANNOT = IommuInstance(
    name="dmar1",
    kind=IommuKind.INTEL_VTD,
    dirty_tracking=Capability.estimated(False, "ecap 0xf00f4a: no SSADS"),
    registers={"cap": 0xD2008C222F0606, "ecap": 0xF00F4A},
)
NOT_KNOWN = IommuInstance(
    name="smmu3.0x000000002b400000",
    kind=IommuKind.ARM_SMMU_V3,
    dirty_tracking=Capability.unknown(Unknown.NO_REGISTERS, "SMMUv3 shows none in sysfs"),
)
LIVE = DeviceMigration(
    can=Capability.probed(True),
    flags=frozenset(MigrationFlag),
    stop_copy_bytes=8 << 20,
)
NEVER = DeviceMigration(can=Capability.probed(False, "ENOTTY"))


def pci(address: str, iommu: IommuInstance | None = CAN, **facts: object) -> Device:
    """A PCI function, bound to vfio-pci and not yet asked unless `facts` say otherwise."""
    given: dict[str, object] = {
        "kind": DeviceKind.VFIO_PCI,
        "iommu": None if iommu is None else iommu.name,
        "iommu_dirty_tracking": Capability.unknown(Unknown.NO_IOMMU)
        if iommu is None
        else iommu.dirty_tracking,
        "driver": "vfio-pci",
        "vendor_id": 0x15B3,
        "device_id": 0x101E,
        "class_code": 0x020000,
        "iommu_group": 7,
        "vfio_cdev": "/dev/vfio/devices/vfio0",
        "numa_node": 0,
    }
    return Device(address, **{**given, **facts})  # type: ignore[arg-type]  # a test's shorthand


def mdev(uuid: str, parent: str = "0000:00:02.0", **facts: object) -> Device:
    given: dict[str, object] = {
        "kind": DeviceKind.VFIO_MDEV,
        "iommu_dirty_tracking": Capability.estimated(False, "no IOMMU sees an mdev's DMA"),
        "driver": "mtty",
        "mdev_parent": parent,
        "vfio_cdev": "/dev/vfio/devices/vfio9",
    }
    return Device(uuid, **{**given, **facts})  # type: ignore[arg-type]  # a test's shorthand


def inventory(
    iommus: Iterable[IommuInstance] = (CAN,),
    devices: Iterable[Device] = (),
    kernel: KernelFacts = KERNEL,
    trouble: Sequence[str] = (),
) -> Inventory:
    by_address = {device.address: device for device in devices}
    by_name = {
        iommu.name: replace(
            iommu,
            devices=tuple(sorted(d.address for d in by_address.values() if d.iommu == iommu.name)),
        )
        for iommu in iommus
    }
    return Inventory(kernel, by_name, by_address, generation=1, trouble=tuple(trouble))


NIC = ("0000:41:00.0", "0000:41:00.1", "0000:41:00.2")
"""A PF and its VFs."""
_UNASKED = Capability.unknown(Unknown.DRIVER_NOT_BOUND)
_UNBOUND: dict[str, Any] = {
    "vfio_cdev": None,
    "dma_logging": _UNASKED,
    "migration": DeviceMigration(_UNASKED),
}
_VF: dict[str, Any] = {
    "driver": "mlx5_vfio_pci",
    "physical_function": NIC[0],
    "iommu_dirty_tracking": Capability.probed(True, "capabilities 0x5"),
    "dma_logging": Capability.probed(True),
    "migration": LIVE,
}
_NVME: dict[str, Any] = {
    "iommu_group": 21,
    "vfio_cdev": "/dev/vfio/devices/vfio2",
    "vendor_id": 0x144D,
    "device_id": 0xA80A,
    "class_code": 0x010802,
    "dma_logging": Capability.probed(False, "ENOTTY"),
    "migration": NEVER,
    "numa_node": 1,
}
_GPU: dict[str, Any] = {
    "driver": "nouveau",
    "iommu_group": 33,
    "group_devices": ("0000:c1:00.1",),
    "vendor_id": 0x10DE,
    "device_id": 0x2330,
    "class_code": 0x030200,
    "trouble": ("/sys/bus/pci/devices/0000:c1:00.0/numa_node: empty",),
    **_UNBOUND,
}


def mixed_host() -> Inventory:
    """Two IOMMUs of different features, a NIC with two VFs, an NVMe drive, a GPU without a VFIO
    driver, and an mdev."""
    return inventory(
        iommus=(CAN, CANNOT),
        devices=(
            pci(NIC[0], driver="mlx5_core", virtual_functions=NIC[1:], **_UNBOUND),
            pci(NIC[1], iommu_group=8, vfio_cdev="/dev/vfio/devices/vfio0", **_VF),
            pci(NIC[2], iommu_group=9, vfio_cdev="/dev/vfio/devices/vfio1", **_VF),
            pci("0000:81:00.0", CANNOT, **_NVME),
            pci("0000:c1:00.0", CANNOT, **_GPU),
            mdev("83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"),
        ),
    )


class FakeInventory:
    """Port DeviceInventory."""

    def __init__(self, truth: Inventory | None = None, *, rescan_interval_s: float = 30.0) -> None:
        self.truth = truth if truth is not None else inventory()
        self.rescan_interval_s = rescan_interval_s
        self.rescans = 0
        self.error: Exception | None = None
        """Makes the next look fail, as a defect would."""
        self._current = Inventory(self.truth.kernel, {}, {})
        self._probed: dict[str, Device] = {}
        self._uevent = asyncio.Event()

    # What a test does ---------------------------------------------------------------------------

    def plug(self, *devices: Device, is_heard: bool = True) -> None:
        """Devices come, or are as given from now on; unheard: the uevents were lost."""
        by_address = {**self.truth.devices, **{device.address: device for device in devices}}
        self.become(
            inventory(self.truth.iommus.values(), by_address.values(), self.truth.kernel),
            is_heard=is_heard,
        )

    def unplug(self, *addresses: str, is_heard: bool = True) -> None:
        left = [d for a, d in self.truth.devices.items() if a not in addresses]
        self.become(
            inventory(self.truth.iommus.values(), left, self.truth.kernel), is_heard=is_heard
        )

    def become(self, truth: Inventory, *, is_heard: bool = True) -> None:
        """All of sysfs is another now."""
        self.truth = truth
        if is_heard:
            self._uevent.set()

    # The port -----------------------------------------------------------------------------------

    @property
    def current(self) -> Inventory:
        return self._current

    async def rescan(self) -> Inventory:
        await asyncio.sleep(0)
        self.rescans += 1
        if (error := self.error) is not None:
            self.error = None
            raise error
        self._probed = {
            address: device
            for address, device in self._probed.items()
            if address in self.truth.devices and self.truth.devices[address].driver == device.driver
        }
        return self._take()

    async def watch(self, changed: Callable[[Inventory], None]) -> None:
        while True:
            try:
                async with asyncio.timeout(self.rescan_interval_s):
                    await self._uevent.wait()
            except TimeoutError:
                pass  # the rescan is the truth: uevents may be lost
            self._uevent.clear()
            before = self._current.generation
            if (await self.rescan()).generation != before:
                changed(self._current)

    def note_probed(self, device: Device) -> Inventory:
        if device.address in self.truth.devices:
            self._probed[device.address] = device
        return self._take()

    @property
    def is_seen(self) -> bool:
        """`current` is the truth, but for what was probed."""
        return self._current == replace(self._seen(), generation=self._current.generation)

    def _take(self) -> Inventory:
        if not self.is_seen:
            self._current = replace(self._seen(), generation=self._current.generation + 1)
        return self._current

    def _seen(self) -> Inventory:
        probed = {a: device for a, device in self._probed.items() if a in self.truth.devices}
        devices = {**self.truth.devices, **probed}
        learnt = {
            device.iommu: device.iommu_dirty_tracking
            for device in devices.values()
            if device.iommu_dirty_tracking.evidence is Evidence.PROBED
        }
        iommus = {
            name: _with_hardware(
                replace(iommu, dirty_tracking=learnt.get(name, iommu.dirty_tracking)), probed
            )
            for name, iommu in self.truth.iommus.items()
        }
        return replace(self.truth, devices=devices, iommus=iommus)


def _with_hardware(iommu: IommuInstance, probed: Mapping[str, Device]) -> IommuInstance:
    """With the numbers that a device below it was told at its bind."""
    for device in probed.values():
        told = device.iommu_hardware
        if device.iommu == iommu.name and told is not None:
            return replace(
                iommu,
                hardware_type=told.hardware_type,
                capability_bits=told.capability_bits,
                unknown_capability_bits=told.unknown_capability_bits,
            )
    return iommu


class FakePassthrough:
    """Port Passthrough: answers what the test has put into `answers`, by address."""

    def __init__(self) -> None:
        self.answers: dict[str, Device] = {}
        self.in_use: dict[str, str] = {}
        """Address -> who has it."""
        self.asked: list[str] = []
        self.delay_s = 0.0

    async def probe(self, device: Device) -> Device:
        self.asked.append(device.address)
        await asyncio.sleep(self.delay_s)
        by = self.in_use.get(device.address)
        if by is None:
            return self.answers.get(device.address, device)
        used = Capability.unknown(Unknown.IN_USE, by)
        known = device.migration.can.evidence is not Evidence.NONE
        return replace(  # what was known before is not forgotten because it cannot be asked now
            device,
            dma_logging=device.dma_logging if known else used,
            migration=device.migration if known else DeviceMigration(used),
        )

    async def open(self, devices: Sequence[Device], iommufds: int) -> OpenDevices:
        del iommufds
        error: type[KernelError] = KernelUnsupported
        raise error(f"the fake opens none of {[device.address for device in devices]}")
