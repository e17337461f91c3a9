"""What keeps a VM from being live-migratable, device by device, each with its cure.

    a device does not migrate                       -> needs_unplug
    two migrate, one of them without P2P            -> needs_unplug  (QEMU stops them one by one)
    nothing is proven to watch its DMA              -> stop_and_copy, where QEMU may be told to
                                                       migrate it; else needs_unplug
    it logs its own DMA under a vIOMMU              -> needs_unplug

What rests on an unknown carries the probe, and the certain half of it is then only a note: whether
a device without a log is tracked at all depends on its IOMMU alone.

QEMU migrates such a device only with enable-migration=on, and takes no memory for dirty because of
it: the guest is stopped before it is copied (engine.stopped_copy). It is never given where another
device of the same container may have a page table with tracking (H3), nor where a blocker would
turn into a failure to start: missing P2P, a vIOMMU.
"""

from collections.abc import Iterator

from migrd.core.devices import Answer
from migrd.core.tracking_facts import Traits, excluded_by_tracking
from migrd.core.tracking_layout import Layout
from migrd.core.tracking_plan import Tracker
from migrd.core.tracking_reasons import Migratability, Probe, Reason, ReasonCode
from migrd.core.tracking_request import TrackingPolicy
from migrd.core.tracking_words import (
    UNTIL_UNPLUGGED,
    name,
    no_iommu_tracking,
    unknown,
)
from migrd.core.vfio_launch import QemuVfioFeature

YES, NO, UNKNOWN = Answer.YES, Answer.NO, Answer.UNKNOWN
LARGEST_ALL_DIRTY_BYTES = 8 << 40
"""QEMU's bitmap for a device that nothing watches has at most 256 MiB, one bit for 4 KiB."""
_UNPLUG = Migratability.NEEDS_UNPLUG


def limits(layout: Layout) -> Iterator[Reason]:
    """Of all devices, and the notes that belong to them."""
    for one in layout.traits.values():
        yield from _migration(one)
        if not layout.has_p2p and one.migrates is YES and one.p2p is NO:
            yield Reason(
                ReasonCode.DEVICE_NO_P2P,
                one.id,
                f"{name(one)} cannot stop its peer DMA (no P2P state), and the VM has other "
                "devices that migrate: QEMU lets such a device migrate only alone",
                f"{UNTIL_UNPLUGGED}, or use a driver with VFIO_MIGRATION_P2P",
                _UNPLUG,
            )
        if one.viommu_blocks:
            yield _logs_under_viommu(one)
        if layout.tracker(one) is Tracker.NONE:
            yield from _untracked(one, layout)


def _migration(one: Traits) -> Iterator[Reason]:
    told = one.vm_device.device.migration.can
    if one.migrates is NO:
        yield Reason(
            ReasonCode.DEVICE_NO_MIGRATION,
            one.id,
            f"{name(one)} does not support VFIO migration"
            + (f" ({told.detail})" if told.detail else ""),
            f"{UNTIL_UNPLUGGED}, or bind a driver of its vendor that supports migration",
            _UNPLUG,
        )
    elif one.migrates is UNKNOWN:
        yield unknown(one, "whether it can migrate", told, Probe.MIGRATION_FEATURE, _UNPLUG)


def _logs_under_viommu(one: Traits) -> Reason:
    return Reason(
        ReasonCode.VIOMMU_PRESENT,
        one.id,
        f"{name(one)} {'logs' if one.log is YES else 'may log'} its own DMA, which misses what the "
        "guest maps later through its vIOMMU",
        f"start the VM without a vIOMMU, or {UNTIL_UNPLUGGED[0].lower()}{UNTIL_UNPLUGGED[1:]}",
        _UNPLUG,
        Probe.DMA_LOGGING_FEATURE if one.log is UNKNOWN else None,
    )


