"""Every setting: its type, its bounds, its default, and what it means.

Longer than a module should be, because it is a list: split up, it could not be read as one.

The description is what the administrator reads in `config/migrd.toml`: it names the unit and what
the setting is for. Defaults that follow other settings are filled in by `_derive` before
validation, so that whoever reads a Settings never meets "not set" where a value is needed.
"""

import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final, Self, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    field_validator,
    model_validator,
)

from migrd.core.migration import Policy, WhenNotConverging
from migrd.core.tracking import TrackingPolicy

NAME_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
DAY_S: Final = 86400.0


class Tls(StrEnum):
    """Whether QEMU's migration stream is encrypted."""

    REQUIRED = "required"
    OFF = "off"


class QemuSampling(StrEnum):
    """How QEMU measures what the guest's CPUs write."""

    PAGE_SAMPLING = "page-sampling"
    DIRTY_BITMAP = "dirty-bitmap"
    OFF = "off"


class ArbiterKind(StrEnum):
    """Who says who may run a VM."""

    JOURNAL = "journal"
    ETCD = "etcd"


class LogLevel(StrEnum):
    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class LogFormat(StrEnum):
    AUTO = "auto"
    JSON = "json"
    CONSOLE = "console"


def _octal(mode: object) -> object:
    """A file mode as people write it: "0660", "660" or 0o660."""
    if not isinstance(mode, str):
        return mode
    try:
        return int(mode.removeprefix("0o"), 8)
    except ValueError:
        raise ValueError('should be an octal mode such as "0660"') from None


def _permissions(mode: int) -> int:
    if not 0 <= mode <= 0o777:
        raise ValueError("should be permissions, at most 0777")
    return mode


def _absolute(path: Path) -> Path:
    if not path.is_absolute():
        raise ValueError("should be an absolute path")
    if "\0" in str(path):
        raise ValueError("should hold no null byte")
    return path


def _https(url: str) -> str:
    host = url.removeprefix("https://").rstrip("/")
    if not url.startswith("https://") or not host or set(host) & set("/?#@ \t"):
        raise ValueError("should be https://<address>:<port>, without user, path or query")
    return f"https://{host}"


_ENDPOINT: Final = re.compile(r"https?://(\[[0-9a-fA-F:.]+\]|[^\s/?#@:\[\]]+):([0-9]{1,5})")


def _endpoint(given: str) -> str:
    url = given.rstrip("/")
    found = _ENDPOINT.fullmatch(url)
    if found is None or not 1 <= int(found[2]) <= 65535:
        raise ValueError(
            "should be http:// or https://<address>:<port>, without user, path or query"
        )
    return url


_KEY_PREFIX: Final = re.compile(r"(/[A-Za-z0-9._-]+)+")


def _key_prefix(given: str) -> str:
    if not _KEY_PREFIX.fullmatch(given):
        raise ValueError("should be as /migrd or /site-1/migrd: no / at the end")
    return given


_ADDRESS: Final = re.compile(
    r"[0-9a-f]{4,8}:[0-9a-f]{2}:[01][0-9a-f]\.[0-7]"
    r"|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
)


def _device_address(given: str) -> str:
    address = given.lower()
    if not _ADDRESS.fullmatch(address):
        raise ValueError("should be a PCI address such as 0000:41:00.2, or the UUID of an mdev")
    return address


AbsolutePath = Annotated[Path, AfterValidator(_absolute)]
FileMode = Annotated[int, BeforeValidator(_octal), AfterValidator(_permissions)]
HostName = Annotated[str, Field(pattern=NAME_PATTERN)]
DeviceAddress = Annotated[str, AfterValidator(_device_address)]
Address = Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[^\s/\[\]@]+$")]
Port = Annotated[int, Field(ge=1, le=65535)]
Endpoint = Annotated[str, Field(max_length=300), AfterValidator(_endpoint)]
KeyPrefix = Annotated[str, Field(max_length=200), AfterValidator(_key_prefix)]
Seconds = Annotated[float, Field(gt=0, le=365 * DAY_S)]
Slots = Annotated[int, Field(ge=0, le=1000)]
UserId = Annotated[int, Field(ge=0, lt=2**32 - 1)]


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_is_a_number(cls, value: object) -> object:
        # Python counts true as 1; no setting here is a truth value
        if isinstance(value, bool):
            raise ValueError("should not be true or false")
        return value


