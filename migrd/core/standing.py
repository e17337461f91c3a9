"""The decision that stands for a VM: the plan, what it rested on, and when it was made.

It is kept durably before QEMU is started, shown, and every change is judged against it. Everything
in it is bounded and plain text, whatever sysfs had in it: what cannot be written down could not be
kept (`sound`).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from enum import Enum
from typing import Any, TypeVar

from migrd.core.devices import (
    Answer,
    Capability,
    Device,
    DeviceKind,
    DeviceMigration,
    Evidence,
    MigrationFlag,
)
from migrd.core.facts import PassthroughFacts, VmSpec
from migrd.core.tracking import Plan, TrackingRequest
from migrd.core.vfio_launch import VfioLaunch

T = TypeVar("T")

LONGEST_TEXT = 1000
"""Characters: a sentence for people, not a file."""


@dataclass(frozen=True)
class DeviceEvidence:
    """What the decision knew of one device."""

    id: str
    address: str
    iommu: str | None
    iommu_dirty_tracking: Capability
    dma_logging: Capability
    migration: Capability
    migration_flags: tuple[MigrationFlag, ...] = ()
    stop_copy_bytes: int | None = None
    driver: str | None = None
    kind: DeviceKind = DeviceKind.VFIO_PCI
    iommu_group: int | None = None
    vfio_cdev: str | None = None

    @classmethod
    def of(cls, id_: str, device: Device) -> "DeviceEvidence":
        flags = tuple(flag for flag in MigrationFlag if flag in device.migration.flags)
        return cls(
            id=id_,
            address=device.address,
            iommu=device.iommu,
            iommu_dirty_tracking=device.iommu_dirty_tracking,
            dma_logging=device.dma_logging,
            migration=device.migration.can,
            migration_flags=flags,
            stop_copy_bytes=device.migration.stop_copy_bytes,
            driver=device.driver,
            kind=device.kind,
            iommu_group=device.iommu_group,
            vfio_cdev=device.vfio_cdev,
        )

    def device(self) -> Device:
        """The device as it was: of one that a running VM has, and sysfs does not show just now."""
        return Device(
            address=self.address,
            kind=self.kind,
            iommu=self.iommu,
            iommu_dirty_tracking=self.iommu_dirty_tracking,
            dma_logging=self.dma_logging,
            migration=DeviceMigration(
                self.migration,
                frozenset(self.migration_flags),
                stop_copy_bytes=self.stop_copy_bytes,
            ),
            driver=self.driver,
            iommu_group=self.iommu_group,
            vfio_cdev=self.vfio_cdev,
        )


@dataclass(frozen=True)
class StandingDecision:
    """One VM's decision."""

    plan: Plan
    evidence: tuple[DeviceEvidence, ...]
    """By QEMU id."""
    decided_wall_s: float
    downgraded: tuple[str, ...] = ()
    """Devices whose domain was refused tracking when QEMU tried."""
    probed: bool = False
    """The kernel was asked about each device for it; else it rests on what was known before."""


def standing(
    request: TrackingRequest, plan: Plan, wall_s: float, *, probed: bool
) -> StandingDecision:
    """The decision of `request`, as it is kept."""
    evidence = tuple(DeviceEvidence.of(one.id, one.device) for one in request.devices)
    made = StandingDecision(
        plan, evidence, wall_s, downgraded=tuple(sorted(request.downgraded)), probed=probed
    )
    return sound(made)


def may_be_asked(device: Device) -> bool:
    """Something of it is not the kernel's own answer yet, so that a probe could tell more."""
    answers = (device.iommu_dirty_tracking, device.dma_logging, device.migration.can)
    return any(
        one.answer is Answer.UNKNOWN or one.evidence is Evidence.ESTIMATED for one in answers
    )


def remembering(device: Device, evidence: DeviceEvidence) -> Device:
    """The device with what the kernel answered of it before it was given to a VM, wherever nothing
    better is known: it can't change while the VM has it."""
    if evidence.address != device.address:
        return device
    migration = device.migration
    if _is_better(evidence.migration, migration.can):
        migration = replace(
            migration,
            can=evidence.migration,
            flags=frozenset(evidence.migration_flags),
            stop_copy_bytes=evidence.stop_copy_bytes,
        )
    return replace(
        device,
        iommu_dirty_tracking=_better(evidence.iommu_dirty_tracking, device.iommu_dirty_tracking),
        dma_logging=_better(evidence.dma_logging, device.dma_logging),
        migration=migration,
    )


def _better(before: Capability, now: Capability) -> Capability:
    return before if _is_better(before, now) else now


def _is_better(before: Capability, now: Capability) -> bool:
    return before.evidence is Evidence.PROBED and now.evidence is not Evidence.PROBED


def with_addresses(spec: VmSpec, addresses: Mapping[str, str]) -> VmSpec:
    """The spec for another host: its devices by QEMU id at their addresses there."""
    devices = tuple(
        replace(device, address=addresses.get(device.id, device.address)) for device in spec.devices
    )
    return replace(spec, devices=devices)


def placed(spec: VmSpec, seen: Iterable[PassthroughFacts]) -> VmSpec:
    """The spec with the guest slots that the running VM was seen to have its devices in, wherever
    none was given: a QEMU elsewhere must not choose others."""
    places = {one.id: one for one in seen if one.guest_bus and one.guest_address}
    devices = tuple(
        replace(
            device,
            guest_bus=places[device.id].guest_bus,
            guest_address=places[device.id].guest_address,
        )
        if device.guest_address is None and device.guest_bus is None and device.id in places
        else device
        for device in spec.devices
    )
    return replace(spec, devices=devices)


def placed_launch(told: VfioLaunch | None, spec: VmSpec) -> VfioLaunch | None:
    """What QEMU was told, with the guest slots of the spec."""
    if told is None:
        return None
    by_id = {device.id: device for device in spec.devices}
    devices = tuple(
        replace(
            one,
            guest_bus=by_id[one.id].guest_bus,
            guest_address=by_id[one.id].guest_address,
        )
        if one.id in by_id
        else one
        for one in told.devices
    )
    return replace(told, devices=devices)


def sound(value: T) -> T:
    """The value with all its texts valid Unicode and bounded; names in sysfs are bytes."""
    found: Any = _sound(value)
    checked: T = found
    return checked


def _sound(value: Any) -> Any:
    if isinstance(value, Enum):
        return value
    if isinstance(value, str):
        if value.isascii() and len(value) <= LONGEST_TEXT:
            return value
        return value.encode("utf-8", "replace").decode()[:LONGEST_TEXT]
    if isinstance(value, tuple):
        items = tuple(_sound(item) for item in value)
        is_same = all(item is had for item, had in zip(items, value, strict=True))
        return value if is_same else items
    if isinstance(value, frozenset):
        return frozenset(_sound(item) for item in value)
    if isinstance(value, Mapping):
        return {_sound(key): _sound(item) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        changed = {}
        for field in fields(value):
            had = getattr(value, field.name)
            if (item := _sound(had)) is not had:
                changed[field.name] = item
        return replace(value, **changed) if changed else value
    return value
