"""Wire models of this host, its VMs, readiness, and events; its devices are in `models_devices`."""

from collections.abc import Mapping
from typing import Annotated, Any, Final, Self

from pydantic import ConfigDict, Field, JsonValue, PlainValidator, WithJsonSchema

from migrd.api.models_devices import MOST_TROUBLE, Iommu, Kernel, safe
from migrd.api.models_plan import (
    Devices,
    GivenDevice,
    TrackingDecision,
    VmDevice,
    decision_or_none,
    spec_devices,
)
from migrd.api.models_rates import DmaRate
from migrd.api.wire import At, Name, WireModel, at, at_or_none, ms
from migrd.core import facts
from migrd.core.tracking import TrackingPolicy
from migrd.engine import service
from migrd.engine.arbiter_port import ArbiterState

MAX_PARAMETERS: Final = 64
MAX_PARAMETER_TEXT: Final = 1024


def _parameter(given: Any) -> str | int | bool:
    """A string, an integer of 64 bits, or a boolean, and never one taken for the other."""
    if isinstance(given, bool):
        return given
    if isinstance(given, int):
        if -(2**63) <= given < 2**63:
            return given
        raise ValueError("should be an integer of at most 64 bits")
    if isinstance(given, str):
        if len(given) <= MAX_PARAMETER_TEXT and "\0" not in given:
            return given
        raise ValueError(f"should be text of at most {MAX_PARAMETER_TEXT} characters, without NUL")
    raise ValueError("should be a string, an integer, or true or false")


ParameterName = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,63}$")]
Parameter = Annotated[
    str | int | bool,
    PlainValidator(_parameter),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "maxLength": MAX_PARAMETER_TEXT, "pattern": r"^[^\x00]*$"},
                {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
                {"type": "boolean"},
            ]
        }
    ),
]


class Peer(WireModel):
    """Another host of the roster."""

    name: str
    url: str
    up: bool | None
    """null: not asked yet."""
    checked_at: At | None
    error: str | None
    migrd_version: str | None

    @classmethod
    def of(cls, view: service.PeerView) -> Self:
        return cls(
            name=view.name,
            url=view.url,
            up=view.up,
            checked_at=at_or_none(view.checked_wall_s),
            error=view.error,
            migrd_version=view.migrd_version,
        )


class Arbiter(WireModel):
    """Who says who may run a VM."""

    kind: str
    """journal: the journals of source and destination, and nobody else; or etcd."""
    reachable: bool
    """Whether it answered when last asked; until then nothing new begins, and every guest runs
    on."""
    since: At | None
    """null: not asked yet, or there is nobody to ask."""
    problem: str | None
    """What is wrong with it, with the cure."""
    endpoints: tuple[str, ...]
    hosts: tuple[str, ...] | None
    """Hosts whose migrd is there, as it last listed them; null: not known."""

    @classmethod
    def of(cls, state: ArbiterState) -> Self:
        return cls(
            kind=state.kind,
            reachable=state.is_reachable,
            since=at_or_none(state.since_wall_s),
            problem=None if state.problem is None else safe(state.problem),
            endpoints=tuple(state.endpoints),
            hosts=None if state.hosts is None else tuple(state.hosts),
        )


