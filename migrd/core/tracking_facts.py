"""What each device can, cannot, and may or may not be able to do, for the decision.

    VmDevice ──traits_of──► Traits   cap     its IOMMU can track its DMA
                                     log     it records its own DMA, in a way that can be used here
                                     migrates, p2p

Each is yes, no or unknown (`Answer`); the plan must be safe whatever an unknown turns out to be.

Rules
1. `cap` belongs to the IOMMU instance: an unknown of a device is looked up there, and two unknowns
   of one instance turn out alike.
2. Devices of one IOMMU group share one page table: what one of them cannot, none of them can.
3. An emulated mdev has no IOMMU: QEMU attaches it to the IOAS itself. An mdev that does sit behind
   an IOMMU is known by its instance, or by a kernel that answers yes for it.
4. On the legacy group interface nothing is tracked by an IOMMU (type1 calls every pinned page
   dirty).
5. Under a vIOMMU device logging is never used: the ranges to log are fixed when it starts, and what
   the guest maps later would not be seen. Where the IOMMU can, QEMU is told to leave the
   device's log alone.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from migrd.core.devices import (
    Answer,
    Capability,
    Device,
    DeviceKind,
    IommuInstance,
    IommuKind,
    MigrationFlag,
    Unknown,
)
from migrd.core.tracking_request import DomainFlag, TrackingRequest, VmDevice
from migrd.core.vfio_launch import QemuVfioFeature

YES, NO, UNKNOWN = Answer.YES, Answer.NO, Answer.UNKNOWN


@dataclass(frozen=True)
class Traits:
    """One device as the decision sees it."""

    vm_device: VmDevice
    iommu: IommuInstance | None
    """None: emulated mdev, or an instance that nobody knows."""
    is_behind_iommu: bool
    capability: Capability
    """What `cap` rests on."""
    cap: Answer
    log: Answer
    log_is_off: bool
    """QEMU is told to leave its log alone."""
    viommu_blocks: bool
    """It logs, or may log, its own DMA under a vIOMMU, and that cannot be switched off."""
    migrates: Answer
    p2p: Answer

    @property
    def id(self) -> str:
        return self.vm_device.id

    @property
    def is_untracked(self) -> bool:
        """Proven: nothing can watch its DMA."""
        return self.cap is NO and self.log is NO

    @property
    def may_be_untracked(self) -> bool:
        return self.cap is not YES and self.log is not YES

    @property
    def instance(self) -> str:
        """Whose fact `cap` is."""
        return self.vm_device.device.iommu or f"of {self.vm_device.device.address}"


def uses_legacy_interface(request: TrackingRequest) -> bool:
    """QEMU or the kernel has no iommufd, or a device has no character device to go with it. A VM
    that runs stays with what it runs on."""
    devices = [one for one in request.devices if one.device.is_passthrough]
    if any(one.attached for one in devices):
        return not request.standing
    kernel = request.kernel
    lacks = kernel is not None and (_is_absent(kernel.iommufd) or _is_absent(kernel.vfio_cdev))
    return (
        lacks
        or QemuVfioFeature.IOMMUFD not in request.qemu
        or any(has_no_cdev(one.device) for one in devices)
    )


def has_no_cdev(device: Device) -> bool:
    """A VFIO driver has it, and the kernel made no character device for it."""
    return device.vfio_cdev is None and not is_unbound(device)


def is_unbound(device: Device) -> bool:
    """No VFIO driver has it. (An mdev's own driver is one, whatever its name.)"""
    if device.vfio_cdev is not None:
        return False
    if device.kind is DeviceKind.VFIO_MDEV:
        return device.driver is None
    return "vfio" not in (device.driver or "")


def _is_absent(capability: Capability) -> bool:
    return capability.is_no or capability.reason is Unknown.KERNEL_TOO_OLD


def traits_of(request: TrackingRequest, *, legacy: bool) -> dict[str, Traits]:
    """All passthrough devices by QEMU id, sorted by it."""
    found = [
        _traits(one, request, legacy=legacy)
        for one in sorted(request.devices, key=lambda one: one.id)
        if one.device.is_passthrough
    ]
    shared = _shared_answers(found)
    return {one.id: _under_viommu(_in_group(one, shared), request) for one in found}


def _traits(one: VmDevice, request: TrackingRequest, *, legacy: bool) -> Traits:
    device = one.device
    iommu = request.iommus.get(device.iommu) if device.iommu is not None else None
    own = device.iommu_dirty_tracking
    capability = own
    if own.answer is UNKNOWN and iommu is not None and iommu.dirty_tracking.answer is not UNKNOWN:
        capability = iommu.dirty_tracking
    behind = device.kind is DeviceKind.VFIO_PCI or device.iommu is not None or own.is_yes
    excluded = legacy or one.id in request.downgraded or _is_elsewhere(one, request)
    can_track = behind and not excluded
    flags = device.migration.flags
    migrates = device.migration.can.answer
    return Traits(
        vm_device=one,
        iommu=iommu,
        is_behind_iommu=behind,
        capability=capability,
        cap=capability.answer if can_track else NO,
        log=device.dma_logging.answer,
        log_is_off=False,
        viommu_blocks=False,
        migrates=migrates,
        p2p=migrates if migrates is not YES else (YES if MigrationFlag.P2P in flags else NO),
    )


def _is_elsewhere(one: VmDevice, request: TrackingRequest) -> bool:
    """The running VM has it in none of its iommufd objects: so on the legacy interface."""
    return one.attached and not any(one.id in part.devices for part in request.standing)


def group_of(one: Traits) -> int | None:
    """Devices of one IOMMU group: None is nobody's."""
    return one.vm_device.device.iommu_group if one.is_behind_iommu else None


def _in_group(one: Traits, shared: Mapping[int | None, Answer]) -> Traits:
    cap = shared.get(group_of(one), one.cap)
    return one if cap is one.cap else replace(one, cap=cap)


def _shared_answers(traits: Iterable[Traits]) -> Mapping[int | None, Answer]:
    """By group: what its one page table can."""
    shared: dict[int | None, Answer] = {}
    for one in traits:
        group = group_of(one)
        if group is not None:
            shared[group] = worse(shared.get(group, YES), one.cap)
    return shared


def worse(one: Answer, other: Answer) -> Answer:
    """Both must hold."""
    for answer in (NO, UNKNOWN):
        if answer in (one, other):
            return answer
    return YES


def _under_viommu(one: Traits, request: TrackingRequest) -> Traits:
    standing = request.standing_devices.get(one.id)
    if standing is not None and standing.log_is_off:
        return replace(one, log=NO, log_is_off=True)
    if not request.has_viommu or one.log is NO:
        return one
    can_switch_off = standing is None and QemuVfioFeature.DEVICE_DIRTY_TRACKING in request.qemu
    if one.cap is YES and can_switch_off:
        return replace(one, log=NO, log_is_off=True)
    return replace(one, viommu_blocks=True)


def excluded_by_tracking(one: Traits, wants: frozenset[DomainFlag]) -> frozenset[DomainFlag]:
    """Of what the VM wants of its page tables, what this IOMMU cannot give together with dirty
    tracking: EOPNOTSUPP at IOMMU_HWPT_ALLOC (amd/iommu.c, arm-smmu-v3.c)."""
    kind = one.iommu.kind if one.iommu is not None and one.is_behind_iommu else IommuKind.OTHER
    match kind:
        case IommuKind.AMD_VI:
            return wants & {DomainFlag.PASID}
        case IommuKind.ARM_SMMU_V3:
            return wants & {DomainFlag.NEST_PARENT}
        case _:
            return frozenset()
