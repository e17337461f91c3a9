"""Which pages are dirty: one bit for each 4 KiB page of a guest.

    word 0                    word 1                        pages are numbered in the merged page
    bit 0 = page 0 ... 63     bit 0 = page 64 ...           space of `memory_map`

A guest of 24 TiB has 768 MiB of bits. What follows from that:

* Every pass is one through memory: what is merged is counted in the same pass, what is moved is
  cleared in it. `bits` does it, in C or in numpy.
* Every method that goes over all words lets go of the GIL for it and may take a tenth of a second:
  call it in a worker thread (`engine.threads.in_thread`), never on the event loop.
* The first write to fresh memory costs more than any of these passes. A bitmap is written once when
  it is made; keep it and reuse it (`clear`), do not make one per round.

One owner at a time: nothing here is safe against another thread that uses the same bitmap.
Bits beyond `pages` in the last word mean nothing and are never counted or reported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Self

import numpy as np

from migrd.core import bits as _bits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from migrd.core.bits_words import Readable

PAGE_BYTES: Final = 4096
PAGE_SHIFT: Final = 12
EXTENTS_AT_ONCE: Final = 65536


class DirtyBitmap:
    """`pages` bits, all clean at first, in memory that is already there (prefaulted)."""

    __slots__ = ("pages", "words")

    def __init__(self, pages: int) -> None:
        """ValueError: a negative number of pages. MemoryError: no room for them."""
        if pages < 0:
            raise ValueError(f"a bitmap cannot have {pages} pages")
        self.pages = pages
        self.words: NDArray[np.uint64] = np.empty(-(-pages // 64), np.uint64)
        self.words.fill(0)

    @classmethod
    def over(cls, words: NDArray[np.uint64], pages: int) -> Self:
        """A bitmap in memory that exists: of a file, of another bitmap. It is not cleared."""
        if words.dtype != np.uint64 or words.ndim != 1 or len(words) != -(-pages // 64):
            raise ValueError(f"{pages} pages are {-(-pages // 64)} words of 64 bits, in one row")
        bitmap = cls.__new__(cls)
        bitmap.pages, bitmap.words = pages, words
        return bitmap

    def mark(self, first_page: int, pages: int) -> None:
        """Make them dirty. ValueError: not all of them are pages of this bitmap."""
        self._fill(first_page, pages, dirty=True)

    def unmark(self, first_page: int, pages: int) -> None:
        """Make them clean. ValueError: not all of them are pages of this bitmap."""
        self._fill(first_page, pages, dirty=False)

    def mark_runs(self, rows: NDArray[np.uint64], base: int, first_page: int) -> int:
        """Make dirty what `rows` tell of: (first address, end address, ...) each, ascending and
        apart; address `base` is page `first_page`. Returns how many pages they are.

        ValueError: pages that the bitmap does not have; then nothing was marked.
        """
        width = rows.shape[1]
        return _bits.mark_runs(self.words, self.pages, rows, width, base, PAGE_SHIFT, first_page)

    def clear(self) -> None:
        """Make all clean."""
        self.words.fill(0)

    def merge(self, other: DirtyBitmap) -> int:
        """OR the other's pages into this one; how many are newly dirty."""
        self._same_size(other)
        return _bits.or_bits(self.words, 0, self.pages, other.words)

    def merge_all(self, sources: Sequence[DirtyBitmap]) -> int:
        """OR all sources into this one in one pass; how many pages are dirty then."""
        for source in sources:
            self._same_size(source)
        return _bits.or_all(self.words, self.pages, [source.words for source in sources])

    def merge_bits(
        self,
        bits: Readable,
        *,
        first_page: int,
        bits_count: int,
        bit_pages: int = 1,
        pages: int | None = None,
    ) -> int:
        """OR a source's own bitmap in; how many pages are newly dirty.

        Bit i of `bits` (little-endian, from its first byte) stands for the `bit_pages` pages from
        `first_page + i * bit_pages` on, at any alignment. `pages` cuts the last bit short, where a
        source's page reaches beyond what it covers. ValueError: the bits are not in the buffer, or
        the pages not in this bitmap.
        """
        stand_for = bits_count * bit_pages
        if bits_count < 0 or bit_pages < 1:
            raise ValueError(f"{bits_count} bits of {bit_pages} pages are no bitmap")
        if pages is None:
            pages = stand_for
        elif pages > stand_for:
            raise ValueError(f"{bits_count} bits of {bit_pages} pages do not tell of {pages} pages")
        self._within(first_page, pages)
        return _bits.or_bits(self.words, first_page, pages, bits, 0, bit_pages)

    def subtract(self, other: DirtyBitmap) -> None:
        """Make clean what is dirty in the other."""
        self._same_size(other)
        _bits.and_not(self.words, self.pages, other.words)

    def move_into(self, other: DirtyBitmap) -> None:
        """Make dirty in the other what is dirty here, and all clean here, in one pass."""
        self._same_size(other)
        _bits.move(other.words, self.pages, self.words)

    def count(self, first_page: int = 0, pages: int | None = None) -> int:
        """How many are dirty, of all or of those named."""
        pages = self.pages - first_page if pages is None else pages
        self._within(first_page, pages)
        return _bits.count(self.words, first_page, pages)

    def region_counts(self, pages_per_region: int) -> NDArray[np.uint64]:
        """How many are dirty in each region of that many pages; the last may be a shorter one."""
        if pages_per_region < 1:
            raise ValueError(f"a region cannot have {pages_per_region} pages")
        counts = np.zeros(-(-self.pages // pages_per_region), np.uint64)
        _bits.region_counts(self.words, self.pages, pages_per_region, counts)
        return counts

    def extents(
        self,
        start_page: int = 0,
        *,
        end_page: int | None = None,
        limit: int = EXTENTS_AT_ONCE,
        gap_pages: int = 0,
    ) -> tuple[NDArray[np.uint64], int | None]:
        """Dirty pages as rows (first page, pages), in order; and where to go on (None: the end).

        At most `limit` rows. Extents with at most `gap_pages` clean pages between them are one, so
        that a row may then have clean pages in it. To go on, pass the page returned as
        `start_page`: the rows of all calls are those that one call without a limit would give.
        """
        end_page = self.pages if end_page is None else end_page
        self._within(start_page, end_page - start_page)
        if limit < 1:
            raise ValueError(f"a limit of {limit} extents")
        most = (end_page - start_page + 1) // 2
        rows = np.empty((max(1, min(limit, most)), 2), np.uint64)
        found, next_page = _bits.extents(self.words, start_page, end_page, rows, gap_pages)
        return rows[:found], None if next_page < 0 else next_page

    def copy(self) -> DirtyBitmap:
        """Another with the same pages dirty, in memory of its own."""
        return DirtyBitmap.over(self.words.copy(), self.pages)

    def slice(self, first_page: int, pages: int) -> DirtyBitmap:
        """Another of those pages alone: its page 0 is `first_page` here."""
        self._within(first_page, pages)
        part = DirtyBitmap(pages)
        _bits.or_bits(part.words, 0, pages, self.words, first_page)
        return part

    def _fill(self, first_page: int, pages: int, *, dirty: bool) -> None:
        self._within(first_page, pages)
        if not pages:
            return
        first, last = first_page // 64, (first_page + pages - 1) // 64
        head = 2**64 - (1 << first_page % 64)
        tail = (2 << (first_page + pages - 1) % 64) - 1
        if first == last:
            self._set(first, head & tail, dirty=dirty)
            return
        self._set(first, head, dirty=dirty)
        self.words[first + 1 : last] = 2**64 - 1 if dirty else 0
        self._set(last, tail, dirty=dirty)

    def _set(self, at: int, mask: int, *, dirty: bool) -> None:
        word = int(self.words[at])
        self.words[at] = word | mask if dirty else word & ~mask

    def _within(self, first_page: int, pages: int) -> None:
        if first_page < 0 or pages < 0 or first_page + pages > self.pages:
            raise ValueError(
                f"{pages} pages from page {first_page} are not in a bitmap of {self.pages} pages"
            )

    def _same_size(self, other: DirtyBitmap) -> None:
        if other.pages != self.pages:
            raise ValueError(f"a bitmap of {other.pages} pages and one of {self.pages} pages")
