"""What migrd does for its clients: the one interface the API (and nothing else) is built on.

Views are snapshots: frozen, never a live object. `generation` of a migration grows by one with
every change a client can see; `resource_version` is one counter over the whole daemon, so that a
watcher can ask for "anything newer than n". Calls raise the RequestError family, Unavailable or
JournalError.

Longer than other modules because it is one port, and whoever builds on it reads all of it.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from migrd.core.admission import Admission
from migrd.core.convergence import Decision, Estimate
from migrd.core.devices import Device, DeviceKind, IommuInstance, KernelFacts
from migrd.core.dma_rate import SampledRate
from migrd.core.facts import Round, SpecDevice, VmFacts, VmSpec
from migrd.core.migration import Cause, Mode, Policy, Refusal, Request
from migrd.core.standing import StandingDecision
from migrd.core.tracking import Migratability, Plan, Reason, TrackingPolicy
from migrd.engine.arbiter_port import ArbiterState, NoArbiter
from migrd.engine.ports import StoredResolution
from migrd.engine.rate_views import AskedRate, DirtyRatesView, HistoryView


class Role(StrEnum):
    """Which side of a migration this host is."""

    SOURCE = "source"
    DESTINATION = "destination"


class Whereabouts(StrEnum):
    """Where the guest of a migration runs, as far as this host can prove."""

    SOURCE = "source"
    DESTINATION = "destination"
    NOWHERE = "nowhere"
    MOVING = "moving"
    """Between STOP and RESUME: it runs on neither side at this moment."""
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class TimelineEntry:
    """A phase, when it was entered, and how long it lasted (None while it lasts)."""

    phase: str
    wall_s: float
    monotonic_s: float
    duration_s: float | None


@dataclass(frozen=True)
class Progress:
    """The newest figures of the transfer; None where QEMU has not said."""

    total_bytes: int | None = None
    transferred_bytes: int | None = None
    remaining_bytes: int | None = None
    dirty_bytes_per_s: float | None = None
    bandwidth_bytes_per_s: float | None = None
    throttle_percent: int = 0
    rounds: int = 0
    qemu_status: str | None = None
    postcopy_requests: int | None = None
    stalled_s: float | None = None
    """How long nothing has moved; None while it moves."""


@dataclass(frozen=True)
class Condition:
    """One standing fact, as Kubernetes clients know them: type, status True/False/Unknown."""

    type: str
    status: str
    reason: str
    message: str
    since_wall_s: float


@dataclass(frozen=True)
class ResolutionView:
    """An operator's word on a migration: the record, and what became of it."""

    stored: StoredResolution
    carried_out_wall_s: float | None
    """None: not yet, or something else has settled the migration first."""
    is_pending: bool


@dataclass(frozen=True)
class MigrationView:
    """One migration as this host knows it."""

    id: str
    role: Role
    vm: str
    source: str
    destination: str
    phase: str
    """core.phases.Phase on the source, core.handover.DestinationPhase on the destination."""
    generation: int
    resource_version: int
    is_terminal: bool
    guest_runs_on: Whereabouts
    epoch: int
    created_wall_s: float
    timeline: tuple[TimelineEntry, ...]
    mode: Mode
    policy: Policy | None
    progress: Progress
    estimate: Estimate | None = None
    last_decision: Decision | None = None
    cause: Cause | None = None
    refusals: tuple[Refusal, ...] = ()
    conditions: tuple[Condition, ...] = ()
    blackout_s: float | None = None
    """Upper bound on one clock: source's STOP to the destination's RESUME known here."""
    qemu_downtime_s: float | None = None
    elapsed_s: float = 0.0
    total_s: float | None = None
    next_step: str | None = None
    """What a person should do now, when there is something."""
    requested_by: str = ""
    queue_position: int | None = None
    resolutions: tuple[ResolutionView, ...] = ()
    """What operators have said of it here, oldest first."""


@dataclass(frozen=True)
class VmView:
    """One VM as this host knows it."""

    name: str
    resource_version: int
    spec: VmSpec
    managed: bool
    """Launched by migrd from a profile (else adopted)."""
    state: str
    """running, paused, stopped, incoming, departed, unreachable, dead, or QEMU's own run state."""
    facts: VmFacts | None
    facts_age_s: float | None
    epoch: int
    migration_id: str | None = None
    """The migration going on, on either side."""
    pid: int | None = None
    serial_path: str | None = None
    decision: StandingDecision | None = None
    """About its passthrough devices; None: it has none, or nobody has named them."""
    dma_rates: tuple[SampledRate, ...] = ()
    """What its devices were last seen to write, one for each page table with dirty tracking."""
    iommufds_held: bool = False
    """migrd has its own reference to its iommufds: dirty DMA can be peeked at. Not so after a
    restart of the daemon, until the VM is started or moved anew."""


