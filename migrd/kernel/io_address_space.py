"""I/O address spaces (IOAS): the maps from IOVA to memory that page tables are filled from.

    Ioas           ours: we map, so we know what is mapped
    ForeignIoas    a VMM's: nothing can be changed through it; what is mapped can only be proven

The kernel lists no mappings, and reading dirty bits of a range with a hole says "nothing dirty"
from the hole on, with success. So a range is read only if it is wholly mapped:

- Ours: `Ioas` keeps the map, and holds it still while a page table is being read.
- A VMM's: a copy of the range into a scratch IOAS, at fixed addresses, succeeds only without
  holes. The scratch IOAS has no page table, so nothing is pinned or entered; it is freed at once.

Memory that is mapped must not go away or be resized: the mapping holds a view of it, so that
Python itself refuses to (BufferError on mmap.close). Unmapping lets go of it.

Traps
- Unmapping drops the dirty bits of the range. While dirty tracking is on it must be said that they
  are not wanted.
- Ids are reused, lowest free one first: an object that was destroyed here answers no more calls.
- Mappings are unmapped whole; part of one is ENOENT.
"""

import contextlib
import ctypes
import errno
import mmap
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from migrd.abi import iommufd as abi
from migrd.errors import KernelBusy, KernelError, KernelGone, KernelRejected
from migrd.kernel.iommufd_calls import (
    DESTROY,
    IOAS_ALLOC,
    IOAS_COPY,
    IOAS_MAP,
    IOAS_UNMAP,
    IOVA_RANGES,
    Context,
)

WriteableMemory = mmap.mmap | bytearray | memoryview
_FIRST_RANGES = 64
_MOST_RANGES = 65536
_FLAGS: Final = abi.iommufd_ioas_map_flags


@dataclass(frozen=True)
class IovaRange:
    first: int
    last: int
    """Inclusive."""


@dataclass(frozen=True)
class IovaRanges:
    """Where something can be mapped; shrinks when a device is attached."""

    ranges: tuple[IovaRange, ...]
    alignment_bytes: int


@dataclass(frozen=True)
class Mapping:
    """Memory of ours at an IOVA."""

    iova: int
    length_bytes: int

    @property
    def end(self) -> int:
        """Exclusive."""
        return self.iova + self.length_bytes

    def meets(self, iova: int, end: int) -> bool:
        return self.iova < end and iova < self.end


@dataclass
class _Held:
    mapping: Mapping
    memory: tuple[memoryview, ...]
    """The memory cannot go until they are released."""
    reads: int = 0

    def let_go(self) -> None:
        _release(self.memory)


def iova_ranges(context: Context, ioas_id: int) -> IovaRanges:
    """Raises KernelGone."""
    room = _FIRST_RANGES
    while True:
        array = (abi.iommu_iova_range * room)()
        argument = abi.iommu_ioas_iova_ranges(
            ioas_id=ioas_id, num_iovas=room, allowed_iovas=ctypes.addressof(array)
        )
        try:
            context.call(IOVA_RANGES, argument, f"ask the IOVA ranges of IOAS {ioas_id}")
        except KernelError as error:
            if error.errno != errno.EMSGSIZE or not room < argument.num_iovas <= _MOST_RANGES:
                raise
            room = argument.num_iovas
            continue
        found = array[: argument.num_iovas]
        ranges = tuple(IovaRange(each.start, each.last) for each in found)
        return IovaRanges(ranges, argument.out_iova_alignment)


def allocate_ioas(context: Context) -> int:
    argument = abi.iommu_ioas_alloc()
    context.call(IOAS_ALLOC, argument, "make an IOAS")
    return int(argument.out_ioas_id)


def destroy(context: Context, object_id: int, what: str) -> None:
    """Raises KernelBusy, KernelGone."""
    context.call(DESTROY, abi.iommu_destroy(id=object_id), f"destroy {what} {object_id}")


