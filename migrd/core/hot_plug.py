"""A change to a VM that runs, judged against its standing decision before anything is touched.

    judge_plug    may this device be added? Not if it lowers the VM's migratability unasked
    reconsider    after an unplug, a driver change or a probe: the plan as it is now; it may rise
    compare       what changed between two plans: the body of a `verdict_changed` event

What QEMU has been told stands: devices stay in their iommufd object with their properties, and a
container that once held a device tracked by its IOMMU is taken for tracked until it is empty (H4).
So both start from the standing plan's `iommufds` and `launched`, and place only what is new.
"""

from dataclasses import dataclass, replace

from migrd.core.tracking import Migratability, Plan, Reason, TrackingRequest, decide


@dataclass(frozen=True)
class VerdictChange:
    """From one plan to the next."""

    before: Migratability
    after: Migratability
    appeared: tuple[Reason, ...]
    """Limits that are new."""
    disappeared: tuple[Reason, ...]

    @property
    def is_lower(self) -> bool:
        return self.after.rank > self.before.rank

    @property
    def is_higher(self) -> bool:
        return self.after.rank < self.before.rank

    @property
    def is_any(self) -> bool:
        """Worth an event."""
        return bool(self.before is not self.after or self.appeared or self.disappeared)


@dataclass(frozen=True)
class Judgement:
    """The answer to a hot-plug."""

    allowed: bool
    plan: Plan
    """As it would be; when it is allowed and done, the new standing decision."""
    change: VerdictChange
    reasons: tuple[Reason, ...]
    """Why not; or, where it was accepted, what is lost."""


def judge_plug(
    standing: Plan, request_now: TrackingRequest, *, accept_lower: bool = False
) -> Judgement:
    """May the VM become what `request_now` describes (all its devices, the new ones not marked as
    attached)? Not when the plan is refused for any reason, nor unasked when it lowers the VM:
    below what it would be now without the new ones, not below what it was at its start."""
    plan = decide(_within(standing, request_now))
    had = tuple(one for one in request_now.devices if one.attached)
    change = compare(reconsider(standing, replace(request_now, devices=had)), plan)
    if plan.refused:
        return Judgement(False, plan, change, plan.refused)
    if not change.is_lower:
        return Judgement(True, plan, change, ())
    return Judgement(accept_lower, plan, change, change.appeared)


def reconsider(standing: Plan, request_now: TrackingRequest) -> Plan:
    """The plan of the running VM with the facts of now (devices that are gone left out, those
    that it has marked as attached). What it refuses could not be started like this now."""
    return decide(_within(standing, request_now))


def _within(standing: Plan, request: TrackingRequest) -> TrackingRequest:
    return replace(request, standing=standing.iommufds, standing_devices=standing.launched)


def compare(before: Plan, after: Plan) -> VerdictChange:
    """What is different, for people and for machines."""
    had = {_limit(reason) for reason in before.limits}
    has = {_limit(reason) for reason in after.limits}
    return VerdictChange(
        before.migratability,
        after.migratability,
        tuple(reason for reason in after.limits if _limit(reason) not in had),
        tuple(reason for reason in before.limits if _limit(reason) not in has),
    )


def _limit(reason: Reason) -> tuple[object, ...]:
    """Without its sentence: figures in it may move while the reason stays."""
    return reason.code, reason.device, reason.lowers_to, reason.probe
