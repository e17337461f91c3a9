"""I/O page tables (HWPT) and their dirty bits: which pages devices wrote.

    OwnedHwpt      ours: tracking on and off, read and clear, peek
    ForeignHwpt    a VMM's: peek. There is no method that clears or switches, because the VMM
                   counts on those bits: one that is taken from it is guest memory not sent
    HandedOverHwpt a VMM's that has made migrd its harvester: all of it, and what is mapped is
                   proven before and after each clearing read

The kernel answers success, and loses or hides dirty bits, when (Linux 6.12, seen):

    tracking is off, or was switched on again        so: we know whether it is on; switching it on
                                                     twice makes one call
    the range has a hole                             so: the range is proven mapped, held still
    the bitmap cannot be written, in a clearing read so: the buffer is ours, zeroed and resident
    the page size is no power of two                 so: refused here
    the buffer has old bits in it                    so: a new one each time

A clearing read destroys what it reads. So `read_and_clear` gives it to `merge` before it does
anything else, after an error too, and in the thread that made the call.

What is left: "0 dirty" of a ForeignHwpt is no proof. Whether a VMM has switched tracking on cannot
be asked; and the VMM may change its mappings between our proof and our read (proven on both sides).
A VMM that unmaps what it handed over and maps it again at the same IOVA between two reads takes the
dirty bits with it, and nothing shows it: whoever hands over promises not to.
"""

import contextlib
import ctypes
import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from migrd.abi import iommufd as abi
from migrd.errors import KernelGone, KernelRejected
from migrd.kernel.io_address_space import ForeignIoas, Ioas, destroy
from migrd.kernel.iommufd_calls import GET_DIRTY_BITMAP, SET_DIRTY_TRACKING, Context

MAX_BITMAP_BYTES: Final = 256 << 20
"""Of one read: 8 TiB in pages of 4 KiB. Larger ranges are read in parts."""
_WORD_BITS = 64
_PEEK: Final = abi.iommufd_hwpt_get_dirty_bitmap_flags.NO_CLEAR
_CLEAR: Final = abi.iommufd_hwpt_get_dirty_bitmap_flags(0)


@dataclass(frozen=True)
class DirtyBits:
    """The dirty pages of one IOVA range, as one read found them."""

    iova: int
    """Address of bit 0."""
    length_bytes: int
    page_size_bytes: int
    bits: memoryview
    """Read-only, whole 64-bit words, lowest bit of the lowest byte first."""

    @property
    def dirty_pages(self) -> int:
        return int.from_bytes(self.bits, "little").bit_count()

    @property
    def pages(self) -> int:
        """Of the range, clean or dirty."""
        return self.length_bytes // self.page_size_bytes


Merge = Callable[[DirtyBits], object]


class OwnedHwpt:
    """A page table that we made; destroyed by us. Verbs block; one thread at a time."""

    def __init__(self, context: Context, hwpt_id: int, ioas: Ioas) -> None:
        self._context = context
        self.id = hwpt_id
        self.ioas = ioas
        self._is_tracking: bool | None = False
        self._is_destroyed = False

    @property
    def is_tracking(self) -> bool | None:
        """None: switching it failed, so it is not known."""
        return self._is_tracking

    def set_tracking(self, on: bool) -> None:
        """Switch dirty tracking. Switching on starts with all clean; switching off drops what was
        not read. Doing either again does nothing.

        Raises KernelUnsupported: made without dirty tracking.
        """
        self._check_there()
        if self._is_tracking is on:
            return
        self._is_tracking = None
        self.ioas.note_tracking(self.id, is_on=True)
        _switch(self._context, self.id, on)
        self._is_tracking = on
        self.ioas.note_tracking(self.id, is_on=on)

    def read_and_clear(
        self, iova: int, length_bytes: int, page_size_bytes: int, merge: Merge
    ) -> int:
        """Read the dirty pages of a wholly mapped range and clear them; returns how many.

        `merge` gets them, once, also when the call fails: they may be cleared then. It must not
        fail, or they are lost. Raises KernelRejected: tracking is off, not mapped, not aligned.
        """
        self._check_tracking()
        with self.ioas.held_still(iova, length_bytes):
            read = _Read(self.id, iova, length_bytes, page_size_bytes)
            try:
                read.make(self._context, _CLEAR)
            finally:
                merge(read.found)
        return read.found.dirty_pages

    def peek(self, iova: int, length_bytes: int, page_size_bytes: int) -> DirtyBits:
        """Read the dirty pages of a wholly mapped range and change nothing.

        Raises KernelRejected: tracking is off, not mapped, not aligned.
        """
        self._check_tracking()
        with self.ioas.held_still(iova, length_bytes):
            read = _Read(self.id, iova, length_bytes, page_size_bytes)
            read.make(self._context, _PEEK)
        return read.found

    def destroy(self) -> None:
        """Drops what was not read. Idempotent; also when it went with its iommufd. Raises
        KernelBusy: devices are attached."""
        if self._is_destroyed:
            return
        with contextlib.suppress(KernelGone):
            destroy(self._context, self.id, "page table")
        self._is_destroyed = True
        self._is_tracking = False
        self.ioas.note_tracking(self.id, is_on=False)

    def _check_there(self) -> None:
        if self._is_destroyed:
            raise KernelGone(f"page table {self.id} has been destroyed", code="hwpt_gone")

    def _check_tracking(self) -> None:
        self._check_there()
        if self._is_tracking is not True:
            raise KernelRejected(
                f"dirty tracking of page table {self.id} is not on: it would seem all clean",
                code="tracking_is_off",
            )


