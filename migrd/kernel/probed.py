"""What probes have answered, kept beside what sysfs says, and both put together.

    HostScan (sysfs) ─┐
                      ├─ assemble ──> Inventory
    Answers (probes) ─┘

Rules
1. A probe beats an estimate; what a probe could not find out beats only "nobody has asked". So an
   answer is not lost when the device is in use the next time.
2. Answers about a device hold until it goes, or its driver or its identity changes; those of a bind
   that has ended (`forget`) likewise.
3. Dirty tracking belongs to the IOMMU instance, so the instance learns it from any device below it,
   and with it all other devices there. That stays when the device goes. Where two devices of one
   instance were answered differently, the instance counts as unable.
4. An estimate that a probe contradicts is told in the log, and counted, once per instance.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import structlog

from migrd.core.devices import (
    Capability,
    Device,
    Evidence,
    Inventory,
    IommuHardware,
    IommuInstance,
    Unknown,
)
from migrd.kernel.host_devices import tracking_of
from migrd.kernel.host_scan import HostScan

MAX_GROUP_SHOWN = 256
"""Members named per device: a group of thousands would fill the memory with its own names."""

_UNASKED = frozenset({Unknown.NOT_PROBED, Unknown.DRIVER_NOT_BOUND, Unknown.NO_IOMMU})
_PROBED_FIELDS = ("iommu_dirty_tracking", "dma_logging", "can_reset", "cache_coherent")

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Answers:
    """What is remembered at one moment; safe to read in a thread."""

    devices: Mapping[str, Device] = field(default_factory=dict)
    iommus: Mapping[str, Capability] = field(default_factory=dict)
    hardware: Mapping[str, IommuHardware] = field(default_factory=dict)
    """By instance, as the last device below it was told."""


class ProbedFacts:
    """The memory of probes. Belongs to the event loop."""

    def __init__(self) -> None:
        self.estimates_wrong = 0
        """IOMMU instances whose registers had promised something else than a bind found."""
        self._devices: dict[str, Device] = {}
        self._by_iommu: dict[str, dict[str, Capability]] = {}
        self._hardware: dict[str, IommuHardware] = {}
        self._contradicted: set[str] = set()

    def answers(self) -> Answers:
        return Answers(
            dict(self._devices),
            {name: _of_instance(told) for name, told in self._by_iommu.items()},
            dict(self._hardware),
        )

    def note(self, told: Device, scan: HostScan) -> bool:
        """Remember it; False if it is about a device that is not there (any more) as it was."""
        found = scan.devices.get(told.address)
        if found is None or not _is_same(found, told):
            return False
        before = self._devices.get(told.address)
        if before is not None and not _is_same(before, told):
            before = None
        self._devices[told.address] = _with_answers(before or found, told)
        tracking = told.iommu_dirty_tracking
        instance = scan.iommus.get(found.iommu or "")
        if tracking.evidence is Evidence.PROBED and instance is not None:
            self._by_iommu.setdefault(instance.name, {})[told.address] = tracking
            self._compare(instance, told)
        if told.iommu_hardware is not None and instance is not None:
            self._hardware[instance.name] = told.iommu_hardware
        return True

    def forget(self, addresses: Iterable[str]) -> None:
        """Their bind has ended: what was answered about them holds no more."""
        for address in addresses:
            self._devices.pop(address, None)

    def keep_to(self, scan: HostScan) -> None:
        """Forget what is about devices and instances that are gone, or are others now."""
        for address, told in list(self._devices.items()):
            found = scan.devices.get(address)
            if found is None or not _is_same(found, told):
                del self._devices[address]
        for name in self._by_iommu.keys() - scan.iommus.keys():
            del self._by_iommu[name]
            self._hardware.pop(name, None)
            self._contradicted.discard(name)

    def _compare(self, instance: IommuInstance, told: Device) -> None:
        estimate, tracking = instance.dirty_tracking, told.iommu_dirty_tracking
        if estimate.evidence is not Evidence.ESTIMATED or estimate.answer is tracking.answer:
            return
        if instance.name in self._contradicted:
            return
        self._contradicted.add(instance.name)
        self.estimates_wrong += 1
        log.warning(
            "an IOMMU answers otherwise than its registers promised",
            iommu=instance.name,
            device=told.address,
            estimated=estimate.answer.value,
            registers=estimate.detail,
            probed=tracking.answer.value,
        )


def assemble(
    scan: HostScan,
    answers: Answers,
    *,
    previous: Inventory | None = None,
    changed: Iterable[str] = (),
    trouble: tuple[str, ...] = (),
) -> Inventory:
    """The inventory of a scan, of generation 0.

    With `previous` only the devices `changed` are made anew; the caller says all that concern them
    (`concerned`). The order of everything is that of the addresses.
    """
    iommus = {
        name: _completed_iommu(instance, scan, answers) for name, instance in scan.iommus.items()
    }
    if previous is None:
        devices = {
            name: _completed(scan.devices[name], scan, answers) for name in sorted(scan.devices)
        }
    else:
        devices = dict(previous.devices)
        for name in changed:
            if name in scan.devices:
                devices[name] = _completed(scan.devices[name], scan, answers)
            else:
                devices.pop(name, None)
        if devices.keys() != previous.devices.keys():
            devices = dict(sorted(devices.items()))
    return Inventory(scan.kernel, iommus, devices, trouble=(*scan.trouble, *trouble))


def concerned(addresses: Iterable[str], before: HostScan, now: HostScan) -> set[str]:
    """These devices, and all others of which something may look different because of them."""
    found = set(addresses)
    for scan in (before, now):
        for address in tuple(found):
            device = scan.devices.get(address)
            if device is None:
                continue
            if device.iommu_group is not None:
                found.update(scan.index.in_group[device.iommu_group])
            if device.physical_function is not None:
                found.add(device.physical_function)
    for name in before.iommus.keys() | now.iommus.keys():
        if before.iommus.get(name) != now.iommus.get(name):
            found.update(before.index.below.get(name, ()), now.index.below.get(name, ()))
    return found


def _completed_iommu(instance: IommuInstance, scan: HostScan, answers: Answers) -> IommuInstance:
    completed = replace(
        instance,
        dirty_tracking=answers.iommus.get(instance.name, instance.dirty_tracking),
        devices=scan.index.below.get(instance.name, ()),
    )
    hardware = answers.hardware.get(instance.name)
    if hardware is None:
        return completed
    return replace(
        completed,
        hardware_type=hardware.hardware_type,
        capability_bits=hardware.capability_bits,
        unknown_capability_bits=hardware.unknown_capability_bits,
    )


def _completed(device: Device, scan: HostScan, answers: Answers) -> Device:
    """A device as sysfs shows it, with what others and probes say of it."""
    changes: dict[str, Any] = {}
    if device.iommu is not None:
        learned = answers.iommus.get(device.iommu)
        tracking = learned or tracking_of(device.iommu, scan.iommus)
        if tracking is not device.iommu_dirty_tracking:
            changes["iommu_dirty_tracking"] = tracking
    functions = scan.index.functions_of.get(device.address)
    if functions:
        changes["virtual_functions"] = functions
    if device.iommu_group is not None:
        members = scan.index.in_group[device.iommu_group]
        if len(members) > 1:
            _add_group(device, members, changes)
    full = replace(device, **changes) if changes else device  # there may be thousands
    told = answers.devices.get(device.address)
    return full if told is None or not _is_same(full, told) else _with_answers(full, told)


def _add_group(device: Device, members: tuple[str, ...], changes: dict[str, Any]) -> None:
    others = [name for name in members[: MAX_GROUP_SHOWN + 1] if name != device.address]
    changes["group_devices"] = tuple(others[:MAX_GROUP_SHOWN])
    if len(members) - 1 > MAX_GROUP_SHOWN:
        told = f"its group has {len(members) - 1} other members; {MAX_GROUP_SHOWN} are named"
        changes["trouble"] = (*device.trouble, told)


def _is_same(one: Device, other: Device) -> bool:
    """The same hardware at the same address, with the same driver."""
    return (one.kind, one.driver, one.vendor_id, one.device_id, one.mdev_type) == (
        other.kind,
        other.driver,
        other.vendor_id,
        other.device_id,
        other.mdev_type,
    )


def _with_answers(base: Device, told: Device) -> Device:
    """`base`, with each fact that a probe knows better."""
    better: dict[str, Any] = {
        name: _better(getattr(base, name), getattr(told, name)) for name in _PROBED_FIELDS
    }
    if _better(base.migration.can, told.migration.can) is told.migration.can:
        better["migration"] = told.migration
    if told.iommu_hardware is not None:
        better["iommu_hardware"] = told.iommu_hardware
    return replace(base, **better)


def _better(base: Capability, told: Capability) -> Capability:
    if told.evidence is Evidence.PROBED:
        return told
    if base.reason in _UNASKED and told.reason is not None and told.reason not in _UNASKED:
        return told
    return base


def _of_instance(told: Mapping[str, Capability]) -> Capability:
    """What an instance can do, from what the devices below it were answered."""
    address, answer = min(told.items(), key=lambda item: (item[1].is_yes, item[0]))
    if any(other.answer is not answer.answer for other in told.values()):
        return replace(answer, detail=f"{address}: {answer.detail}; other devices were told yes")
    return replace(answer, detail=f"{address}: {answer.detail}" if answer.detail else address)
