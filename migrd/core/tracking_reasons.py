"""Why a plan is what it is: codes for machines, sentences for people, cures, and probes.

    Reason   code · device · message · cure · lowers_to · probe

`lowers_to` tells a limit from a note: the best migratability that is left while this reason holds,
None when it only is worth knowing. A reason that rests on an unknown names the probe that would
settle it, and its cure is what stands in that probe's way.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Final


class Migratability(StrEnum):
    """What can be promised of a VM, best first."""

    LIVE = "live"
    """All DMA is watched: precopy, and a short stop."""
    STOP_AND_COPY = "stop_and_copy"
    """It works, but all memory that devices can reach moves while the guest stands still."""
    NEEDS_UNPLUG = "needs_unplug"
    """Only without the devices that the reasons name."""
    BLOCKED = "blocked"
    """Not while this VM runs as it does: the reasons name no device that could be taken away."""

    @property
    def rank(self) -> int:
        """0 is the best."""
        return _RANK[self]

    @property
    def is_possible(self) -> bool:
        """The VM can be migrated as it is, live or not."""
        return self in (Migratability.LIVE, Migratability.STOP_AND_COPY)


_RANK: Final[Mapping[Migratability, int]] = {one: i for i, one in enumerate(Migratability)}


class Probe(StrEnum):
    """The question that settles an unknown."""

    GET_HW_INFO = "get_hw_info"
    DMA_LOGGING_FEATURE = "dma_logging_feature"
    MIGRATION_FEATURE = "migration_feature"
    MIG_DATA_SIZE = "mig_data_size"
    QEMU_BLOCKED_REASONS = "qemu_blocked_reasons"


HOW: Final[Mapping[Probe, str]] = MappingProxyType(
    {
        Probe.GET_HW_INFO: "bind the device to an iommufd and ask IOMMU_GET_HW_INFO",
        Probe.DMA_LOGGING_FEATURE: "probe VFIO_DEVICE_FEATURE_DMA_LOGGING_START of the device",
        Probe.MIGRATION_FEATURE: "get VFIO_DEVICE_FEATURE_MIGRATION of the device",
        Probe.MIG_DATA_SIZE: "get VFIO_DEVICE_FEATURE_MIG_DATA_SIZE of the device",
        Probe.QEMU_BLOCKED_REASONS: "start the VM paused and read blocked-reasons of query-migrate",
    }
)
"""For people: how each probe is done."""


class ReasonCode(StrEnum):
    """Stable words for machines."""

    # about one device
    IOMMU_NO_DIRTY_TRACKING = "iommu_no_dirty_tracking"
    DEVICE_NO_DMA_LOGGING = "device_no_dma_logging"
    DEVICE_NO_MIGRATION = "device_no_migration"
    DEVICE_NO_P2P = "device_no_p2p"
    UNKNOWN_CAPABILITY = "unknown_capability"
    ESTIMATED = "estimated"
    """It rests on registers read in sysfs; the bind checks it."""
    ESTIMATE_WRONG = "estimate_wrong"
    """The kernel's answer contradicts the estimate."""
    UNKNOWN_BITS = "unknown_bits"
    """Capability bits or flags that this version does not know; shown, never an error."""
    DOWNGRADED = "downgraded"
    """The kernel refused tracking when it was tried: the device goes on without."""
    STARTED_WITHOUT = "started_without"
    """QEMU got the device without the property that this needs; it cannot be set while it runs."""
    GUEST_ADDRESS_NOT_FIXED = "guest_address_not_fixed"
    STOP_COPY_SIZE_UNKNOWN = "stop_copy_size_unknown"
    # why a device cannot be given to the VM at all
    DRIVER_NOT_BOUND = "driver_not_bound"
    IN_GROUP_WITH_OTHERS = "in_group_with_others"
    IN_USE = "in_use"
    NO_PERMISSION = "no_permission"
    NO_IOMMU = "no_iommu"
    GIVEN_TWICE = "given_twice"
    # about the VM, its policy, its host
    NOT_REQUESTED = "not_requested"
    """The policy, or the devices beside it, leave the IOMMU's tracking unrequested."""
    WANTED_FEATURE_EXCLUDES_TRACKING = "wanted_feature_excludes_tracking"
    TRACKING_EXCLUDES_WANTED_FEATURE = "tracking_excludes_wanted_feature"
    QEMU_ALWAYS_REQUESTS = "qemu_always_requests"
    VIOMMU_PRESENT = "viommu_present"
    KERNEL_TOO_OLD = "kernel_too_old"
    QEMU_TOO_OLD = "qemu_too_old"
    LEGACY_INTERFACE = "legacy_interface"
    MEMORY_ABOVE_LIMIT = "memory_above_limit"
    IOMMUFD_LIMIT = "iommufd_limit"
    NO_SAFE_PARTITION = "no_safe_partition"
    POLICY_FORBIDDEN = "policy_forbidden"
    POLICY_NOT_MET = "policy_not_met"
    DOWNTIME_BELOW_FLOOR = "downtime_below_floor"
    BLACKOUT_ABOVE_LIMIT = "blackout_above_limit"
    BANDWIDTH_UNKNOWN = "bandwidth_unknown"
    # of two hosts
    SOURCE_NOT_MIGRATABLE = "source_not_migratable"
    LESS_MIGRATABLE_THERE = "less_migratable_there"
    NO_WAY_BACK = "no_way_back"
    DESTINATION_CANNOT_LOAD = "destination_cannot_load"
    DEVICES_DIFFER = "devices_differ"
    GUEST_ADDRESSES_DIFFER = "guest_addresses_differ"


@dataclass(frozen=True)
class Reason:
    """One of them, said of one device or of the whole VM."""

    code: ReasonCode
    device: str | None
    """QEMU's id of the device; None: of the VM or its host."""
    message: str
    """What is so, with the values found."""
    cure: str = ""
    """What would change it; empty when nothing needs to."""
    lowers_to: Migratability | None = None
    """The best that is left while it holds; None: a note."""
    probe: Probe | None = None
    """Only of an unknown (or an estimate): what settles it."""
