"""Dirty pages as batches that fit one record each, handed out to whichever channel asks next.

    taken (DirtyBitmap) --by region--> extents --holes left out, cut--> Batch, Batch, ...

A batch has at most a record's payload: one piece of a long extent, or many short ones.
Extents are found as they are needed, so that memory does not grow with the guest. No page is handed
out twice.

Where holes are to be left out, a region's file is asked for its next data (SEEK_DATA): where it has
no pages for longer, memory is zero, and is not even read. A page that the guest makes there
meanwhile is dirty, and so comes with the next round. Seeking moves a file's position, which the
guest's process shares with its descriptor: it is done on one of our own, opened anew.
"""

import contextlib
import errno
import os
import threading
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from migrd.core.bitmap import DirtyBitmap
from migrd.core.memory_map import PAGE_BYTES, MemoryMap, Region
from migrd.direct.stream_wire import PAYLOAD_BYTES

_EXTENTS_AT_ONCE: Final = 4096
Extents = Generator[tuple[int, int], None, None]
"""(offset in the region, length), in bytes."""


@dataclass(frozen=True)
class RegionFile:
    """Where a region's bytes are."""

    region: Region
    fd: int
    base: int = 0
    """Offset of the region in the file, in bytes."""


@dataclass(frozen=True)
class Batch:
    """Extents of one region: (offset in the region, length), in bytes."""

    file: RegionFile
    extents: list[tuple[int, int]]
    payload_bytes: int


class ExtentFeed:
    """Thread-safe. `hole_pages` counts what was left out; `end_page` is where it has come to: all
    pages of the merged page space before it were handed out, or were holes."""

    def __init__(
        self,
        memory: MemoryMap,
        files: Mapping[int, RegionFile],
        taken: DirtyBitmap,
        *,
        leave_holes: bool,
    ) -> None:
        self._files = [files[region.id] for region in memory.regions]
        self._taken = taken
        self._leave_holes = leave_holes
        self._lock = threading.Lock()
        self._batches = self._make()
        self._is_stopped = False
        self.hole_pages = 0
        self.end_page = 0

    def next(self) -> Batch | None:
        """None: that was all, or it was stopped."""
        with self._lock:
            batch = None if self._is_stopped else next(self._batches, None)
            if batch is not None:
                offset, length = batch.extents[-1]
                self.end_page = batch.file.region.first_page + (offset + length) // PAGE_BYTES
            elif not self._is_stopped:
                self.end_page = self._taken.pages
            return batch

    def stop(self) -> None:
        """Hand out nothing more."""
        self._is_stopped = True

    def close(self) -> None:
        """Hand out nothing more, and let go of the file that was being looked at: it is the guest's
        memory, which nobody would get back while it is held."""
        with self._lock:
            self._is_stopped = True
            self._batches.close()

    def _make(self) -> Generator[Batch, None, None]:
        for file in self._files:
            extents = self._extents(file.region)
            if self._leave_holes:
                extents = self._without_holes(file, extents)
            with contextlib.closing(extents):
                yield from batches(file, extents)

    def _extents(self, region: Region) -> Extents:
        at: int | None = region.first_page
        while at is not None:
            rows, at = self._taken.extents(at, end_page=region.end_page, limit=_EXTENTS_AT_ONCE)
            rows[:, 0] -= region.first_page
            rows *= PAGE_BYTES
            yield from rows.tolist()

    def _without_holes(self, file: RegionFile, extents: Extents) -> Extents:
        with own_descriptor(file.fd) as fd:
            if fd is None:
                yield from extents
                return
            for offset, length in extents:
                seen = 0
                for at, data_bytes in data_in(fd, file.base + offset, length):
                    seen += data_bytes
                    yield at - file.base, data_bytes
                self.hole_pages += (length - seen) // PAGE_BYTES


def batches(file: RegionFile, extents: Iterator[tuple[int, int]]) -> Iterator[Batch]:
    """Cut and joined to what fits a record."""
    gathered: list[tuple[int, int]] = []
    room = PAYLOAD_BYTES
    for offset, length in extents:
        while length:
            piece = min(length, room)
            gathered.append((offset, piece))
            room -= piece
            offset, length = offset + piece, length - piece
            if not room:
                yield Batch(file, gathered, PAYLOAD_BYTES - room)
                gathered, room = [], PAYLOAD_BYTES
    if gathered:
        yield Batch(file, gathered, PAYLOAD_BYTES - room)


@contextlib.contextmanager
def own_descriptor(fd: int) -> Iterator[int | None]:
    """The same file with a position of its own; None where it cannot be opened again."""
    try:
        own = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        yield None
        return
    try:
        yield own
    finally:
        os.close(own)


def data_in(fd: int, offset: int, length: int) -> Iterator[tuple[int, int]]:
    """What of a range may have pages behind it: (offset in the file, length), whole pages, at most
    a record's payload each.

    Only the next data is asked for, never the next hole: to find that the kernel walks all data
    before it, which for a guest that uses its memory is all of its memory. So a piece may have
    holes in it; those are read, and seen to be zero.
    """
    end = offset + length
    while offset < end:
        try:
            data = os.lseek(fd, offset, os.SEEK_DATA)
        except OSError as failure:
            # ENXIO: only a hole follows, or the file was cut short, which reading it will tell
            if failure.errno != errno.ENXIO or os.fstat(fd).st_size < end:
                yield offset, end - offset  # a file that does not tell: all of it may be data
            return
        first = max(offset, data // PAGE_BYTES * PAGE_BYTES)
        if first >= end:
            return
        offset = min(end, first + PAYLOAD_BYTES)
        yield first, offset - first
