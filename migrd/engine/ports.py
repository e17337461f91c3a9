"""What the engine needs of the world, as Protocols. Adapters fulfil them; fakes obey their rules.

    Vmm        one QEMU process of one VM on this host        migrd.qemu
    Launcher   starts, finds and ends QEMU processes          migrd.qemu
    Peer       the other host's migrd                         migrd.peer
    Journal    durable intent                                 migrd.journal
    Clock      time, so that tests can own it                 here: SystemClock

Rules every implementation keeps:
- each call has a deadline of its own and raises the errors its docstring names, no others;
- VmmTimedOut / PeerTimedOut say "not known whether it took effect", never "it did not";
- VmmDied is raised only on proof (the process was seen to exit).

Longer than other modules because whoever writes a fake or an adapter reads all of it at once.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from migrd.core.facts import (
    Feature,
    RunState,
    TransferAddress,
    TransferSample,
    TransferSettings,
    VmFacts,
    VmSpec,
)
from migrd.core.handover import DestinationEvent, DestinationPhase
from migrd.core.migration import MigrationEvent, Request
from migrd.core.rate_reading import MeasuredRate, RateMode, RateOffer
from migrd.core.standing import StandingDecision
from migrd.core.tracking import Migratability, Plan
from migrd.core.vfio_launch import QemuVfioFeature, VfioLaunch, VfioLaunchDevice

if TYPE_CHECKING:
    from migrd.engine.peer_service import HelloFacts


PortRange = tuple[int, int]
"""First and last port, both included."""


@dataclass(frozen=True)
class TlsIdentity:
    """Where QEMU finds its credentials for the migration stream.

    `directory` holds ca-cert.pem, server-cert.pem, server-key.pem, client-cert.pem and
    client-key.pem, the names QEMU's tls-creds-x509 object wants.
    """

    directory: str


@dataclass(frozen=True)
class PassedDevices:
    """Passthrough devices for a new QEMU. The descriptors stay the caller's, who may close them as
    soon as the call has ended: QEMU gets copies of its own."""

    launch: VfioLaunch
    iommufds: Sequence[int] = ()
    """One open /dev/iommu for each of `launch.iommufds`, in their order."""
    device_fds: Mapping[str, int] = field(default_factory=dict)
    """Address -> open VFIO character device, for each device that is given by descriptor."""


@dataclass(frozen=True)
class PluggedFds:
    """Descriptors for one device that is plugged into a running QEMU; the caller's, as above."""

    device: int | None = None
    """Open VFIO character device; None: QEMU opens it by its path in sysfs."""
    iommufd: int | None = None
    """Open /dev/iommu for a new iommufd object; None: the object that the device names is there,
    or QEMU is to open /dev/iommu itself."""


class TransferFeed(Protocol):
    """Samples of one QEMU's migration; statuses arrive with the event, numbers every ~100 ms."""

    @property
    def latest(self) -> TransferSample | None:
        """The newest sample, at once."""

    async def newer(self, *, within_s: float) -> TransferSample | None:
        """The next sample not yet returned by this feed; None when none came within `within_s`
        (which says nothing about the migration).

        Raises VmmDied once the process is proven dead.
        """


