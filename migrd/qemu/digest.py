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
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Final

from migrd.core.facts import SpecDevice
from migrd.core.vfio_launch import VfioLaunchDevice
from migrd.errors import Invalid, Violation
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
_CHUNK_BYTES: Final = 1 << 20
_VERSION: Final = 1

_known: dict[tuple[int, int, int, int], str] = {}
_KNOWN_LIMIT: Final = 256


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


def content_digest(path: Path, name: str) -> str:
    """sha256 of a file's contents; remembered until the file changes. Blocking.

    Raises Invalid, naming the parameter or option `name`, when it cannot be read.
    """
    try:
        with path.open("rb") as file:
            about = os.fstat(file.fileno())
            key = (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns)
            if key not in _known:
                if len(_known) >= _KNOWN_LIMIT:
                    _known.clear()
                _known[key] = _sha256(file)
            return _known[key]
    except OSError as error:
        text = f"{path} cannot be read: {error.strerror}"
        raise Invalid(text, [Violation(f"parameters.{name}", "no_file", text)]) from error


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK_BYTES):
        digest.update(chunk)
    return f"sha256:{digest.hexdigest()}"
