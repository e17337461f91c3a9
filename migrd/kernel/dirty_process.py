"""Which pages of a process' memory were written, by PAGEMAP_SCAN on a pagemap that it passed.

    the process, once                               migrd, for each transfer
    userfaultfd(O_CLOEXEC | O_NONBLOCK)             start_tracking   protects all pages (arming)
    UFFDIO_API       features, see below            read_and_clear   finds the written ones and
    UFFDIO_REGISTER  mode WP, all guest memory                       protects them anew, in one step
    open("/proc/self/pagemap"), pass it with the    stop_tracking    nothing more is read
      ranges; keep the userfaultfd open

**What the process must ask for with UFFDIO_API** (Linux 6.7 or newer), all in one:

    UFFD_FEATURE_WP_ASYNC            the kernel lifts the protection itself; nobody waits for an
                                     event, and nothing is ever to be read from the userfaultfd
    UFFD_FEATURE_WP_UNPOPULATED      pages that are not there yet are protected too (WP_ASYNC
                                     implies it; ask, so that a kernel without it says so)
    UFFD_FEATURE_WP_HUGETLBFS_SHMEM  memory in memfds (MAP_SHARED)
    UFFD_FEATURE_PAGEFAULT_FLAG_WP   what the mode WP rests on

and register each range whole with UFFDIO_REGISTER_MODE_WP and no other mode. UFFDIO_WRITEPROTECT is
not needed: migrd arms by PM_SCAN_WP_MATCHING. The ranges are addresses of the process that opened
the pagemap, multiples of 4096. Anonymous private memory and memfds mapped MAP_SHARED both work.
It needs no privilege: with UFFD_USER_MODE_ONLY the kernel lifts the protection for its own writes
too (read(2) into the memory), since no event has to be waited for.

What is seen: every write through these mappings, by the process' threads and by system calls that
it makes (read(2) into guest memory); pages that it discards (MADV_DONTNEED of private memory).

**What is not seen, and must not be done to the memory while it is tracked**: writes by devices
(DMA: that takes another source) and by the kernel into pages that were pinned before a read
(O_DIRECT, io_uring fixed buffers); writes through another mapping of the same memfd, in this
process or another, and by pwrite(2) on it; holes punched into a memfd (MADV_REMOVE, fallocate).

Rules
1. Arming protects every page, also those without a page table: the kernel leaves a marker that the
   first write turns into a written page. Without arming, the first write into an untouched 2 MiB
   would tell of all its pages.
2. One ioctl walks at least 256 MiB while little is dirty, and ends early when enough pages or runs
   were found; the sizes adapt so that one takes less than 5 ms. Its end is a multiple of 2 MiB, so
   that no huge page is split for it.
3. What is not mapped is told of as clean, with success. So after each read the mappings are looked
   at (`process_maps`, else page by page); a gap is LogLost. Registered anew it may be: what was
   never armed counts as written.
4. Huge pages of 1 GiB (hugetlbfs) are refused at the start: the kernel takes each of them for a
   part of a page, does not protect it, and goes back to where the last one begins.
5. A range that is not registered (the userfaultfd was closed, or the memory mapped anew) is EPERM:
   KernelRejected at the start, LogLost later.
6. When a call fails, the whole piece that it was to walk is taken for dirty: what it had protected
   anew before it failed, it does not say.

Stopping cannot lift the protection, only the process' userfaultfd can: each page that is clean then
costs its next writer one short fault (1 to 2 us), once.

Source: Documentation/admin-guide/mm/{pagemap,userfaultfd}.rst; the rest was seen on Linux 6.12 and
6.18 and is pinned by tests/contract/dirty_process.py.
"""

import errno
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from migrd.core.bitmap import PAGE_BYTES, DirtyBitmap
from migrd.engine.dirty_ports import PageRun, SourceRead, Tracker
from migrd.errors import KernelError, KernelRejected, KernelUnsupported, LogLost
from migrd.kernel.calls import Ioctl, system_ioctl
from migrd.kernel.pagemap import ROWS, Pagemap, tells_of_holes
from migrd.kernel.process_maps import ProcessMaps

MOST_RANGES: Final = 1024
_ADDRESSES: Final = 1 << 64
_ALIGN: Final = 2 << 20
_FIRST_WALK_BYTES: Final = 256 << 20
_LEAST_WALK_BYTES: Final = 16 << 20
_MOST_WALK_BYTES: Final = 4 << 30
_MOST_PAGES: Final = 32768
_LEAST_PAGES: Final = 4096
_LONG_S: Final = 0.0025
_SHORT_S: Final = 0.0008