class HostSettings(_Section):
    """This host and where migrd keeps its files."""

    name: HostName = Field(
        default_factory=socket.gethostname,
        description="Name of this host, as the other hosts' rosters call it. "
        "Default: the system's host name.",
    )
    state_dir: AbsolutePath = Field(
        default=Path("/var/lib/migrd"),
        description="Directory of what must survive a reboot: the journal.",
    )
    runtime_dir: AbsolutePath = Field(
        default=Path("/run/migrd"),
        description="Directory of sockets and of one directory per QEMU process. Must survive a "
        "restart of the daemon, and should not survive a reboot.",
    )
    profiles_dir: AbsolutePath = Field(
        default=Path("/etc/migrd/profiles"),
        description="Directory of launch profiles, one TOML file each. Owned by the administrator: "
        "whoever writes here decides what QEMU runs.",
    )
    adopt_dir: AbsolutePath | None = Field(
        default=None,
        description="Directory where QEMU processes that others launched put their QMP sockets, "
        "<vm>.qmp each (and <vm>.oob.qmp for a second monitor); migrd adopts them by name. "
        "Not set: none are adopted.",
    )


class ApiTcpSettings(_Section):
    """The HTTP interface on a TCP port, beside the unix socket. Never without authentication."""

    host: Address = Field(
        default="127.0.0.1",
        description="Address to listen on. Off the loopback, tls_cert and tls_key are needed.",
    )
    port: Port = Field(default=7441, description="Port to listen on.")
    token_file: AbsolutePath | None = Field(
        default=None,
        description="File with the bearer tokens that clients must send, one a line: a plain token "
        "of 16 characters or more (then mode 0600), or <name> read|write sha256:<its SHA-256>. "
        "Needed. Default: the systemd credential api-token, where there is one.",
    )
    tls_cert: AbsolutePath | None = Field(
        default=None,
        description="File with the certificate chain, PEM. Default: the systemd credential "
        "api-tls-cert, where there is one.",
    )
    tls_key: AbsolutePath | None = Field(
        default=None,
        description="File with the private key of tls_cert, PEM. Default: the systemd credential "
        "api-tls-key, where there is one.",
    )


class ApiSettings(_Section):
    """The HTTP interface for control planes, people and Prometheus."""

    socket: AbsolutePath = Field(
        default=Path("/run/migrd/api.sock"),
        description="Unix socket to listen on; at most 107 bytes long. "
        "Default: api.sock in host.runtime_dir.",
    )
    socket_mode: FileMode = Field(
        default=0o660,
        description='Mode of the socket: octal digits in quotes, "0660", or a TOML octal number, '
        "0o660.",
    )
    socket_group: Annotated[str, Field(min_length=1, max_length=64)] | None = Field(
        default=None,
        description="Group that owns the socket. Not set: the daemon's own group.",
    )
    allow_uids: tuple[UserId, ...] = Field(
        default=(),
        description="Numeric users that may use the socket. With allow_uids and allow_gids both "
        "empty, whoever can open the socket may. Root and the daemon's own user always may.",
    )
    allow_gids: tuple[UserId, ...] = Field(
        default=(),
        description="Numeric groups whose members may use the socket.",
    )
    body_limit_bytes: Annotated[int, Field(ge=1024, le=2**30)] = Field(
        default=1 << 16, description="Longest request body accepted, in bytes."
    )
    tcp: ApiTcpSettings | None = Field(default=None)


class PeerSettings(_Section):
    """Daemon to daemon: our own listener and identity, with mutual TLS."""

    listen_host: Address | None = Field(
        default=None,
        description="Address that the other hosts' migrd connect to. Not set: no listener, and no "
        "migration to or from this host.",
    )
    listen_port: Port = Field(default=7443, description="Port of that listener.")
    cert: AbsolutePath | None = Field(
        default=None,
        description="File with our certificate chain, PEM; it must carry host.name. Default: the "
        "systemd credential peer-cert, where there is one.",
    )
    key: AbsolutePath | None = Field(
        default=None,
        description="File with the private key of cert, PEM. Default: the systemd credential "
        "peer-key, where there is one.",
    )
    ca: AbsolutePath | None = Field(
        default=None,
        description="File with the authority that signs all hosts' certificates, PEM. Default: "
        "the systemd credential peer-ca, where there is one.",
    )


