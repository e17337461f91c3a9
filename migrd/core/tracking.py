"""The decision at VM start: facts + policy -> plan. Same input, same plan.

TrackingRequest ──decide──► Plan            types: tracking_request, tracking_plan,
    │                                              tracking_reasons (all exported here)
    ├─ tracking_facts   what each device can, may be able to, and cannot
    ├─ partition        which devices share an iommufd object, and the attach order
    ├─ attach_ladder    what to do for each errno
    ├─ downtime_floor   what no switchover goes below
    └─ tracking_launch  what QEMU is told
hot_plug         the same question about a VM that runs
two_hosts        two plans of one VM: may it go there, can it come back
"""

from migrd.core.tracking_plan import Cost, CostCode, Domain, Plan, Tracker
from migrd.core.tracking_reasons import HOW, Migratability, Probe, Reason, ReasonCode
from migrd.core.tracking_request import (
    DomainFlag,
    StandingDevice,
    StandingObject,
    TrackingPolicy,
    TrackingRequest,
    VmDevice,
)

__all__ = [
    "HOW",
    "Cost",
    "CostCode",
    "Domain",
    "DomainFlag",
    "Migratability",
    "Plan",
    "Probe",
    "Reason",
    "ReasonCode",
    "StandingDevice",
    "StandingObject",
    "Tracker",
    "TrackingPolicy",
    "TrackingRequest",
    "VmDevice",
    "decide",
]


def decide(request: TrackingRequest) -> Plan:
    """The one plan for this request. Never raises for what the facts hold."""
    raise NotImplementedError
