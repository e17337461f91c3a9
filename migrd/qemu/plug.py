"""Plugging a passthrough device into a running QEMU, and taking one out again.

    plug     getfd (SCM_RIGHTS) ► object-add iommufd ► getfd ► device_add
    unplug   device_del ··· the guest lets go ··· DEVICE_DELETED ► object-del iommufd

Both may be said again after an answer was lost: what is there already is passed over, and a
half-made iommufd object is made anew. A refusal is undone: the descriptor closed, the object gone.

Traps (seen on QEMU 10.0)
- A name given to getfd is used up by whoever takes the descriptor, and closed by it when it fails
  later than that; one that was not taken stays until closefd. So closefd after each refusal, and
  its own refusal means that there was nothing to close.
- A property that is not known, or has a wrong value, is found out after the descriptor was taken,
  and then nobody closes it. So what can be known is looked at first.
- QEMU never closes the descriptor of an iommufd object that was handed to it, not even when the
  object goes: one empty /dev/iommu stays open in QEMU until it ends. It pins no memory.
- device_add pins all memory of the guest on the main loop: for a large guest that is seconds in
  which nothing in band is answered. Hence a deadline of its own.
- device_del only asks the guest. While it is asked again QEMU says "already in the process of
  unplug". A guest that has no driver, or no ACPI yet, never answers; a reset of the machine takes
  the device out. On a bus without hot-plug (pcie.0) QEMU refuses at once.
- While a migration runs QEMU refuses both.
"""

import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Final

from migrd.core.vfio_launch import GivenBy, QemuVfioFeature, VfioLaunchDevice
from migrd.engine.ports import PluggedFds
from migrd.errors import VmmRefused, VmmTimedOut
from migrd.qemu import passthrough
from migrd.qemu.monitor import EventStream, Gap
from migrd.qemu.passthrough import DRIVER, IOMMUFD, PERIPHERAL
from migrd.qemu.preparation import Ask
from migrd.qemu.wire import CommandRefused, json_object

PLUG_DEADLINE_S: Final = 120.0
LOOK_AGAIN_S: Final = 2.0
"""An event may be lost with a connection: so often it is looked whether the device is gone."""
_DELETED: Final = "DEVICE_DELETED"
_GUEST_KEEPS_IT: Final = "DEVICE_UNPLUG_GUEST_ERROR"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lane:
    """What is needed of a machine; all of it raises VmmError."""

    ask: Ask
    send_fd: Callable[[str, int], Awaitable[None]]
    """getfd."""
    subscribe: Callable[[Iterable[str]], AbstractContextManager[EventStream]]


async def plug(lane: Lane, device: VfioLaunchDevice, fds: PluggedFds) -> None:
    """As `Vmm.plug_device`."""
    kind = await _kind(lane, device.id)
    if kind is not None:
        _refuse_other(device.id, kind)
        return
    types = await _properties(lane, DRIVER)
    _refuse_lacking(device, fds, passthrough.vfio_features(types, await _properties(lane, IOMMUFD)))
    _refuse_unknown(device, types)
    made = None
    if device.iommufd is not None and await _is_new(lane, device.iommufd, fds.iommufd):
        made = device.iommufd
        await _make_iommufd(lane, made, fds.iommufd)
    fd_name = f"migrd-{device.id}"
    try:
        if fds.device is not None:
            await lane.send_fd(fd_name, fds.device)
        arguments = passthrough.device_add(device, fd_name, types)
        await lane.ask("device_add", arguments, deadline_s=PLUG_DEADLINE_S)
    except CommandRefused as refusal:
        await _undo(lane, fd_name if fds.device is not None else None, made)
        text = f"QEMU did not take {device.address} as {device.id}: {refusal.description}"
        raise VmmRefused(text, code="plug_refused") from refusal


def _refuse_lacking(
    device: VfioLaunchDevice, fds: PluggedFds, offered: frozenset[QemuVfioFeature]
) -> None:
    if (device.given_by is GivenBy.FD) != (fds.device is not None):
        given = "no descriptor came" if fds.device is None else "a descriptor came"
        text = f"{device.id} is to be given by {device.given_by.value}, and {given} with it"
        raise VmmRefused(text, code="bad_descriptors")
    needed = passthrough.needed_features([device], new_iommufds=fds.iommufd is not None)
    lacking = sorted(feature.value for feature in needed - offered)
    if lacking:
        text = f"this QEMU does not offer what {device.address} needs: {', '.join(lacking)}"
        raise VmmRefused(f"{text}; use a newer QEMU (10.0)", code="passthrough_unsupported")


def _refuse_unknown(device: VfioLaunchDevice, types: Mapping[str, str]) -> None:
    """Before QEMU does: it would keep the device's descriptor."""
    unknown = sorted({*device.properties} - {*types})
    if unknown:
        text = f"{device.id}: QEMU's {DRIVER} has no property {', '.join(unknown)}"
        raise VmmRefused(text, code="plug_refused")