@dataclass(frozen=True)
class PeerView:
    name: str
    url: str
    up: bool | None
    """None: not asked yet."""
    checked_wall_s: float | None
    error: str | None
    migrd_version: str | None = None


@dataclass(frozen=True)
class HostView:
    """This host."""

    name: str
    migrd_version: str
    boot_wall_s: float
    qemu_binaries: Mapping[str, str | None]
    """Profile name -> QEMU's version, None when it cannot be asked."""
    profiles: tuple[str, ...]
    outgoing_slots: int
    outgoing_active: int
    incoming_slots: int
    incoming_active: int
    memory_available_bytes: int | None
    all_iommus_track_dirty: bool | None
    """None: not known; `all_iommus_track_dirty_why` says of which."""
    tls: bool
    vms: int
    peers: tuple[PeerView, ...] = ()
    all_iommus_track_dirty_why: str = ""
    """For people: the instances it rests on, and how their answers are known."""
    iommus: tuple[IommuInstance, ...] = ()
    """By name."""
    kernel: KernelFacts | None = None
    devices: int = 0
    """How many devices are, or could be, passed through."""
    inventory_trouble: tuple[str, ...] = ()
    """What of this host's hardware could not be read."""
    tracking_policy: TrackingPolicy = TrackingPolicy.AUTO
    forbidden_tracking_policies: tuple[TrackingPolicy, ...] = ()
    arbiter: ArbiterState = NoArbiter.state


@dataclass(frozen=True)
class DeviceVerdict:
    """What a VM with one device alone could be promised."""

    migratability: Migratability
    """What is proven."""
    migratability_at_best: Migratability
    """If what is unknown turns out well."""
    can_start: bool
    """A VM could be started with it as things are; else some of the reasons say what is in the
    way."""
    reasons: tuple[Reason, ...] = ()


@dataclass(frozen=True)
class DeviceView:
    """One device that is, or could be, passed through."""

    device: Device
    verdict: DeviceVerdict
    resource_version: int
    in_use_by: str | None = None
    """The VM that has it; None: none that is known."""

    @property
    def is_ready(self) -> bool:
        """A VFIO driver has it, so a VM could be given it as things are."""
        device = self.device
        return (
            device.kind is DeviceKind.VFIO_MDEV
            or device.vfio_cdev is not None
            or "vfio" in (device.driver or "")
        )


@dataclass(frozen=True)
class PlanView:
    """What a migration would meet: every refusal at once, and the estimate."""

    vm: str
    destination: str | None
    """None: no migration was asked about."""
    possible: bool
    refusals: tuple[Refusal, ...]
    warnings: tuple[Refusal, ...]
    memory_bytes: int | None
    mode_choices: tuple[Mode, ...]
    features_missing: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """"source"/"destination" -> features that QEMU lacks."""
    predicted_total_s: float | None = None
    """The three predictions: as the VM was measured last, by what the newest migration away from
    here got of the link; None: not known."""
    predicted_blackout_s: float | None = None
    predicted_converges: bool | None = None
    dirty_bytes_per_s: float | None = None
    """By the guest's CPUs, measured last; None: not known."""
    dirty_rate_age_s: float | None = None
    decision: StandingDecision | None = None
    """About its passthrough devices, as it would be; None: it has none."""
    plan_there: Plan | None = None
    """What the destination would decide; None: nothing, or it did not say."""


@dataclass(frozen=True)
class WhatIf:
    """A question that changes nothing. None: as the VM is defined."""

    vm: str
    move: Request | None = None
    """A migration to think through."""
    devices: tuple[SpecDevice, ...] | None = None
    tracking_policy: TrackingPolicy | None = None
    downtime_limit_s: float | None = None


@dataclass(frozen=True)
class PlugRequest:
    """A passthrough device to add to a VM."""

    address: str
    id: str | None = None
    """None: the first hostdevN that is free."""
    guest_bus: str | None = None
    guest_address: str | None = None
    accept_lower: bool = False
    """Someone has agreed that the VM may be less migratable with it."""


@dataclass(frozen=True)
class Answer:
    """What became of a client's wish about a migration."""

    admission: Admission
    reason: str
    message: str
    migration: MigrationView


@dataclass(frozen=True)
class Published:
    """One event of the stream. `id` grows by one; `kind` is e.g. migration.phase,
    migration.round, migration.decision, vm.changed, vm.verdict_changed, peer.changed,
    arbiter.reachable, arbiter.unreachable, device.changed, iommu.changed, host.changed,
    events.lost."""

    id: int
    wall_s: float
    kind: str
    vm: str | None
    migration_id: str | None
    body: Mapping[str, object]


