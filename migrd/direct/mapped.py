"""That what a process source watches is the region: mapped shared, from the file handed over.

What the guest writes is found by address and then read from the file. Where the two are not one
memory (MAP_PRIVATE, another file, another place in it) stale bytes or zeros would be migrated, and
nothing would say so. So the mappings of each range are looked at when it is handed over:

    mapped beside the pagemap     they are the process': all must fit, or Invalid
    no maps to be found there     those of the process that is connected: it is to hand over its own
                                  pagemap (messages.py). It is so in a container, whose /proc is
                                  another than ours
    they cannot be read           not known: accepted, with a warning in the log

They cannot be read of a process of another user, where migrd has not CAP_SYS_PTRACE, as its unit
would have it. Refusing it would keep out all VMMs that direct.allow_uids lets in, most of which are
right; and this finds an author's mistake, which shows at once where he tries it as migrd's own user
or as root. It is no defence: what is mapped can be mapped anew a moment later.
"""

import os
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import structlog

from migrd.errors import Invalid
from migrd.processes.mappings import MOST_BYTES, Mapping, open_beside, parsed, read_text

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Watched:
    """A range of a process source, and what must be mapped there."""

    region_id: int
    address: int
    length_bytes: int
    file: tuple[int, int]
    """(device, inode)."""
    offset_bytes: int
    """In that file."""


def check_mapped(pid: int, pagemap_fd: int, watched: Iterable[Watched]) -> None:
    """Blocking (reads /proc). Raises Invalid. `pid`: the process that hands over."""
    try:
        found = _mappings(pid, pagemap_fd)
    except OSError as failure:
        log.warning("direct.mappings_unknown", pid=pid, why=failure.strerror or str(failure))
        return
    for one in watched:
        _check(one, found)


def _mappings(pid: int, pagemap_fd: int) -> Sequence[Mapping]:
    """Raises OSError: they are not known."""
    fd = open_beside(pagemap_fd)
    if fd is None:
        fd = os.open(f"/proc/{pid}/maps", os.O_RDONLY | os.O_CLOEXEC)
    try:
        text = read_text(fd)
    finally:
        os.close(fd)
    if not text or len(text) >= MOST_BYTES:  # none: it has ended, or its memory is not ours to see
        raise OSError(f"its list of mappings has {len(text)} bytes")
    return tuple(parsed(text))


def _check(watched: Watched, mappings: Sequence[Mapping]) -> None:
    reached, end = watched.address, watched.address + watched.length_bytes
    number = bisect_right(mappings, reached, key=lambda mapping: mapping.end)
    while reached < end:
        mapping = mappings[number] if number < len(mappings) else None
        wrong = _wrong(watched, reached, mapping)
        if wrong is not None:
            raise Invalid(
                f"region {watched.region_id}: the process has {wrong} at address {reached:#x}, "
                "where writes to it are watched, so what is migrated would not be what the guest "
                "has; map it MAP_SHARED, from the descriptor that you hand over"
            )
        assert mapping is not None
        reached = mapping.end
        number += 1


def _wrong(watched: Watched, address: int, mapping: Mapping | None) -> str | None:
    """What is there, where it is not what must be."""
    if mapping is None or mapping.start > address:
        return "nothing mapped"
    if mapping.file != watched.file:
        return f"another file ({mapping.name[:100]})" if mapping.file[1] else "memory of no file"
    if not mapping.is_shared:
        return "its file mapped MAP_PRIVATE"
    offset = mapping.offset_bytes + address - mapping.start
    wanted = watched.offset_bytes + address - watched.address
    if offset != wanted:
        return f"offset {offset:#x} of its file (not {wanted:#x}) mapped"
    return None if mapping.is_writable else "its file mapped without PROT_WRITE"
