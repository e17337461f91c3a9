"""Which pages devices wrote, by the dirty bits of an I/O page table (HWPT).

    HwptSource   a page table that migrd harvests: ours, or one that its owner handed over
    HwptPeeks    somebody else's: it has no method that clears or switches

Rules
1. What is read is merged in the same call, before anything else is done, after an error too.
2. A range is read in pieces of 64 GiB, what the kernel pins of a bitmap of 4 KiB pages at a time;
   each piece is proven mapped before and after it is read. A hole is LogLost: from the hole on,
   the kernel would have said "clean".
3. A bit stands for `page_size_bytes`; it is told of as all the 4 KiB pages in it. Asking for
   smaller pages than the page table has tells of no less: the kernel fills them in. Asking for
   larger ones than it has makes the read no cheaper and the result coarser.
4. A range that is not aligned to that size is read in the largest pages that it is aligned to.
"""

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Final, Protocol, Self

from migrd.core.bitmap import DirtyBitmap
from migrd.engine.dirty_ports import IovaPiece, PageRun, SourceRead, Tracker
from migrd.errors import KernelError, KernelRejected, LogLost
from migrd.kernel.calls import Ioctl, system_ioctl
from migrd.kernel.dirty_pieces import Told, check_pieces, covered, parts_of
from migrd.kernel.iommufd import Iommufd
from migrd.kernel.page_table import DirtyBits, ForeignHwpt, Merge

AT_ONCE_BYTES: Final = 64 << 30


class Clearing(Protocol):
    """OwnedHwpt and HandedOverHwpt."""

    def set_tracking(self, on: bool) -> None: ...

    def read_and_clear(
        self, iova: int, length_bytes: int, page_size_bytes: int, merge: Merge
    ) -> int: ...

    def peek(self, iova: int, length_bytes: int, page_size_bytes: int) -> DirtyBits: ...


class HwptSource:
    """A page table that migrd harvests. A DirtySource."""

    tracker = Tracker.IOMMU

    def __init__(
        self,
        hwpt: Clearing,
        pieces: Sequence[IovaPiece],
        page_size_bytes: int,
        name: str,
        close: Callable[[], None] = lambda: None,
    ) -> None:
        """`close` gives back what `hwpt` needs. Raises KernelRejected (`bad_ranges`)."""
        check_pieces(name, pieces, page_size_bytes)
        self.name = name
        self.page_size_bytes = page_size_bytes
        self.covers: tuple[PageRun, ...] = covered(pieces)
        self._hwpt = hwpt
        self._pieces = tuple(pieces)
        self._close = close
        self._is_closed = False

    @classmethod
    def handed_over(
        cls,
        iommufd_fd: int,
        hwpt_id: int,
        pieces: Sequence[IovaPiece],
        page_size_bytes: int,
        name: str,
        *,
        ioas_ids: tuple[int, ...] = (),
        ioctl: Ioctl = system_ioctl,
    ) -> Self:
        """Of a passed iommufd, which stays its owner's: a duplicate is kept, and with it all memory
        that is mapped there pinned, until `close`. Blocks. Raises KernelRejected, KernelGone."""
        iommufd = Iommufd.share(iommufd_fd, ioctl)
        try:
            hwpt = iommufd.handed_over_hwpt(hwpt_id, ioas_ids)
            return cls(hwpt, pieces, page_size_bytes, name, iommufd.close)
        except BaseException:
            iommufd.close()
            raise

    def start_tracking(self) -> None:
        """Walks the whole page table. Raises KernelUnsupported: made without dirty tracking."""
        self._hwpt.set_tracking(True)

    def stop_tracking(self) -> None:
        if not self._is_closed:
            self._hwpt.set_tracking(False)

    def read_and_clear(self, into: DirtyBitmap) -> SourceRead:
        def clear(part: IovaPiece, page_size: int, merge: Merge) -> None:
            self._hwpt.read_and_clear(part.iova, part.length_bytes, page_size, merge)

        return self._read(into, clear)

    def peek(self, into: DirtyBitmap) -> SourceRead:
        def peek(part: IovaPiece, page_size: int, merge: Merge) -> None:
            merge(self._hwpt.peek(part.iova, part.length_bytes, page_size))

        return self._read(into, peek)

    def close(self) -> None:
        """Switches tracking off if it can."""
        if self._is_closed:
            return
        with contextlib.suppress(KernelError):
            self.stop_tracking()
        self._is_closed = True
        self._close()

    def _read(self, into: DirtyBitmap, read: Callable[[IovaPiece, int, Merge], None]) -> SourceRead:
        began_s, told = time.perf_counter(), Told(into)
        for part, page_size in parts_of(self._pieces, self.page_size_bytes, AT_ONCE_BYTES):
            try:
                read(part, page_size, told.of(part))
            except KernelRejected as error:
                if error.code != "range_has_holes":
                    raise
                raise LogLost(
                    f"the log of {self.name} is lost: {error.message}", errno=error.errno
                ) from error
        took_s = time.perf_counter() - began_s
        return SourceRead(self.name, self.tracker, told.dirty_pages, self.page_size_bytes, took_s)


class HwptPeeks:
    """What is dirty in a page table that its VMM harvests itself: only to be looked at."""

    tracker = Tracker.IOMMU

    def __init__(
        self, hwpt: ForeignHwpt, pieces: Sequence[IovaPiece], page_size_bytes: int, name: str
    ) -> None:
        """Raises KernelRejected (`bad_ranges`)."""
        check_pieces(name, pieces, page_size_bytes)
        self.name = name
        self.page_size_bytes = page_size_bytes
        self.covers: tuple[PageRun, ...] = covered(pieces)
        self._hwpt = hwpt
        self._pieces = tuple(pieces)

    def peek(self, into: DirtyBitmap) -> SourceRead:
        """OR what is dirty into `into`. No dirty page is no proof: the VMM may not track.

        Raises LogLost: part of it is not mapped (any more); KernelGone.
        """
        began_s, told = time.perf_counter(), Told(into)
        for part, page_size in parts_of(self._pieces, self.page_size_bytes, AT_ONCE_BYTES):
            found = self._hwpt.peek(part.iova, part.length_bytes, page_size)
            if found is None:
                raise LogLost(f"IOVA {part.iova:#x} of {self.name} is not wholly mapped")
            told.of(part)(found)
        took_s = time.perf_counter() - began_s
        return SourceRead(self.name, self.tracker, told.dirty_pages, self.page_size_bytes, took_s)