class ForeignIoas:
    """A VMM's IOAS: it can be looked at, and that is all."""

    def __init__(self, context: Context, ioas_id: int) -> None:
        self._context = context
        self.id = ioas_id

    def iova_ranges(self) -> IovaRanges:
        """Raises KernelGone."""
        return iova_ranges(self._context, self.id)

    def is_wholly_mapped(self, iova: int, length_bytes: int) -> bool:
        """Whether the range is mapped without holes at this moment; the VMM may change it any
        time. Raises KernelGone when the IOAS is gone."""
        scratch_id = allocate_ioas(self._context)
        try:
            return self._is_copied_to(scratch_id, iova, length_bytes)
        finally:
            destroy(self._context, scratch_id, "scratch IOAS")

    def _is_copied_to(self, scratch_id: int, iova: int, length_bytes: int) -> bool:
        argument = abi.iommu_ioas_copy(
            flags=_FLAGS.FIXED_IOVA | _FLAGS.READABLE,
            dst_ioas_id=scratch_id,
            src_ioas_id=self.id,
            length=length_bytes,
            dst_iova=iova,
            src_iova=iova,
        )
        subject = f"prove {_shown(iova, length_bytes)} of IOAS {self.id} mapped"
        try:
            self._context.call(IOAS_COPY, argument, subject)
        except KernelGone:
            self.iova_ranges()
            return False
        return True


