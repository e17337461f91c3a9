"""Wire models of what is asked of migrations, and what becomes of the asking."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Self, TypeVar

from pydantic import ConfigDict, Field, model_validator

from migrd.api.models_devices import Address
from migrd.api.models_plan import (
    MAX_DEVICES,
    Devices,
    QemuId,
    TrackingDecision,
    decision_or_none,
    spec_devices,
)
from migrd.api.models_progress import Migration, Refusal
from migrd.api.wire import (
    MAX_DEADLINE_S,
    MAX_DOWNTIME_LIMIT_MS,
    MAX_MULTIFD_CHANNELS,
    MAX_THROTTLE_PERCENT,
    Count,
    Name,
    Text,
    WireModel,
    finite,
    ms,
    seconds,
)
from migrd.core import migration
from migrd.core.admission import Admission
from migrd.core.migration import Mode, WhenNotConverging
from migrd.core.tracking import TrackingPolicy
from migrd.engine import service
from migrd.engine.service import Resolution

T = TypeVar("T")

_SAYS_SOMETHING = {"minProperties": 1}


@dataclass(frozen=True)
class Defaults:
    """What the daemon's configuration says where a request does not."""

    policy: migration.Policy = field(default_factory=migration.Policy)
    multifd_channels: int = 0


class PolicyRequest(WireModel):
    """What a client may say about how the guest is to be moved; what it leaves out comes from the
    daemon's configuration."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"when_not_converging": "throttle", "downtime_limit_ms": 300}]
        }
    )

    when_not_converging: WhenNotConverging | None = None
    """What to do when the rounds say that the downtime limit will not be met as things are."""
    downtime_limit_ms: Annotated[int, Field(ge=1, le=MAX_DOWNTIME_LIMIT_MS)] | None = None
    """Longest acceptable blackout, in milliseconds."""
    deadline_s: Annotated[float, Field(ge=0.1, le=MAX_DEADLINE_S)] | None = None
    """Roll back when the guest has not moved so many seconds after the request."""
    max_bandwidth_bytes_per_s: Count | None = None
    """Limit of the migration stream, in bytes per second; 0 means unlimited."""
    max_throttle_percent: Annotated[int, Field(ge=1, le=MAX_THROTTLE_PERCENT)] | None = None
    """Strongest slowing of the vCPUs, in percent, where the policy is to throttle."""

    def over(self, base: migration.Policy) -> migration.Policy:
        """`base`, with what is said here in its place."""
        return migration.Policy(
            when_not_converging=_said(self.when_not_converging, base.when_not_converging),
            downtime_limit_s=_said(seconds(self.downtime_limit_ms), base.downtime_limit_s),
            deadline_s=_said(self.deadline_s, base.deadline_s),
            max_bandwidth_bytes_per_s=_said(
                self.max_bandwidth_bytes_per_s, base.max_bandwidth_bytes_per_s
            ),
            max_throttle_percent=_said(self.max_throttle_percent, base.max_throttle_percent),
        )


def _said(given: T | None, otherwise: T) -> T:
    return otherwise if given is None else given


class PolicyChange(PolicyRequest):
    """A change of the policy of a migration that is going on; what it leaves out stays."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"downtime_limit_ms": 500}], **_SAYS_SOMETHING}
    )

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if all(said is None for said in self.model_dump().values()):
            raise ValueError("says nothing: give at least one field with a value")
        return self


class MoveRequest(WireModel):
    """How a guest is to be moved."""

    policy: PolicyRequest = PolicyRequest()
    multifd_channels: Annotated[int, Field(ge=0, le=MAX_MULTIFD_CHANNELS)] | None = None
    """Parallel connections for memory; 0 means one plain stream. Left out: the configuration's."""
    allow_postcopy: bool = False
    """Prepare both sides so that postcopy can be chosen while the migration runs."""
    destination_devices: Annotated[
        Mapping[QemuId, Address], Field(max_length=MAX_DEVICES, default_factory=dict)
    ]
    """QEMU id of a passthrough device -> address of the one that takes its place there. Those left
    out have the same address on both hosts."""
    accept_less_migratable: bool = False
    """Go even if the VM is less migratable there, or cannot come back."""

    def to(self, destination: str, vm: str, defaults: Defaults, *, by: str) -> migration.Request:
        """The engine's request, with the daemon's defaults where nothing is said."""
        return migration.Request(
            vm=vm,
            destination=destination,
            policy=self.policy.over(defaults.policy),
            multifd_channels=_said(self.multifd_channels, defaults.multifd_channels),
            allow_postcopy=self.allow_postcopy,
            requested_by=by,
            destination_devices=dict(self.destination_devices),
            accept_less_migratable=self.accept_less_migratable,
        )


