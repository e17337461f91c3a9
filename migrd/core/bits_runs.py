"""Runs of bits, as rows tell of them, into a bitmap: millions of them without a loop, in numpy.

Most runs lie within one word: each is a mask, and those of one word are ORed together. A run over
several words is a one where it begins and a one behind its end; the bits between are what the
exclusive-or of all before comes to, which takes six shifts for each word, and a carry from word to
word.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from migrd.core.bits_words import apart, fits, numbers, words_of

if TYPE_CHECKING:
    from migrd.core.bits_words import Readable, Writable

_ONE: Final = np.uint64(1)
_ALL: Final = np.uint64((1 << 64) - 1)
_WORD_SHIFT: Final = np.uint64(6)
_BIT_MASK: Final = np.uint64(63)
_LAST_BIT: Final = np.uint64(63)
_SHIFTS: Final = tuple(np.uint64(1 << n) for n in range(6))


def mark_runs(
    dst: Writable, pages: int, rows: Readable, row_words: int, base: int, shift: int, first: int
) -> int:
    to, source = words_of(dst, writable=True), words_of(rows)
    apart(to, source)
    pages, row_words, base, shift, first = numbers(pages, row_words, base, shift, first)
    if not 2 <= row_words <= 64 or len(source) % row_words or shift > 62:
        raise ValueError("not rows of words, or not a shift")
    fits("dst", to.nbytes, 0, pages)
    fits("dst", to.nbytes, first, 0)
    runs = source.reshape(-1, row_words)
    begins, ends = runs[:, 0] - np.uint64(base) >> shift, runs[:, 1] - np.uint64(base) >> shift
    outside = (runs[:, 0] < base) | (runs[:, 1] < runs[:, 0])
    if first > pages or outside.any() or (ends > pages - first).any():
        raise ValueError(f"runs that are not in a bitmap of {pages} pages")
    some = ends > begins
    begins, lasts = begins[some] + np.uint64(first), ends[some] + np.uint64(first) - _ONE
    words = begins >> _WORD_SHIFT
    is_long = words != lasts >> _WORD_SHIFT
    if is_long.any():
        edges = np.stack((begins[is_long], lasts[is_long] + _ONE), axis=1).reshape(-1)
        _fill(to, edges)
    _mark_short(to, words[~is_long], begins[~is_long], lasts[~is_long])
    return int((lasts - begins).sum()) + len(begins)


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