@dataclass(eq=False)
class Ioas:
    """An IOAS of ours. Verbs block; they may be called from several threads."""

    _context: Context
    id: int
    _held: dict[int, _Held] = field(default_factory=dict)
    _tracking: set[int] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _is_destroyed: bool = False

    def iova_ranges(self) -> IovaRanges:
        self._check_there()
        return iova_ranges(self._context, self.id)

    @property
    def mappings(self) -> tuple[Mapping, ...]:
        """In the order of their IOVAs."""
        with self._lock:
            return tuple(self._held[iova].mapping for iova in sorted(self._held))

    def map(self, memory: WriteableMemory, iova: int | None = None) -> Mapping:
        """Map the whole of `memory`, at `iova` or where the kernel likes. It is pinned at once if
        a page table is filled from here.

        Raises KernelRejected: taken, not allowed, not aligned; KernelBusy: no memory to lock.
        """
        view = memoryview(memory)
        flags = _FLAGS.WRITEABLE | _FLAGS.READABLE
        argument = abi.iommu_ioas_map(
            flags=flags if iova is None else flags | _FLAGS.FIXED_IOVA,
            ioas_id=self.id,
            user_va=_address_of(view),
            length=view.nbytes,
            iova=iova or 0,
        )
        where = "anywhere" if iova is None else f"at {iova:#x}"
        subject = f"map {view.nbytes} bytes {where} in IOAS {self.id}"
        with self._lock, _released_on_error((view,)):
            self._check_there()
            self._context.call(IOAS_MAP, argument, subject)
            return self._hold(argument.iova, view.nbytes, (view,))

    def copy(self, source: "Ioas", iova: int, length_bytes: int, to_iova: int) -> Mapping:
        """Map here what `source`, which is on the same iommufd, has mapped at `iova`.

        Raises KernelRejected when part of that range is not mapped, or `to_iova` is taken.
        """
        with source.held_still(iova, length_bytes) as held:
            memory = tuple(memoryview(view) for each in held for view in each.memory)
            argument = abi.iommu_ioas_copy(
                flags=_FLAGS.FIXED_IOVA | _FLAGS.WRITEABLE | _FLAGS.READABLE,
                dst_ioas_id=self.id,
                src_ioas_id=source.id,
                length=length_bytes,
                dst_iova=to_iova,
                src_iova=iova,
            )
            subject = f"copy {_shown(iova, length_bytes)} of IOAS {source.id} to IOAS {self.id}"
            with self._lock, _released_on_error(memory):
                self._check_there()
                self._context.call(IOAS_COPY, argument, subject)
                return self._hold(to_iova, length_bytes, memory)

    def unmap(self, mapping: Mapping, *, drop_dirty: bool = False) -> None:
        """Unmap it whole and let go of its memory. `drop_dirty`: dirty bits that were not read
        are not wanted; without it this is refused while a page table tracks dirty pages.

        Raises KernelRejected (tracking is on), KernelBusy (being read), KernelGone (not mapped).
        """
        shown = _shown(mapping.iova, mapping.length_bytes)
        with self._lock:
            self._check_there()
            held = self._held.get(mapping.iova)
            if held is None or held.mapping != mapping:
                raise KernelGone(f"{shown} is not mapped in IOAS {self.id}", code="mapping_gone")
            if held.reads:
                raise KernelBusy(f"{shown} is being read; unmap it afterwards", code="being_read")
            if self._tracking and not drop_dirty:
                raise KernelRejected(
                    f"unmapping {shown} would lose its dirty bits: page tables"
                    f" {sorted(self._tracking)} track them",
                    code="dirty_bits_would_be_lost",
                )
            argument = abi.iommu_ioas_unmap(
                ioas_id=self.id, iova=mapping.iova, length=mapping.length_bytes
            )
            self._context.call(IOAS_UNMAP, argument, f"unmap {shown} of IOAS {self.id}")
            self._held.pop(mapping.iova).let_go()

    def destroy(self) -> None:
        """Destroy it with all its mappings and let go of their memory. Idempotent; also when it
        went with its iommufd. Raises KernelBusy: still in use."""
        with self._lock:
            if self._is_destroyed:
                return
            with contextlib.suppress(KernelGone):
                destroy(self._context, self.id, "IOAS")
            self._is_destroyed = True
            for held in self._held.values():
                held.let_go()
            self._held.clear()

    @contextlib.contextmanager
    def held_still(self, iova: int, length_bytes: int) -> Iterator[list[_Held]]:
        """Nothing of the range can be unmapped inside the block; gives what covers it. Raises
        KernelRejected when part of it is not mapped."""
        with self._lock:
            self._check_there()
            reading = self._covering(iova, length_bytes)
            for held in reading:
                held.reads += 1
        try:
            yield reading
        finally:
            with self._lock:
                for held in reading:
                    held.reads -= 1

    def note_tracking(self, hwpt_id: int, *, is_on: bool) -> None:
        """A page table that is filled from here tracks dirty pages from now on, or no more."""
        with self._lock:
            (self._tracking.add if is_on else self._tracking.discard)(hwpt_id)

    def check_usable_on(self, context: Context) -> None:
        """Raises KernelGone when it is destroyed: its id may be somebody else's by now."""
        self._check_there()
        if self._context is not context:
            raise ValueError(f"IOAS {self.id} is on another iommufd")

    def _hold(self, iova: int, length_bytes: int, memory: tuple[memoryview, ...]) -> Mapping:
        mapping = Mapping(iova, length_bytes)
        self._held[iova] = _Held(mapping, memory)
        return mapping

    def _covering(self, iova: int, length_bytes: int) -> list[_Held]:
        """The mappings that cover the range, gapless."""
        end, reached, found = iova + length_bytes, iova, []
        for start in sorted(self._held):
            held = self._held[start]
            if held.mapping.meets(iova, end):
                if start > reached:
                    break
                found.append(held)
                reached = held.mapping.end
        if reached < end or length_bytes <= 0:
            raise KernelRejected(
                f"{_shown(iova, length_bytes)} is not wholly mapped in IOAS {self.id}:"
                f" nothing at {reached:#x}",
                code="range_has_holes",
            )
        return found

    def _check_there(self) -> None:
        if self._is_destroyed:
            raise KernelGone(f"IOAS {self.id} has been destroyed", code="ioas_gone")


def _shown(iova: int, length_bytes: int) -> str:
    return f"IOVA {iova:#x} + {length_bytes:#x}"


def _address_of(view: memoryview) -> int:
    return ctypes.addressof((ctypes.c_char * view.nbytes).from_buffer(view))


def _release(memory: tuple[memoryview, ...]) -> None:
    for view in memory:
        view.release()


@contextlib.contextmanager
def _released_on_error(memory: tuple[memoryview, ...]) -> Iterator[None]:
    """An error's traceback keeps its frames, and would keep the memory with them."""
    try:
        yield
    except BaseException:
        _release(memory)
        raise