class Host(WireModel):
    """This host."""

    name: str
    migrd_version: str
    booted_at: At
    qemu_binaries: Mapping[str, str | None]
    """Launch profile -> the version of its QEMU; null where it cannot be asked."""
    profiles: tuple[str, ...]
    outgoing_slots: int
    outgoing_active: int
    incoming_slots: int
    incoming_active: int
    memory_available_bytes: int | None
    all_iommus_track_dirty: bool | None
    """Whether every IOMMU of this host can track dirty pages; null: not known."""
    all_iommus_track_dirty_why: str
    """For people: which instances the answer rests on, and how theirs are known."""
    iommus: tuple[Iommu, ...]
    """The evidence, by name."""
    kernel: Kernel | None
    """What it offers for passthrough; null: not looked at."""
    devices: int
    """How many devices are, or could be, passed through: /v1/devices lists them."""
    inventory_trouble: tuple[str, ...]
    """What of the hardware could not be read, for people."""
    tracking_policy: TrackingPolicy
    """When dirty tracking is asked for as a VM starts, where the request does not say."""
    forbidden_tracking_policies: tuple[TrackingPolicy, ...]
    tls: bool
    """Whether the stream of guest memory is encrypted."""
    vms: int
    peers: tuple[Peer, ...]
    arbiter: Arbiter

    @classmethod
    def of(cls, view: service.HostView) -> Self:
        return cls(
            name=view.name,
            migrd_version=view.migrd_version,
            booted_at=at(view.boot_wall_s),
            qemu_binaries=dict(view.qemu_binaries),
            profiles=tuple(view.profiles),
            outgoing_slots=view.outgoing_slots,
            outgoing_active=view.outgoing_active,
            incoming_slots=view.incoming_slots,
            incoming_active=view.incoming_active,
            memory_available_bytes=view.memory_available_bytes,
            all_iommus_track_dirty=view.all_iommus_track_dirty,
            all_iommus_track_dirty_why=safe(view.all_iommus_track_dirty_why),
            iommus=tuple(Iommu.of(iommu) for iommu in view.iommus),
            kernel=None if view.kernel is None else Kernel.of(view.kernel),
            devices=view.devices,
            inventory_trouble=tuple(safe(t) for t in view.inventory_trouble[:MOST_TROUBLE]),
            tracking_policy=view.tracking_policy,
            forbidden_tracking_policies=view.forbidden_tracking_policies,
            tls=view.tls,
            vms=view.vms,
            peers=tuple(Peer.of(peer) for peer in view.peers),
            arbiter=Arbiter.of(view.arbiter),
        )


class VmDefinition(WireModel):
    """A VM as it is to be: a launch profile of the administrator, filled in. For an adopted VM it
    names the profile that a destination would launch."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"profile": "small", "parameters": {"memory_mib": 512, "vcpus": 2}}]
        }
    )

    profile: Name
    parameters: Annotated[
        Mapping[ParameterName, Parameter], Field(max_length=MAX_PARAMETERS, default_factory=dict)
    ]
    devices: Devices = ()
    """Passthrough devices; whether their DMA is tracked is decided for all of them together."""
    tracking_policy: TrackingPolicy | None = None
    """When to ask for dirty tracking. Left out: this host's default."""

    def spec(self, vm: str) -> facts.VmSpec:
        return facts.VmSpec(
            name=vm,
            profile=self.profile,
            parameters=dict(self.parameters),
            devices=spec_devices(self.devices),
            tracking_policy=self.tracking_policy,
        )


class DevicePlug(GivenDevice):
    """A passthrough device to add to a VM."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"address": "0000:41:00.3", "id": "hostdev1"}]}
    )

    accept_lower_migratability: bool = False
    """Add it even if the VM can then be migrated less well, or not at all."""


class PassthroughDevice(WireModel):
    """What a running QEMU says of one of its passthrough devices."""

    id: str
    address: str | None
    """null: QEMU was given a descriptor and nobody remembers of what."""
    iommufd: str | None
    guest_bus: str | None
    """QEMU's id of the bus that it is on in the guest."""
    guest_address: str | None
    """Its slot and function there (`05.0`)."""
    migrates: bool | None
    """false: a reason of QEMU's names it; null: not known."""
    blocked_reasons: tuple[str, ...]
    device_state: str | None
    """QEMU's own word, the last that was told; null: none was."""
    was_reset: bool
    """Its state could not be moved, QEMU reset it and the guest runs on without what it held."""

    @classmethod
    def of(cls, known: facts.PassthroughFacts) -> Self:
        return cls(
            id=known.id,
            address=known.address,
            iommufd=known.iommufd,
            guest_bus=known.guest_bus,
            guest_address=known.guest_address,
            migrates=known.migrates,
            blocked_reasons=tuple(known.blocked_reasons),
            device_state=known.device_state,
            was_reset=known.was_reset,
        )


