"""What is known of a host and its VMs, as values.

Facts come from outside (QMP, sysfs, a peer), so each enum has UNKNOWN and each number that may be
missing is optional: unknown is a state, never a default. Nothing here decides anything.

Somewhat longer than other modules of the core, because what is known belongs in one place.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Self

from migrd.core.harvest_round import SourceRead
from migrd.core.vm_spec import SpecDevice as SpecDevice
from migrd.core.vm_spec import VmSpec as VmSpec


class _Open(StrEnum):
    """An enum of somebody else's words: what we have not met maps to UNKNOWN."""

    @classmethod
    def of(cls, word: object) -> Self:
        try:
            return cls(str(word))
        except ValueError:
            return cls("unknown")


class QemuStatus(_Open):
    """QEMU's MigrationStatus (qapi/migration.json)."""

    NONE = "none"
    SETUP = "setup"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"
    ACTIVE = "active"
    POSTCOPY_DEVICE = "postcopy-device"
    POSTCOPY_ACTIVE = "postcopy-active"
    POSTCOPY_PAUSED = "postcopy-paused"
    POSTCOPY_RECOVER_SETUP = "postcopy-recover-setup"
    POSTCOPY_RECOVER = "postcopy-recover"
    COMPLETED = "completed"
    FAILING = "failing"
    FAILED = "failed"
    COLO = "colo"
    PRE_SWITCHOVER = "pre-switchover"
    DEVICE = "device"
    WAIT_UNPLUG = "wait-unplug"
    UNKNOWN = "unknown"

    @property
    def is_postcopy(self) -> bool:
        """The guest's memory is split over both hosts: neither process may be killed."""
        return self.value.startswith("postcopy")


class RunState(_Open):
    """QEMU's RunState (qapi/run-state.json): what the VM does on this host."""

    DEBUG = "debug"
    INMIGRATE = "inmigrate"
    INTERNAL_ERROR = "internal-error"
    IO_ERROR = "io-error"
    PAUSED = "paused"
    POSTMIGRATE = "postmigrate"
    PRELAUNCH = "prelaunch"
    FINISH_MIGRATE = "finish-migrate"
    RESTORE_VM = "restore-vm"
    RUNNING = "running"
    SAVE_VM = "save-vm"
    SHUTDOWN = "shutdown"
    SUSPENDED = "suspended"
    WATCHDOG = "watchdog"
    GUEST_PANICKED = "guest-panicked"
    COLO = "colo"
    UNKNOWN = "unknown"


class Feature(StrEnum):
    """What a QEMU may or may not offer; found in its schema, never by its version."""

    RETURN_PATH = "return_path"
    EVENTS = "events"
    PAUSE_BEFORE_SWITCHOVER = "pause_before_switchover"
    MULTIFD = "multifd"
    AUTO_CONVERGE = "auto_converge"
    POSTCOPY = "postcopy"
    POSTCOPY_PREEMPT = "postcopy_preempt"
    SWITCHOVER_ACK = "switchover_ack"
    AVAIL_SWITCHOVER_BANDWIDTH = "avail_switchover_bandwidth"
    INCOMING_EXIT_ON_ERROR = "incoming_exit_on_error"
    TLS = "tls"
    TLS_AUTHZ = "tls_authz"
    YANK = "yank"
    OOB = "oob"
    TCG_KEEPS_DIRTY_PAGES = "tcg_keeps_dirty_pages"
    """Its dirty tracking of TCG guests is sound for RAM of any size (QEMU 9.0 on)."""


REQUIRED_FEATURES = frozenset(
    {Feature.RETURN_PATH, Feature.EVENTS, Feature.PAUSE_BEFORE_SWITCHOVER, Feature.YANK}
)
"""Without these the handover cannot be made safe (handover rules, `core.handover`)."""


@dataclass(frozen=True)
class PassthroughFacts:
    """What a running QEMU says of one of its passthrough devices."""

    id: str
    """QEMU's id of it, the same on both hosts."""
    address: str | None = None
    """PCI address or mdev UUID on this host; None where QEMU was given a descriptor and nobody
    remembers of what."""
    iommufd: str | None = None
    """Id of its iommufd object; None: the legacy VFIO group interface, or not known."""
    guest_bus: str | None = None
    """QEMU's id of the bus that it is on in the guest."""
    guest_address: str | None = None
    """Its slot and function there (`05.0`)."""
    migrates: bool | None = None
    """False: a reason of QEMU's names it. None: a reason names no device and may mean it."""
    blocked_reasons: tuple[str, ...] = ()
    """Those of QEMU's reasons that name it."""
    device_state: str | None = None
    """The last that was told, in QEMU's word, be it one never met; None: nothing was told."""
    was_reset: bool = False
    """QEMU reset it, its state could not be moved: what the guest had set up in it is lost."""


