"""The wire models, in one place for those who use the API from Python.

wire               what all of them share
models_host        this host, VMs, readiness, events
models_devices     IOMMUs and devices
models_plan        passthrough devices of VMs, and the decision about them
models_migration   what is asked of migrations
models_progress    how a migration stands
problems           problem details
"""

from migrd.api.models_devices import (
    Capability,
    Device,
    DeviceList,
    DeviceMigration,
    DeviceReason,
    DeviceVerdict,
    Iommu,
    Kernel,
)
from migrd.api.models_host import (
    Check,
    DevicePlug,
    Event,
    Health,
    Host,
    PassthroughDevice,
    Peer,
    Readiness,
    Vm,
    VmDefinition,
    VmFacts,
    VmList,
)
from migrd.api.models_migration import (
    ActionAnswer,
    Defaults,
    MigrationRequest,
    Plan,
    PlanRequest,
    PolicyChange,
    PolicyRequest,
    ResolveRequest,
)
from migrd.api.models_plan import (
    DeviceEvidence,
    DeviceLadder,
    GivenDevice,
    LadderRung,
    Launch,
    LaunchDevice,
    TrackingCost,
    TrackingDecision,
    TrackingDomain,
    TrackingObject,
    TrackingReason,
    VmDevice,
)
from migrd.api.models_progress import (
    Condition,
    Decision,
    DecisionList,
    Estimate,
    Migration,
    MigrationList,
    Policy,
    Progress,
    Refusal,
    Round,
    RoundList,
    TimelineEntry,
)
from migrd.api.problems import Problem
from migrd.api.wire import NAME_PATTERN, WireModel

__all__ = [
    "NAME_PATTERN",
    "ActionAnswer",
    "Capability",
    "Check",
    "Condition",
    "Decision",
    "DecisionList",
    "Defaults",
    "Device",
    "DeviceEvidence",
    "DeviceLadder",
    "DeviceList",
    "DeviceMigration",
    "DevicePlug",
    "DeviceReason",
    "DeviceVerdict",
    "Estimate",
    "Event",
    "GivenDevice",
    "Health",
    "Host",
    "Iommu",
    "Kernel",
    "LadderRung",
    "Launch",
    "LaunchDevice",
    "Migration",
    "MigrationList",
    "MigrationRequest",
    "PassthroughDevice",
    "Peer",
    "Plan",
    "PlanRequest",
    "Policy",
    "PolicyChange",
    "PolicyRequest",
    "Problem",
    "Progress",
    "Readiness",
    "Refusal",
    "ResolveRequest",
    "Round",
    "RoundList",
    "TimelineEntry",
    "TrackingCost",
    "TrackingDecision",
    "TrackingDomain",
    "TrackingObject",
    "TrackingReason",
    "Vm",
    "VmDefinition",
    "VmDevice",
    "VmFacts",
    "VmList",
    "WireModel",
]
