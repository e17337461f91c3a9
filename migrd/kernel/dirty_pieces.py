"""What the sources of DMA have in common: pieces of IOVA space, read part by part into a bitmap."""

import errno
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np

from migrd.core.bitmap import PAGE_BYTES, DirtyBitmap
from migrd.engine.dirty_ports import IovaPiece, PageRun
from migrd.errors import KernelRejected
from migrd.kernel.page_table import DirtyBits, Merge

MOST_PIECES: Final = 1024
_ADDRESSES: Final = 1 << 64


def check_pieces(name: str, pieces: Sequence[IovaPiece], page_size_bytes: int) -> None:
    """Raises KernelRejected (`bad_ranges`), naming the first piece that cannot be."""
    if page_size_bytes < PAGE_BYTES or page_size_bytes & (page_size_bytes - 1):
        raise _bad(f"{name}: {page_size_bytes} bytes are no page size from {PAGE_BYTES} up")
    if not 0 < len(pieces) <= MOST_PIECES:
        raise _bad(f"{name}: {len(pieces)} ranges: give 1 to {MOST_PIECES}")
    end = -1
    for one in sorted(pieces, key=lambda one: one.iova):
        named = f"{name}: IOVA {one.iova:#x} + {one.length_bytes:#x}"
        if one.iova < 0 or one.length_bytes <= 0 or one.first_page < 0:
            raise _bad(f"{named} at page {one.first_page} is empty, or is nowhere")
        if one.iova + one.length_bytes > _ADDRESSES:
            raise _bad(f"{named} reaches beyond the address space")
        if (one.iova | one.length_bytes) % PAGE_BYTES:
            raise _bad(f"{named} is not aligned to {PAGE_BYTES}")
        if one.iova < end:
            raise _bad(f"{named} overlaps another range")
        end = one.iova + one.length_bytes


def covered(pieces: Sequence[IovaPiece]) -> tuple[PageRun, ...]:
    return tuple((one.first_page, one.length_bytes // PAGE_BYTES) for one in pieces)


def parts_of(
    pieces: Sequence[IovaPiece], page_size_bytes: int, most_bytes: int
) -> Iterator[tuple[IovaPiece, int]]:
    """The pieces cut to `most_bytes`, each with the page size to read it in: as asked, or the
    largest that it is aligned to."""
    for piece in pieces:
        at = piece.iova
        end = piece.iova + piece.length_bytes
        while at < end:
            stop = min(end, (at + most_bytes) // most_bytes * most_bytes)
            page = piece.first_page + (at - piece.iova) // PAGE_BYTES
            aligned = (at | stop) & -(at | stop)
            yield IovaPiece(at, stop - at, page), min(page_size_bytes, aligned)
            at = stop


class Told:
    """Merges what reads find into a bitmap, and counts it."""

    def __init__(self, into: DirtyBitmap) -> None:
        self._into = into
        self.dirty_pages = 0
        """Of 4 KiB; whether or not they were dirty in the bitmap already."""

    def of(self, part: IovaPiece) -> Merge:
        """To be called with the bits of that part."""

        def merge(found: DirtyBits) -> None:
            bit_pages = found.page_size_bytes // PAGE_BYTES
            words = np.frombuffer(found.bits, np.uint64)
            self.dirty_pages += int(np.bitwise_count(words).sum()) * bit_pages
            self._into.merge_bits(
                found.bits,
                first_page=part.first_page,
                bits_count=found.pages,
                bit_pages=bit_pages,
            )

        return merge


def _bad(message: str) -> KernelRejected:
    return KernelRejected(message, errno=errno.EINVAL, code="bad_ranges")