class PlanRequest(MoveRequest):
    """What if? A migration to think through, other devices, another policy, or all of them."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"destination": "host-b"},
                {"devices": [{"address": "0000:41:00.2"}], "tracking_policy": "require"},
            ]
        }
    )

    destination: Name | None = None
    """Name of the host to move to, from this host's roster. Left out: only what is decided here."""
    devices: Devices | None = None
    """If it had these passthrough devices. Left out: those that it is defined with."""
    tracking_policy: TrackingPolicy | None = None
    """If this policy applied to it. Left out: the one it is defined with."""

    def question(self, vm: str, defaults: Defaults, *, by: str) -> service.WhatIf:
        """The engine's question."""
        move, limit = None, seconds(self.policy.downtime_limit_ms)
        if self.destination is not None:
            move = self.to(self.destination, vm, defaults, by=by)
            limit = move.policy.downtime_limit_s
        return service.WhatIf(
            vm=vm,
            move=move,
            devices=None if self.devices is None else spec_devices(self.devices),
            tracking_policy=self.tracking_policy,
            downtime_limit_s=limit,
        )


class MigrationRequest(MoveRequest):
    """A migration to begin."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "vm": "web-1",
                    "destination": "host-b",
                    "policy": {"when_not_converging": "throttle", "downtime_limit_ms": 300},
                }
            ]
        }
    )

    vm: Name
    destination: Name
    """Name of the host to move to, from this host's roster."""

    def request(self, defaults: Defaults, *, by: str) -> migration.Request:
        """The engine's request."""
        return self.to(self.destination, self.vm, defaults, by=by)


class ResolveRequest(WireModel):
    """An operator's word on who has a guest; it is written into the journal."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "resolution": "destination_fenced",
                    "evidence": "host-b powered off at the PDU, 10:15 UTC, seen dark by J. Doe",
                }
            ]
        }
    )

    resolution: Resolution
    evidence: Annotated[Text, Field(min_length=1, max_length=2000)]
    """How it is known: what was looked at, when, by whom."""


class ActionAnswer(WireModel):
    """What became of a client's wish: `queued` (202) or `already_so` (200). A wish that is denied
    is a problem with status 409 whose code names the reason."""

    admission: Admission
    reason: str
    """Stable code."""
    message: str
    migration: Migration

    @classmethod
    def of(cls, answer: service.Answer) -> Self:
        return cls(
            admission=answer.admission,
            reason=answer.reason,
            message=answer.message,
            migration=Migration.of(answer.migration),
        )


class Plan(WireModel):
    """What a migration, or a start, would meet: every refusal at once, what is decided about
    passthrough devices here and there, and the estimate. Nothing was changed."""

    vm: str
    destination: str | None
    """null: no migration was asked about."""
    possible: bool
    """The migration may begin; without a destination: the VM may be started like this."""
    decision: TrackingDecision | None
    """About its passthrough devices, here; null: it has none."""
    decision_there: TrackingDecision | None
    """By the destination, from its own facts; null: it has none, or did not say."""
    refusals: tuple[Refusal, ...]
    warnings: tuple[Refusal, ...]
    memory_bytes: int | None
    mode_choices: tuple[Mode, ...]
    features_missing: Mapping[str, tuple[str, ...]]
    """`source` and `destination`: the features that their QEMU lacks."""
    predicted_total_ms: float | None
    """As the VM was measured last, by what the newest migration away from here got of the link
    (or the policy's limit). null: not known, or it would not end."""
    predicted_blackout_ms: float | None
    predicted_converges: bool | None
    """false: throttling, postcopy or a longer blackout would be needed."""
    dirty_bytes_per_s: float | None
    """By the guest's CPUs, measured last, outside of a migration."""
    dirty_rate_age_ms: float | None

    @classmethod
    def of(cls, view: service.PlanView) -> Self:
        return cls(
            vm=view.vm,
            destination=view.destination,
            possible=view.possible,
            decision=decision_or_none(view.decision),
            decision_there=(
                None if view.plan_there is None else TrackingDecision.of_plan(view.plan_there)
            ),
            refusals=tuple(Refusal.of(r) for r in view.refusals),
            warnings=tuple(Refusal.of(w) for w in view.warnings),
            memory_bytes=view.memory_bytes,
            mode_choices=tuple(view.mode_choices),
            features_missing={side: tuple(names) for side, names in view.features_missing.items()},
            predicted_total_ms=ms(view.predicted_total_s),
            predicted_blackout_ms=ms(view.predicted_blackout_s),
            predicted_converges=view.predicted_converges,
            dirty_bytes_per_s=finite(view.dirty_bytes_per_s),
            dirty_rate_age_ms=ms(view.dirty_rate_age_s),
        )
