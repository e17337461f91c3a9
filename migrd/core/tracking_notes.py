"""Reasons about the whole VM, and what is worth knowing though it limits nothing."""

from collections.abc import Iterator

from migrd.core.devices import Answer, Evidence
from migrd.core.tracking_facts import Traits, excluded_by_tracking
from migrd.core.tracking_layout import Layout
from migrd.core.tracking_reasons import HOW, Migratability, Probe, Reason, ReasonCode
from migrd.core.tracking_request import DomainFlag
from migrd.core.tracking_words import name
from migrd.core.vfio_launch import QemuVfioFeature

YES, NO, UNKNOWN = Answer.YES, Answer.NO, Answer.UNKNOWN
_BLOCKED = Migratability.BLOCKED


def of_vm(layout: Layout) -> Iterator[Reason]:
    """Limits that name no device."""
    request = layout.request
    if not layout.traits:
        return
    if QemuVfioFeature.ENABLE_MIGRATION not in request.qemu:
        yield Reason(
            ReasonCode.QEMU_TOO_OLD,
            None,
            "this QEMU's vfio-pci has no enable-migration: it does not migrate VFIO devices",
            "use QEMU 8.1 or newer",
            _BLOCKED,
        )
    if request.has_viommu:
        yield Reason(
            ReasonCode.VIOMMU_PRESENT,
            None,
            "the VM has a vIOMMU, with which most QEMU do not migrate VFIO devices",
            f"{HOW[Probe.QEMU_BLOCKED_REASONS]}; or start the VM without a vIOMMU",
            _BLOCKED,
            Probe.QEMU_BLOCKED_REASONS,
        )
    if not layout.partition.is_safe:
        yield no_safe_partition(layout)


def no_safe_partition(layout: Layout) -> Reason:
    """H2: nothing would block, and pages would be lost."""
    most = layout.request.max_iommufds
    logs = [one.id for one in layout.traits.values() if one.cap is not YES and one.log is not NO]
    only = f"in {most} iommufd object{'s' if most != 1 else ''} " if most is not None else ""
    return Reason(
        ReasonCode.NO_SAFE_PARTITION,
        None,
        f"{only}QEMU would watch the VM's devices in one way only, and lose the DMA of those that "
        f"log their own ({', '.join(logs[:4])}): memory would be corrupted without an error",
        "let the VM have one iommufd object for each way of tracking, or take one kind away",
        _BLOCKED,
    )


def notes(layout: Layout) -> Iterator[Reason]:
    """What limits nothing."""
    for one in layout.traits.values():
        yield from _of_evidence(one)
        if layout.is_requested(one):
            yield from _gone_without(one, excluded_by_tracking(one, layout.request.wants))
    yield from _of_interface(layout)
    free = [one for one in layout.traits.values() if one.vm_device.guest_address is None]
    if free and len(layout.traits) > 1:
        yield Reason(
            ReasonCode.GUEST_ADDRESS_NOT_FIXED,
            None,
            f"{len(free)} devices have no guest address of their own: they get slots in attach "
            "order, which may be another one on a host with other IOMMUs",
            "give each device a guest address",
        )


def _gone_without(one: Traits, lost: frozenset[DomainFlag]) -> Iterator[Reason]:
    if lost:
        words = " and ".join(sorted(flag.value for flag in lost))
        yield Reason(
            ReasonCode.TRACKING_EXCLUDES_WANTED_FEATURE,
            one.id,
            f"{name(one)}: dirty tracking is requested on {one.instance}, so the VM goes "
            f"without {words}",
            f"choose policy auto: it keeps {words} and goes without tracking",
        )


def _of_interface(layout: Layout) -> Iterator[Reason]:
    """Where QEMU does otherwise than the policy says, or cannot do what it says."""
    unasked = {
        one.instance
        for one in layout.traits.values()
        if one.cap is not NO and one.is_behind_iommu and not layout.is_requested(one)
    }
    if unasked and not layout.is_legacy:
        yield Reason(
            ReasonCode.QEMU_ALWAYS_REQUESTS,
            None,
            "QEMU requests dirty tracking wherever the IOMMU can, so its page tables have it "
            f"(and its price) behind {', '.join(sorted(unasked)[:4])}",
            "none in QEMU, but for the VFIO group interface",
        )
    if layout.is_legacy and layout.traits:
        yield Reason(
            ReasonCode.LEGACY_INTERFACE,
            None,
            "the devices are given by the VFIO group interface: QEMU, the kernel or a driver has "
            "no iommufd, and QEMU must be able to open the devices itself",
            "use a QEMU and a kernel with iommufd and VFIO character devices",
        )


def _of_evidence(one: Traits) -> Iterator[Reason]:
    device, iommu = one.vm_device.device, one.iommu
    told = one.capability
    if one.is_behind_iommu and told.evidence is Evidence.ESTIMATED:
        can = "can" if told.is_yes else "cannot"
        yield Reason(
            ReasonCode.ESTIMATED,
            one.id,
            f"{name(one)}: that {one.instance} {can} track dirty pages is estimated"
            + (f" ({told.detail})" if told.detail else ""),
            HOW[Probe.GET_HW_INFO],
            probe=Probe.GET_HW_INFO,
        )
    estimate = iommu.dirty_tracking if iommu is not None else None
    if (
        estimate is not None
        and estimate.evidence is Evidence.ESTIMATED
        and told.evidence is Evidence.PROBED
        and told.answer is not estimate.answer
    ):
        yield Reason(
            ReasonCode.ESTIMATE_WRONG,
            one.id,
            f"{name(one)}: the estimate for {one.instance} was {estimate.answer.value} "
            f"({estimate.detail}), the kernel says {told.answer.value}",
            "none is needed: the kernel's answer counts; please report it",
        )
    bits = iommu.unknown_capability_bits if iommu is not None else 0
    if bits or device.migration.unknown_flags:
        yield Reason(
            ReasonCode.UNKNOWN_BITS,
            one.id,
            f"{name(one)}: this version does not know the capability bits {bits:#x} of its IOMMU "
            f"and the migration flags {device.migration.unknown_flags:#x}",
            "none is needed: they are passed over",
        )
