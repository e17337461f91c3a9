"""What the daemons say to each other: JSON, one model per message.

    POST /peer/v1/<call>     Migrd-Protocol: 1      request model of the call
    200                      Migrd-Protocol: 1      answer model of the call
    4xx, 5xx                 Migrd-Protocol: 1      Problem

Rules
1. A field that we do not know is ignored (the other side may be newer); one that we need is checked
   strictly, with a bound. A phase that we do not know makes the whole answer unintelligible: to
   guess at where a guest stands is the one thing forbidden here.
2. A change that an old daemon would misunderstand grows PEER_PROTOCOL; no daemon then acts on the
   other's messages, and both say why.
3. Quantities carry their unit in the name, as everywhere.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Final, Self

from pydantic import Field

from migrd.core.facts import SpecDevice, TransferAddress, TransferSettings, VmSpec
from migrd.core.handover import DestinationPhase
from migrd.core.tracking import Migratability, TrackingPolicy
from migrd.engine.peer_service import HelloFacts
from migrd.engine.ports import DestinationView, HostProfile, SourceView
from migrd.peer.plan_messages import MOST_DEVICES, WirePlan
from migrd.peer.wire import Name, Text, WireModel, shortened

PATH: Final = "/peer/v1/"
PROTOCOL_HEADER: Final = "Migrd-Protocol"
MAX_REQUEST_BYTES: Final = 256 * 1024
MAX_ANSWER_BYTES: Final = 1024 * 1024
MAX_WAIT_S: Final = 30.0
"""Longest that a `view` is held back; who asks for more is answered earlier."""

MigrationId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
Epoch = Annotated[int, Field(ge=0, lt=1 << 62)]
Bytes = Annotated[int, Field(ge=0, lt=1 << 62)]
Count = Annotated[int, Field(ge=0, lt=1 << 31)]


class Empty(WireModel):
    """A request without a question."""


class WireSpecDevice(WireModel):
    id: Name
    address: Name
    """On the host that reads this."""
    guest_bus: Name | None = None
    guest_address: Name | None = None

    @classmethod
    def of(cls, device: SpecDevice) -> Self:
        return cls(**vars(device))

    def value(self) -> SpecDevice:
        return SpecDevice(**vars(self))


class WireVmSpec(WireModel):
    name: Name
    profile: Name | None
    parameters: Annotated[dict[Name, bool | int | Text], Field(max_length=256)] = {}
    devices: Annotated[list[WireSpecDevice], Field(max_length=MOST_DEVICES)] = []
    tracking_policy: TrackingPolicy | None = None

    @classmethod
    def of(cls, spec: VmSpec) -> Self:
        return cls(
            name=spec.name,
            profile=spec.profile,
            parameters=dict(spec.parameters),
            devices=[WireSpecDevice.of(device) for device in spec.devices],
            tracking_policy=spec.tracking_policy,
        )

    def value(self) -> VmSpec:
        devices = tuple(device.value() for device in self.devices)
        return VmSpec(self.name, self.profile, self.parameters, devices, self.tracking_policy)


class WireSettings(WireModel):
    downtime_limit_s: Annotated[float, Field(ge=0)]
    max_bandwidth_bytes_per_s: Bytes
    multifd_channels: Annotated[int, Field(ge=0, le=255)]
    auto_converge: bool
    postcopy: bool
    postcopy_preempt: bool
    tls: bool
    peer_name: Annotated[str, Field(max_length=253)]
    arbitrated: bool = False

    @classmethod
    def of(cls, settings: TransferSettings) -> Self:
        return cls(**{name: getattr(settings, name) for name in cls.model_fields})

    def value(self) -> TransferSettings:
        """Without the migration's name, which the message itself has."""
        return TransferSettings(**vars(self))


class WireAddress(WireModel):
    host: Name
    port: Annotated[int, Field(ge=1, le=65535)]

    @classmethod
    def of(cls, address: TransferAddress) -> Self:
        return cls(host=address.host, port=address.port)

    def value(self) -> TransferAddress:
        return TransferAddress(self.host, self.port)


class PreflightRequest(WireModel):
    vm: WireVmSpec


class PrepareRequest(WireModel):
    migration_id: MigrationId
    epoch: Epoch
    vm: WireVmSpec
    settings: WireSettings
    least: Migratability | None = None
    """Refuse when the VM would be less migratable than this; null: nobody minds."""


class ViewRequest(WireModel):
    migration_id: MigrationId
    newer_than: Annotated[int, Field(ge=-1, lt=1 << 62)]
    wait_s: Annotated[float, Field(ge=0)]


class GrantRequest(WireModel):
    migration_id: MigrationId
    epoch: Epoch
    run_guest: bool