class RosterEntry(_Section):
    """One other host."""

    url: Annotated[str, AfterValidator(_https)] = Field(
        description="Where its migrd listens for other hosts: https://<address>:<port>."
    )
    migration_host: Address | None = Field(
        default=None,
        description="Address for the migration stream to that host, where it differs from the one "
        "that host names itself (another network, a tunnel).",
    )


class MigrationSettings(_Section):
    """How guests travel, what a request gets when it does not say, and every deadline."""

    listen_host: Address = Field(
        default="127.0.0.1",
        description="Address that an incoming QEMU listens on and that the source connects to. "
        "Default: peer.listen_host, or the loopback.",
    )
    port_range: tuple[Port, Port] | None = Field(
        default=None,
        description="First and last port for incoming guests, e.g. [49152, 49215]. Not set: any "
        "free port.",
    )
    tls: Tls = Field(
        default=Tls.REQUIRED,
        description='Encryption of the stream of guest memory: "required" or "off". Off means '
        "that whoever sees the network sees the guest's memory.",
    )
    tls_dir: AbsolutePath | None = Field(
        default=None,
        description="Directory with ca-cert.pem, server-cert.pem, server-key.pem, client-cert.pem "
        'and client-key.pem for QEMU. Needed with tls = "required" once there is a peer. Without a '
        "dh-params.pem beside them QEMU makes new parameters for each migration, which takes about "
        "a second of it.",
    )
    outgoing_slots: Slots = Field(
        default=2, description="Migrations away from this host at one time; others wait. 0: none."
    )
    incoming_slots: Slots = Field(
        default=2, description="Migrations to this host at one time; others are refused. 0: none."
    )
    downtime_limit_ms: Annotated[int, Field(ge=1, le=2_000_000)] = Field(
        default=300,
        description="Longest acceptable blackout, in milliseconds, where the request does not say.",
    )
    deadline_s: Seconds = Field(
        default=3600.0,
        description="Time for a migration until the guest moves, in seconds, where the request "
        "does not say; after it the migration is rolled back.",
    )
    max_bandwidth_bytes_per_s: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        default=0,
        description="Bandwidth limit, in bytes per second, where the request does not say. 0: "
        "unlimited.",
    )
    when_not_converging: WhenNotConverging = Field(
        default=WhenNotConverging.WAIT,
        description='What to do when the downtime limit will not be met as things are: "wait", '
        '"throttle", "postcopy" or "give_up", where the request does not say.',
    )
    max_throttle_percent: Annotated[int, Field(ge=1, le=99)] = Field(
        default=80,
        description="Strongest slowing of vCPUs, in percent, where the request does not say.",
    )
    multifd_channels: Annotated[int, Field(ge=0, le=255)] = Field(
        default=0,
        description="Parallel connections for memory, where the request does not say. 0: one "
        "plain stream.",
    )
    preflight_deadline_s: Seconds = Field(
        default=15.0, description="Time for the checks of both hosts, in seconds."
    )
    prepare_deadline_s: Seconds = Field(
        default=60.0,
        description="Time for the destination to start a QEMU that waits, in seconds.",
    )
    switchover_deadline_s: Seconds | None = Field(
        default=None,
        description="Time from the stop of the guest until all of it has arrived, in seconds; "
        "then the connection is cut and the guest goes on at the source. Not set: twice the "
        "downtime limit and 2 s more.",
    )
    grant_deadline_s: Seconds = Field(
        default=30.0,
        description="Time for the destination to answer that it runs the guest, in seconds; after "
        "it the migration is in needs_operator, and goes on asking.",
    )
    rollback_deadline_s: Seconds = Field(
        default=30.0,
        description="Time for the guest to be seen on the source again after a decision to roll "
        "back, in seconds; then needs_operator.",
    )
    release_deadline_s: Seconds = Field(
        default=60.0,
        description="Time for the source's QEMU to end after the guest has moved, in seconds.",
    )
    stall_s: Seconds = Field(
        default=10.0,
        description="No byte moved for so long, in seconds: the link counts as stalled.",
    )
    receive_idle_s: Seconds = Field(
        default=60.0,
        description="A destination that has received nothing, and heard nothing from the source, "
        "for so long, in seconds, refuses and cleans up. Where postcopy is allowed, only once no "
        "guest can arrive any more; until then it waits, and says so (condition NotGoingOn).",
    )
    loaded_idle_s: Seconds = Field(
        default=120.0,
        description="A destination that holds a whole guest and has heard nothing from the source "
        "for so long, in seconds, says so (condition NotGoingOn). It never refuses by time: its "
        "copy may be the last one, so a person decides (migrd resolve).",
    )

    def switchover_deadline_for(self, downtime_limit_s: float) -> float:
        """Seconds from the guest's stop to all of it having arrived, for this downtime limit."""
        if self.switchover_deadline_s is not None:
            return self.switchover_deadline_s
        return 2 * downtime_limit_s + 2.0

    def default_policy(self) -> Policy:
        """What a request gets that says nothing."""
        return Policy(
            when_not_converging=self.when_not_converging,
            downtime_limit_s=self.downtime_limit_ms / 1000,
            deadline_s=self.deadline_s,
            max_bandwidth_bytes_per_s=self.max_bandwidth_bytes_per_s,
            max_throttle_percent=self.max_throttle_percent,
        )


