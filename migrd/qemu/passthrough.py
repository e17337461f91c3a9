"""Passthrough devices in QEMU's words: what it offers, how it is told of one, what it says of one.

QEMU has several names for the same device:

    id           `hostdev0`: ours, in QOM, in events, in the migration stream
    own name     `0000:41:00.2` (host=, sysfsdev=), `VFIO_FD34` (a descriptor, up to QEMU 10.0;
                 later ones use the id): in blocked-reasons, in error-desc and on stderr

The number in VFIO_FD34 is QEMU's own. What was inherited at the start has the number it was given
there; of a device plugged later QEMU tells no number, so it is learnt from the reason that turned
up with it, if one did.

Traps
- device_add wants JSON types since QEMU 9.2: `true`, not "on", where a property is a bool, and "on"
  where it is an OnOffAuto. Older ones take both. So the types are asked for with the names.
- A reason about VFIO that names no device (a vIOMMU, several devices without P2P) may mean any:
  then it is not known of any that it migrates.
- When a device cannot be moved into the next state nor back, QEMU resets it, lets the migration
  fail and the guest run on. Only error-desc (and stderr) says so, until the next migration: the
  VFIO_MIGRATION events look as after a cancel. With pause-before-switchover the reset comes first,
  and the failure only when the migration is continued.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Final

from migrd.core.facts import PassthroughFacts
from migrd.core.vfio_launch import GivenBy, QemuVfioFeature, VfioLaunch, VfioLaunchDevice
from migrd.qemu.wire import json_object

DRIVER: Final = "vfio-pci"
IOMMUFD: Final = "iommufd"
PERIPHERAL: Final = "/machine/peripheral"
DEVICES_BOUND: Final = 256
"""More devices than a machine can have: what is beyond is not remembered."""
WORD_BOUND: Final = 128
ERROR_BOUND: Final = 2048
"""Characters of an error-desc that are looked at."""

_PROPERTIES: Final[Mapping[QemuVfioFeature, str]] = MappingProxyType(
    {
        QemuVfioFeature.DEVICE_FD: "fd",
        QemuVfioFeature.ENABLE_MIGRATION: "enable-migration",
        QemuVfioFeature.MIGRATION_EVENTS: "migration-events",
        QemuVfioFeature.DEVICE_DIRTY_TRACKING: "x-device-dirty-page-tracking",
        QemuVfioFeature.MULTIFD_DEVICE_STATE: "x-migration-multifd-transfer",
    }
)
_RESET: Final = re.compile(r"([^\s:]+(?::[^\s:]+)*): Failed setting device state.*Resetting device")
_INTEGER: Final = re.compile(r"u?int\d*")

States = tuple[tuple[str, str], ...]


# What it offers


def read_properties(answer: object) -> Mapping[str, str]:
    """Name -> type, from qom-list-properties or device-list-properties; empty for a refusal."""
    rows = [json_object(row) for row in answer] if isinstance(answer, list) else []
    return {str(row["name"]): str(row.get("type")) for row in rows if "name" in row}


def vfio_features(
    device: Mapping[str, str], iommufd: Mapping[str, str]
) -> frozenset[QemuVfioFeature]:
    """From the properties of `vfio-pci` and of the object type `iommufd` (empty: there is none)."""
    found = {feature for feature, name in _PROPERTIES.items() if name in device}
    if IOMMUFD in device and iommufd:
        found.add(QemuVfioFeature.IOMMUFD)
        if "fd" in iommufd:
            found.add(QemuVfioFeature.IOMMUFD_FD)
    return frozenset(found)


def needed_features(
    devices: Iterable[VfioLaunchDevice], *, new_iommufds: bool
) -> frozenset[QemuVfioFeature]:
    """What a QEMU must offer to take these devices as they are to be given."""
    needed = {QemuVfioFeature.IOMMUFD_FD, QemuVfioFeature.IOMMUFD} if new_iommufds else set()
    for device in devices:
        if device.iommufd is not None:
            needed.add(QemuVfioFeature.IOMMUFD)
        if device.given_by is GivenBy.FD:
            needed.add(QemuVfioFeature.DEVICE_FD)
        needed |= {f for f, name in _PROPERTIES.items() if name in device.properties}
    return frozenset(needed)


# How it is told


def device_add(
    device: VfioLaunchDevice, fd_name: str, types: Mapping[str, str]
) -> dict[str, object]:
    """The arguments of device_add; `fd_name` is what getfd gave the descriptor."""
    arguments: dict[str, object] = {"driver": DRIVER, "id": device.id}
    if device.given_by is GivenBy.FD:
        arguments["fd"] = fd_name
    elif device.sysfs_path is not None:
        arguments["sysfsdev"] = device.sysfs_path
    else:
        arguments["host"] = device.address
    named = {
        "iommufd": device.iommufd,
        "bus": device.guest_bus,
        "addr": device.guest_address,
    }
    arguments |= {name: value for name, value in named.items() if value is not None}
    more = {name: _typed(text, types.get(name, "")) for name, text in device.properties.items()}
    return arguments | more


def _typed(text: str, kind: str) -> object:
    if kind == "bool" and text in ("on", "off"):
        return text == "on"
    if _INTEGER.fullmatch(kind) and text.isdecimal():
        return int(text)
    return text


def own_names(launch: VfioLaunch, fds: Mapping[str, int]) -> dict[str, str]:
    """QEMU's own name -> id, of devices that were inherited under these numbers (by address)."""
    inherited = [device for device in launch.devices if device.address in fds]
    return {f"VFIO_FD{fds[device.address]}": device.id for device in inherited}


