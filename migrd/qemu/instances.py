"""The directory of one QEMU: what this daemon, or the next one, needs to know of it.

    <runtime_dir>/vms/<vm>/<instance>/      mode 0700
        launch.json     what was launched, and which process it became
        qmp.sock        in-band monitor
        oob.sock        second monitor, for the out-of-band lane
        stderr.log      QEMU's last words; locked while any process of this launch lives
        serial.log      what the guest printed, where the profile says so

Written in this order, so that a daemon killed at any line leaves something the next one can read:

    mkdir ► stderr.log, locked ► launch.json ► fork, exec ► launch.json with the process's identity
            (flock(2))           (intent)

The lock belongs to the open file that QEMU inherits as its stderr, from the instant of the fork on.
The kernel drops it when the last process that has it open ends, however it ends. So

    lock taken by us     nothing of this launch lives: proof of death, also where no pid was noted
    lock held            something lives: QEMU, or a child of it

and a process is taken for dead only when its identity is proven dead *and* the lock is free.
Nothing is fsynced: what power failure takes, it takes together with the process.
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Self

from migrd.core.facts import SpecDevice, VmSpec
from migrd.core.tracking_request import TrackingPolicy
from migrd.errors import Unavailable, VmmUnreachable
from migrd.qemu.device_record import devices_as_json, devices_of_json
from migrd.qemu.passthrough import KnownDevices
from migrd.qemu.process import Life, ProcessIdentity, identify_listener, look_up

SUN_PATH_BYTES: Final = 107
"""Longest path of a unix socket (unix(7): 108 with the closing null)."""
LAST_WORDS_BYTES: Final = 4096
RECORD_BYTES_LIMIT: Final = 1 << 20
RECORD_VERSION: Final = 1


@dataclass(frozen=True)
class Instance:
    """One QEMU's directory; it need not exist."""

    runtime_dir: Path
    vm: str
    name: str

    @property
    def directory(self) -> Path:
        return self.runtime_dir / "vms" / self.vm / self.name

    @property
    def record_path(self) -> Path:
        return self.directory / "launch.json"

    @property
    def qmp_path(self) -> Path:
        return self.directory / "qmp.sock"

    @property
    def oob_path(self) -> Path:
        return self.directory / "oob.sock"

    @property
    def stderr_path(self) -> Path:
        return self.directory / "stderr.log"

    @property
    def serial_path(self) -> Path:
        return self.directory / "serial.log"

    @property
    def spare_bytes(self) -> int:
        """By how much its sockets' paths fall short of the limit; negative: too long."""
        longest = max(len(os.fsencode(path)) for path in (self.qmp_path, self.oob_path))
        return SUN_PATH_BYTES - longest

    def remove(self) -> None:
        """Remove the directory with all that is in it, and the VM's if it was the last. Blocking.

        Only for what is proven dead. Raises OSError.
        """
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.directory)
        with contextlib.suppress(OSError):  # another instance of the VM is there
            self.directory.parent.rmdir()

    def last_words(self) -> str:
        """The end of stderr.log, in whole lines where it was cut. Bounded; "" when there is none.

        At most one page from the page cache, so it may be called on the event loop.
        """
        try:
            fd = os.open(self.stderr_path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            return ""
        try:
            start = max(0, os.fstat(fd).st_size - LAST_WORDS_BYTES)
            text = os.pread(fd, LAST_WORDS_BYTES, start).decode(errors="replace")
        except OSError:
            return ""
        finally:
            os.close(fd)
        if start:
            text = text.partition("\n")[2] or text
        return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text).strip()


