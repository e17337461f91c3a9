"""The destination's decision about a VM's passthrough devices, as it crosses between daemons.

The destination makes it from its own facts (`core.tracking`), the source judges it beside its own
(`core.two_hosts`). It carries what that judgement and a person need, bounded: how migratable the VM
would be and why, who would watch each device, what its QEMU would be told, and the downtime floor.

A verdict that we do not know makes the answer unintelligible; a reason that we do not know is still
a reason, and its sentence is kept.
"""

from collections.abc import Iterable
from typing import Annotated, Final, Self

from pydantic import Field

from migrd.core.tracking import Migratability, Plan, Probe, Reason, ReasonCode, Tracker
from migrd.core.tracking_request import TrackingPolicy
from migrd.core.vfio_launch import GivenBy, VfioLaunch, VfioLaunchDevice
from migrd.peer.wire import Name, ShortText, WireModel, cut

MOST_REASONS: Final = 128
MOST_DEVICES: Final = 64

MOST_SECONDS: Final = 1e9
"""Three decades: what a driver that lies about its size makes of a floor is no more than that."""

Seconds = Annotated[float, Field(ge=0, le=MOST_SECONDS)]


class WireReason(WireModel):
    code: Name
    device: Name | None
    message: ShortText
    cure: ShortText
    lowers_to: Migratability | None
    probe: Name | None

    @classmethod
    def of(cls, reason: Reason) -> Self:
        return cls(
            code=reason.code.value,
            device=reason.device,
            message=cut(reason.message),
            cure=cut(reason.cure),
            lowers_to=reason.lowers_to,
            probe=None if reason.probe is None else reason.probe.value,
        )

    def value(self) -> Reason:
        known = self.code in _CODES
        code = ReasonCode(self.code) if known else ReasonCode.UNKNOWN_CAPABILITY
        message = self.message if known else f"{self.code}: {self.message}"
        probe = Probe(self.probe) if self.probe in _PROBES else None
        return Reason(code, self.device, message, self.cure, self.lowers_to, probe)


_CODES: Final = frozenset(code.value for code in ReasonCode)
_PROBES: Final = frozenset(probe.value for probe in Probe)
Reasons = Annotated[list[WireReason], Field(max_length=MOST_REASONS)]


class WireLaunchDevice(WireModel):
    id: Name
    address: Name
    iommufd: Name | None
    guest_bus: Name | None
    guest_address: Name | None
    properties: Annotated[dict[Name, Name], Field(max_length=64)] = {}

    @classmethod
    def of(cls, device: VfioLaunchDevice) -> Self:
        return cls(
            id=device.id,
            address=device.address,
            iommufd=device.iommufd,
            guest_bus=device.guest_bus,
            guest_address=device.guest_address,
            properties=dict(device.properties),
        )

    def value(self) -> VfioLaunchDevice:
        return VfioLaunchDevice(
            id=self.id,
            address=self.address,
            iommufd=self.iommufd,
            given_by=GivenBy.FD,  # how that host opens it is nobody else's business
            guest_bus=self.guest_bus,
            guest_address=self.guest_address,
            properties=dict(self.properties),
        )


class WirePlan(WireModel):
    policy: TrackingPolicy
    migratability: Migratability
    migratability_at_best: Migratability
    reasons: Reasons
    refused: Reasons
    trackers: Annotated[dict[Name, Tracker], Field(max_length=MOST_DEVICES)]
    attach_order: Annotated[list[Name], Field(max_length=MOST_DEVICES)]
    devices: Annotated[list[WireLaunchDevice], Field(max_length=MOST_DEVICES)] | None
    """What QEMU there would be told; null: it would not be started."""
    downtime_floor_s: Seconds
    expected_blackout_s: Seconds | None

    @classmethod
    def of(cls, plan: Plan) -> Self:
        launch = plan.launch
        told = None if launch is None else [WireLaunchDevice.of(one) for one in launch.devices]
        return cls(
            policy=plan.policy,
            migratability=plan.migratability,
            migratability_at_best=plan.migratability_at_best,
            reasons=_reasons(plan.reasons),
            refused=_reasons(plan.refused),
            trackers=dict(plan.trackers),
            attach_order=list(plan.attach_order),
            devices=told,
            downtime_floor_s=min(plan.downtime_floor_s, MOST_SECONDS),
            expected_blackout_s=None
            if plan.expected_blackout_s is None
            else min(plan.expected_blackout_s, MOST_SECONDS),
        )

    def value(self) -> Plan:
        told = self.devices
        return Plan(
            policy=self.policy,
            migratability=self.migratability,
            migratability_at_best=self.migratability_at_best,
            reasons=tuple(reason.value() for reason in self.reasons),
            refused=tuple(reason.value() for reason in self.refused),
            trackers=dict(self.trackers),
            attach_order=tuple(self.attach_order),
            launch=None if told is None else VfioLaunch(devices=tuple(d.value() for d in told)),
            downtime_floor_s=self.downtime_floor_s,
            expected_blackout_s=self.expected_blackout_s,
        )


def _reasons(reasons: Iterable[Reason]) -> list[WireReason]:
    """The worst come first; what is beyond the bound is not told."""
    return [WireReason.of(reason) for reason in list(reasons)[:MOST_REASONS]]
