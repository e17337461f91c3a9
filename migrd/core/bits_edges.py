"""Runs of ones in a buffer, in numpy: the part of `bits_numpy` that finds extents.

It works from edges: w ^ (w << 1 | last bit of the word before) has a bit wherever a run begins or
ends. Only the words with an edge are taken apart, so that zeros and ones cost four operations per
word; a run costs 100 to 400 ns, against less than 10 in C.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from migrd.core.bits_words import ALL, apart, fits, low, numbers, words_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from migrd.core.bits_words import Readable, Words, Writable

EDGE_CHUNK_WORDS: Final = 1 << 14
"""Small, because a dense chunk is taken apart into eight bytes per bit."""
_U1, _U63 = np.uint64(1), np.uint64(63)


def extents(src: Readable, first: int, end: int, out: Writable, gap: int = 0) -> tuple[int, int]:
    words, room = words_of(src), words_of(out, writable=True)
    apart(room, words)
    first, end, gap = numbers(first, end, gap)
    fits("src", words.nbytes, first, end - first)
    pairs = room[: len(room) // 2 * 2].reshape(-1, 2)
    if not len(pairs):
        raise ValueError("out must have room for at least one extent (16 bytes)")
    found = 0
    held = np.empty((0, 2), np.uint64)  # the last run: what comes next may be joined to it
    for runs in _runs(words, first, end):
        held = _join(np.concatenate((held, runs)), gap)
        ready = min(len(held) - 1, len(pairs) - found)
        pairs[found : found + ready, 0] = held[:ready, 0]
        pairs[found : found + ready, 1] = held[:ready, 1] - held[:ready, 0]
        found += ready
        held = held[ready:]
        if found == len(pairs):
            return found, int(held[0, 0])
    if len(held):
        pairs[found] = held[0, 0], held[0, 1] - held[0, 0]
        found += 1
    return found, -1


def _runs(words: Words, first: int, end: int) -> Iterator[Words]:
    """(first, end) of each run of ones, in order; some per chunk, never none."""
    carry = 0
    opened: list[int] = []
    for begin in range(first // 64, -(-end // 64), EDGE_CHUNK_WORDS):
        part = words[begin : min(begin + EDGE_CHUNK_WORDS, -(-end // 64))]
        if not carry and not part.any():
            continue
        if begin * 64 < first or (begin + len(part)) * 64 > end:
            part = _within(part, first - begin * 64, end - begin * 64)
        edges = part << _U1
        edges[1:] |= part[:-1] >> _U63
        edges[0] |= np.uint64(carry)
        edges ^= part
        carry = int(part[-1]) >> 63
        where = np.flatnonzero(edges)
        if not len(where):
            continue
        bits = np.flatnonzero(np.unpackbits(edges[where].view(np.uint8), bitorder="little"))
        at = (where[bits >> 6] + begin) * 64 + (bits & 63)
        both = np.concatenate((np.array(opened, np.uint64), at.astype(np.uint64)))
        opened = [int(both[-1])] if len(both) % 2 else []
        if len(both) > 1:
            yield both[: len(both) // 2 * 2].reshape(-1, 2)
    if opened:
        yield np.array([(opened[0], end)], np.uint64)


def _join(runs: Words, gap: int) -> Words:
    """Runs that at most `gap` zeros part, as one."""
    if not gap or len(runs) < 2:
        return runs
    parted = np.empty(len(runs) + 1, np.bool_)
    parted[0] = parted[-1] = True
    np.greater(runs[1:, 0] - runs[:-1, 1], np.uint64(min(gap, ALL)), out=parted[1:-1])
    return np.column_stack((runs[parted[:-1], 0], runs[parted[1:], 1]))


def _within(part: Words, begin: int, end: int) -> Words:
    """A copy without the bits before `begin` and from `end` on, counted from part's first bit."""
    part = part.copy()
    if begin > 0:
        part[0] &= np.uint64(ALL ^ low(begin))
    if end < len(part) * 64:
        part[-1] &= np.uint64(low(end - (len(part) - 1) * 64))
    return part