class ForeignHwpt:
    """A page table of a VMM, on an iommufd that we share with it. Verbs block."""

    def __init__(self, context: Context, hwpt_id: int, ioases: tuple[ForeignIoas, ...]) -> None:
        """`ioases`: all that it may be filled from. Which one it is cannot be asked, so a range
        counts as mapped when it is mapped in all of them."""
        self._context = context
        self.id = hwpt_id
        self.ioases = ioases

    def peek(self, iova: int, length_bytes: int, page_size_bytes: int) -> DirtyBits | None:
        """Read the dirty pages of a range and change nothing; None when it is not wholly mapped.

        No dirty page is no proof that nothing was written: the VMM may not have switched tracking
        on. Raises KernelRejected (not aligned), KernelGone, KernelUnsupported.
        """
        read = _Read(self.id, iova, length_bytes, page_size_bytes)
        if not self.is_wholly_mapped(iova, length_bytes):
            return None
        read.make(self._context, _PEEK)
        if not self.is_wholly_mapped(iova, length_bytes):
            return None
        return read.found

    def is_wholly_mapped(self, iova: int, length_bytes: int) -> bool:
        """Whether the range is mapped without holes at this moment. Walks no page table. Raises
        KernelGone."""
        return bool(self.ioases) and all(
            ioas.is_wholly_mapped(iova, length_bytes) for ioas in self.ioases
        )


class HandedOverHwpt:
    """A page table of a VMM that has handed its dirty tracking over to us: it promises to neither
    switch nor read it, nor to change what is mapped of what it handed over. Verbs block; one thread
    at a time."""

    def __init__(self, context: Context, hwpt_id: int, ioases: tuple[ForeignIoas, ...]) -> None:
        """`ioases`: as for ForeignHwpt."""
        self._context = context
        self._foreign = ForeignHwpt(context, hwpt_id, ioases)
        self._is_tracking: bool | None = None
        self._buffer = bytearray()
        self.id = hwpt_id

    @property
    def is_tracking(self) -> bool | None:
        """None: we have not switched it yet, or that failed."""
        return self._is_tracking

    def set_tracking(self, on: bool) -> None:
        """Switch dirty tracking; the first time also if it is so already. Switching on starts with
        all clean, off drops what was not read. Raises KernelUnsupported, KernelGone."""
        if self._is_tracking is on:
            return
        self._is_tracking = None
        _switch(self._context, self.id, on)
        self._is_tracking = on

    def read_and_clear(
        self, iova: int, length_bytes: int, page_size_bytes: int, merge: Merge
    ) -> int:
        """Read the dirty pages of a wholly mapped range and clear them; returns how many.

        `merge` gets them, once, also when the call fails: they may be cleared then. What it gets is
        valid until the next read. Raises KernelRejected: tracking is off, not aligned, or
        (`range_has_holes`) not wholly mapped; then pages may be missing from what it got.
        """
        self._check_tracking()
        self._prove(iova, length_bytes)
        read = _Read(self.id, iova, length_bytes, page_size_bytes, self._room)
        try:
            read.make(self._context, _CLEAR)
        finally:
            merge(read.found)
        self._prove(iova, length_bytes)
        return read.found.dirty_pages

    def peek(self, iova: int, length_bytes: int, page_size_bytes: int) -> DirtyBits:
        """Read the dirty pages of a wholly mapped range and change nothing. Raises as above."""
        self._check_tracking()
        found = self._foreign.peek(iova, length_bytes, page_size_bytes)
        if found is None:
            raise self._hole(iova, length_bytes)
        return found

    def _room(self, size_bytes: int) -> bytearray:
        """Zeroed and resident; the same one each time, if it is large enough."""
        if len(self._buffer) < size_bytes:
            self._buffer = bytearray(size_bytes)
        else:
            ctypes.memset((ctypes.c_char * size_bytes).from_buffer(self._buffer), 0, size_bytes)
        return self._buffer

    def _prove(self, iova: int, length_bytes: int) -> None:
        if not self._foreign.is_wholly_mapped(iova, length_bytes):
            raise self._hole(iova, length_bytes)

    def _hole(self, iova: int, length_bytes: int) -> KernelRejected:
        return _rejected(
            f"IOVA {iova:#x} + {length_bytes:#x} is not wholly mapped for page table {self.id}: the"
            " VMM must leave mapped what it handed over",
            "range_has_holes",
        )

    def _check_tracking(self) -> None:
        if self._is_tracking is not True:
            raise KernelRejected(
                f"dirty tracking of page table {self.id} is not on: it would seem all clean",
                code="tracking_is_off",
            )


