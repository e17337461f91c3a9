"""The directory of one QEMU: what this daemon, or the next one, needs to know of it.

<runtime_dir>/vms/<vm>/<instance>/      as migrd.processes.instance tells; besides
    qmp.sock        in-band monitor
    oob.sock        second monitor, for the out-of-band lane
    serial.log      what the guest printed, where the profile says so
"""

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Final

from migrd.errors import Unavailable, VmmUnreachable
from migrd.processes import instance as instances
from migrd.processes.instance import proven
from migrd.processes.process import Life, ProcessIdentity, look_up
from migrd.qemu.attachment import identify_listener
from migrd.qemu.device_record import devices_as_json, devices_of_json
from migrd.qemu.passthrough import KnownDevices

SUN_PATH_BYTES: Final = 107
"""Longest path of a unix socket (unix(7): 108 with the closing null)."""


@dataclass(frozen=True)
class Instance(instances.Instance):
    """One QEMU's directory; it need not exist."""

    below: ClassVar[str] = "vms"

    @property
    def qmp_path(self) -> Path:
        return self.directory / "qmp.sock"

    @property
    def oob_path(self) -> Path:
        return self.directory / "oob.sock"

    @property
    def serial_path(self) -> Path:
        return self.directory / "serial.log"

    @property
    def spare_bytes(self) -> int:
        """By how much its sockets' paths fall short of the limit; negative: too long."""
        longest = max(len(os.fsencode(path)) for path in (self.qmp_path, self.oob_path))
        return SUN_PATH_BYTES - longest


@dataclass(frozen=True, kw_only=True)
class LaunchRecord(instances.LaunchRecord):
    """What launch.json says."""

    has_serial: bool
    devices: KnownDevices = field(default_factory=KnownDevices)
    """Its passthrough devices."""
    locked_bytes: int = 0
    """How much memory they may have it lock."""

    def _more(self) -> Mapping[str, object]:
        return {
            "serial": self.has_serial,
            "devices": devices_as_json(self.devices),
            "locked_bytes": self.locked_bytes,
        }

    @classmethod
    def _more_of(cls, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        return {
            "has_serial": bool(fields["serial"]),
            "devices": devices_of_json(fields.get("devices")),
            "locked_bytes": int(fields.get("locked_bytes", 0)),
        }


def rewrite_devices(instance: Instance, devices: KnownDevices) -> None:
    """Keep that these are its passthrough devices now. Blocking. Raises Unavailable."""
    record = LaunchRecord.read(instance)
    try:
        if record is not None:
            replace(record, devices=devices).write(instance)
    except OSError as failure:
        text = f"{instance.record_path}: {failure.strerror}: the devices of {instance.vm} not noted"
        raise Unavailable(text, code="devices_not_noted") from failure


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
    identity = record.identity if record is not None else None
    life, pidfd = proven(instance, identity)
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