@dataclass(frozen=True)
class ProcessRange:
    """Guest memory where the process has it, and where it stands in the merged page space."""

    hva: int
    length_bytes: int
    first_page: int

    @property
    def end(self) -> int:
        """Exclusive."""
        return self.hva + self.length_bytes

    def page_at(self, hva: int) -> int:
        return self.first_page + (hva - self.hva) // PAGE_BYTES


class ProcessSource:
    """Pages of a process' memory that were written. A DirtySource."""

    tracker = Tracker.PROCESS
    page_size_bytes = PAGE_BYTES

    def __init__(
        self,
        pagemap_fd: int,
        ranges: Sequence[ProcessRange],
        name: str,
        ioctl: Ioctl = system_ioctl,
    ) -> None:
        """`pagemap_fd` stays its owner's. Raises KernelRejected (`bad_ranges`)."""
        _check(ranges)
        self.name = name
        self._ranges = tuple(sorted(ranges, key=lambda one: one.hva))
        self.covers: tuple[PageRun, ...] = tuple(
            (one.first_page, one.length_bytes // PAGE_BYTES) for one in ranges
        )
        self._pagemap = Pagemap(pagemap_fd, ioctl)
        self._maps: ProcessMaps | None = None
        self._pace = _Pace()
        self._is_tracking = False
        self._scan_holes = False

    def start_tracking(self) -> None:
        """Protects all pages: 10 to 100 ns for each that is there. Raises KernelRejected: not
        registered, not mapped; KernelUnsupported: pages too large; KernelTooOld; KernelGone."""
        self._is_tracking = False
        self._open_maps()
        self._scan_holes = not tells_of_holes()
        for one in self._ranges:
            at = one.hva
            while at < one.end:
                at = self._armed(at, one.end)
            self._refuse_gap(one, self._pagemap.unmapped(one.hva, one.end))
        self._is_tracking = True

    def _armed(self, at: int, end: int) -> int:
        """How far one call got."""
        with self._pace:
            reached = self._pagemap.arm(at, self._pace.end(at, end))
        if reached <= at:
            raise KernelUnsupported(
                f"memory of {self.name} at {at:#x} cannot be watched: of huge pages (hugetlbfs) the"
                " kernel protects those of 2 MiB alone; have the guest's memory in these",
                code="pages_too_large",
            )
        return reached

    def stop_tracking(self) -> None:
        """The protection stays, until it is written or the process lifts it."""
        self._is_tracking = False

    def read_and_clear(self, into: DirtyBitmap) -> SourceRead:
        return self._read(into, clear=True)

    def peek(self, into: DirtyBitmap) -> SourceRead:
        return self._read(into, clear=False)

    def close(self) -> None:
        self._is_tracking = False
        self._pagemap.close()
        if self._maps is not None:
            self._maps.close()
            self._maps = None

    @property
    def longest_s(self) -> float:
        """Of one ioctl so far, processor time; may be set back."""
        return self._pace.longest_s

    @longest_s.setter
    def longest_s(self, value: float) -> None:
        self._pace.longest_s = value

    def _read(self, into: DirtyBitmap, *, clear: bool) -> SourceRead:
        if not self._is_tracking:
            raise KernelRejected(
                f"dirty tracking of {self.name} is not on: not all that was written would be told",
                code="tracking_is_off",
            )
        began_s, pages = time.perf_counter(), 0
        try:
            for one in self._ranges:
                pages += self._read_range(one, into, clear=clear)
            self._check_mapped()
        except KernelRejected as error:
            raise LogLost(
                f"the log of {self.name} is lost: {error.message}", errno=error.errno
            ) from error
        took_s = time.perf_counter() - began_s
        return SourceRead(self.name, self.tracker, pages, PAGE_BYTES, took_s)

    def _read_range(self, one: ProcessRange, into: DirtyBitmap, *, clear: bool) -> int:
        pages = self._walk(one, into, self._pagemap.scan, clear=clear)
        if self._scan_holes:
            pages += self._walk(one, into, self._pagemap.holes, clear=clear)
        return pages

    def _walk(self, one: ProcessRange, into: DirtyBitmap, scan: "_Scan", *, clear: bool) -> int:
        at, pages, filled = one.hva, 0, 0
        rows = self._pagemap.rows
        try:
            while at < one.end:
                end = self._pace.end(at, one.end)
                found, walked = self._call(scan, at, end, one, into, clear=clear, first_row=filled)
                filled += found
                if walked <= at:
                    raise KernelError(f"a scan of {self.name} does not get on at {at:#x}")
                at = walked
                if filled > ROWS // 2:
                    full, filled = filled, 0
                    pages += into.mark_runs(rows[:full], one.hva, one.first_page)
        finally:
            pages += into.mark_runs(rows[:filled], one.hva, one.first_page)
        return pages

    def _call(
        self,
        scan: "_Scan",
        at: int,
        end: int,
        one: ProcessRange,
        into: DirtyBitmap,
        *,
        clear: bool,
        first_row: int,
    ) -> tuple[int, int]:
        is_told = False
        try:
            with self._pace:
                told = scan(
                    at, end, clear=clear, max_pages=self._pace.max_pages, first_row=first_row
                )
            is_told = True
        finally:
            if clear and not is_told:  # some of it may be protected anew: nobody says what
                into.mark(one.page_at(at), (end - at) // PAGE_BYTES)
        return told

    def _check_mapped(self) -> None:
        """What is not mapped seemed clean."""
        for one in self._ranges:
            if self._maps is not None:
                gap = self._maps.first_gap(one.hva, one.end)
            else:
                gap = self._pagemap.unmapped(one.hva, one.end)
            self._refuse_gap(one, gap)

    def _refuse_gap(self, one: ProcessRange, gap: int | None) -> None:
        if gap is None:
            return
        raise KernelRejected(
            f"memory {one.hva:#x} + {one.length_bytes:#x} of {self.name} is not wholly mapped:"
            f" nothing at {gap:#x}; the process must keep all guest memory mapped where it said,"
            " and registered, while it is tracked",
            code="range_not_mapped",
        )

    def _open_maps(self) -> None:
        if self._maps is None:
            self._maps = ProcessMaps.beside(self._pagemap.fd)


class _Scan(Protocol):
    def __call__(
        self, start: int, end: int, *, clear: bool, max_pages: int, first_row: int
    ) -> tuple[int, int]: ...


def _check(ranges: Sequence[ProcessRange]) -> None:
    """Raises KernelRejected, naming the first range that cannot be."""
    if not 0 < len(ranges) <= MOST_RANGES:
        raise _bad(f"{len(ranges)} ranges of process memory: give 1 to {MOST_RANGES}")
    end = 0
    for one in sorted(ranges, key=lambda one: one.hva):
        named = f"process memory {one.hva:#x} + {one.length_bytes:#x}"
        if one.hva <= 0 or one.length_bytes <= 0 or one.first_page < 0 or one.end > _ADDRESSES:
            raise _bad(f"{named} at page {one.first_page} is empty, or is nowhere")
        if (one.hva | one.length_bytes) % PAGE_BYTES:
            raise _bad(f"{named} is not aligned to {PAGE_BYTES}")
        if one.hva < end:
            raise _bad(f"{named} overlaps another range")
        end = one.end


def _bad(message: str) -> KernelRejected:
    return KernelRejected(message, errno=errno.EINVAL, code="bad_ranges")


class _Pace:
    """How much one ioctl walks; a context manager around it. By processor time: a thread that had
    to wait for a processor has not walked too far."""

    def __init__(self) -> None:
        self.walk_bytes = _FIRST_WALK_BYTES
        self.max_pages = _MOST_PAGES
        self.longest_s = 0.0
        self._began_s = 0.0

    def end(self, at: int, end: int) -> int:
        """Where a call from `at` on ends: no huge page is cut."""
        return min(end, (at + self.walk_bytes) // _ALIGN * _ALIGN)

    def __enter__(self) -> None:
        self._began_s = time.thread_time()

    def __exit__(self, *_: object) -> None:
        took_s = time.thread_time() - self._began_s
        self.longest_s = max(self.longest_s, took_s)
        if took_s > _LONG_S:
            self.walk_bytes = max(_LEAST_WALK_BYTES, self.walk_bytes // 2)
            self.max_pages = max(_LEAST_PAGES, self.max_pages // 2)
        elif took_s < _SHORT_S:
            self.walk_bytes = min(_MOST_WALK_BYTES, self.walk_bytes * 2)
            self.max_pages = min(_MOST_PAGES, self.max_pages * 2)
