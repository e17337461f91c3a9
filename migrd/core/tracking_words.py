"""Sentences that several reasons share."""

from migrd.core.devices import Capability, Unknown
from migrd.core.tracking_facts import Traits
from migrd.core.tracking_reasons import HOW, Migratability, Probe, Reason, ReasonCode

UNTIL_UNPLUGGED = "Unplug the device before a migration"

_IN_THE_WAY = {
    Unknown.DRIVER_NOT_BOUND: "bind it to its VFIO driver first",
    Unknown.NO_PERMISSION: "let migrd open it first (group and mode of the device node)",
    Unknown.KERNEL_TOO_OLD: "this kernel cannot be asked: use a newer one",
    Unknown.IN_USE: "whoever has it open must let it go first",
    Unknown.NOT_READABLE: "mend what cannot be read first",
    Unknown.NO_IOMMU: "switch the IOMMU on (firmware and kernel command line) first",
    Unknown.PROBE_FAILED: "see the kernel's log for why it failed",
}


def name(one: Traits) -> str:
    """The device, as people find it."""
    device = one.vm_device.device
    driver = f", {device.driver}" if device.driver else ""
    return f"{one.id} ({device.address}{driver})"


def unknown(
    one: Traits, what: str, told: Capability, probe: Probe, lowers: Migratability | None
) -> Reason:
    """Neither no nor yes."""
    words = [told.reason.value.replace("_", " ") if told.reason is not None else "", told.detail]
    why = ", ".join(word for word in words if word)
    is_old = told.reason is Unknown.KERNEL_TOO_OLD
    return Reason(
        ReasonCode.KERNEL_TOO_OLD if is_old else ReasonCode.UNKNOWN_CAPABILITY,
        one.id,
        f"{name(one)}: it is not known {what}" + (f" ({why})" if why else ""),
        cure_of_unknown(told, probe),
        lowers,
        probe,
    )


def cure_of_unknown(told: Capability, probe: Probe) -> str:
    """What stands in the probe's way, and the probe."""
    obstacle = _IN_THE_WAY.get(told.reason) if told.reason is not None else None
    return f"{HOW[probe]}; {obstacle}" if obstacle else HOW[probe]


def no_iommu_tracking(one: Traits, lowers: Migratability | None, *, is_legacy: bool) -> Reason:
    """Why its IOMMU is no tracker."""
    if not one.is_behind_iommu:
        why = "its driver pins the pages: no IOMMU sees its DMA"
        cure = "use a device whose driver supports VFIO DMA logging"
    elif is_legacy:
        why = "the VFIO group interface cannot request dirty tracking of an IOMMU"
        cure = "use a QEMU and a kernel with iommufd"
    else:
        detail = f" ({one.capability.detail})" if one.capability.detail else ""
        why = f"its IOMMU, {one.instance}, cannot track dirty pages{detail}"
        cure = "use a device behind an IOMMU that can, or one that logs its own DMA"
    return Reason(ReasonCode.IOMMU_NO_DIRTY_TRACKING, one.id, f"{name(one)}: {why}", cure, lowers)