class Vmm(Protocol):
    """One QEMU process of one VM on this host. All calls: VmmRefused, VmmTimedOut,
    VmmUnreachable, VmmDied."""

    @property
    def vm(self) -> str: ...

    @property
    def instance(self) -> str:
        """Names this process among all processes the VM ever had here (directory name)."""

    @property
    def pid(self) -> int | None: ...

    @property
    def is_dead(self) -> bool:
        """True only when the process is proven dead."""

    @property
    def is_reachable(self) -> bool:
        """The in-band monitor is connected at this moment."""

    async def facts(self) -> VmFacts: ...

    async def run_state(self) -> RunState:
        """query-status alone: the cheapest sign of life, asked of every VM each second."""

    async def sample(self) -> TransferSample:
        """query-migrate and query-status, asked now."""

    def feed(self) -> AbstractAsyncContextManager[TransferFeed]: ...

    async def prepare_outgoing(self, settings: TransferSettings, tls: TlsIdentity | None) -> None:
        """Set capabilities and parameters for a migration away. Idempotent."""

    async def start_outgoing(self, address: TransferAddress) -> None:
        """QMP `migrate`. Accepted even when nobody listens: the outcome shows in the feed."""

    async def clean_outgoing(self) -> None:
        """Take back what prepare_outgoing added, after a migration that did not happen."""

    async def prepare_incoming(
        self,
        settings: TransferSettings,
        tls: TlsIdentity | None,
        listen_host: str,
        ports: PortRange | None = None,
    ) -> TransferAddress:
        """Listen for the guest on `listen_host`, at a free port of `ports` (None: any); returns
        the address with the port chosen. VmmRefused when none is free."""

    async def set_limits(
        self,
        *,
        max_bandwidth_bytes_per_s: int | None = None,
        downtime_limit_s: float | None = None,
        switchover_bandwidth_bytes_per_s: int | None = None,
    ) -> None:
        """Change limits of a running migration. `switchover_bandwidth` is left out silently
        where QEMU lacks it (Feature.AVAIL_SWITCHOVER_BANDWIDTH)."""

    async def set_throttle(self, percent: int) -> None:
        """Let auto-converge slow the vCPUs to `percent` and no further."""

    async def start_postcopy(self) -> None:
        """Stop the guest here for good, and let it go by postcopy: whatever happens then, this
        QEMU never runs it again by itself."""

    async def continue_switchover(self) -> None:
        """QMP `migrate-continue` at pre-switchover."""

    async def cancel_transfer(self) -> None:
        """QMP `migrate_cancel`. May hang behind a stalled link: then free_stalled()."""

    async def free_stalled(self) -> None:
        """Out-of-band `yank` of the migration connection: answers even when everything else is
        blocked. The source then fails and resumes by itself."""

    async def pause_postcopy(self) -> None:
        """Out-of-band `migrate-pause`."""

    async def listen_for_recovery(
        self, listen_host: str, ports: PortRange | None = None
    ) -> TransferAddress:
        """Out-of-band `migrate-recover` on a paused postcopy destination; listens as
        `prepare_incoming` does."""

    async def resume_postcopy(self, address: TransferAddress) -> None:
        """`migrate` with resume on a paused postcopy source."""

    async def run_guest(self) -> None:
        """QMP `cont`. Only the engine's ownership rules may lead here."""

    async def pause_guest(self) -> None: ...

    async def plug_device(self, device: VfioLaunchDevice, fds: PluggedFds) -> None:
        """Add a passthrough device to the running machine; with `fds.iommufd`, its iommufd object
        too. Nothing happens when it is there already. VmmRefused: QEMU did not take it, and
        nothing of it is left. VmmTimedOut, VmmUnreachable: not known; say it again."""

    async def unplug_device(self, id: str, *, within_s: float) -> None:
        """Take a passthrough device (and its iommufd object, if nobody else uses it) out of the
        machine, together with the guest, which has to let go of it. Nothing happens when it is not
        there. VmmRefused: QEMU or the guest (`unplug_refused_by_guest`) keeps it. VmmTimedOut: the
        guest has not let go within `within_s`, and still may; say it again to go on waiting."""

    async def rate_offer(self) -> RateOffer:
        """What it can measure of its guest's writes outside of migrations; maybe nothing."""

    async def measure_rate(
        self, window_s: float, mode: RateMode, *, pages_per_gib: int
    ) -> MeasuredRate:
        """One measurement; returns when it is over. `window_s`: one of `RateOffer.windows`.
        VmmRefused: it does not measure (`rate_busy`: another measurement is going on), or says what
        no QEMU should. VmmTimedOut: it has not come to an end in time, and may still be going
        on."""

    async def quit(self) -> None:
        """End the process: QMP `quit`, then SIGKILL by pidfd; returns when it is proven dead.
        Raises VmmTimedOut when it could not be seen to exit."""


