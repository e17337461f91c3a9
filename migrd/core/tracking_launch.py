"""What QEMU is told of the plan: objects, devices in attach order, and only properties it has.

- `enable-migration` stays at QEMU's default (auto: QEMU itself blocks what it cannot track) but for
  devices that may be copied whole; see `tracking_limits` for when (H3).
- Emulated mdevs come by their path in sysfs: given a descriptor, QEMU takes them for PCI devices
  and asks for hardware information that they do not have (ENOENT).
"""

from collections.abc import Mapping

from migrd.core.devices import DeviceKind
from migrd.core.tracking_facts import Traits
from migrd.core.tracking_layout import Layout
from migrd.core.tracking_request import StandingDevice
from migrd.core.vfio_launch import GivenBy, QemuVfioFeature, VfioLaunch, VfioLaunchDevice

_BUS = {DeviceKind.VFIO_PCI: "pci", DeviceKind.VFIO_MDEV: "mdev"}


def launched(layout: Layout, copied: frozenset[str]) -> dict[str, StandingDevice]:
    """What each device is told, or has been; by QEMU id in attach order. `copied`: those that are
    to be copied whole."""
    standing = layout.request.standing_devices
    return {
        id_: standing.get(
            id_,
            StandingDevice(
                id_,
                may_copy_all=id_ in copied and not layout.traits[id_].vm_device.attached,
                log_is_off=layout.traits[id_].log_is_off,
            ),
        )
        for id_ in layout.attach_order
    }


def launch(layout: Layout, told: Mapping[str, StandingDevice]) -> VfioLaunch:
    """All devices of the VM."""
    homes = {id_: part.id for part in layout.partition.objects for id_ in part.devices}
    return VfioLaunch(
        iommufds=tuple(part.id for part in layout.partition.objects),
        iommufds_by_fd=QemuVfioFeature.IOMMUFD_FD in layout.request.qemu and not layout.is_legacy,
        devices=tuple(
            _device(layout, layout.traits[id_], homes.get(id_), told[id_])
            for id_ in layout.attach_order
        ),
    )


def _device(
    layout: Layout, one: Traits, iommufd: str | None, told: StandingDevice
) -> VfioLaunchDevice:
    qemu, device = layout.request.qemu, one.vm_device.device
    takes_fd = iommufd is not None and one.is_behind_iommu and QemuVfioFeature.DEVICE_FD in qemu
    properties = {}
    if told.may_copy_all:
        properties["enable-migration"] = "on"
    if told.log_is_off:
        properties["x-device-dirty-page-tracking"] = "off"
    if QemuVfioFeature.MIGRATION_EVENTS in qemu:
        properties["migration-events"] = "on"
    return VfioLaunchDevice(
        id=one.id,
        address=device.address,
        iommufd=iommufd,
        given_by=GivenBy.FD if takes_fd else GivenBy.SYSFSDEV,
        sysfs_path=None if takes_fd else f"/sys/bus/{_BUS[device.kind]}/devices/{device.address}",
        guest_bus=one.vm_device.guest_bus,
        guest_address=one.vm_device.guest_address,
        properties=properties,
    )