@dataclass(frozen=True)
class VmFacts:
    """What a running QEMU says of itself."""

    vm: str
    run_state: RunState
    qemu_status: QemuStatus
    qemu_version: str
    """For people only: features are found in `features`."""
    machine_type: str | None
    memory_bytes: int | None
    features: frozenset[Feature]
    passthrough_devices: tuple[str, ...] = ()
    """QOM ids of VFIO devices; not empty means: no postcopy."""
    watches_dma: bool = False  # it handed over who does; where nobody does is a blocked reason
    devices: tuple[PassthroughFacts, ...] = ()
    """The same devices, each with what is said of it."""
    blocked_reasons: tuple[str, ...] = ()
    """QEMU's own reasons not to migrate."""
    may_lose_dirty_pages: bool = False
    """A TCG guest in a QEMU whose dirty tracking is known to miss pages for RAM of this size."""
    pid: int | None = None

    @property
    def is_running(self) -> bool:
        return self.run_state is RunState.RUNNING


@dataclass(frozen=True)
class TransferSettings:
    """How QEMU is to move the guest; both sides are given the same."""

    downtime_limit_s: float
    max_bandwidth_bytes_per_s: int
    """0 means unlimited."""
    multifd_channels: int = 0
    """0 means one plain stream."""
    auto_converge: bool = False
    postcopy: bool = False
    postcopy_preempt: bool = False
    tls: bool = True
    peer_name: str = ""
    """Host name of the other side, as in its certificate."""
    migration_id: str = ""
    epoch: int = 0
    """Of which migration the stream is, for engines whose streams name it."""
    arbitrated: bool = False
    """The guest is started by what an arbiter's record says (engine.arbiter_port)."""


@dataclass(frozen=True)
class TransferAddress:
    """Where a waiting destination listens."""

    host: str
    port: int


@dataclass(frozen=True)
class TransferSample:
    """One look at a QEMU in the middle of a migration. None: QEMU did not say (its numbers
    vanish when a migration ends)."""

    at_s: float
    """time.monotonic() when it was taken."""
    qemu_status: QemuStatus
    run_state: RunState
    total_bytes: int | None = None
    remaining_bytes: int | None = None
    transferred_bytes: int | None = None
    dirty_pages_per_s: float | None = None
    page_size_bytes: int | None = None
    qemu_dirty_sync_count: int | None = None
    bandwidth_bytes_per_s: float | None = None
    expected_downtime_s: float | None = None
    downtime_s: float | None = None
    setup_time_s: float | None = None
    total_time_s: float | None = None
    throttle_percent: int | None = None
    device_transferred_bytes: int | None = None
    """VFIO device data, where there is any."""
    device_states: tuple[tuple[str, str], ...] = ()
    """(id, state in QEMU's word) of each passthrough device that told of one, by id."""
    reset_devices: tuple[str, ...] = ()
    """Devices that lost their state in a migration that failed: see PassthroughFacts.was_reset.
    Ids, or QEMU's own name for one whose id is not known."""
    multifd_bytes: int | None = None
    postcopy_requests: int | None = None
    error: str | None = None
    """QEMU's `error-desc`."""
    stopped_at_s: float | None = None
    """time.monotonic() when this QEMU's STOP event arrived here; None if it has not."""
    resumed_at_s: float | None = None
    sources: tuple[SourceRead, ...] = ()
    """What each source told in the last harvest round; empty where the VMM harvests."""

    @property
    def is_of_arrival(self) -> bool:
        """Its `completed` is that of the migration by which the guest came to this QEMU, which
        keeps saying so: a guest that has left is in one of very few run states. (UNKNOWN stands
        for "stopped": the event of STOP does not say how.)"""
        left = (RunState.POSTMIGRATE, RunState.FINISH_MIGRATE, RunState.UNKNOWN)
        return self.qemu_status is QemuStatus.COMPLETED and self.run_state not in left


@dataclass(frozen=True)
class Round:
    """One dirty sync of QEMU, or one harvest of ours, seen as a harvest round (words: "round")."""

    number: int
    at_s: float
    """time.monotonic() at the end of the round."""
    duration_s: float
    transferred_bytes: int
    """Sent during the round."""
    remaining_bytes: int
    """Left to send right after the sync: what the next round has to move."""
    dirty_pages_per_s: float | None
    page_size_bytes: int
    bandwidth_bytes_per_s: float | None
    """Measured over the round."""
    throttle_percent: int
    sources: tuple[SourceRead, ...] = ()
    """What each told; empty where the VMM harvests. Of rounds seen at once only the last has it."""