class DirectSettings(_Section):
    """Processes that hand their guests over: migrd itself moves their memory, without QEMU."""

    socket: AbsolutePath = Field(
        default=Path("/run/migrd/direct.sock"),
        description="Unix socket where they hand over; at most 107 bytes long. "
        "Default: direct.sock in host.runtime_dir.",
    )
    socket_mode: FileMode = Field(
        default=0o660,
        description='Mode of the socket: octal digits in quotes, "0660", or a TOML octal number, '
        "0o660.",
    )
    socket_group: Annotated[str, Field(min_length=1, max_length=64)] | None = Field(
        default=None,
        description="Group that owns the socket. Not set: the daemon's own group.",
    )
    allow_uids: tuple[UserId, ...] = Field(
        default=(),
        description="Numeric users whose processes may hand over. Root and the daemon's own user "
        "always may. A profile's `user` needs to be here, and able to reach the socket.",
    )
    channels: Annotated[int, Field(ge=1, le=16)] = Field(
        default=2,
        description="Parallel connections for memory, where the request does not say "
        "(multifd_channels).",
    )
    largest_guest_mib: Annotated[int, Field(ge=1, le=24 << 20)] = Field(
        default=24 << 20,
        description="Most memory of one guest, in MiB, that is taken from another host. A launch "
        "profile may allow less.",
    )


class WatchSettings(_Section):
    """Watching the VMs of this host."""

    interval_s: Annotated[float, Field(ge=0.05, le=3600)] = Field(
        default=1.0, description="Time between two looks at each VM, in seconds."
    )


class DevicesSettings(_Section):
    """The devices that this host passes through to VMs, and the tracking of what they write."""

    rescan_interval_s: Annotated[float, Field(ge=1, le=86_400)] = Field(
        default=60.0,
        description="Time between two looks at all of sysfs, in seconds. Changes are usually "
        "heard of at once; the look is for those whose announcement was lost.",
    )
    tracking_policy: TrackingPolicy = Field(
        default=TrackingPolicy.AUTO,
        description="When to ask for dirty tracking as a VM starts, where the request does not "
        'say: "auto" (when every passthrough device can be tracked), "always" (wherever an IOMMU '
        'can), "never", or "require" (as auto, but a VM that could not be live-migrated is '
        "refused).",
    )
    forbidden_tracking_policies: tuple[TrackingPolicy, ...] = Field(
        default=(),
        description="Policies that a request may not ask for on this host.",
    )
    sample_interval_s: Annotated[float, Field(ge=1, le=86_400)] = Field(
        default=10.0,
        description="Time between two samples of what the devices of the VMs write, in seconds.",
    )
    sample_budget_ms: Annotated[float, Field(gt=0, le=10_000)] = Field(
        default=20.0,
        description="Kernel time that a sample of one VM may take, in milliseconds: it looks at "
        "as much of the memory as fits. Nothing is cleared by it, so nothing is ever missed.",
    )
    expected: tuple[DeviceAddress, ...] = Field(
        default=(),
        description="Addresses of the devices that are meant for VMs: PCI addresses as in "
        "0000:41:00.2, UUIDs of mdevs. `migrd doctor` says which of them are not ready; nothing "
        "is allowed or forbidden by this list.",
    )