class Launcher(Protocol):
    """Starts, finds and ends QEMU processes on this host."""

    def check(self, spec: VmSpec, devices: VfioLaunch | None = None) -> str:
        """Digest of what a guest can see of this profile with these parameters (machine, memory,
        devices; of passthrough ones their ids, order and visible properties, not where they are).
        Blocking: files are looked at. Raises Invalid naming each parameter that is wrong and each
        device that the profile does not allow, NotFound for the profile."""

    async def probe(self, spec: VmSpec) -> tuple[str, frozenset[Feature]]:
        """(version for people, features) of the QEMU that the profile names; asked of a process
        without a machine, remembered until the binary changes. Raises as `check`, VmmError."""

    def memory_bytes(self, spec: VmSpec) -> int:
        """RAM of the guest. Blocking, and raises, as `check`."""

    async def vfio_features(self, spec: VmSpec) -> frozenset[QemuVfioFeature]:
        """What the QEMU that the profile names offers for passthrough; found as by `probe`, of the
        same process. Raises as `probe`."""

    async def versions(self) -> Mapping[str, str | None]:
        """QEMU's version for each profile, for people; None where it cannot be asked."""

    async def launch(
        self,
        spec: VmSpec,
        instance: str,
        *,
        incoming: bool,
        devices: PassedDevices | None = None,
    ) -> Vmm:
        """Start a QEMU, detached so that it outlives this daemon; `incoming` waits for a guest
        (`-S -incoming defer`). Raises VmmDied with QEMU's own words when it does not start."""

    async def find(self) -> Sequence[Vmm]:
        """Every QEMU that has a directory of ours or an adopted socket, not yet found before;
        those proven dead since are among them (`is_dead`)."""

    def is_managed(self, vmm: Vmm) -> bool:
        """Launched by us (else adopted)."""

    def spec_of(self, vmm: Vmm) -> VmSpec:
        """What it was launched from; for an adopted one its name alone."""

    def devices_of(self, vmm: Vmm) -> VfioLaunch | None:
        """The passthrough devices it was launched with, or that were noted since; None: none, or
        not known (adopted)."""

    async def note_devices(self, vmm: Vmm, devices: VfioLaunch) -> None:
        """Keep, also for the next daemon, that these are its devices now (after a plug or unplug).
        Raises Unavailable when it cannot be written."""

    def serial_path(self, vmm: Vmm) -> str | None:
        """Where the guest's serial output goes, if the profile has any."""

    async def forget(self, vmm: Vmm) -> None:
        """Close the connections and remove the files of a process that is proven dead."""

    def last_words(self, vmm: Vmm) -> str:
        """The end of the process's stderr, bounded; "" when there is none."""


@dataclass(frozen=True)
class DestinationView:
    """What the destination's migrd says of its side of a migration."""

    migration_id: str
    epoch: int
    phase: DestinationPhase
    generation: int
    address: TransferAddress | None = None
    reason: str | None = None
    """Why it refused, or what is wrong."""
    vmm_died: bool = False
    """Its QEMU is proven dead (and when it was `starting`, nobody can know whether it ran)."""
    transfer_completed: bool = False
    """Its QEMU has all memory (in postcopy: later than `running`)."""
    guest_running: bool = False
    postcopy_paused: bool = False
    """Its QEMU was seen to wait for memory that does not come."""
    arbitrated: bool = False
    """It starts the guest by what the arbiter's record says; GRANT only hastens that."""


@dataclass(frozen=True)
class SourceView:
    """What the source's migrd says of its side, for a destination that wonders."""

    migration_id: str
    epoch: int
    phase: str
    copy_gone: bool = False
    """Its QEMU is proven dead: no memory of the guest comes from there any more."""


@dataclass(frozen=True)
class HostProfile:
    """What preflight needs to know of the destination."""

    host: str
    migrd_version: str
    protocol: int
    qemu_version: str | None
    features: frozenset[str]
    launch_digest: str | None
    incoming_slots_free: int
    memory_available_bytes: int | None
    vm_present: bool
    last_epoch: int
    tls: bool
    refusals: tuple[tuple[str, str], ...] = ()
    """Further reasons of its own not to take this VM, (code, message)."""
    plan: Plan | None = None
    """What it would decide about the VM's passthrough devices; None: the VM has none, or that host
    cannot tell."""
    arbiter: str = "journal"
    """The kind of its arbiter (ArbiterState.kind)."""


class Peer(Protocol):
    """The other host's migrd. All calls: PeerRefused, PeerTimedOut, PeerUnreachable."""

    @property
    def name(self) -> str: ...

    async def hello(self) -> "HelloFacts":
        """Who answers: the sign of life that is asked for every few seconds."""

    async def preflight(self, vm: VmSpec) -> HostProfile: ...

    async def prepare(
        self,
        migration_id: str,
        epoch: int,
        vm: VmSpec,
        settings: TransferSettings,
        *,
        least: Migratability | None = None,
    ) -> DestinationView:
        """Launch the waiting QEMU. Idempotent by migration id. `least`: the VM must not be less
        migratable there than this; None: nobody minds."""

    async def view(
        self, migration_id: str, *, newer_than: int = -1, wait_s: float = 0.0
    ) -> DestinationView:
        """Its side now; with `wait_s`, as soon as its generation exceeds `newer_than`."""

    async def grant(self, migration_id: str, epoch: int, *, run_guest: bool) -> DestinationView:
        """GRANT (idempotent): the destination may run the guest."""

    async def discard(self, migration_id: str, epoch: int, reason: str) -> DestinationView:
        """This migration will never be granted: refuse and clean up."""

    async def listen_for_recovery(self, migration_id: str) -> TransferAddress:
        """Postcopy is broken: pause, and listen for the source's new connection."""

    async def source_view(self, migration_id: str) -> SourceView:
        """(asked by a destination) the source's side now."""