def _untracked(one: Traits, layout: Layout) -> Iterator[Reason]:
    """Nothing is proven to watch it: why, and why it cannot be copied whole if it cannot."""
    obstacles = list(_against_copying(one, layout))
    tracked_anyway = one.cap is YES and not layout.is_legacy  # QEMU asks whatever it is told
    lowers = Migratability.STOP_AND_COPY if tracked_anyway or not obstacles else _UNPLUG
    log = one.vm_device.device.dma_logging
    open_questions = []
    if layout.is_requested(one) and one.cap is UNKNOWN:
        what = "whether its IOMMU can track dirty pages"
        open_questions.append(unknown(one, what, one.capability, Probe.GET_HW_INFO, lowers))
    if one.log is UNKNOWN and not one.viommu_blocks:
        what = "whether it logs its own DMA"
        open_questions.append(unknown(one, what, log, Probe.DMA_LOGGING_FEATURE, lowers))
    yield from open_questions
    proven = None if open_questions else lowers
    if not (layout.is_requested(one) and one.cap is UNKNOWN):
        yield _why_not_iommu(one, layout, proven)
    if one.log is NO and not one.log_is_off:
        yield Reason(
            ReasonCode.DEVICE_NO_DMA_LOGGING,
            one.id,
            f"{name(one)} does not log its own DMA" + (f" ({log.detail})" if log.detail else ""),
            "use a device whose driver supports VFIO DMA logging",
            proven,
        )
    if not tracked_anyway:
        yield from obstacles


def _why_not_iommu(one: Traits, layout: Layout, lowers: Migratability | None) -> Reason:
    request = layout.request
    if one.id in request.downgraded:
        return Reason(
            ReasonCode.DOWNGRADED,
            one.id,
            f"{name(one)}: the kernel refused dirty tracking when it was tried",
            "see the errno in the VM's timeline; " + UNTIL_UNPLUGGED,
            lowers,
        )
    excluded = excluded_by_tracking(one, request.wants)
    if one.cap is not NO and excluded and not layout.is_requested(one):
        words = " and ".join(sorted(flag.value for flag in excluded))
        return Reason(
            ReasonCode.WANTED_FEATURE_EXCLUDES_TRACKING,
            one.id,
            f"{one.instance} cannot give {words} together with dirty tracking, and the VM wants it",
            f"give up {words}, or choose policy always: it puts tracking first",
            lowers,
        )
    if one.cap is not NO:
        is_never = request.policy is TrackingPolicy.NEVER
        why = "policy never" if is_never else "not all devices of the VM can be tracked"
        return Reason(
            ReasonCode.NOT_REQUESTED,
            one.id,
            f"{name(one)}: dirty tracking of its IOMMU is not requested ({why})",
            "choose policy auto or always" if is_never else "take away what cannot be tracked",
            lowers,
        )
    return no_iommu_tracking(one, lowers, is_legacy=layout.is_legacy)


def _against_copying(one: Traits, layout: Layout) -> Iterator[Reason]:
    """Why QEMU cannot be told to migrate this device though nothing watches it; notes."""
    request, standing = layout.request, layout.request.standing_devices.get(one.id)
    cannot = "so QEMU cannot be told to migrate it unwatched"
    if request.has_viommu:
        why = f"the VM has a vIOMMU, {cannot}"
        yield Reason(ReasonCode.VIOMMU_PRESENT, one.id, why, "start the VM without a vIOMMU")
    memory = request.memory_bytes
    if memory is not None and memory > LARGEST_ALL_DIRTY_BYTES:
        why = f"the VM has more than 8 TiB of memory ({memory >> 40} TiB), {cannot}"
        yield Reason(ReasonCode.MEMORY_ABOVE_LIMIT, one.id, why, UNTIL_UNPLUGGED)
    if one.id not in layout.partition.may_copy_all and layout.partition.is_safe:
        why = f"{name(one)} shares an iommufd object with devices that IOMMUs track, {cannot}"
        cure = "let the VM have an iommufd object more, and plug it again with all of its group"
        yield Reason(ReasonCode.IOMMUFD_LIMIT, one.id, why, cure)
    if one.vm_device.attached and not (standing is not None and standing.may_copy_all):
        why = f"{name(one)} was given to QEMU without enable-migration=on, {cannot}"
        yield Reason(ReasonCode.STARTED_WITHOUT, one.id, why, "unplug it and plug it again")
    if not layout.has_p2p:
        why = f"devices without P2P would keep QEMU from starting, {cannot}"
        yield Reason(ReasonCode.DEVICE_NO_P2P, one.id, why, UNTIL_UNPLUGGED)


def copies_all(layout: Layout) -> frozenset[str]:
    """Devices that QEMU is to be given with enable-migration=on."""
    if QemuVfioFeature.ENABLE_MIGRATION not in layout.request.qemu:
        return frozenset()
    moving = [one for one in layout.traits.values() if one.migrates is not NO]
    if len(moving) > 1 and any(one.p2p is not YES for one in moving):
        return frozenset()
    return frozenset(
        one.id
        for one in moving
        if one.migrates is YES
        and one.may_be_untracked
        and not one.vm_device.attached
        and not any(_against_copying(one, layout))
    )
