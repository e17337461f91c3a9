"""Guest memory as one row of pages: where each region stands in the merged page space.

    regions   ram (0 .. 3 GiB)        high (4 GiB .. 7.5 GiB)
    pages     [0 ............ 786432) [786432 .......... 1703936)
                                      every region begins at a multiple of 64

A dirty bitmap of a guest has one bit for each page of this row, so that the bitmaps of all sources
are ORed word by word. A region whose length is no multiple of 64 pages leaves a gap behind it:
pages that stand for nothing, and are never dirty.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Self

from migrd.core.bitmap import PAGE_BYTES, DirtyBitmap
from migrd.errors import Invalid, Violation

__all__ = ["PAGE_BYTES", "MemoryMap", "Region"]

WORD_PAGES: Final = 64
MOST_BYTES: Final = 24 << 40
"""Of all regions together: a bitmap of 768 MiB."""
MOST_REGIONS: Final = 1024
MOST_ADDRESS: Final = 1 << 57
"""Exclusive; what five levels of page tables reach."""
MOST_ID: Final = (1 << 32) - 1


@dataclass(frozen=True)
class Region:
    """One piece of guest memory."""

    id: int
    gpa: int
    """Guest physical address."""
    length_bytes: int
    first_page: int
    """Where it begins in the merged page space: a multiple of WORD_PAGES."""

    @property
    def pages(self) -> int:
        return self.length_bytes // PAGE_BYTES

    @property
    def end_page(self) -> int:
        """Exclusive."""
        return self.first_page + self.pages


@dataclass(frozen=True)
class MemoryMap:
    """All memory of one guest. Make it with `of`."""

    regions: tuple[Region, ...]
    """By their place in the merged page space, which is the order they were given in."""

    @classmethod
    def of(cls, pieces: Sequence[tuple[int, int, int]]) -> Self:
        """From (id, gpa, length in bytes) of each region.

        Raises Invalid with everything that is wrong: alignment, length, overlap, ids, size, count.
        """
        violations = list(_violations(pieces))
        if violations:
            raise Invalid(
                "the memory map cannot be used: " + "; ".join(one.message for one in violations),
                violations,
                code="bad_memory_map",
            )
        regions, first_page = [], 0
        for region_id, gpa, length_bytes in pieces:
            regions.append(Region(region_id, gpa, length_bytes, first_page))
            first_page = _whole_words(regions[-1].end_page)
        return cls(tuple(regions))

    @cached_property
    def pages(self) -> int:
        """Of the merged page space, the gaps between regions included: a multiple of WORD_PAGES."""
        return _whole_words(self.regions[-1].end_page) if self.regions else 0

    @cached_property
    def bytes(self) -> int:
        """Of guest memory."""
        return sum(region.length_bytes for region in self.regions)

    def region(self, region_id: int) -> Region:
        """Raises Invalid: there is none with this id."""
        for one in self.regions:
            if one.id == region_id:
                return one
        raise Invalid(f"there is no region {region_id} in the memory map", code="no_such_region")

    def pieces(self, first_page: int, pages: int) -> Iterator[tuple[Region, int, int]]:
        """The memory that a run of the merged page space stands for: region, offset in it in bytes,
        length in bytes. Gaps and what is beyond the end are left out."""
        end_page = first_page + pages
        for region in self.regions:
            begin, end = max(first_page, region.first_page), min(end_page, region.end_page)
            if begin < end:
                offset_bytes = (begin - region.first_page) * PAGE_BYTES
                yield region, offset_bytes, (end - begin) * PAGE_BYTES

    def is_memory(self, first_page: int, pages: int) -> bool:
        """Whether a run lies within regions, gaps not touched."""
        told = sum(length for _, _, length in self.pieces(first_page, pages))
        return first_page >= 0 and pages > 0 and told == pages * PAGE_BYTES

    def full(self) -> DirtyBitmap:
        """A bitmap with exactly the pages of regions set."""
        bitmap = DirtyBitmap(self.pages)
        for region in self.regions:
            bitmap.mark(region.first_page, region.pages)
        return bitmap


def _whole_words(pages: int) -> int:
    return -(-pages // WORD_PAGES) * WORD_PAGES


def _violations(pieces: Sequence[tuple[int, int, int]]) -> Iterator[Violation]:
    if not pieces or len(pieces) > MOST_REGIONS:
        yield Violation(
            "regions",
            "bad_count",
            f"{len(pieces)} regions: give 1 to {MOST_REGIONS}, joining adjacent ones",
        )
        return
    for number, piece in enumerate(pieces):
        yield from _violations_of(number, *piece)
    yield from _repeated_ids(pieces)
    yield from _overlaps(pieces)
    total = sum(length_bytes for _, _, length_bytes in pieces)
    if total > MOST_BYTES:
        yield Violation(
            "regions", "too_large", f"{total:#x} bytes in all: at most {MOST_BYTES:#x} are moved"
        )


def _violations_of(number: int, region_id: int, gpa: int, length_bytes: int) -> Iterator[Violation]:
    named = f"region {region_id} (gpa {gpa:#x}, {length_bytes:#x} bytes)"
    field = f"regions[{number}]"
    if not 0 <= region_id <= MOST_ID:
        yield Violation(f"{field}.id", "bad_id", f"{named}: the id must fit 32 bits")
    if length_bytes <= 0:
        yield Violation(f"{field}.length_bytes", "empty", f"{named} is empty: leave it out")
    elif length_bytes % PAGE_BYTES:
        cure = f"the length must be a multiple of {PAGE_BYTES}"
        yield Violation(f"{field}.length_bytes", "unaligned", f"{named}: {cure}")
    if gpa < 0 or gpa + max(length_bytes, 0) > MOST_ADDRESS:
        yield Violation(f"{field}.gpa", "out_of_reach", f"{named} reaches beyond {MOST_ADDRESS:#x}")
    elif gpa % PAGE_BYTES:
        cure = f"the address must be a multiple of {PAGE_BYTES}"
        yield Violation(f"{field}.gpa", "unaligned", f"{named}: {cure}")


def _repeated_ids(pieces: Sequence[tuple[int, int, int]]) -> Iterator[Violation]:
    seen: set[int] = set()
    for number, (region_id, gpa, _) in enumerate(pieces):
        if region_id in seen:
            yield Violation(
                f"regions[{number}].id",
                "repeated_id",
                f"region {region_id} (gpa {gpa:#x}): the id is another region's too: number them",
            )
        seen.add(region_id)


def _overlaps(pieces: Sequence[tuple[int, int, int]]) -> Iterator[Violation]:
    end, before = 0, None
    for region_id, gpa, length_bytes in sorted(pieces, key=lambda piece: piece[1]):
        if before is not None and gpa < end:
            yield Violation(
                "regions",
                "overlap",
                f"region {region_id} (gpa {gpa:#x}) overlaps region {before}, which ends at"
                f" {end:#x}: give each page once",
            )
        if before is None or gpa + length_bytes > end:
            end, before = gpa + length_bytes, region_id
