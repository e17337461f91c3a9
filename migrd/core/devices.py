"""What is known of a host's IOMMU instances and passthrough devices, as values.

    IommuInstance   one hardware unit; its features belong to it, not to the devices below it
        ▲ iommu (name)
    Device          one PCI function or mdev: driver, group, what it can do about its own DMA

A fact is a `Capability`: yes, no or unknown, with how it is known. `estimated` facts are read from
registers before a device is bound, and the bind checks them; `probed` ones are the kernel's own
answer. Unknown carries the reason (`Unknown`) and is never taken for no, nor for yes. Bits that
nobody here has met are kept as numbers and shown, never an error.

Nothing here decides anything: `core.tracking` does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum


class Answer(StrEnum):
    """Can it?"""

    YES = "yes"
    NO = "no"
    UNKNOWN = "unknown"


class Evidence(StrEnum):
    """How an answer is known."""

    NONE = "none"
    ESTIMATED = "estimated"
    """From the instance's registers in sysfs, before any device was bound."""
    PROBED = "probed"
    """The kernel's own answer to an ioctl."""


class Unknown(StrEnum):
    """Why an answer is unknown, and so which probe would settle it."""

    DRIVER_NOT_BOUND = "driver_not_bound"
    """No VFIO driver is bound: nothing can be asked of the device."""
    NOT_PROBED = "not_probed"
    """Nobody has asked yet; binding the device to an iommufd will tell."""
    NO_PERMISSION = "no_permission"
    KERNEL_TOO_OLD = "kernel_too_old"
    IN_USE = "in_use"
    """Opened by somebody else (the kernel lets one process bind a device)."""
    NOT_READABLE = "not_readable"
    """A file is missing, empty or not what it should be; `detail` names it."""
    NO_REGISTERS = "no_registers"
    """This kind of IOMMU shows no registers in sysfs."""
    NO_IOMMU = "no_iommu"
    """The device is behind no IOMMU instance that sysfs knows."""
    PROBE_FAILED = "probe_failed"
    """The kernel answered with an error that says neither yes nor no; `detail` has it."""


@dataclass(frozen=True)
class Capability:
    """One answer, with its evidence."""

    answer: Answer
    evidence: Evidence = Evidence.NONE
    reason: Unknown | None = None
    """Only of an unknown answer, and always of one."""
    detail: str = ""
    """For people: the register, file or errno it rests on."""

    @classmethod
    def unknown(cls, reason: Unknown, detail: str = "") -> "Capability":
        return cls(Answer.UNKNOWN, Evidence.NONE, reason, detail)

    @classmethod
    def estimated(cls, can: bool, detail: str) -> "Capability":
        return cls(Answer.YES if can else Answer.NO, Evidence.ESTIMATED, None, detail)

    @classmethod
    def probed(cls, can: bool, detail: str = "") -> "Capability":
        return cls(Answer.YES if can else Answer.NO, Evidence.PROBED, None, detail)

    @property
    def is_yes(self) -> bool:
        return self.answer is Answer.YES

    @property
    def is_no(self) -> bool:
        return self.answer is Answer.NO


class IommuKind(StrEnum):
    """Whose IOMMU it is: what else dirty tracking costs depends on it."""

    INTEL_VTD = "intel_vtd"
    AMD_VI = "amd_vi"
    ARM_SMMU_V3 = "arm_smmu_v3"
    VIRTIO = "virtio"
    OTHER = "other"
    """Something that this version has not met; `IommuInstance.hardware_type` has its number."""


@dataclass(frozen=True)
class IommuInstance:
    """One hardware unit, as /sys/class/iommu names it."""

    name: str
    kind: IommuKind
    dirty_tracking: Capability
    registers: Mapping[str, int] = field(default_factory=dict)
    """As sysfs shows them: `cap`, `ecap` (VT-d), `features` (AMD)."""
    hardware_type: int | None = None
    """`out_data_type` of IOMMU_GET_HW_INFO; None before a device behind it was bound."""
    capability_bits: int | None = None
    """`out_capabilities` of IOMMU_GET_HW_INFO, all 64 of them; None before."""
    unknown_capability_bits: int = 0
    """Those of them that this version does not know (SVA, IOPF … of a newer kernel)."""
    devices: tuple[str, ...] = ()
    """Addresses of the PCI functions below it."""