@dataclass(frozen=True)
class JournalRecord:
    """One event of one migration, as it is on disk."""

    migration_id: str
    seq: int
    event: MigrationEvent | DestinationEvent


@dataclass(frozen=True)
class StoredRequest:
    """A migration as asked for; written in one transaction with its idempotency key."""

    id: str
    request: Request
    spec: VmSpec
    epoch: int
    created_wall_s: float
    created_monotonic_s: float = 0.0
    idempotency_key: str | None = None
    body_digest: str | None = None


@dataclass(frozen=True)
class StoredIncoming:
    """The destination's side of a migration, as first asked for by the source."""

    id: str
    source: str
    spec: VmSpec
    epoch: int
    instance: str
    settings: TransferSettings
    created_wall_s: float
    decision: StandingDecision | None = None
    """About its passthrough devices, made before the waiting QEMU is launched."""


@dataclass(frozen=True)
class StoredVm:
    """A VM this host knows: its spec, the epoch of its ownership, and whether it is here."""

    spec: VmSpec
    epoch: int
    here: bool
    instance: str | None
    decision: StandingDecision | None = None
    """The one that stands; None: no passthrough devices, or none was made."""


@dataclass(frozen=True)
class KnownThen:
    """What could be seen of both sides when an operator gave a word."""

    phase: str
    cause: str | None
    """Code of what had called for a person."""
    run_state: str | None
    """Of the VMM on this host; `dead` on proof, None: it did not say."""
    pid: int | None
    peer: str
    """The other host."""
    peer_phase: str | None = None
    """What migrd there said of its side; None: it did not answer."""
    peer_vmm_died: bool | None = None
    peer_guest_running: bool | None = None
    peer_problem: str | None = None
    """Why it did not answer, or what it said was wrong."""


@dataclass(frozen=True)
class StoredResolution:
    """An operator's word on a migration; durable before it is carried out, and kept as long as the
    migration."""

    migration_id: str
    role: str
    """`source` or `destination`: which side this host is."""
    resolution: str
    """service.Resolution."""
    evidence: str
    by: str
    """Who said it: the uid, or the token's name."""
    host: str
    wall_s: float
    monotonic_s: float
    known: KnownThen


@dataclass(frozen=True)
class Replay:
    """Everything the journal holds, for recovery."""

    vms: Sequence[StoredVm]
    outgoing: Sequence[tuple[StoredRequest, Sequence[MigrationEvent]]]
    incoming: Sequence[tuple[StoredIncoming, Sequence[DestinationEvent]]]
    resolutions: Sequence[StoredResolution] = ()
    """Of each migration in the order they were given."""


class Journal(Protocol):
    """Durable intent. Every call returns only after fsync, or raises JournalError with nothing
    written (all or nothing per call)."""

    async def create_outgoing(self, stored: StoredRequest) -> None:
        """The request is durable from here. Raises Conflict when the id or key exists."""

    async def create_incoming(self, stored: StoredIncoming) -> None: ...

    async def append_outgoing(
        self, migration_id: str, events: Sequence[MigrationEvent], vm: StoredVm | None = None
    ) -> None:
        """Append events (and, in the same transaction, what becomes of the VM)."""

    async def append_incoming(
        self, migration_id: str, events: Sequence[DestinationEvent], vm: StoredVm | None = None
    ) -> None: ...

    async def add_resolution(self, word: StoredResolution) -> None:
        """Append an operator's word. Raises JournalError (`unknown_migration`) when there is no
        such migration in that role."""

    async def put_vm(self, vm: StoredVm) -> None: ...

    async def delete_vm(self, name: str) -> None:
        """Forget the VM; never its epoch."""

    async def last_epoch(self, vm: str) -> int:
        """The highest epoch ever stored for a VM of that name, also of deleted ones; 0: none."""

    async def find_key(self, key: str) -> tuple[str, str] | None:
        """(migration id, body digest) stored under an idempotency key."""

    async def add_observations(
        self, migration_id: str, kind: str, rows: Sequence[Mapping[str, object]]
    ) -> None:
        """Rounds and decisions (`kind` "round" or "decision"): kept, not part of anyone's fate."""

    async def observations(
        self, migration_id: str, kind: str
    ) -> Sequence[Mapping[str, object]]: ...

    async def replay(self) -> Replay:
        """Raises JournalError naming the first record that is not understood."""


class Clock(Protocol):
    def monotonic_s(self) -> float: ...

    def wall_s(self) -> float: ...


class SystemClock:
    """The real time."""

    def monotonic_s(self) -> float:
        return time.monotonic()

    def wall_s(self) -> float:
        return time.time()