async def _is_new(lane: Lane, iommufd: str, fd: int | None) -> bool:
    """Whether the iommufd object has to be made: always where a descriptor came for it."""
    if fd is not None:
        return True
    rows = await lane.ask("qom-list", {"path": "/objects"})
    there = {json_object(row).get("name") for row in (rows if isinstance(rows, list) else [])}
    return iommufd not in there


async def _make_iommufd(lane: Lane, id_: str, fd: int | None) -> None:
    """A fresh object: one of that name is left of a try whose answer was lost."""
    fd_name = f"migrd-{id_}"
    try:
        await lane.ask("object-del", {"id": id_})
    except CommandRefused as refusal:
        if "in use" in refusal.description:
            text = f"the iommufd object {id_} has devices on it already, so it cannot be a new one"
            raise VmmRefused(text, code="plug_refused") from refusal
    arguments = {"qom-type": IOMMUFD, "id": id_}
    if fd is not None:
        await lane.send_fd(fd_name, fd)
        arguments["fd"] = fd_name
    try:
        await lane.ask("object-add", arguments)
    except CommandRefused as refusal:
        await _undo(lane, fd_name, None)
        text = f"QEMU did not take the iommufd object {id_}: {refusal.description}"
        raise VmmRefused(text, code="plug_refused") from refusal


async def _undo(lane: Lane, fd_name: str | None, iommufd: str | None) -> None:
    if fd_name is not None:
        await _ask_quietly(lane, "closefd", {"fdname": fd_name})
    if iommufd is not None:
        await _ask_quietly(lane, "object-del", {"id": iommufd})


async def unplug(lane: Lane, id_: str, *, within_s: float, iommufd: str | None = None) -> None:
    """As `Vmm.unplug_device`. `iommufd`: the object it is known to have been on, for when the guest
    has let go of it already, after nobody waited any more."""
    deadline_s = time.monotonic() + within_s
    with lane.subscribe((_DELETED, _GUEST_KEEPS_IT)) as events:
        kind = await _kind(lane, id_)
        if kind is not None:
            _refuse_other(id_, kind)
            iommufd = await iommufd_of(lane.ask, id_) or iommufd
            await _delete(lane, id_)
            while not await _is_deleted(lane, events, id_, deadline_s):
                if time.monotonic() >= deadline_s:
                    text = f"the guest has not let go of {id_} within {within_s:g} s, and still may"
                    raise VmmTimedOut(text, code="unplug_timed_out")
    if iommufd is not None:
        await _ask_quietly(lane, "object-del", {"id": iommufd})  # refused: another device has it


def _refuse_other(id_: str, kind: str) -> None:
    if not kind.startswith("child<vfio-"):
        what = kind.removeprefix("child<").rstrip(">")
        text = f"{id_} is no passthrough device of this machine but its {what}"
        raise VmmRefused(text, code="no_passthrough_device")


async def _delete(lane: Lane, id_: str) -> None:
    try:
        await lane.ask("device_del", {"id": id_})
    except CommandRefused as refusal:
        is_under_way = "already in the process of unplug" in refusal.description
        if not is_under_way and refusal.error_class != "DeviceNotFound":
            text = f"QEMU keeps {id_}: {refusal.description}"
            raise VmmRefused(text, code="unplug_refused") from refusal


async def _is_deleted(lane: Lane, events: EventStream, id_: str, deadline_s: float) -> bool:
    """Wait for what is told next, a little while. Raises VmmRefused when the guest keeps it."""
    left_s = max(0.0, deadline_s - time.monotonic())
    told = await events.within(min(LOOK_AGAIN_S, left_s))
    if told is None or isinstance(told, Gap):
        return await _kind(lane, id_) is None
    path = str(told.data.get("path", ""))
    if id_ not in (told.data.get("device"), path.removeprefix(f"{PERIPHERAL}/")):
        return False
    if told.name == _GUEST_KEEPS_IT:
        text = f"the guest does not let go of {id_}"
        raise VmmRefused(text, code="unplug_refused_by_guest")
    return True


async def _kind(lane: Lane, id_: str) -> str | None:
    """QOM type of a device with this id; None when there is none."""
    rows = await lane.ask("qom-list", {"path": PERIPHERAL})
    for row in map(json_object, rows if isinstance(rows, list) else []):
        if row.get("name") == id_:
            return str(row.get("type"))
    return None


async def _properties(lane: Lane, kind: str) -> dict[str, str]:
    """Empty when this QEMU has no such type."""
    try:
        answer = await lane.ask("qom-list-properties", {"typename": kind})
    except CommandRefused:
        return {}
    return dict(passthrough.read_properties(answer))


async def iommufd_of(ask: Ask, id_: str) -> str | None:
    """Id of the iommufd object of a device; None where it has none, or QEMU does not say."""
    try:
        link = await ask("qom-get", {"path": f"{PERIPHERAL}/{id_}", "property": IOMMUFD})
    except CommandRefused:
        return None
    return str(link).rpartition("/")[2] or None


async def _ask_quietly(lane: Lane, command: str, arguments: dict[str, Any]) -> None:
    """For what is to be gone: a refusal says that it is, or that somebody else needs it."""
    try:
        await lane.ask(command, arguments)
    except CommandRefused as refusal:
        log.debug("%s", refusal.message)
