"""The answer of the decision, as values (see `core.tracking` for how it comes about).

Plan
├── migratability, migratability_at_best, reasons     the verdict, explained
├── domains, trackers, ladders                        for a VMM whose page tables migrd makes
├── iommufds, attach_order, launch                    for QEMU, which makes its own
├── downtime_floor_s, expected_blackout_s, costs      what it costs
└── refused                                           why the VM must not start like this
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from migrd.core.attach_ladder import Ladder
from migrd.core.tracking_reasons import Migratability, Reason
from migrd.core.tracking_request import (
    DomainFlag,
    StandingDevice,
    StandingObject,
    TrackingPolicy,
)
from migrd.core.vfio_launch import VfioLaunch


class Tracker(StrEnum):
    """Who watches a device's DMA."""

    IOMMU = "iommu"
    DEVICE = "device"
    BOTH = "both"
    NONE = "none"
    """Nobody, or nobody who is proven to: what it can reach must be taken as always dirty."""


@dataclass(frozen=True)
class Domain:
    """Devices that share one page table."""

    iommu: str | None
    """The IOMMU instance; None: none (`is_ioas`), or sysfs does not say which."""
    iommufd: str | None
    """Id of the iommufd object whose IOAS it maps; None: the legacy interface."""
    devices: tuple[str, ...]
    """QEMU ids, in attach order."""
    flags: frozenset[DomainFlag]
    """What to allocate it with."""
    is_ioas: bool = False
    """There is no page table to make: its devices (emulated mdevs) are attached to the IOAS."""

    @property
    def dirty_tracking(self) -> bool:
        """Tracking is requested."""
        return DomainFlag.DIRTY_TRACKING in self.flags


class CostCode(StrEnum):
    """What dirty tracking takes away."""

    AMD_V1_PAGE_TABLE = "amd_v1_page_table"
    AMD_NO_PASID = "amd_no_pasid"
    SMMU_V3_NO_NESTING = "smmu_v3_no_nesting"


@dataclass(frozen=True)
class Cost:
    """One price of tracking on one IOMMU instance."""

    code: CostCode
    iommu: str
    message: str
    is_paid: bool
    """This plan requests tracking there; else what it would cost."""
    is_wanted: bool
    """The VM asked for what is lost."""


@dataclass(frozen=True)
class Plan:
    """The decision for one VM."""

    policy: TrackingPolicy
    migratability: Migratability
    """What is proven: it holds whatever the unknowns turn out to be."""
    migratability_at_best: Migratability
    """If every unknown turns out well; better than `migratability` only with probes to do."""
    reasons: tuple[Reason, ...]
    """Limits first, worst first; then notes."""
    domains: tuple[Domain, ...] = ()
    trackers: Mapping[str, Tracker] = field(default_factory=dict)
    """By QEMU id, in attach order."""
    ladders: Mapping[str, Ladder] = field(default_factory=dict)
    """By QEMU id: what to do for each errno while its domain is allocated and attached."""
    iommufds: tuple[StandingObject, ...] = ()
    """The partition. An object of the running QEMU that is not among them has lost its last device:
    delete it before its id is used again."""
    attach_order: tuple[str, ...] = ()
    launch: VfioLaunch | None = None
    """None when the start is refused."""
    launched: Mapping[str, StandingDevice] = field(default_factory=dict)
    """By QEMU id: what QEMU is told and cannot be told again (part of the standing decision)."""
    downtime_floor_s: float = 0.0
    """No switchover of this VM is shorter; what is unknown counts as nothing."""
    expected_blackout_s: float | None = None
    """Of stop_and_copy; None otherwise, or when memory or bandwidth is not known."""
    costs: tuple[Cost, ...] = ()
    refused: tuple[Reason, ...] = ()
    """Why the VM must not be started (or changed) like this; all at once, empty when it may."""

    @property
    def requests_tracking(self) -> bool:
        """On at least one domain."""
        return any(domain.dirty_tracking for domain in self.domains)

    @property
    def limits(self) -> tuple[Reason, ...]:
        """The reasons that keep it from being live."""
        return tuple(reason for reason in self.reasons if reason.lowers_to is not None)

    @property
    def probes(self) -> tuple[Reason, ...]:
        """The reasons that a probe would settle."""
        return tuple(reason for reason in self.reasons if reason.probe is not None)
