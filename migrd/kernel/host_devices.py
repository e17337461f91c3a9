"""What sysfs says of one PCI function or one mdev.

    /sys/bus/pci/devices/<bdf>      modalias numa_node reset_method driver_override
                                    driver@ iommu_group@ iommu@ physfn@ vfio-dev/vfioN/dev
    /sys/bus/mdev/devices/<uuid>    driver@ iommu_group@ mdev_type@ vfio-dev/vfioN/dev; its parent
                                    is the directory that it really stands in

Which PCI functions are in the inventory
    All that are bound to a VFIO driver, and all that could be: every function but bridges (class
    06) and IOMMUs (08 06), which no driver for passthrough takes. A network card that the host uses
    itself is in it too: `migrd devices` shows what could be passed through, and clients filter by
    driver. A function whose class cannot be read is in it, with its trouble.

Traps
- vendor, device and class are read from `modalias`, which has all three. `uevent` has them too, but
  some kernels take the device's lock to show it; `config` would wake a sleeping device.
- `driver_override` is read of functions without a driver only: that takes the lock, too, which is
  held for as long as a probe or a reset lasts, and of a bound device it says nothing.
- A VFIO driver is known by what it registered (`vfio-dev`, since Linux 6.1), else by its name, in
  which all of them have "vfio".
- An mdev with an `iommu` link is behind an IOMMU after all, and is judged as a PCI function is.
"""

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final

from migrd.core.devices import (
    Capability,
    Device,
    DeviceKind,
    DeviceMigration,
    IommuInstance,
    Unknown,
)
from migrd.kernel.sysfs import Directory, Roots, shown

BDF: Final = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[01][0-9a-f]\.[0-7]")
UUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")

_MODALIAS: Final = re.compile(
    r"pci:v([0-9A-F]{8})d([0-9A-F]{8})sv[0-9A-F]{8}sd[0-9A-F]{8}"
    r"bc([0-9A-F]{2})sc([0-9A-F]{2})i([0-9A-F]{2})"
)
_VFIO_DEV: Final = re.compile(r"vfio\d{1,9}")
_BRIDGE: Final = 0x06
_IOMMU: Final = 0x0806
_MDEV_TRACKING: Final = Capability.estimated(
    False, "an mdev's driver pins pages itself: no IOMMU sees its DMA"
)
_NO_IOMMU: Final = Capability.unknown(Unknown.NO_IOMMU, "sysfs names no IOMMU instance for it")


def is_infrastructure(device: Device) -> bool:
    """Whether it is a bridge or an IOMMU: part of the host, not a device to pass through."""
    code = device.class_code
    if device.kind is not DeviceKind.VFIO_PCI or code is None or has_vfio_driver(device):
        return False
    return code >> 16 == _BRIDGE or code >> 8 == _IOMMU


def has_vfio_driver(device: Device) -> bool:
    return device.vfio_cdev is not None or "vfio" in (device.driver or "")


def read_function(
    bus: Directory, address: str, roots: Roots, iommus: Mapping[str, IommuInstance]
) -> Device | None:
    """One PCI function, by its link in /sys/bus/pci/devices; None when it has gone.

    `roots.sys` must be a real path.
    """
    trouble: list[str] = []
    opened = bus.child(address, roots.sys, trouble)
    if opened is None:
        if not trouble:
            return None
        return _of_nothing(address, DeviceKind.VFIO_PCI, trouble)
    with opened as device:
        driver = device.link("driver")
        registered, cdev = _vfio_device(device, roots)
        is_vfio = registered or "vfio" in (driver or "")
        numa_node = device.number("numa_node", 10, lowest=-1)
        vendor_id, device_id, class_code = _identity(device)
        iommu = device.link("iommu")
        return Device(
            address,
            DeviceKind.VFIO_PCI,
            iommu=iommu,
            iommu_dirty_tracking=_NO_IOMMU if iommu is None else tracking_of(iommu, iommus),
            driver=driver,
            driver_override=None if driver else _driver_override(device),
            vendor_id=vendor_id,
            device_id=device_id,
            class_code=class_code,
            iommu_group=_group(device),
            physical_function=_physical_function(device),
            vfio_cdev=cdev,
            numa_node=None if numa_node == -1 else numa_node,
            can_reset=_can_reset(device),
            **_unasked(driver, is_vfio),
            trouble=tuple(trouble),
        )


def read_mdev(
    bus: Directory, uuid: str, roots: Roots, iommus: Mapping[str, IommuInstance]
) -> Device | None:
    """One mediated device, by its link in /sys/bus/mdev/devices; None when it has gone."""
    trouble: list[str] = []
    opened = bus.child(uuid, roots.sys, trouble)
    if opened is None:
        return _of_nothing(uuid, DeviceKind.VFIO_MDEV, trouble) if trouble else None
    with opened as device:
        driver = device.link("driver")
        registered, cdev = _vfio_device(device, roots)
        iommu = device.link("iommu")
        return Device(
            uuid,
            DeviceKind.VFIO_MDEV,
            iommu=iommu,
            iommu_dirty_tracking=_MDEV_TRACKING if iommu is None else tracking_of(iommu, iommus),
            driver=driver,
            iommu_group=_group(device),
            mdev_parent=device.path.split("/")[-2],
            mdev_type=device.link("mdev_type"),
            vfio_cdev=cdev,
            **_unasked(driver, registered or "vfio" in (driver or "")),
            trouble=tuple(trouble),
        )