@dataclass(frozen=True)
class LaunchRecord:
    """What launch.json says."""

    spec: VmSpec
    instance: str
    incoming: bool
    argv: tuple[str, ...]
    digest: str
    has_serial: bool
    requested_wall_s: float
    devices: KnownDevices = field(default_factory=KnownDevices)
    """Its passthrough devices."""
    locked_bytes: int = 0
    """How much memory they may have it lock."""
    identity: ProcessIdentity | None = None
    """None: written before the start, and never completed."""

    def with_identity(self, identity: ProcessIdentity) -> Self:
        return replace(self, identity=identity)

    def write(self, instance: Instance) -> None:
        """Replace the record as a whole. Blocking. Raises OSError."""
        fields = {
            "version": RECORD_VERSION,
            "vm": self.spec.name,
            "profile": self.spec.profile,
            "parameters": dict(self.spec.parameters),
            "wanted_devices": [asdict(device) for device in self.spec.devices],
            "tracking_policy": self.spec.tracking_policy,
            "instance": self.instance,
            "incoming": self.incoming,
            "argv": list(self.argv),
            "digest": self.digest,
            "serial": self.has_serial,
            "requested_wall_s": self.requested_wall_s,
            "devices": devices_as_json(self.devices),
            "locked_bytes": self.locked_bytes,
            "process": None if self.identity is None else self.identity.as_json(),
        }
        aside = instance.record_path.with_suffix(".new")
        aside.write_text(json.dumps(fields, indent=1) + "\n")
        aside.replace(instance.record_path)

    @classmethod
    def read(cls, instance: Instance) -> Self | None:
        """None when there is no record, or none that can be understood. Blocking."""
        try:
            with instance.record_path.open("rb") as file:
                fields = json.loads(file.read(RECORD_BYTES_LIMIT))
            if fields["version"] != RECORD_VERSION or fields["vm"] != instance.vm:
                return None
            return cls(
                spec=_spec(instance.vm, fields),
                instance=str(fields["instance"]),
                incoming=bool(fields["incoming"]),
                argv=tuple(map(str, fields["argv"])),
                digest=str(fields["digest"]),
                has_serial=bool(fields["serial"]),
                requested_wall_s=float(fields["requested_wall_s"]),
                devices=devices_of_json(fields.get("devices")),
                locked_bytes=int(fields.get("locked_bytes", 0)),
                identity=ProcessIdentity.of_json(fields["process"]),
            )
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None


def _spec(vm: str, fields: Mapping[str, Any]) -> VmSpec:
    """Raises ValueError, KeyError, TypeError."""
    policy = fields.get("tracking_policy")
    return VmSpec(
        name=vm,
        profile=fields["profile"],
        parameters=dict(fields["parameters"]),
        devices=tuple(SpecDevice(**row) for row in fields.get("wanted_devices", ())),
        tracking_policy=None if policy is None else TrackingPolicy(policy),
    )


def rewrite_devices(instance: Instance, devices: KnownDevices) -> None:
    """Keep that these are its passthrough devices now. Blocking. Raises Unavailable."""
    record = LaunchRecord.read(instance)
    try:
        if record is not None:
            replace(record, devices=devices).write(instance)
    except OSError as failure:
        text = f"{instance.record_path}: {failure.strerror}: the devices of {instance.vm} not noted"
        raise Unavailable(text, code="devices_not_noted") from failure


def open_locked_log(instance: Instance) -> int:
    """Make stderr.log and lock it; the descriptor is the caller's. Blocking. Raises OSError."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    fd = os.open(instance.stderr_path, flags, 0o600)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return fd


def lock_says(instance: Instance) -> Life:
    """Whether anything of this launch lives, by the lock on stderr.log. Blocking."""
    try:
        fd = os.open(instance.stderr_path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        # the log comes before all else: an empty directory never had a process
        return Life.DEAD if _is_empty(instance.directory) else Life.UNKNOWN
    except OSError:
        return Life.UNKNOWN
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return Life.ALIVE
    except OSError:
        return Life.UNKNOWN
    finally:
        os.close(fd)
    return Life.DEAD


def _is_empty(directory: Path) -> bool:
    try:
        return not any(directory.iterdir())
    except OSError:
        return False


@dataclass(frozen=True)
class Found:
    """An instance's directory, and what is proven of its process. Owns `pidfd`."""

    instance: Instance
    record: LaunchRecord | None
    identity: ProcessIdentity | None
    life: Life
    pidfd: int | None = None


def examine(instance: Instance) -> Found:
    """What a directory left by an earlier daemon says. Blocking."""
    record = LaunchRecord.read(instance)
    lock = lock_says(instance)
    identity = record.identity if record is not None else None
    life, pidfd = (Life.UNKNOWN, None) if identity is None else look_up(identity)
    if lock is Life.DEAD and life is not Life.ALIVE:
        life = Life.DEAD
    elif life is not Life.ALIVE:
        life = Life.UNKNOWN if lock is Life.ALIVE else life
        listener = identity_by_socket(instance) if life is Life.UNKNOWN else None
        if listener is not None:  # never noted, or noted wrongly
            identity = listener
            life, pidfd = look_up(identity)
            if record is not None:
                with contextlib.suppress(OSError):
                    record.with_identity(identity).write(instance)
    return Found(instance, record, identity, life, pidfd)


def identity_by_socket(instance: Instance) -> ProcessIdentity | None:
    """For a launch that was cut off before its process was noted. The sockets are QEMU's own
    work, in a directory that only we may enter: who listens there is the QEMU."""
    try:
        return identify_listener(instance.oob_path)
    except VmmUnreachable:
        return None