class VmFacts(WireModel):
    """What its QEMU says of itself."""

    run_state: str
    """QEMU's own word (RunState)."""
    qemu_status: str
    """QEMU's own word (MigrationStatus)."""
    qemu_version: str
    """For people: what it can do is in `features`."""
    machine_type: str | None
    memory_bytes: int | None
    features: tuple[str, ...]
    passthrough_devices: tuple[str, ...]
    """VFIO devices; not empty means: no postcopy."""
    devices: tuple[PassthroughDevice, ...]
    """The same devices, each with what is said of it."""
    blocked_reasons: tuple[str, ...]
    """QEMU's own reasons not to migrate."""

    @classmethod
    def of(cls, known: facts.VmFacts) -> Self:
        return cls(
            run_state=str(known.run_state),
            qemu_status=str(known.qemu_status),
            qemu_version=known.qemu_version,
            machine_type=known.machine_type,
            memory_bytes=known.memory_bytes,
            features=tuple(sorted(str(feature) for feature in known.features)),
            passthrough_devices=tuple(known.passthrough_devices),
            devices=tuple(PassthroughDevice.of(device) for device in known.devices),
            blocked_reasons=tuple(known.blocked_reasons),
        )


class Vm(WireModel):
    """One VM as this host knows it."""

    name: str
    resource_version: int
    """Also the ETag."""
    profile: str | None
    """null: adopted, and nobody has named its profile."""
    parameters: Mapping[str, Parameter]
    devices: tuple[VmDevice, ...]
    """Passthrough devices, as defined."""
    tracking_policy: TrackingPolicy | None
    """As defined; null: this host's default."""
    decision: TrackingDecision | None
    """The one that stands; null: no passthrough devices are defined."""
    dma_rates: tuple[DmaRate, ...]
    """What its devices were last seen to write, one for each page table with dirty tracking."""
    iommufds_held: bool
    """migrd has a reference to its iommufds and can sample the dirty rates of its devices; not so
    after a restart of migrd, until the VM is started or moved anew."""
    managed: bool
    """Launched by migrd from a profile; else adopted."""
    state: str
    """running, paused, stopped, incoming, departed, unreachable, dead, or QEMU's own word."""
    facts: VmFacts | None
    facts_age_ms: float | None
    epoch: int
    migration_id: str | None
    """The migration going on, on either side."""
    pid: int | None
    serial_path: str | None

    @classmethod
    def of(cls, view: service.VmView) -> Self:
        return cls(
            name=view.name,
            resource_version=view.resource_version,
            profile=view.spec.profile,
            parameters=dict(view.spec.parameters),
            devices=tuple(VmDevice.of(device) for device in view.spec.devices),
            tracking_policy=view.spec.tracking_policy,
            decision=decision_or_none(view.decision),
            dma_rates=tuple(DmaRate.of(sampled) for sampled in view.dma_rates),
            iommufds_held=view.iommufds_held,
            managed=view.managed,
            state=view.state,
            facts=None if view.facts is None else VmFacts.of(view.facts),
            facts_age_ms=ms(view.facts_age_s),
            epoch=view.epoch,
            migration_id=view.migration_id,
            pid=view.pid,
            serial_path=view.serial_path,
        )


class VmList(WireModel):
    """VMs by name."""

    resource_version: int
    """Hand it back with `watch` to wait for anything newer."""
    items: tuple[Vm, ...]
    next_page_token: str | None


class Health(WireModel):
    """The daemon's event loop answers."""

    status: str


class Check(WireModel):
    """One line of readiness."""

    name: str
    ok: bool
    message: str


class Readiness(WireModel):
    """The daemon can do its work; when it cannot, the answer is a problem with status 503."""

    ready: bool
    checks: tuple[Check, ...]


class Event(WireModel):
    """The `data` of one server-sent event; `id` and `kind` are also its `id` and `event` lines."""

    id: int
    at: At
    kind: str
    """migration.phase, migration.round, migration.decision, vm.changed, vm.verdict_changed,
    peer.changed, arbiter.reachable, arbiter.unreachable,
    device.changed, iommu.changed, host.changed, events.lost; new kinds may come."""
    vm: str | None
    migration_id: str | None
    body: Mapping[str, JsonValue]
    """Figures of the event; quantities carry their unit in their names."""