@dataclass(frozen=True)
class Check:
    """One line of readiness."""

    name: str
    ok: bool
    message: str


class Resolution(StrEnum):
    """An operator's word on a migration in needs_operator."""

    DESTINATION_FENCED = "destination_fenced"
    """The destination can never run the guest (powered off, its QEMU proven dead before it ran)."""
    DESTINATION_RUNS = "destination_runs"
    """The guest was seen to run on the destination."""
    USE_DESTINATION_COPY = "use_destination_copy"
    """The source is dead, or off for good, and did not run on after the destination had its copy:
    that copy may run. Also taken by the destination of a guest that is loaded there."""
    GUEST_LOST = "guest_lost"
    """Give the guest up."""


class Service(Protocol):
    """The engine, as its clients see it."""

    def host(self) -> HostView: ...

    def readiness(self) -> Sequence[Check]: ...

    def devices(self) -> tuple[int, Sequence[DeviceView]]:
        """(resource_version, all devices by address)."""

    def device(self, address: str) -> DeviceView:
        """Raises NotFound (`unknown_device`)."""

    async def probe_device(self, address: str, *, by: str) -> DeviceView:
        """Ask the kernel about a device now, and note the answers. Raises NotFound, Conflict
        (`device_in_use`, `driver_not_bound`), Unavailable."""

    def vms(self) -> tuple[int, Sequence[VmView]]:
        """(resource_version, all VMs by name)."""

    def vm(self, name: str) -> VmView: ...

    async def define_vm(self, spec: VmSpec, *, dry_run: bool) -> tuple[VmView, bool]:
        """Define a VM, or name the profile of an adopted one; (view, created). Idempotent."""

    async def forget_vm(self, name: str) -> None:
        """Forget a VM that is not running here."""

    async def start_vm(self, name: str) -> VmView: ...

    async def stop_vm(self, name: str) -> VmView: ...

    async def plug_device(self, vm: str, request: PlugRequest, *, by: str) -> VmView:
        """Add a passthrough device to a VM, running or not. Judged first: raises Refused with all
        reasons, nothing touched."""

    async def unplug_device(self, vm: str, id_: str, *, by: str) -> VmView:
        """Take one out, together with the guest. Raises NotFound (`unknown_device`), Conflict
        (`unplug_refused_by_guest`, ...), Unavailable (`unplug_pending`: ask again)."""

    def dirty_rates(self, vm: str) -> DirtyRatesView:
        """How fast a VM's memory gets dirty, as it was measured last. Raises NotFound."""

    def dirty_rate_history(
        self, vm: str, *, since_wall_s: float | None, step_s: int | None
    ) -> HistoryView:
        """The same of the last hours, as far as kept. None: an hour, as fine as it is kept."""

    async def measure_dirty_rate(self, vm: str, *, by: str) -> AskedRate:
        """Measure it soon. Raises NotFound, Conflict (`vm_migrating`, `vm_stopped`,
        `vm_unreachable`, `sampling_off`)."""

    async def plan(self, request: Request) -> PlanView: ...

    async def what_if(self, question: WhatIf) -> PlanView:
        """What a start or a migration would meet, were things so. Changes nothing."""

    async def create_migration(
        self, request: Request, *, idempotency_key: str | None, body_digest: str
    ) -> tuple[MigrationView, bool]:
        """(view, created). False: the same key and body came before. Raises Conflict
        (`already_migrating`, ...), NotFound (`unknown_vm`, `unknown_destination`), Invalid
        (`idempotency_key_reused` when the body differs)."""

    def migrations(self) -> tuple[int, Sequence[MigrationView]]:
        """(resource_version, all, newest first)."""

    def migration(self, migration_id: str) -> MigrationView: ...

    async def wait_newer(self, resource_version: int, *, within_s: float) -> int:
        """The daemon's resource_version, as soon as it exceeds the one given or time is over."""

    async def rounds(self, migration_id: str) -> Sequence[Round]: ...

    async def decisions(self, migration_id: str) -> Sequence[Decision]: ...

    async def cancel(self, migration_id: str, *, by: str) -> Answer: ...

    async def switch_over(self, migration_id: str, *, by: str) -> Answer: ...

    async def change_policy(self, migration_id: str, policy: Policy, *, by: str) -> Answer: ...

    async def resolve(
        self, migration_id: str, resolution: Resolution, *, evidence: str, by: str
    ) -> Answer: ...

    def events(
        self, *, after_id: int | None
    ) -> AbstractAsyncContextManager[AsyncIterator[Published]]:
        """The stream, from after `after_id` where the bounded history still has it (else the
        first event is `events.lost`), from now when None. A reader that is too slow gets
        `events.lost` and goes on."""
