"""A change to a VM that runs, judged against its standing decision before anything is touched.

    judge_plug    may this device be added? Not if it lowers the VM's migratability unasked
    reconsider    after an unplug, a driver change or a probe: the plan as it is now; it may rise
    compare       what changed between two plans: the body of a `verdict_changed` event

What QEMU has been told stands: devices stay in their iommufd object with their properties, and a
container that once held a device tracked by its IOMMU is taken for tracked until it is empty (H4).
So both start from the standing plan's `iommufds` and `launched`, and place only what is new.
"""

from dataclasses import dataclass

from migrd.core.tracking import Migratability, Plan, Reason, TrackingRequest


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
    """May the VM become what `request_now` describes (all its devices, the new ones included)?"""
    raise NotImplementedError


def reconsider(standing: Plan, request_now: TrackingRequest) -> Plan:
    """The plan of the running VM with the facts of now (devices that are gone left out)."""
    raise NotImplementedError


def compare(before: Plan, after: Plan) -> VerdictChange:
    """What is different, for people and for machines."""
    raise NotImplementedError