def tracking_of(iommu: str, iommus: Mapping[str, IommuInstance]) -> Capability:
    """What sysfs lets expect of the instance of that name."""
    instance = iommus.get(iommu)
    if instance is not None:
        return instance.dirty_tracking
    return Capability.unknown(Unknown.NO_IOMMU, f"{iommu} is not in class/iommu")


def _of_nothing(address: str, kind: DeviceKind, trouble: list[str]) -> Device:
    """It is listed, and that is all that is known."""
    unknown = Capability.unknown(Unknown.NOT_READABLE, trouble[0])
    return Device(
        address,
        kind,
        iommu_dirty_tracking=unknown,
        dma_logging=unknown,
        migration=DeviceMigration(unknown),
        can_reset=unknown,
        trouble=tuple(trouble),
    )


def _identity(device: Directory) -> tuple[int | None, int | None, int | None]:
    """Vendor, device and class; trouble if they cannot be told."""
    before = len(device.trouble)
    text = device.text("modalias")
    said = _MODALIAS.fullmatch(text or "")
    if said is not None:
        return int(said[1], 16), int(said[2], 16), int(said[3] + said[4] + said[5], 16)
    if len(device.trouble) == before:
        why = "is missing" if text is None else f"is of no PCI function: {shown(text)}"
        device.trouble.append(f"modalias: {why}")
    return None, None, None


def _group(device: Directory) -> int | None:
    name = device.link("iommu_group")
    if name is None:
        return None
    if name.isascii() and name.isdigit():
        return int(name)
    device.trouble.append(f"iommu_group: leads to {shown(name)}, not to a number")
    return None


def _physical_function(device: Directory) -> str | None:
    name = device.link("physfn")
    if name is None or BDF.fullmatch(name):
        return name
    device.trouble.append(f"physfn: leads to {shown(name)}, not to a PCI address")
    return None


def _driver_override(device: Directory) -> str | None:
    text = device.text("driver_override")
    return None if text in ("", "(null)") else text


def _can_reset(device: Directory) -> Capability:
    before = len(device.trouble)
    methods = device.text("reset_method")  # since Linux 5.15
    if methods is None and len(device.trouble) > before:
        return Capability.unknown(Unknown.NOT_READABLE, device.trouble[-1])
    return _reset_by(methods, methods is None and device.has("reset"))


@lru_cache(maxsize=256)
def _reset_by(methods: str | None, has_reset: bool) -> Capability:
    if methods:
        return Capability.estimated(True, f"reset_method: {methods}")
    if methods is not None:
        return Capability.estimated(False, "reset_method is empty: every method was switched off")
    if has_reset:
        return Capability.estimated(True, "has the attribute `reset`")
    return Capability.estimated(False, "no reset_method, no reset")


def _vfio_device(device: Directory, roots: Roots) -> tuple[bool, str | None]:
    """Whether it is registered with VFIO, and its character device, if the kernel makes such."""
    names = device.names_in("vfio-dev")
    named = [name for name in names if _VFIO_DEV.fullmatch(name)]
    device.trouble += [
        f"vfio-dev: {shown(name)} is no VFIO device" for name in names[:3] if name not in named
    ]
    if not named:
        return False, None
    if len(named) > 1:
        device.trouble.append(f"vfio-dev: has {len(named)} devices; {named[0]} is taken")
    if not device.has(f"vfio-dev/{named[0]}/dev"):
        return True, None  # a kernel without CONFIG_VFIO_DEVICE_CDEV
    return True, f"{roots.dev}/vfio/devices/{named[0]}"


def _unasked(driver: str | None, is_vfio: bool) -> dict[str, Any]:
    """The facts that only a probe gives, with the reason why they are not known yet."""
    unknown, migration = _unknown(driver, is_vfio)
    return {
        "dma_logging": unknown,
        "migration": migration,
        "cache_coherent": unknown,
    }


@lru_cache(maxsize=256)
def _unknown(driver: str | None, is_vfio: bool) -> tuple[Capability, DeviceMigration]:
    """Shared by all devices of a driver: there may be thousands."""
    if is_vfio:
        unknown = Capability.unknown(Unknown.NOT_PROBED, "nobody has asked the device yet")
    elif driver is None:
        unknown = Capability.unknown(Unknown.DRIVER_NOT_BOUND, "no driver is bound")
    else:
        unknown = Capability.unknown(Unknown.DRIVER_NOT_BOUND, f"bound to {driver}")
    return unknown, DeviceMigration(unknown)
