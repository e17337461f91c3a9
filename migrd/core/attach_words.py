"""What QEMU's last words say about a page table that it could not get, and what follows.

QEMU allocates and attaches by itself, once, and ends when that fails. Its words (hw/vfio/iommufd.c,
backends/iommufd.c; errno as strerror says it):

    … -device vfio-pci,id=hostdev0,…: vfio 0000:41:00.2: Failed to allocate hwpt: Operation not …
    … -device vfio-pci,id=hostdev0,…: vfio VFIO_FD34: [iommufd=7] error attach VFIO_FD34 (34) to
      id=2: Invalid argument

So the device, the rung of its ladder and the errno can be told. Words that say anything else, or
that may mean another device, lead nowhere: an error that is not understood is not retried.
"""

import re
from dataclasses import dataclass
from errno import EBUSY, EINVAL, ENOENT, ENOMEM, EOPNOTSUPP
from types import MappingProxyType
from typing import Final

from migrd.core.attach_ladder import Ladder, LadderAction, step
from migrd.core.tracking import Plan

_ERRNO: Final = MappingProxyType(
    {
        "Operation not supported": EOPNOTSUPP,
        "Invalid argument": EINVAL,
        "Device or resource busy": EBUSY,
        "Cannot allocate memory": ENOMEM,
        "No such file or directory": ENOENT,
    }
)
_ACTIONS: Final = (
    (LadderAction.ALLOCATE, re.compile(r"Failed to allocate hwpt")),
    (LadderAction.ATTACH, re.compile(r"error attach \S+ \(-?\d+\) to id=")),
)
_ENDS: Final = (LadderAction.DONE, LadderAction.FAILED)


@dataclass(frozen=True)
class AttachFailure:
    """One call of QEMU's that the kernel refused."""

    device: str
    """QEMU's id of it."""
    action: LadderAction
    """ALLOCATE or ATTACH."""
    errno: int


def read_failure(words: str, plan: Plan) -> AttachFailure | None:
    """The first line that tells of a refused page table; None when there is none, or when it does
    not say of which device or with which errno."""
    for line in words.splitlines():
        action = next((action for action, said in _ACTIONS if said.search(line)), None)
        if action is None:
            continue
        errno = next((n for text, n in _ERRNO.items() if line.rstrip().endswith(text)), None)
        device = _device_in(line, plan)
        if errno is None or device is None:
            return None
        return AttachFailure(device, action, errno)
    return None


def _device_in(line: str, plan: Plan) -> str | None:
    """The only device that the line can mean."""
    devices = () if plan.launch is None else plan.launch.devices
    if len(devices) == 1:
        return devices[0].id
    named = [
        device.id
        for device in devices
        if _names(line, device.id) or f"vfio {device.address}:" in line
    ]
    return named[0] if len(named) == 1 else None


def _names(line: str, id_: str) -> bool:
    quoted = re.escape(id_)
    return bool(re.search(rf'\bid=["\']?{quoted}\b|"id":\s*"{quoted}"|vfio {quoted}:', line))


def next_rung(plan: Plan, failure: AttachFailure) -> Ladder | None:
    """The failed device's ladder at its next rung; None when it has none for this errno."""
    ladder = plan.ladders.get(failure.device)
    while ladder is not None and ladder.action is not failure.action:
        if ladder.action in _ENDS:
            return None
        ladder = step(ladder, None)
    if ladder is None:
        return None
    lower = step(ladder, failure.errno)
    return None if lower.failed else lower