def _switch(context: Context, hwpt_id: int, on: bool) -> None:
    flags = abi.iommufd_hwpt_set_dirty_tracking_flags
    argument = abi.iommu_hwpt_set_dirty_tracking(flags=flags.ENABLE if on else 0, hwpt_id=hwpt_id)
    subject = f"switch dirty tracking of page table {hwpt_id} {'on' if on else 'off'}"
    context.call(SET_DIRTY_TRACKING, argument, subject)


class _Read:
    """One read of dirty bits, into a buffer of its own, or into one that `room` gives."""

    def __init__(
        self,
        hwpt_id: int,
        iova: int,
        length_bytes: int,
        page_size_bytes: int,
        room: Callable[[int], bytearray] = bytearray,  # written to, so it is resident
    ) -> None:
        _check_range(iova, length_bytes, page_size_bytes)
        words = -(-length_bytes // (page_size_bytes * _WORD_BITS))
        size_bytes = words * _WORD_BITS // 8
        self._buffer = room(size_bytes)
        self._hwpt_id = hwpt_id
        self.found = DirtyBits(
            iova, length_bytes, page_size_bytes, memoryview(self._buffer)[:size_bytes].toreadonly()
        )

    def make(self, context: Context, flags: abi.iommufd_hwpt_get_dirty_bitmap_flags) -> None:
        exported = (ctypes.c_char * len(self._buffer)).from_buffer(self._buffer)
        argument = abi.iommu_hwpt_get_dirty_bitmap(
            hwpt_id=self._hwpt_id,
            flags=flags,
            iova=self.found.iova,
            length=self.found.length_bytes,
            page_size=self.found.page_size_bytes,
            data=ctypes.addressof(exported),
        )
        found = self.found
        subject = (
            f"read dirty pages of {found.page_size_bytes} bytes of page table {self._hwpt_id},"
            f" IOVA {found.iova:#x} + {found.length_bytes:#x}"
        )
        context.call(GET_DIRTY_BITMAP, argument, subject)


def _check_range(iova: int, length_bytes: int, page_size_bytes: int) -> None:
    """What the kernel takes for something else, or what no reader wants."""
    if page_size_bytes <= 0 or page_size_bytes & (page_size_bytes - 1):
        raise _rejected(
            f"page size {page_size_bytes} is no power of two: the kernel would take another",
            "bad_page_size",
        )
    if length_bytes <= 0 or iova < 0 or (iova | length_bytes) % page_size_bytes:
        raise _rejected(
            f"IOVA {iova:#x} + {length_bytes:#x} is empty or not aligned to {page_size_bytes}",
            "range_not_aligned",
        )
    if iova + length_bytes > 1 << 64:
        raise _rejected(f"IOVA {iova:#x} + {length_bytes:#x} overflows", "range_overflows")
    if length_bytes // page_size_bytes > MAX_BITMAP_BYTES * 8:
        raise _rejected(
            f"a bitmap of {length_bytes // page_size_bytes} pages is too large: read in parts",
            "range_too_large",
        )


def _rejected(message: str, code: str) -> KernelRejected:
    return KernelRejected(message, errno=errno.EINVAL, code=code)
