"""Passthrough: IOMMUs, iommufd, VFIO, and the devices that are meant for VMs.

How much a lack matters depends on what is wanted
    fail   devices.expected names a device: without this it cannot be given to a VM
    warn   a VFIO driver has a device, so somebody means to pass it through
    ok     neither: it is only said

The hardware is read as the daemon reads it, and judged by the same function; nothing is opened but
/dev/iommu, and no device is bound or asked.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from migrd.config import Settings
from migrd.core.devices import Answer, Device, DeviceKind, Inventory, Unknown
from migrd.doctor.finding import Check, Finding, fail, ok, warn
from migrd.engine.device_verdict import judge, why_all_track
from migrd.kernel.host_devices import has_vfio_driver
from migrd.kernel.host_scan import scan_host
from migrd.kernel.probed import Answers, assemble
from migrd.kernel.sysfs import Roots

CDEV_SINCE: Final = (6, 6)
DIRTY_TRACKING_SINCE: Final = (6, 7)
"""Linux: VFIO character devices; dirty tracking by IOMMUs (iommufd)."""
MOST_TOLD: Final = 16
_RELEASE: Final = re.compile(r"(\d{1,3})\.(\d{1,3})")
_USER: Final = "the user that migrd runs as"

_ALL_TRACK: Final[Mapping[bool | None, str]] = {
    True: "all track dirty pages",
    False: "not all track dirty pages",
    None: "whether all track dirty pages is not known",
}

Bad = Callable[[str, str, str], Finding]


def checks(settings: Settings | None) -> list[Check]:
    expected = () if settings is None else settings.devices.expected
    return [Check("passthrough", blocking=partial(look_at_passthrough, expected))]


def look_at_passthrough(
    expected: Sequence[str], root: Path = Path("/"), may_open: Callable[[str], bool] | None = None
) -> list[Finding]:
    """Blocking."""
    inventory = assemble(scan_host(Roots.below(root)), Answers())
    return list(findings(inventory, expected, may_open or _may_open))


def _may_open(path: str) -> bool:
    return os.access(path, os.R_OK | os.W_OK)


def findings(
    inventory: Inventory, expected: Sequence[str], may_open: Callable[[str], bool]
) -> Iterator[Finding]:
    """In a fixed order: the host, then each device."""
    ready = [device for device in inventory.devices.values() if has_vfio_driver(device)]
    bad: Bad = fail if expected else warn if ready else _only_said
    yield from _host(inventory, bad)
    examined = _Devices(inventory, may_open)
    for address in dict.fromkeys(expected):
        yield examined.expected(address)
    told = 0
    for device in ready:
        if device.address not in expected and (finding := examined.trouble_of(device, warn)):
            told += 1
            if told <= MOST_TOLD:
                yield finding
    if told > MOST_TOLD:
        cure = "mend those above, then run migrd doctor again"
        yield warn("devices", f"{told - MOST_TOLD} more devices have trouble of this kind", cure)


def _only_said(name: str, message: str, cure: str) -> Finding:
    del cure
    return ok(name, message)


# The host -----------------------------------------------------------------------------------------


def _host(inventory: Inventory, bad: Bad) -> Iterator[Finding]:
    yield _iommus(inventory, bad)
    yield _release(inventory.kernel.release, bad)
    yield _iommufd(inventory, bad)
    yield _vfio(inventory, bad)
    if inventory.kernel.unsafe_interrupts:
        yield bad(
            "interrupts",
            "passthrough is allowed without interrupt remapping (allow_unsafe_interrupts): a guest "
            "with a device can raise any interrupt of this host",
            "enable interrupt remapping in the firmware (x2APIC, VT-d), then set "
            "options iommufd allow_unsafe_interrupts=N in /etc/modprobe.d/",
        )
    if inventory.trouble:
        some = "; ".join(inventory.trouble[:3])
        yield bad(
            "sysfs",
            f"{len(inventory.trouble)} things could not be read: {some}",
            "look at them, as root; in a container, mount /sys whole",
        )


def _iommus(inventory: Inventory, bad: Bad) -> Finding:
    name = "iommu and vfio"
    if not inventory.iommus:
        return bad(
            name,
            "no IOMMU: this host has none, or it is off, and no PCI device can be passed through",
            "enable it in the firmware (VT-d, AMD-Vi, SMMU)\n"
            "add intel_iommu=on to the kernel's command line on Intel; take amd_iommu=off or "
            "iommu=off away; then reboot",
        )
    all_track = _ALL_TRACK[inventory.all_iommus_track_dirty]
    ready = sum(has_vfio_driver(device) for device in inventory.devices.values())
    return ok(
        name,
        f"{len(inventory.iommus)} IOMMUs, {all_track}: {why_all_track(inventory)}; "
        f"{len(inventory.devices)} devices, {ready} of them bound to VFIO",
    )


def _release(release: str, bad: Bad) -> Finding:
    name = "kernel"
    found = _RELEASE.match(release)
    if found is None:
        return ok(name, f"release {release or 'not told'}: its version is not known")
    version = int(found[1]), int(found[2])
    if version < CDEV_SINCE:
        lacks = "has no VFIO character devices (since 6.6) and no dirty tracking by IOMMUs (6.7)"
    elif version < DIRTY_TRACKING_SINCE:
        lacks = "has no dirty tracking by IOMMUs (since 6.7)"
    else:
        return ok(name, f"Linux {release}")
    return bad(name, f"Linux {release} {lacks}", "boot Linux 6.7 or newer, best 6.12")


def _iommufd(inventory: Inventory, bad: Bad) -> Finding:
    name, known = "iommufd", inventory.kernel.iommufd
    if known.is_yes:
        return ok(name, known.detail or "/dev/iommu can be opened")
    if known.reason is Unknown.NO_PERMISSION:
        return bad(
            name,
            f"/dev/iommu may not be opened: {known.detail}",
            f'echo \'KERNEL=="iommu", GROUP="migrd", MODE="0660"\' > '
            f"/etc/udev/rules.d/70-migrd-iommu.rules   ({_USER} is in that group)\n"
            "udevadm control --reload; udevadm trigger /dev/iommu",
        )
    if known.is_no:
        return bad(
            name,
            f"no iommufd: {known.detail}",
            "modprobe iommufd; where there is no such module, boot a kernel with CONFIG_IOMMUFD",
        )
    return bad(name, f"not known: {known.detail}", "look at it: ls -l /dev/iommu; dmesg -T | tail")


def _vfio(inventory: Inventory, bad: Bad) -> Finding:
    name, known = "vfio", inventory.kernel.vfio_cdev
    if known.is_yes:
        return ok(name, known.detail or "devices have character devices")
    if known.answer is Answer.NO:
        return bad(
            name,
            f"devices have no character devices: {known.detail}",
            "boot a kernel with CONFIG_VFIO_DEVICE_CDEV (Linux 6.6 or newer)",
        )
    return bad(name, f"not known: {known.detail}", "modprobe vfio-pci")


# Devices ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Devices:
    """The hardware, and who may open what."""

    inventory: Inventory
    may_open: Callable[[str], bool]

    def expected(self, address: str) -> Finding:
        """A device that the configuration names."""
        device = self.inventory.devices.get(address)
        if device is None:
            return fail(
                f"device {address}",
                "devices.expected names it, and it is not there",
                f"look for it: lspci -D | grep {address[5:]}; a VF is made by its PF: "
                "echo N > /sys/bus/pci/devices/<PF>/sriov_numvfs"
                if ":" in address
                else "create the mdev: mdevctl start --uuid " + address,
            )
        return self.trouble_of(device, fail) or self._sound(device)

    def _sound(self, device: Device) -> Finding:
        verdict = judge(device, self.inventory)
        promise = verdict.migratability_at_best.value.replace("_", " ")
        surely = verdict.migratability is verdict.migratability_at_best
        why = next((reason.message for reason in verdict.reasons if reason.lowers_to), "")
        return ok(
            f"device {device.address}",
            f"ready ({device.driver}); the verdict on a VM with it alone is"
            f"{'' if surely else ' at best'} {promise!r}" + (f": {why}" if why else ""),
        )

    def trouble_of(self, device: Device, bad: Bad) -> Finding | None:
        """The first thing that keeps it from being given to a VM; None when nothing does."""
        found = (
            self._without_driver(device)
            or self._without_iommu(device)
            or self._in_mixed_group(device)
            or self._closed(device)
        )
        return None if found is None else bad(f"device {device.address}", *found)

    @staticmethod
    def _without_driver(device: Device) -> tuple[str, str] | None:
        if has_vfio_driver(device):
            return None
        has = f"{device.driver} has it" if device.driver else "no driver has it"
        cure = f"driverctl set-override {device.address} vfio-pci   (or its vendor's VFIO driver)"
        if device.kind is DeviceKind.VFIO_MDEV:
            cure = f"mdevctl stop --uuid {device.address}; mdevctl start --uuid {device.address}"
        return f"no VFIO driver has it: {has}", cure

    def _without_iommu(self, device: Device) -> tuple[str, str] | None:
        if device.iommu is not None or device.kind is DeviceKind.VFIO_MDEV:
            return None
        if not self.inventory.iommus:
            return "there is no IOMMU", "see `iommu and vfio` above"
        return (
            "it is behind none of this host's IOMMUs",
            "look for it in the firmware's tables: dmesg | grep -i -e dmar -e ivrs -e iort",
        )

    def _in_mixed_group(self, device: Device) -> tuple[str, str] | None:
        others = [
            other
            for address in device.group_devices
            if (other := self.inventory.devices.get(address)) is not None
            and other.driver is not None
            and not has_vfio_driver(other)
        ]
        if not others:
            return None
        named = ", ".join(f"{other.address} ({other.driver})" for other in others[:4])
        return (
            f"its group {device.iommu_group} is not viable: the host's own drivers have {named}",
            "\n".join(f"driverctl set-override {other.address} vfio-pci" for other in others[:4]),
        )

    def _closed(self, device: Device) -> tuple[str, str] | None:
        if device.vfio_cdev is None:
            return (
                "it has no character device",
                "boot a kernel with CONFIG_VFIO_DEVICE_CDEV (Linux 6.6 or newer)",
            )
        if self.may_open(device.vfio_cdev):
            return None
        return (
            f"{device.vfio_cdev} may not be opened by {_USER}",
            'echo \'SUBSYSTEM=="vfio-dev", GROUP="migrd", MODE="0660"\' > '
            "/etc/udev/rules.d/70-migrd-vfio.rules\n"
            "udevadm control --reload; udevadm trigger --subsystem-match=vfio-dev",
        )
