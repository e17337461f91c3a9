"""How a VM's passthrough devices are given to QEMU, as values: what the plan says, QEMU is told.

    Plan (core.tracking) ──► VfioLaunch ──► arguments(fds) ──► -object iommufd,… -device vfio-pci,…

The order of `devices` is the attach order, and each iommufd object is a container of its own in
QEMU; both decide which page tables QEMU makes (decision.md, H1 to H3), so neither is ever changed
on the way.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from migrd.errors import Invalid

LONGEST_VALUE: Final = 1024
_ID: Final = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,127}")
"""QEMU's own rule (id_wellformed), with a bound."""
_NAME: Final = re.compile(r"[a-z][a-z0-9-]{0,63}")


class QemuVfioFeature(StrEnum):
    """What a QEMU offers for passthrough; found by asking the binary, never by its version."""

    IOMMUFD = "iommufd"
    """It has `-object iommufd`, and vfio-pci its property `iommufd`."""
    IOMMUFD_FD = "iommufd_fd"
    """`-object iommufd,fd=`: it uses a descriptor it is given."""
    DEVICE_FD = "device_fd"
    """`-device vfio-pci,fd=`."""
    ENABLE_MIGRATION = "enable_migration"
    MIGRATION_EVENTS = "migration_events"
    DEVICE_DIRTY_TRACKING = "device_dirty_tracking"
    """`x-device-dirty-page-tracking`: the device's own log can be left alone."""
    MULTIFD_DEVICE_STATE = "multifd_device_state"


class GivenBy(StrEnum):
    """How QEMU gets at the device."""

    FD = "fd"
    """An open character device: QEMU needs no permission of its own."""
    SYSFSDEV = "sysfsdev"
    """By its path in sysfs: for emulated mdevs, which QEMU takes for PCI devices when they come as
    `fd=`, and for a QEMU that cannot take one."""


@dataclass(frozen=True)
class VfioLaunchDevice:
    """One `-device vfio-pci`."""

    id: str
    """QEMU's id, the same on both hosts of a migration (its data is sent under that name)."""
    address: str
    """PCI address or mdev UUID on this host."""
    iommufd: str | None
    """Id of its iommufd object; None: the legacy VFIO group interface."""
    given_by: GivenBy
    sysfs_path: str | None = None
    """For `sysfsdev`."""
    guest_bus: str | None = None
    guest_address: str | None = None
    """Its slot in the guest (`05.0`); None: QEMU takes the next free one, in attach order."""
    properties: Mapping[str, str] = field(default_factory=dict)
    """Further properties, only such as this QEMU has (`enable-migration`, `migration-events`)."""


@dataclass(frozen=True)
class VfioLaunch:
    """All passthrough devices of one VM."""

    iommufds: tuple[str, ...] = ()
    """Ids of the iommufd objects."""
    iommufds_by_fd: bool = False
    """They are given as open descriptors of /dev/iommu; else QEMU opens it."""
    devices: tuple[VfioLaunchDevice, ...] = ()
    """In attach order."""


def arguments(
    launch: VfioLaunch, iommufd_fds: Sequence[int], device_fds: Mapping[str, int]
) -> list[str]:
    """QEMU's arguments for all passthrough devices, in the plan's order.

    `iommufd_fds`: one inherited descriptor for each iommufd object, in its order, when they are
    given by descriptor; `device_fds`: by address, for each device that is. Raises Invalid when one
    is missing or a value could be read as more than a value.
    """
    wanted = len(launch.iommufds) if launch.iommufds_by_fd else 0
    if len(iommufd_fds) != wanted:
        raise Invalid(
            f"{len(iommufd_fds)} descriptors of /dev/iommu for {wanted} iommufd objects",
            code="wrong_descriptors",
        )
    said = []
    for n, id_ in enumerate(launch.iommufds):
        fd = {"fd": str(iommufd_fds[n])} if launch.iommufds_by_fd else {}
        said += ["-object", _joined("iommufd", {"id": _id(id_)} | fd)]
    for device in launch.devices:
        said += ["-device", _joined("vfio-pci", _device(device, device_fds))]
    return said


def _device(device: VfioLaunchDevice, device_fds: Mapping[str, int]) -> dict[str, str]:
    told = {"id": _id(device.id)}
    if device.given_by is GivenBy.FD:
        fd = device_fds.get(device.address)
        if fd is None:
            what = f"no descriptor of {device.id} ({device.address}) is open"
            raise Invalid(what, code="wrong_descriptors")
        told["fd"] = str(fd)
    elif device.sysfs_path is not None:
        told["sysfsdev"] = device.sysfs_path
    else:
        told["host"] = device.address
    named = {"iommufd": device.iommufd, "bus": device.guest_bus, "addr": device.guest_address}
    told |= {name: value for name, value in named.items() if value is not None}
    for name, value in device.properties.items():
        if name in told or _NAME.fullmatch(name) is None:
            raise Invalid(f"{device.id}: {name!r} is no further property", code="unsafe_argument")
        told[name] = value
    return told


def _id(value: str) -> str:
    if _ID.fullmatch(value) is None:
        raise Invalid(f"{value!r} cannot be an id in QEMU", code="unsafe_argument")
    return value


def _joined(what: str, told: Mapping[str, str]) -> str:
    """`what,name=value,…`: a comma in a value would begin another property."""
    for name, value in told.items():
        if not value or len(value) > LONGEST_VALUE or "," in value or not value.isprintable():
            raise Invalid(f"{name}={value!r} cannot be passed to QEMU", code="unsafe_argument")
    return ",".join([what, *(f"{name}={value}" for name, value in told.items())])
