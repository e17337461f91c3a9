"""Runs of pages, as a scan tells them, into a bitmap: millions of them without a loop.

A run is a one where it begins and a one behind its end; the bits between are what the exclusive-or
of all before comes to. That takes six shifts for each word, and a carry from word to word.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from migrd.core.bitmap import DirtyBitmap

_FEW: Final = 16
"""So many are marked one by one faster."""
_PAGE_SHIFT: Final = np.uint64(12)
_ONE: Final = np.uint64(1)
_WORD_SHIFT: Final = np.uint64(6)
_BIT_MASK: Final = np.uint64(63)
_LAST_BIT: Final = np.uint64(63)
_SHIFTS: Final = tuple(np.uint64(1 << n) for n in range(6))


def mark_runs(into: DirtyBitmap, rows: NDArray[np.uint64], base: int, first_page: int) -> int:
    """Make dirty what `rows` tell of: (first address, end address, ...) each, ascending and apart;
    address `base` is page `first_page`. Returns how many pages they are.

    Raises ValueError: pages that the bitmap does not have; then nothing was marked.
    """
    if not len(rows):
        return 0
    edges = (rows[:, :2] - np.uint64(base)) >> _PAGE_SHIFT
    edges += np.uint64(first_page)
    pages = int((edges[:, 1] - edges[:, 0]).sum())
    if int(edges[-1, 1]) > into.pages or int(edges[0, 0]) < first_page:
        raise ValueError(f"pages up to {int(edges[-1, 1])} of a bitmap of {into.pages} pages")
    if len(rows) <= _FEW:
        for begin, end in edges.tolist():
            into.mark(begin, end - begin)
    else:
        _fill(into.words, edges.reshape(-1))
    return pages


def _fill(words: NDArray[np.uint64], edges: NDArray[np.uint64]) -> None:
    """`edges`: where runs begin and end in turn, ascending."""
    at = edges >> _WORD_SHIFT
    bits = _ONE << (edges & _BIT_MASK)
    begins = np.flatnonzero(at[1:] != at[:-1]) + 1
    begins = np.concatenate(([0], begins))
    first = int(at[0])
    filled = np.zeros(int(at[-1]) - first + 1, np.uint64)
    filled[(at[begins] - np.uint64(first)).astype(np.intp)] = np.bitwise_xor.reduceat(bits, begins)
    for shift in _SHIFTS:
        filled ^= filled << shift
    open_after = np.bitwise_xor.accumulate(filled >> _LAST_BIT)
    filled[1:] ^= np.uint64(0) - open_after[:-1]
    here = words[first : first + len(filled)]  # the last run may end where the bitmap does
    here |= filled[: len(here)]
