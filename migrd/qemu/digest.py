"""What a guest can see of its launch, as one number that two hosts can compare.

Left out, because hosts may differ in it and no guest can tell: the QEMU binary, back ends (the
other ends of network, character and block devices, displays), where files lie, and the addresses of
passthrough devices. Kept: machine, accelerator, CPU, memory, the order and properties of devices,
ids (migration matches memory and devices by them), and the contents of firmware, which are copied
into the guest's memory at start.

Two equal digests are no proof that a guest can move, two different ones are the proof that it is
launched differently: preflight refuses on that.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from migrd.core.facts import SpecDevice
from migrd.core.vfio_launch import VfioLaunchDevice
from migrd.profiles.content import content_digest
from migrd.qemu.command_line import FIRMWARE, Argument, Placeholder
from migrd.qemu.passthrough import DRIVER

BACK_ENDS: Final = frozenset(
    (
        *("netdev", "chardev", "blockdev", "fsdev", "tpmdev", "audiodev"),
        *("display", "vnc", "spice", "k", "gdb", "s"),
        *("sandbox", "run-with", "runas", "chroot", "overcommit", "mem-path", "mem-prealloc"),
        *("L", "D", "d", "trace", "msg", "plugin"),
    )
)
BY_PRESENCE: Final = frozenset(("serial", "parallel", "debugcon"))
"""The guest sees the port, and not what is behind it."""
OF_THE_HOST: Final = frozenset(
    (
        *("enable-migration", "migration-events", "x-migration-multifd-transfer"),
        *("x-pre-copy-dirty-page-tracking", "x-device-dirty-page-tracking"),
    )
)
"""Properties of a passthrough device that only say how QEMU treats it."""
_VERSION: Final = 1


def launch_digest(
    machine: Mapping[str, object],
    template: Sequence[str | Argument],
    visible: Callable[[Argument, Placeholder], str],
) -> str:
    """sha256, as hex digits. `visible` gives what the guest sees of a placeholder's value."""
    seen: list[str] = []
    for part in template:
        option = part.option if isinstance(part, Argument) else part.removeprefix("-")
        if option in BACK_ENDS:
            continue
        if isinstance(part, str):
            seen.append(part)
        elif option not in BY_PRESENCE:
            seen.append(_seen(part, visible))
    text = json.dumps({"version": _VERSION, **machine, "arguments": seen}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def visible_device(device: SpecDevice | VfioLaunchDevice) -> Mapping[str, object]:
    """Of a passthrough device: which of the host's it is, how QEMU gets at it and in which iommufd
    object it is are not seen. Its order is, where QEMU chooses the guest's slot for it."""
    properties = device.properties if isinstance(device, VfioLaunchDevice) else {}
    seen = {name: value for name, value in properties.items() if name not in OF_THE_HOST}
    place = {"bus": device.guest_bus, "addr": device.guest_address}
    return {"kind": DRIVER, "id": device.id, **place, "properties": seen}


def _seen(argument: Argument, visible: Callable[[Argument, Placeholder], str]) -> str:
    pieces = [
        piece if isinstance(piece, str) else visible(argument, piece) for piece in argument.pieces
    ]
    text = "".join(pieces)
    if argument.option in FIRMWARE:  # a path that stands in the profile itself
        return content_digest(Path(text), argument.option) if text.startswith("/") else text
    return re.sub(r"=/[^,]*(,,[^,]*)*", "=<path>", text)