@dataclass
class KnownDevices:
    """What a daemon remembers of one QEMU's devices, and QEMU does not tell."""

    launch: VfioLaunch = field(default_factory=VfioLaunch)
    names: dict[str, str] = field(default_factory=dict)
    """QEMU's own name -> id."""

    def address(self, id_: str) -> str | None:
        return next((d.address for d in self.launch.devices if d.id == id_), None)

    def iommufd(self, id_: str) -> str | None:
        return next((d.iommufd for d in self.launch.devices if d.id == id_), None)

    def add(self, device: VfioLaunchDevice, own_name: str | None) -> None:
        """It was plugged."""
        self.remove(device.id)
        iommufds = self.launch.iommufds
        if device.iommufd is not None and device.iommufd not in iommufds:
            iommufds = (*iommufds, device.iommufd)
        devices = (*self.launch.devices, device)
        self.launch = replace(self.launch, iommufds=iommufds, devices=devices)
        if own_name is not None:
            self.names[own_name] = device.id

    def remove(self, id_: str) -> None:
        """It was unplugged, with its iommufd object if nobody else was on that."""
        gone = [device for device in self.launch.devices if device.id == id_]
        left = tuple(device for device in self.launch.devices if device.id != id_)
        unused = {device.iommufd for device in gone} - {device.iommufd for device in left}
        kept = tuple(iommufd for iommufd in self.launch.iommufds if iommufd not in unused)
        self.launch = replace(self.launch, iommufds=kept, devices=left)
        self.names = {name: owner for name, owner in self.names.items() if owner != id_}


# What it says


def judged(
    devices: Iterable[PassthroughFacts], names: Mapping[str, str], blocked_reasons: Iterable[str]
) -> tuple[PassthroughFacts, ...]:
    """The devices, each with QEMU's reasons that name it and what they say of its migration."""
    known = list(devices)
    reasons: dict[str, list[str]] = {}
    has_nameless = False
    for reason in blocked_reasons:
        owner = _owner(reason, known, names)
        if owner is not None:
            reasons.setdefault(owner, []).append(reason)
        else:
            has_nameless = has_nameless or "vfio" in reason.lower()
    return tuple(
        replace(
            device,
            migrates=False if device.id in reasons else None if has_nameless else True,
            blocked_reasons=tuple(reasons.get(device.id, ())),
        )
        for device in known
    )


def _owner(
    reason: str, devices: Iterable[PassthroughFacts], names: Mapping[str, str]
) -> str | None:
    for device in devices:
        if reason.startswith((f"{device.id}:", f"{device.address or device.id}:")):
            return device.id
    return next((id_ for name, id_ in names.items() if reason.startswith(f"{name}:")), None)


def read_reset_devices(error: str | None, names: Mapping[str, str]) -> tuple[str, ...]:
    """Devices that an error-desc says were reset; ids where QEMU's own name is known."""
    if error is None or "Resetting device" not in error:
        return ()
    found = _RESET.findall(error[:ERROR_BOUND])
    return tuple(dict.fromkeys(names.get(name, name)[:WORD_BOUND] for name in found))


def name_in_new_reason(before: Iterable[str], after: Iterable[str]) -> str | None:
    """QEMU's own name of a device that was plugged between two looks at blocked-reasons."""
    new = [reason for reason in after if reason not in set(before)]
    found = {match[0] for reason in new if (match := re.match(r"VFIO_FD\d+(?=:)", reason))}
    return found.pop() if len(found) == 1 else None


def with_device_state(states: States, told: Mapping[str, object]) -> States:
    """`states` after one VFIO_MIGRATION event. A state never met is kept in its own word."""
    path = str(told.get("qom-path", ""))
    id_ = str(told.get("device-id") or path.rpartition("/")[2])[:WORD_BOUND]
    word = str(told.get("device-state", "unknown"))[:WORD_BOUND]
    known = dict(states)
    if not id_ or (id_ not in known and len(known) >= DEVICES_BOUND):
        return states
    known[id_] = word
    return tuple(sorted(known.items()))


def read_slot(devfn: object) -> str | None:
    """`slot.function` as VfioLaunchDevice has it, from the property `addr`."""
    if not isinstance(devfn, int) or isinstance(devfn, bool) or not 0 <= devfn < 256:
        return None
    return f"{devfn >> 3:02x}.{devfn & 7:x}"