class DeviceKind(StrEnum):
    """How a device is passed through."""

    VFIO_PCI = "vfio_pci"
    """A PCI function behind its IOMMU."""
    VFIO_MDEV = "vfio_mdev"
    """A mediated device whose driver pins pages itself: no IOMMU sees its DMA."""
    EMULATED = "emulated"
    """QEMU's own: writes as the CPU does, nothing to track."""


class MigrationFlag(StrEnum):
    """VFIO_MIGRATION_* of vfio.h."""

    STOP_COPY = "stop_copy"
    P2P = "p2p"
    PRE_COPY = "pre_copy"


@dataclass(frozen=True)
class DeviceMigration:
    """What VFIO_DEVICE_FEATURE_MIGRATION says."""

    can: Capability
    flags: frozenset[MigrationFlag] = frozenset()
    unknown_flags: int = 0
    stop_copy_bytes: int | None = None
    """VFIO_DEVICE_FEATURE_MIG_DATA_SIZE; None: not supported or not asked."""


@dataclass(frozen=True)
class IommuHardware:
    """What IOMMU_GET_HW_INFO says of the IOMMU behind a bound device."""

    hardware_type: int
    """`out_data_type`."""
    capability_bits: int
    """`out_capabilities`, all 64 of them."""
    unknown_capability_bits: int = 0


_NOT_ASKED = Capability.unknown(Unknown.NOT_PROBED)


@dataclass(frozen=True)
class Device:
    """One passthrough device. Optional facts are None when they could not be read."""

    address: str
    """`0000:41:00.2` of a PCI function, the UUID of an mdev."""
    kind: DeviceKind
    iommu: str | None = None
    """Name of its IommuInstance."""
    iommu_dirty_tracking: Capability = _NOT_ASKED
    """Of its IOMMU, as found for this device at bind, else its instance's estimate."""
    iommu_hardware: IommuHardware | None = None
    """Of its IOMMU, as found at bind; None before."""
    dma_logging: Capability = _NOT_ASKED
    """VFIO_DEVICE_FEATURE_DMA_LOGGING_*: the device records its own DMA."""
    migration: DeviceMigration = field(default_factory=lambda: DeviceMigration(_NOT_ASKED))
    driver: str | None = None
    driver_override: str | None = None
    """Of a function without a driver: the only one that would be bound to it."""
    vendor_id: int | None = None
    device_id: int | None = None
    class_code: int | None = None
    iommu_group: int | None = None
    group_devices: tuple[str, ...] = ()
    """The other members of its group: isolated from the rest only together."""
    physical_function: str | None = None
    """Of a VF: the PF it belongs to."""
    virtual_functions: tuple[str, ...] = ()
    mdev_parent: str | None = None
    mdev_type: str | None = None
    vfio_cdev: str | None = None
    """`/dev/vfio/devices/vfioN`; None unless a VFIO driver with cdev is bound."""
    numa_node: int | None = None
    can_reset: Capability = _NOT_ASKED
    cache_coherent: Capability = _NOT_ASKED
    trouble: tuple[str, ...] = ()
    """What could not be read of it, for people."""

    @property
    def is_passthrough(self) -> bool:
        return self.kind is not DeviceKind.EMULATED


@dataclass(frozen=True)
class KernelFacts:
    """What this kernel offers for passthrough."""

    release: str
    iommufd: Capability
    """/dev/iommu is there and may be opened."""
    vfio_cdev: Capability
    unsafe_interrupts: bool | None = None
    """Interrupts are not remapped and an administrator has allowed that."""


@dataclass(frozen=True)
class Inventory:
    """All of it at one moment; replaced as a whole, never changed."""

    kernel: KernelFacts
    iommus: Mapping[str, IommuInstance]
    devices: Mapping[str, Device]
    """By address: every PCI function and mdev that is, or could be, passed through."""
    generation: int = 0
    """Grows with every change that is seen."""
    trouble: Sequence[str] = ()

    @property
    def all_iommus_track_dirty(self) -> bool | None:
        """The one boolean: True, False (one proven not to), None (not known, or no IOMMU)."""
        answers = [iommu.dirty_tracking.answer for iommu in self.iommus.values()]
        if Answer.NO in answers:
            return False
        if not answers or Answer.UNKNOWN in answers:
            return None
        return True
