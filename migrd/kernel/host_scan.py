"""One reading of the host's passthrough hardware, whole or in part.

    scan_host ───────────────> HostScan   everything, anew: a second one reuses nothing
    scan_again(scan, names) ─> HostScan   the named devices and their IOMMU instances

A HostScan holds what sysfs says, device by device. Who shares a group with whom, which VFs a PF has
and what is below an IOMMU is its `index`, made from the devices' own links: one source for each
relation, so no half of a pair can be missing. (The kernel's own lists, /sys/kernel/iommu_groups,
virtfn* and class/iommu/*/devices, say the same from the other end, at the price of as many reads
again; what else they name are bridges, which nobody has to pass through.)

All of it blocks, and is called through in_thread(). Nothing raises for what sysfs holds: trouble of
a device stands in the device, the rest in `HostScan.trouble`.
"""

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, TypeVar

from migrd.core.devices import Device, IommuInstance, KernelFacts
from migrd.kernel.host_devices import BDF, UUID, is_infrastructure, read_function, read_mdev
from migrd.kernel.host_iommus import read_iommu, read_iommus
from migrd.kernel.host_kernel import NOT_READ, read_command_line, read_kernel
from migrd.kernel.iommu_registers import scalable_mode_is_off
from migrd.kernel.sysfs import Directory, Roots, bounded, shown

Key = TypeVar("Key", int, str)

Iommus = Mapping[str, IommuInstance]


@dataclass(frozen=True)
class Bus:
    """A directory of links to devices."""

    path: str
    address: re.Pattern[str]
    named: str
    """What its entries should be, for people."""
    read: Callable[[Directory, str, Roots, Iommus], Device | None]


_PCI: Final = Bus("bus/pci/devices", BDF, "a PCI address", read_function)
_MDEV: Final = Bus("bus/mdev/devices", UUID, "the UUID of an mdev", read_mdev)


@dataclass(frozen=True)
class Index:
    """The devices by what they have in common, each list in order."""

    in_group: Mapping[int, tuple[str, ...]]
    functions_of: Mapping[str, tuple[str, ...]]
    """The VFs of a PF."""
    below: Mapping[str, tuple[str, ...]]
    """What stands behind an IOMMU instance."""


@dataclass(frozen=True)
class HostScan:
    """What sysfs said. The devices know nothing of each other yet (`probed.assemble`)."""

    kernel: KernelFacts = NOT_READ
    scalable_mode_off: bool = False
    iommus: Mapping[str, IommuInstance] = field(default_factory=dict)
    devices: Mapping[str, Device] = field(default_factory=dict)
    trouble: tuple[str, ...] = ("the host has not been read yet",)
    index: Index = field(default_factory=lambda: Index({}, {}, {}))


def scan_host(roots: Roots) -> HostScan:
    """Read everything. Raises OSError only for want of descriptors or memory."""
    roots = _real(roots)
    trouble: list[str] = []
    kernel = read_kernel(roots, trouble)
    scalable_mode_off = scalable_mode_is_off(read_command_line(roots, trouble))
    iommus = read_iommus(roots, scalable_mode_off, trouble)
    devices = {
        device.address: device
        for device in (
            *_scan(roots, _PCI, iommus, trouble),
            *_scan(roots, _MDEV, iommus, trouble),
        )
        if not is_infrastructure(device)
    }
    index = _index_with(Index({}, {}, {}), (), devices.values())
    return HostScan(kernel, scalable_mode_off, iommus, devices, bounded(trouble), index)


def scan_again(roots: Roots, before: HostScan, addresses: Iterable[str]) -> HostScan:
    """`before`, with these addresses read anew, and what they hang on. Raises as scan_host."""
    roots = _real(roots)
    trouble: list[str] = []
    devices = dict(before.devices)
    old, new = [], []
    for address in sorted(set(addresses)):
        if (was := devices.pop(address, None)) is not None:
            old.append(was)
        now = _read_one(roots, address, before.iommus, trouble)
        if now is not None and not is_infrastructure(now):
            devices[address] = now
            new.append(now)
    named = sorted({one.iommu for one in (*old, *new) if one.iommu is not None})
    return replace(
        before,
        iommus=_iommus_again(roots, before, named, trouble),
        devices=devices,
        trouble=bounded(list({*before.trouble, *trouble})),
        index=_index_with(before.index, old, new),
    )


def _real(roots: Roots) -> Roots:
    return replace(roots, sys=os.path.realpath(roots.sys))


def _scan(roots: Roots, bus: Bus, iommus: Iommus, trouble: list[str]) -> Iterable[Device]:
    """All devices of one bus."""
    opened = Directory.open(f"{roots.sys}/{bus.path}", trouble)
    if opened is None:
        return
    with opened as directory:
        for name in directory.names():
            if not bus.address.fullmatch(name):
                trouble.append(f"{bus.path}: {shown(name)} is not {bus.named}")
            elif (device := bus.read(directory, name, roots, iommus)) is not None:
                yield device


def _read_one(roots: Roots, address: str, iommus: Iommus, trouble: list[str]) -> Device | None:
    bus = _PCI if _PCI.address.fullmatch(address) else _MDEV
    opened = Directory.open(f"{roots.sys}/{bus.path}", trouble)
    if opened is None:
        return None
    with opened as directory:
        return bus.read(directory, address, roots, iommus)


def _iommus_again(
    roots: Roots, before: HostScan, names: Iterable[str], trouble: list[str]
) -> dict[str, IommuInstance]:
    iommus = dict(before.iommus)
    opened = Directory.open(f"{roots.sys}/class/iommu", trouble)
    if opened is None:
        return iommus
    with opened as of_class:
        for name in names:
            instance = read_iommu(of_class, name, roots, before.scalable_mode_off, trouble)
            if instance is None:
                iommus.pop(name, None)
            else:
                iommus[name] = instance
    return dict(sorted(iommus.items()))


def _index_with(before: Index, old: Iterable[Device], new: Iterable[Device]) -> Index:
    """An index with these devices taken out, and those put in."""
    return Index(
        _relation(before.in_group, old, new, lambda device: device.iommu_group),
        _relation(before.functions_of, old, new, lambda device: device.physical_function),
        _relation(before.below, old, new, lambda device: device.iommu),
    )


def _relation(
    before: Mapping[Key, tuple[str, ...]],
    old: Iterable[Device],
    new: Iterable[Device],
    key_of: Callable[[Device], Key | None],
) -> dict[Key, tuple[str, ...]]:
    """One relation of the index; only the lists of these devices are made anew."""
    changed: dict[Key, set[str]] = {}
    for device in old:
        if (key := key_of(device)) is not None:
            changed.setdefault(key, set(before[key])).discard(device.address)
    for device in new:
        if (key := key_of(device)) is not None:
            changed.setdefault(key, set(before.get(key, ()))).add(device.address)
    after = dict(before)
    for key, members in changed.items():
        if members:
            after[key] = tuple(sorted(members))
        else:
            del after[key]
    return after
