"""What the decision is made from: the VM's devices with their facts, its policy, its QEMU.

The order of `devices` means nothing: the plan sorts them by their facts, then by QEMU id. All
quantities are optional where a host may not know them; the plan says what it could not compute.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from migrd.core.devices import Device, IommuInstance, KernelFacts
from migrd.core.vfio_launch import QemuVfioFeature


class TrackingPolicy(StrEnum):
    """When to request dirty-tracking domains for a VM."""

    AUTO = "auto"
    """When every passthrough device can be tracked by its IOMMU or tracks itself; else nowhere."""
    ALWAYS = "always"
    """On every domain whose IOMMU can; the others go without and the VM is marked."""
    NEVER = "never"
    """Nowhere. Devices that log their own DMA still do: it costs nothing until a migration."""
    REQUIRE = "require"
    """As auto, but a VM that would not be live-migratable is refused, with all reasons at once."""


class DomainFlag(StrEnum):
    """What a page table is allocated with (IOMMU_HWPT_ALLOC_*)."""

    DIRTY_TRACKING = "dirty_tracking"
    NEST_PARENT = "nest_parent"
    """The guest's own IOMMU page tables are put below it."""
    PASID = "pasid"


@dataclass(frozen=True)
class VmDevice:
    """One device of the VM."""

    id: str
    """QEMU's id of it: the same on both hosts of a migration."""
    device: Device
    guest_bus: str | None = None
    guest_address: str | None = None
    """Where the guest sees it (`05.0`). None: QEMU takes the next free slot in attach order, which
    may be another one on another host."""
    attached: bool = False
    """The running VM has it already: whether it can be opened is not asked again."""


@dataclass(frozen=True)
class StandingObject:
    """An iommufd object of the running QEMU, as the standing plan made it (`Plan.iommufds`)."""

    id: str
    devices: tuple[str, ...]
    """QEMU ids, in the order they were attached."""
    saw_iommu_tracking: bool = False
    """A device tracked by its IOMMU was attached at some time: QEMU then takes the whole container
    for tracked until its last device has gone (H4)."""
    unsettled: frozenset[str] = frozenset()
    """IOMMU instances of devices attached at some time of which it was not known."""


@dataclass(frozen=True)
class StandingDevice:
    """What QEMU was told of a device that it has; it cannot be changed while the VM runs."""

    id: str
    may_copy_all: bool = False
    """It came with enable-migration=on: QEMU lets it migrate though nothing tracks it."""
    log_is_off: bool = False
    """Its own DMA logging is left alone."""


@dataclass(frozen=True)
class TrackingRequest:
    """One question to `core.tracking.decide`."""

    devices: tuple[VmDevice, ...]
    """All devices of the VM; those that QEMU emulates are passed over."""
    qemu: frozenset[QemuVfioFeature]
    """What the QEMU that runs, or will run, the VM offers."""
    policy: TrackingPolicy = TrackingPolicy.AUTO
    forbidden: frozenset[TrackingPolicy] = frozenset()
    """Policies that this host does not allow."""
    iommus: Mapping[str, IommuInstance] = field(default_factory=dict)
    """By name; at least those of the devices. A missing one is of kind OTHER."""
    kernel: KernelFacts | None = None
    """None: not looked at."""
    neighbours: Mapping[str, Device] = field(default_factory=dict)
    """By address: what is known of devices that share a group with the VM's."""
    downtime_limit_s: float | None = None
    """The limit that was asked for; None: none was."""
    memory_bytes: int | None = None
    """Memory that devices can reach: all of the guest's, without a vIOMMU."""
    switchover_bytes_per_s: float | None = None
    load_bytes_per_s: float | None = None
    """How fast the destination's devices take their state in; None: as fast as it arrives."""
    has_viommu: bool = False
    wants: frozenset[DomainFlag] = frozenset()
    """NEST_PARENT, PASID: what else the VM's page tables are to offer."""
    max_iommufds: int | None = None
    """What launches the VM gives QEMU only so many iommufd objects (libvirt: one)."""
    downgraded: frozenset[str] = frozenset()
    """Devices whose ladder ended without tracking (`attach_ladder`)."""
    standing: tuple[StandingObject, ...] = ()
    """Of a running VM: devices stay where they are. Filled by `hot_plug` from the standing plan.
    Attached devices without any (an adopted VM) are taken to be on the legacy interface: what is
    not known of their containers must not be promised."""
    standing_devices: Mapping[str, StandingDevice] = field(default_factory=dict)
