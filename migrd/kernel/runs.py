"""Runs of pages, as a scan tells them, into a bitmap: millions of them without a loop.

Most runs lie within one word: each is a mask, and those of one word are ORed together. A run over
several words is a one where it begins and a one behind its end; the bits between are what the
exclusive-or of all before comes to, which takes six shifts for each word, and a carry from word to
word; unless there are few of them.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from migrd.core.bitmap import DirtyBitmap

_FEW: Final = 32
"""So many are marked one by one faster."""
_PAGE_SHIFT: Final = np.uint64(12)
_ONE: Final = np.uint64(1)
_ALL: Final = np.uint64((1 << 64) - 1)
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
    begins = (rows[:, 0] - np.uint64(base) >> _PAGE_SHIFT) + np.uint64(first_page)
    lasts = (rows[:, 1] - np.uint64(base) >> _PAGE_SHIFT) + np.uint64(first_page) - _ONE
    if int(lasts[-1]) >= into.pages or int(begins[0]) < first_page:
        raise ValueError(f"pages up to {int(lasts[-1])} of a bitmap of {into.pages} pages")
    if len(rows) <= _FEW:
        _mark_each(into, begins, lasts)
    else:
        words = begins >> _WORD_SHIFT
        is_long = words != lasts >> _WORD_SHIFT
        if is_long.any():
            _mark_long(into, begins[is_long], lasts[is_long])
            is_short = ~is_long
            words, begins, ends = words[is_short], begins[is_short], lasts[is_short]
            _mark_short(into.words, words, begins, ends)
        else:
            _mark_short(into.words, words, begins, lasts)
    return int((rows[:, 1] - rows[:, 0]).sum()) >> 12


def _mark_each(into: DirtyBitmap, begins: NDArray[np.uint64], lasts: NDArray[np.uint64]) -> None:
    for begin, last in zip(begins.tolist(), lasts.tolist(), strict=True):
        into.mark(begin, last - begin + 1)


def _mark_short(
    into: NDArray[np.uint64],
    words: NDArray[np.uint64],
    begins: NDArray[np.uint64],
    lasts: NDArray[np.uint64],
) -> None:
    """Runs within one word each."""
    if not len(words):
        return
    masks = _ALL >> (_LAST_BIT - (lasts - begins))
    masks <<= begins & _BIT_MASK
    is_first = np.empty(len(words), np.bool_)
    is_first[0] = True
    np.not_equal(words[1:], words[:-1], out=is_first[1:])
    firsts = np.flatnonzero(is_first)
    into[words[firsts].view(np.int64)] |= np.bitwise_or.reduceat(masks, firsts)


def _mark_long(into: DirtyBitmap, begins: NDArray[np.uint64], lasts: NDArray[np.uint64]) -> None:
    if len(begins) <= _FEW:
        _mark_each(into, begins, lasts)
    else:
        _fill(into.words, np.stack((begins, lasts + _ONE), axis=1).reshape(-1))


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
