"""The decision at VM start: facts + policy -> plan. Same input, same plan.

    TrackingRequest ──decide──► Plan            types: tracking_request, tracking_plan,
        │                                              tracking_reasons (all exported here)
        ├─ tracking_facts      what each device can, may be able to, and cannot
        ├─ partition (_rules)  which devices share an iommufd object, and the attach order
        ├─ tracking_layout     flags, domains, trackers, prices      ── attach_ladder
        ├─ tracking_limits     why a device keeps the VM from being live
        ├─ tracking_notes      the same of the whole VM, and what is worth knowing
        ├─ tracking_obstacles  why a device cannot be given to the VM at all
        ├─ downtime_floor      what no switchover goes below
        └─ tracking_launch     what QEMU is told
    hot_plug         the same question about a VM that runs
    two_hosts        two plans of one VM: may it go there, can it come back

Rules
1. The verdict is read off the reasons, never the other way round: `migratability` is the worst
   that one of them allows, `migratability_at_best` the worst of those that no probe could lift.
   So a verdict that is not live always has its reason.
2. An unknown is neither no nor yes: the plan is safe whichever it is, promises only what holds
   either way, and names the probe.
3. The order of the request's devices means nothing.
4. `require` gives the plan of `auto`, and refuses it when that is not live.
"""

from collections.abc import Iterable, Iterator

from migrd.core.downtime_floor import (
    above_limit,
    below_floor,
    blackout_s,
    floor_s,
    unknown_figures,
)
from migrd.core.tracking_launch import launch, launched
from migrd.core.tracking_layout import Layout, costs, domains, ladders, lay_out
from migrd.core.tracking_limits import copies_all, limits
from migrd.core.tracking_notes import no_safe_partition, notes, of_vm
from migrd.core.tracking_obstacles import obstacles
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
    layout = lay_out(request)
    limiting = [*of_vm(layout), *limits(layout)]
    verdict = _worst(limiting)
    at_best = _worst(reason for reason in limiting if reason.probe is None)
    floor = floor_s(request)
    copies = Migratability.STOP_AND_COPY in (verdict, at_best)
    blackout = blackout_s(request) if copies else None
    noted = [
        *notes(layout),
        *unknown_figures(layout),
        *above_limit(request.downtime_limit_s, blackout),
    ]
    refused = tuple(_refused(layout, verdict, limiting, floor))
    told = launched(layout, copies_all(layout))
    made = domains(layout)
    return Plan(
        policy=request.policy,
        migratability=verdict,
        migratability_at_best=at_best,
        reasons=tuple(sorted([*limiting, *noted], key=_in_order)),
        domains=made,
        trackers={id_: layout.tracker(layout.traits[id_]) for id_ in layout.attach_order},
        ladders=ladders(layout, made),
        iommufds=layout.partition.objects,
        attach_order=layout.attach_order,
        launch=None if refused else launch(layout, told),
        launched=told,
        downtime_floor_s=floor,
        expected_blackout_s=blackout,
        costs=tuple(costs(layout)),
        refused=refused,
    )


def _worst(reasons: Iterable[Reason]) -> Migratability:
    found = {reason.lowers_to for reason in reasons} - {None}
    return next((one for one in reversed(Migratability) if one in found), Migratability.LIVE)


def _in_order(reason: Reason) -> tuple[int, str, str, str]:
    """Limits before notes, the worst first; then by device."""
    rank = -1 if reason.lowers_to is None else reason.lowers_to.rank
    return -rank, reason.device or "", reason.code.value, reason.message


def _refused(
    layout: Layout, verdict: Migratability, limiting: list[Reason], floor: float
) -> Iterator[Reason]:
    request = layout.request
    if request.policy in request.forbidden:
        allowed = ", ".join(one.value for one in TrackingPolicy if one not in request.forbidden)
        yield Reason(
            ReasonCode.POLICY_FORBIDDEN,
            None,
            f"this host does not allow policy {request.policy.value}",
            f"choose one of: {allowed}" if allowed else "change the host's settings",
        )
    if request.policy is TrackingPolicy.REQUIRE and verdict is not Migratability.LIVE:
        yield Reason(
            ReasonCode.POLICY_NOT_MET,
            None,
            f"policy require wants a live-migratable VM; this one is {verdict.value}",
            "mend what the other reasons name, or choose policy auto",
        )
        yield from sorted((one for one in limiting if one.lowers_to is not None), key=_in_order)
    elif not layout.partition.is_safe:
        yield no_safe_partition(layout)
    yield from below_floor(request.downtime_limit_s, floor)
    yield from obstacles(layout)