class SamplingSettings(_Section):
    """Dirty rates of the VMs, measured outside of migrations."""

    qemu_mode: QemuSampling = Field(
        default=QemuSampling.PAGE_SAMPLING,
        description='How QEMU measures what the guest\'s CPUs write: "page-sampling" (hashes some '
        'pages twice; the guest does not notice), "dirty-bitmap" (counts every page, but '
        "write-protects the guest's memory each time, so that the first write to each page is "
        'slower; only with KVM), or "off".',
    )
    interval_s: Annotated[float, Field(ge=5, le=86_400)] = Field(
        default=30.0,
        description="Time between two measurements of one VM, in seconds; longer where the budget "
        "says so.",
    )
    windows_ms: Annotated[
        tuple[Annotated[int, Field(ge=50, le=60_000)], ...], Field(min_length=1, max_length=8)
    ] = Field(
        default=(250, 1000, 4000),
        description="Lengths of the windows of one measurement, in milliseconds. A page that is "
        "written again in a longer window counts once: two lengths or more tell the working set. "
        "QEMU before 8.2 takes whole seconds.",
    )
    sampled_pages: Annotated[int, Field(ge=128, le=1_000_000)] = Field(
        default=2048,
        description="So many pages of a guest are hashed in each window, within what QEMU takes "
        "(128 to 4096 of each GiB): four times as many halve the error.",
    )
    budget_percent: Annotated[float, Field(gt=0, le=100)] = Field(
        default=1.0,
        description="CPU time that all measurements of this host together may take, in percent of "
        "one core. When it is used up, the intervals grow.",
    )


class JournalSettings(_Section):
    """The durable record of what migrd means to do."""

    path: AbsolutePath = Field(
        default=Path("/var/lib/migrd/journal.db"),
        description="The journal, an SQLite database on a file system whose fsync can be trusted. "
        "Default: journal.db in host.state_dir.",
    )
    keep_days: Annotated[float, Field(gt=0, le=36500)] = Field(
        default=30.0, description="Ended migrations are kept for so many days."
    )
    keep_migrations: Annotated[int, Field(ge=1, le=10_000_000)] = Field(
        default=10_000, description="At most so many ended migrations are kept."
    )


class ArbiterSettings(_Section):
    """Who says who may run a VM: the two hosts' journals alone, or an etcd cluster for a fleet."""

    kind: ArbiterKind = Field(
        default=ArbiterKind.JOURNAL,
        description="\"journal\" (the source's and the destination's journals decide; nothing else "
        'is needed) or "etcd" (each VM has a record there, changed by compare-and-swap: a guest '
        "whose destination was lost in the handover can be taken back). The same on all hosts.",
    )
    endpoints: Annotated[tuple[Endpoint, ...], Field(max_length=16)] = Field(
        default=(),
        description="The members of the etcd cluster (3.4 or newer), each as "
        "https://<address>:<port>. Needed with etcd; name all of them.",
    )
    prefix: KeyPrefix = Field(
        default="/migrd",
        description="Keys of migrd in etcd begin so: <prefix>/vms/<vm> and <prefix>/hosts/<host>. "
        "The same on all hosts that share VMs.",
    )
    ca: AbsolutePath | None = Field(
        default=None,
        description="File with the authority of etcd's certificates, PEM. Not set: the system's "
        "authorities.",
    )
    cert: AbsolutePath | None = Field(
        default=None,
        description="File with this host's certificate for etcd, PEM, where etcd wants one.",
    )
    key: AbsolutePath | None = Field(
        default=None, description="File with the private key of cert, PEM."
    )
    user: Annotated[str, Field(min_length=1, max_length=256)] | None = Field(
        default=None,
        description="User of etcd, where it asks for one; needs a role with readwrite on the keys "
        "below prefix.",
    )
    password_file: AbsolutePath | None = Field(
        default=None,
        description="File with the password of user: one line, mode 0600. Read again whenever "
        "etcd asks for it.",
    )
    request_timeout_ms: Annotated[int, Field(ge=100, le=60_000)] = Field(
        default=3000,
        description="Deadline of each call of the arbiter, whichever members it takes, in "
        "milliseconds. A member has a third of it to answer, then the next one is asked.",
    )
    lease_ttl_s: Annotated[int, Field(ge=5, le=3600)] = Field(
        default=15,
        description="A host that is not heard of for so long leaves etcd's list of hosts, in "
        "seconds. The list is for people; no guest starts or stops by it.",
    )


