"""What a process has mapped, by /proc/PID/maps (proc(5)).

`open_beside` finds it by a pagemap descriptor of that process. The pagemap's name leads to a
directory; what lies there is only believed if the pagemap beside it is the very file we hold
(another mount of /proc, or a pid that is somebody else's, has another). An open `maps` belongs to
the address space, not to the pid.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

MOST_BYTES: Final = 64 << 20
"""Of text: ten times what the kernel's own limit of mappings comes to."""
_AT_ONCE: Final = 1 << 20
_LINE: Final = re.compile(
    rb"^([0-9a-f]+)-([0-9a-f]+) .(.).(.) ([0-9a-f]+) ([0-9a-f]+):([0-9a-f]+) (\d+) *(.*)$",
    re.MULTILINE,
)


@dataclass(frozen=True, slots=True)
class Mapping:
    """One of them; addresses are the process'."""

    start: int
    end: int
    is_writable: bool
    is_shared: bool
    offset_bytes: int
    """Where in its file it begins."""
    file: tuple[int, int]
    """(device, inode) as fstat has them; an inode of 0 is no file."""
    name: str


def open_beside(pagemap_fd: int) -> int | None:
    """An open `maps` of the process whose pagemap this is; None where it cannot be found, or not
    for certain. Blocking."""
    try:
        directory, name = os.path.split(os.readlink(f"/proc/self/fd/{pagemap_fd}"))
        if name != "pagemap":
            return None
        fd = os.open(f"{directory}/maps", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:  # after it was opened: a pid that was taken anew meanwhile has another pagemap
        is_same = os.path.samestat(os.fstat(pagemap_fd), os.stat(f"{directory}/pagemap"))
    except OSError:
        is_same = False
    if not is_same:
        os.close(fd)
        return None
    return fd


def read_text(fd: int) -> bytes:
    """Of an open `maps`, from its beginning; at most MOST_BYTES and a piece. Blocking.

    Raises OSError: ProcessLookupError, where the process has exited.
    """
    text = bytearray()
    while len(text) < MOST_BYTES:
        part = os.pread(fd, _AT_ONCE, len(text))
        if not part:
            break
        text += part
    return bytes(text)


def parsed(text: bytes) -> Iterator[Mapping]:
    """In the order of their addresses; a line of another form is passed over."""
    for found in _LINE.finditer(text):
        start, end, write, shared, offset, major, minor, inode, name = found.groups()
        yield Mapping(
            int(start, 16),
            int(end, 16),
            write == b"w",
            shared == b"s",
            int(offset, 16),
            (os.makedev(int(major, 16), int(minor, 16)), int(inode)),
            name.decode(errors="replace"),
        )
