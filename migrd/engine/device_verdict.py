"""What the host's hardware means for one question each: can all of it track dirty pages, and what
could a VM be promised that has one device alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final

from migrd.core.devices import Answer, Device, Evidence, Inventory, IommuInstance
from migrd.core.tracking import Plan, Reason, TrackingRequest, VmDevice, decide
from migrd.core.vfio_launch import QemuVfioFeature
from migrd.engine.service import DeviceVerdict

MOST_NAMED: Final = 4
_EVERYTHING: Final = frozenset(QemuVfioFeature)
"""The verdict is about the hardware: a QEMU that lacks something is the VM's matter."""
_ID: Final = "the device"
"""Stands in messages where a VM's device has QEMU's id."""
_BUS: Final = "pcie.0"
_ADDRESS: Final = "05.0"


def judge(device: Device, inventory: Inventory) -> DeviceVerdict:
    """What a VM with this device alone could be promised, by the same function that decides at
    its start."""
    known = inventory.iommus.get(device.iommu or "")
    group = {
        address: inventory.devices[address]
        for address in device.group_devices
        if address in inventory.devices
    }
    plan = decide(
        TrackingRequest(
            devices=(VmDevice(_ID, device, _BUS, _ADDRESS),),
            qemu=_EVERYTHING,
            iommus={} if known is None else {known.name: known},
            kernel=inventory.kernel,
            neighbours=group,
        )
    )
    return DeviceVerdict(
        migratability=plan.migratability,
        migratability_at_best=plan.migratability_at_best,
        can_start=not plan.refused,
        reasons=tuple(_of_device(plan, device.address)),
    )


def _of_device(plan: Plan, address: str) -> Iterator[Reason]:
    """What is said of the device; not the notes about a VM that nobody has described."""
    for reason in dict.fromkeys((*plan.refused, *plan.reasons)):
        if reason.device is not None:
            yield replace(reason, device=address)
        elif reason.lowers_to is not None or reason in plan.refused:
            yield reason


def why_all_track(inventory: Inventory) -> str:
    """The sentence behind `Inventory.all_iommus_track_dirty`: which instances it rests on."""
    iommus = sorted(inventory.iommus.values(), key=lambda iommu: iommu.name)
    if not iommus:
        return (
            "this host shows no IOMMU: it has none, or it is off in the firmware or on the "
            "kernel's command line"
        )
    cannot = [iommu for iommu in iommus if iommu.dirty_tracking.answer is Answer.NO]
    if cannot:
        return f"{_count(cannot, iommus)} cannot: {_named(cannot)}"
    unknown = [iommu for iommu in iommus if iommu.dirty_tracking.answer is Answer.UNKNOWN]
    if unknown:
        return f"not known of {_count(unknown, iommus)}: {_named(unknown)}"
    estimated = [iommu for iommu in iommus if iommu.dirty_tracking.evidence is Evidence.ESTIMATED]
    if estimated:
        return f"estimated from registers of {_count(estimated, iommus)}: {_named(estimated)}"
    return f"the kernel says so of all {len(iommus)}"


def _count(some: Sequence[IommuInstance], every: Sequence[IommuInstance]) -> str:
    return f"{len(some)} of {len(every)}"


def _named(iommus: Sequence[IommuInstance]) -> str:
    named = "; ".join(_reason(iommu) for iommu in iommus[:MOST_NAMED])
    more = len(iommus) - MOST_NAMED
    return f"{named}; and {more} more" if more > 0 else named


def _reason(iommu: IommuInstance) -> str:
    told = iommu.dirty_tracking
    words = [told.reason.value.replace("_", " ") if told.reason else "", told.detail]
    why = ", ".join(word for word in words if word)
    return f"{iommu.name} ({why})" if why else iommu.name