class LogSettings(_Section):
    """The daemon's log, on standard error."""

    level: LogLevel = Field(
        default=LogLevel.INFO,
        description='The least that is written: "debug", "info", "warning" or "error".',
    )
    format: LogFormat = Field(
        default=LogFormat.AUTO,
        description='"json" (one object per line, with journald\'s priority), "console" (for '
        'people), or "auto": console on a terminal, json elsewhere.',
    )


class EventsSettings(_Section):
    """The event stream (/v1/events)."""

    history_events: Annotated[int, Field(ge=1, le=1_000_000)] = Field(
        default=10_000,
        description="So many past events are kept for clients that come back (Last-Event-ID).",
    )
    queue_events: Annotated[int, Field(ge=1, le=100_000)] = Field(
        default=1_000,
        description="A client that is so many events behind is told that it lost some.",
    )


@dataclass(frozen=True)
class _Origins:
    """Where values came from: no part of what the settings are, so all are equal."""

    by_key: Mapping[str, str] = field(default_factory=dict, compare=False)


class Settings(_Section):
    """Everything an administrator can set."""

    host: HostSettings = Field(default_factory=HostSettings)
    api: ApiSettings = Field(default_factory=ApiSettings)
    peer: PeerSettings = Field(default_factory=PeerSettings)
    peers: dict[HostName, RosterEntry] = Field(default_factory=dict)
    migration: MigrationSettings = Field(default_factory=MigrationSettings)
    direct: DirectSettings = Field(default_factory=DirectSettings)
    watch: WatchSettings = Field(default_factory=WatchSettings)
    devices: DevicesSettings = Field(default_factory=DevicesSettings)
    sampling: SamplingSettings = Field(default_factory=SamplingSettings)
    journal: JournalSettings = Field(default_factory=JournalSettings)
    arbiter: ArbiterSettings = Field(default_factory=ArbiterSettings)
    log: LogSettings = Field(default_factory=LogSettings)
    events: EventsSettings = Field(default_factory=EventsSettings)

    _origins: _Origins = PrivateAttr(default_factory=_Origins)

    @property
    def origins(self) -> Mapping[str, str]:
        """Dotted key -> where its value came from; only keys that somebody set."""
        return self._origins.by_key

    def with_origins(self, origins: Mapping[str, str]) -> Self:
        self._origins = _Origins(dict(origins))
        return self

    @model_validator(mode="before")
    @classmethod
    def _derive(cls, given: Any) -> Any:
        """Fill in the defaults that follow other settings."""
        if not isinstance(given, Mapping):
            return given
        filled = dict(given)
        for (section, key), (other_section, other_key), suffix in _DERIVED:
            base = _peek(filled.get(other_section), other_key)
            if base is None and suffix is not None:
                continue
            if isinstance(base, str | Path) and _peek(filled.get(section), key) is None:
                value = base if suffix is None else f"{base}/{suffix}"
                filled[section] = _with(filled.get(section), key, value)
        return filled


_DERIVED: Final = (
    (("api", "socket"), ("host", "runtime_dir"), "api.sock"),
    (("direct", "socket"), ("host", "runtime_dir"), "direct.sock"),
    (("journal", "path"), ("host", "state_dir"), "journal.db"),
    (("migration", "listen_host"), ("peer", "listen_host"), None),
)


def _peek(section: object, key: str) -> object:
    if isinstance(section, BaseModel):
        return getattr(section, key, None) if key in section.model_fields_set else None
    return section.get(key) if isinstance(section, Mapping) else None


def _with(section: object, key: str, value: object) -> object:
    if isinstance(section, BaseModel):
        return {**{k: getattr(section, k) for k in section.model_fields_set}, key: value}
    if section is None or isinstance(section, Mapping):
        return {**cast("Mapping[str, object]", section or {}), key: value}
    return section
