"""Devices and requests for the tests of the decision, and the plan put into the model of QEMU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import product
from typing import Any, Final

from migrd.core.devices import (
    Answer,
    Capability,
    Device,
    DeviceKind,
    DeviceMigration,
    IommuInstance,
    IommuKind,
    MigrationFlag,
    Unknown,
)
from migrd.core.tracking import Migratability, Plan, Reason, TrackingRequest, VmDevice, decide
from migrd.core.vfio_launch import QemuVfioFeature, VfioLaunchDevice
from tests.core.qemu_vfio_model import Given, Outcome

YES: Final = Capability.probed(True)
NO: Final = Capability.probed(False, "caps 0x0")
ASK: Final = Capability.unknown(Unknown.NOT_PROBED)
ALL_FLAGS: Final = frozenset(MigrationFlag)
NO_P2P: Final = frozenset({MigrationFlag.STOP_COPY, MigrationFlag.PRE_COPY})
MOVES: Final = DeviceMigration(YES, ALL_FLAGS, stop_copy_bytes=1 << 20)
MOVES_ALONE: Final = DeviceMigration(YES, NO_P2P, stop_copy_bytes=1 << 20)
STAYS: Final = DeviceMigration(NO)
MAYBE_MOVES: Final = DeviceMigration(ASK)
QEMU: Final = frozenset(QemuVfioFeature)
GIB: Final = 1 << 30


def device(
    id_: str,
    cap: Capability = NO,
    log: Capability = NO,
    *,
    migration: DeviceMigration = MOVES,
    iommu: str | None = "iommu0",
    mdev: bool = False,
    attached: bool = False,
    guest_address: str | None = "fixed",
    **facts: Any,
) -> VmDevice:
    """One device; its address follows from its id."""
    number = sum(ord(letter) << (8 * n) for n, letter in enumerate(reversed(id_[-2:])))
    found = Device(
        address=f"uuid-{id_}" if mdev else f"0000:{number >> 8:02x}:{number & 31:02x}.{number % 7}",
        kind=DeviceKind.VFIO_MDEV if mdev else DeviceKind.VFIO_PCI,
        iommu=None if mdev else iommu,
        iommu_dirty_tracking=cap,
        dma_logging=log,
        migration=migration,
        driver="vfio-pci",
        vfio_cdev=f"/dev/vfio/devices/vfio{number}",
    )
    at = f"{number % 29:02x}.0" if guest_address == "fixed" else guest_address
    return VmDevice(id_, replace(found, **facts), guest_address=at, attached=attached)


def both(id_: str, **facts: Any) -> VmDevice:
    """Its IOMMU can track, and it logs."""
    return device(id_, YES, YES, **facts)


def by_iommu(id_: str, **facts: Any) -> VmDevice:
    return device(id_, YES, NO, **facts)


def by_log(id_: str, **facts: Any) -> VmDevice:
    """It logs; its IOMMU cannot track."""
    return device(id_, NO, YES, **({"iommu": "iommu9"} | facts))


def by_none(id_: str, **facts: Any) -> VmDevice:
    return device(id_, NO, NO, **({"iommu": "iommu9"} | facts))


def iommu(name: str, kind: IommuKind = IommuKind.INTEL_VTD, **facts: Any) -> IommuInstance:
    found = IommuInstance(name, kind, ASK)
    return replace(found, **facts)


def asked(*devices: VmDevice, **facts: Any) -> TrackingRequest:
    found = TrackingRequest(devices, QEMU, memory_bytes=16 * GIB, switchover_bytes_per_s=1e9)
    return replace(found, **facts)


def plan(*devices: VmDevice, **facts: Any) -> Plan:
    return decide(asked(*devices, **facts))


def codes(reasons: Iterable[Reason]) -> set[str]:
    return {reason.code.value for reason in reasons}


def of_device(found: Plan, id_: str) -> set[str]:
    return codes(reason for reason in found.limits if reason.device == id_)


def parts(found: Plan) -> list[list[str]]:
    return [list(one.devices) for one in found.iommufds]


# The plan in the model of QEMU

Truth = Mapping[str, Given]
"""By QEMU id: what turns out to be true of each device."""


def truth_of(one: VmDevice) -> Given:
    """Of a device of which everything is known."""
    return next(iter(truths([one])))[one.id]


def truths(devices: Iterable[VmDevice]) -> Iterator[dict[str, Given]]:
    """Every way in which the unknowns may turn out: alike for devices of one IOMMU instance."""
    devices = list(devices)
    unsettled = {one.device.iommu for one in devices if _either(one.device.iommu_dirty_tracking)}
    names = sorted(str(name) for name in unsettled)
    for settled in product((True, False), repeat=len(names)):
        cap = dict(zip(names, settled, strict=True))
        for each in product(*(list(_ways(one, cap)) for one in devices)):
            yield {given.id: given for given in each}


def _either(told: Capability) -> bool:
    return told.answer is Answer.UNKNOWN


def _ways(one: VmDevice, settled: Mapping[str, bool]) -> Iterator[Given]:
    facts = one.device
    is_mdev = facts.kind is DeviceKind.VFIO_MDEV
    told = facts.iommu_dirty_tracking
    cap = settled[str(facts.iommu)] if _either(told) else told.is_yes
    logs = (True, False) if _either(facts.dma_logging) else (facts.dma_logging.is_yes,)
    can = facts.migration.can
    p2p = MigrationFlag.P2P in facts.migration.flags
    moves = [(True, True), (True, False), (False, False)] if _either(can) else [(can.is_yes, p2p)]
    for log, (migrates, has_p2p) in product(logs, moves):
        yield Given(
            one.id,
            cap and not is_mdev,
            log,
            migrates,
            has_p2p,
            is_mdev,
            instance=str(facts.iommu),
        )


def as_told(told: VfioLaunchDevice, truth: Given) -> Given:
    """The device as QEMU gets it by the plan."""
    return replace(
        truth,
        container=told.iommufd,
        enable_migration=told.properties.get("enable-migration", "auto"),
        log_on=told.properties.get("x-device-dirty-page-tracking", "on") == "on",
    )


def launched(found: Plan, truth: Truth) -> list[Given]:
    """All devices in attach order."""
    assert found.launch is not None, found.refused
    return [as_told(one, truth[one.id]) for one in found.launch.devices]


MEANS: Final = {
    Outcome.LIVE: Migratability.LIVE,
    Outcome.ALL_DIRTY: Migratability.STOP_AND_COPY,
    Outcome.BLOCKED: Migratability.NEEDS_UNPLUG,
}
"""What QEMU would do, in the decision's words. A migration that corrupts has none."""