class DiscardRequest(WireModel):
    migration_id: MigrationId
    epoch: Epoch
    reason: Text


class MigrationRequest(WireModel):
    migration_id: MigrationId


class WireHello(WireModel):
    host: Name
    migrd_version: Name
    protocol: Count

    @classmethod
    def of(cls, facts: HelloFacts) -> Self:
        return cls(host=facts.host, migrd_version=facts.migrd_version, protocol=facts.protocol)

    def value(self) -> HelloFacts:
        return HelloFacts(self.host, self.migrd_version, self.protocol)


class WireDestinationView(WireModel):
    migration_id: MigrationId
    epoch: Epoch
    phase: DestinationPhase
    generation: Annotated[int, Field(ge=0, lt=1 << 62)]
    address: WireAddress | None
    reason: Text | None
    vmm_died: bool
    transfer_completed: bool
    guest_running: bool
    postcopy_paused: bool = False
    arbitrated: bool = False

    @classmethod
    def of(cls, view: DestinationView) -> Self:
        return cls(
            migration_id=view.migration_id,
            epoch=view.epoch,
            phase=view.phase,
            generation=view.generation,
            address=None if view.address is None else WireAddress.of(view.address),
            reason=shortened(view.reason),
            vmm_died=view.vmm_died,
            transfer_completed=view.transfer_completed,
            guest_running=view.guest_running,
            postcopy_paused=view.postcopy_paused,
            arbitrated=view.arbitrated,
        )

    def value(self) -> DestinationView:
        address = None if self.address is None else self.address.value()
        return DestinationView(**{**vars(self), "address": address})


class WireSourceView(WireModel):
    migration_id: MigrationId
    epoch: Epoch
    phase: Name
    copy_gone: bool = False

    @classmethod
    def of(cls, view: SourceView) -> Self:
        return cls(**vars(view))

    def value(self) -> SourceView:
        return SourceView(self.migration_id, self.epoch, self.phase, self.copy_gone)


class WireRefusal(WireModel):
    code: Name
    message: Text


class WireHostProfile(WireModel):
    host: Name
    migrd_version: Name
    protocol: Count
    qemu_version: Name | None
    features: Annotated[list[Name], Field(max_length=1000)]
    launch_digest: Name | None
    incoming_slots_free: Count
    memory_available_bytes: Bytes | None
    vm_present: bool
    last_epoch: Epoch
    tls: bool
    refusals: Annotated[list[WireRefusal], Field(max_length=1000)] = []
    plan: WirePlan | None = None
    arbiter: Name = "journal"

    @classmethod
    def of(cls, profile: HostProfile) -> Self:
        refusals = [
            WireRefusal(code=code, message=shortened(message) or "")
            for code, message in profile.refusals
        ]
        plan = None if profile.plan is None else WirePlan.of(profile.plan)
        listed = {"features": sorted(profile.features), "refusals": refusals, "plan": plan}
        return cls(**{**vars(profile), **listed})

    def value(self) -> HostProfile:
        refusals = tuple((refusal.code, refusal.message) for refusal in self.refusals)
        plan = None if self.plan is None else self.plan.value()
        listed = {"features": frozenset(self.features), "refusals": refusals, "plan": plan}
        return HostProfile(**{**vars(self), **listed})


class Problem(WireModel):
    """RFC 9457, with migrd's `code` and `retryable`."""

    type: str = "about:blank"
    title: Text
    status: Annotated[int, Field(ge=400, le=599)]
    detail: Text
    code: Annotated[str, Field(pattern=r"^[a-z0-9_]{1,64}$")]
    retryable: bool = False


@dataclass(frozen=True)
class Call:
    """One call: what goes there, and what comes back."""

    request: type[WireModel]
    answer: type[WireModel]
    writes: bool = True
    """It may change something: an unanswered one is not known to have happened or not."""


CALLS: Final[Mapping[str, Call]] = MappingProxyType(
    {
        "hello": Call(Empty, WireHello, writes=False),
        "preflight": Call(PreflightRequest, WireHostProfile, writes=False),
        "prepare": Call(PrepareRequest, WireDestinationView),
        "view": Call(ViewRequest, WireDestinationView, writes=False),
        "grant": Call(GrantRequest, WireDestinationView),
        "discard": Call(DiscardRequest, WireDestinationView),
        "listen_for_recovery": Call(MigrationRequest, WireAddress),
        "source_view": Call(MigrationRequest, WireSourceView, writes=False),
    }
)


Observe = Callable[[str, str, str, float], None]
"""Told of each call: (peer, call, outcome, seconds); outcome is "ok" or an error's code class."""
