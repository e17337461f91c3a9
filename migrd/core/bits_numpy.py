"""Operations on bits of a buffer, in numpy: what serves where the C extension was not built.

The functions are those of `_bits.c`, with the same arguments, results and errors; `bits` chooses,
and `_bits.pyi` says what each does. They work through chunks that stay in the processor's cache:
memory is read once however many operations a chunk needs, and numpy lets go of the GIL in each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from migrd.core.bits_edges import extents
from migrd.core.bits_runs import mark_runs
from migrd.core.bits_words import (
    ALL,
    CHUNK_WORDS,
    apart,
    bytes_of,
    chunks,
    fits,
    low,
    numbers,
    popcount,
    words_of,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from migrd.core.bits_words import Bytes, Readable, Words, Writable

__all__ = [
    "and_not",
    "count",
    "extents",
    "mark_runs",
    "move",
    "or_all",
    "or_bits",
    "region_counts",
]


def or_bits(
    dst: Writable,
    dst_bit: int,
    pages: int,
    src: Readable,
    src_bit: int = 0,
    bit_pages: int = 1,
) -> int:
    to, source = words_of(dst, writable=True), bytes_of(src)
    apart(to, source)
    dst_bit, pages, src_bit, bit_pages = numbers(dst_bit, pages, src_bit, bit_pages)
    if bit_pages < 1:
        raise ValueError("bit_pages must be at least 1")
    fits("dst", to.nbytes, dst_bit, pages)
    fits("src", source.nbytes, src_bit, -(-pages // bit_pages))
    if bit_pages > 1:
        return _or_coarse(to, dst_bit, pages, source, src_bit, bit_pages)
    return _or_fine(to, dst_bit, pages, source, src_bit)


def _or_fine(to: Words, dst_bit: int, pages: int, source: Bytes, src_bit: int) -> int:
    newly = 0
    while pages:
        at, offset = divmod(dst_bit, 64)
        if offset or pages < 64:
            step = min(64 - offset, pages)
            newly += _or_word(to, at, _take(source, src_bit, step) << offset)
        else:
            words = min(pages // 64, CHUNK_WORDS)
            step = words * 64
            newly += _or_words(to[at : at + words], _shifted(source, src_bit, words))
        dst_bit, src_bit, pages = dst_bit + step, src_bit + step, pages - step
    return newly


def _or_coarse(
    to: Words, dst_bit: int, pages: int, source: Bytes, src_bit: int, bit_pages: int
) -> int:
    """Each source bit as `bit_pages` bits of its own; chunks of one value need no expansion."""
    newly = 0
    at_once = max(1, CHUNK_WORDS * 4 // bit_pages)
    while pages:
        bits = min(at_once, -(-pages // bit_pages))
        step = min(bits * bit_pages, pages)
        first, last = src_bit >> 3, (src_bit + bits + 7) >> 3
        each = np.unpackbits(source[first:last], bitorder="little")
        each = each[src_bit & 7 : (src_bit & 7) + bits]
        if each.any():
            many = np.repeat(each, bit_pages) if bits > 1 else np.ones(step, np.uint8)
            newly += _or_fine(to, dst_bit, step, np.packbits(many, bitorder="little"), 0)
        dst_bit, src_bit, pages = dst_bit + step, src_bit + bits, pages - step
    return newly


def or_all(dst: Writable, pages: int, sources: Sequence[Readable]) -> int:
    to = words_of(dst, writable=True)
    others = [words_of(one) for one in sources]
    (pages,) = numbers(pages)
    fits("dst", to.nbytes, 0, pages)
    for other in others:
        apart(to, other)
        fits("a source", other.nbytes, 0, pages)
    total = 0
    counts = np.empty(CHUNK_WORDS, np.uint8)
    for part in chunks(pages // 64):
        words = to[part]
        for other in others:
            np.bitwise_or(words, other[part], out=words)
        total += popcount(words, counts)
    if pages % 64:
        at, mask = pages // 64, low(pages % 64)
        for other in others:
            _or_word(to, at, int(other[at]) & mask)
        total += (int(to[at]) & mask).bit_count()
    return total


def and_not(dst: Writable, pages: int, src: Readable) -> None:
    to, source, pages = _pair(dst, src, pages)
    for part in chunks(pages // 64):
        np.bitwise_and(to[part], ~source[part], out=to[part])
    if pages % 64:
        to[pages // 64] &= np.uint64(~(int(source[pages // 64]) & low(pages % 64)) & ALL)


def move(dst: Writable, pages: int, src: Writable) -> None:
    to, source, pages = _pair(dst, src, pages, writable=True)
    for part in chunks(pages // 64):
        np.bitwise_or(to[part], source[part], out=to[part])
        source[part] = 0
    if pages % 64:
        mask = np.uint64(low(pages % 64))
        to[pages // 64] |= source[pages // 64] & mask
        source[pages // 64] &= ~mask


def count(src: Readable, first: int, pages: int) -> int:
    words = words_of(src)
    first, pages = numbers(first, pages)
    fits("src", words.nbytes, first, pages)
    return _count(words, first, pages)


def region_counts(src: Readable, pages: int, pages_per_region: int, out: Writable) -> None:
    words, counts = words_of(src), words_of(out, writable=True)
    apart(counts, words)
    pages, per = numbers(pages, pages_per_region)
    if per < 1:
        raise ValueError("pages_per_region must be at least 1")
    fits("src", words.nbytes, 0, pages)
    regions = -(-pages // per)
    if len(counts) < regions:
        raise ValueError(f"out has room for {len(counts)} regions, not for {regions}")
    if per % 64 == 0 and per // 64 <= CHUNK_WORDS and pages // per:
        _even_regions(words, per // 64, counts[: pages // per])
        begin = pages // per
    else:
        begin = 0
    for region in range(begin, regions):
        first = region * per
        counts[region] = _count(words, first, min(per, pages - first))


def _even_regions(words: Words, per_words: int, counts: Words) -> None:
    at_once = CHUNK_WORDS // per_words
    for first in range(0, len(counts), at_once):
        part = counts[first : first + at_once]
        bits = np.bitwise_count(words[first * per_words : (first + len(part)) * per_words])
        np.add.reduce(bits.reshape(len(part), per_words), axis=1, dtype=np.uint64, out=part)


def _or_word(to: Words, at: int, bits: int) -> int:
    old = int(to[at])
    to[at] = old | bits
    return (bits & ~old).bit_count()


def _or_words(to: Words, source: Words) -> int:
    counts = np.empty(len(to), np.uint8)
    before = popcount(to, counts)
    np.bitwise_or(to, source, out=to)
    return popcount(to, counts) - before


def _take(source: Bytes, src_bit: int, bits: int) -> int:
    """Up to 64 bits from anywhere."""
    some = source[src_bit >> 3 : (src_bit + bits + 7) >> 3].tobytes()
    return int.from_bytes(some, "little") >> (src_bit & 7) & low(bits)


def _shifted(source: Bytes, src_bit: int, words: int) -> Words:
    """Whole words that begin at any bit: two loads that overlap, one byte apart."""
    first, shift = divmod(src_bit, 8)
    begin = source[first : first + words * 8].view(np.uint64)
    if not shift:
        return begin
    end = source[first + 1 : first + 1 + words * 8].view(np.uint64)
    return begin >> np.uint64(shift) | end << np.uint64(8 - shift)


def _count(words: Words, first: int, pages: int) -> int:
    begin, end = first // 64, (first + pages) // 64
    if begin == end:
        return (int(words[begin]) >> first % 64 & low(pages)).bit_count() if pages else 0
    total = 0
    if first % 64:
        total += (int(words[begin]) >> first % 64).bit_count()
        begin += 1
    counts = np.empty(min(end - begin, CHUNK_WORDS), np.uint8)
    for at in range(begin, end, CHUNK_WORDS):
        total += popcount(words[at : min(at + CHUNK_WORDS, end)], counts)
    if (first + pages) % 64:
        total += (int(words[end]) & low((first + pages) % 64)).bit_count()
    return total


def _pair(
    dst: Writable, src: Readable, pages: int, *, writable: bool = False
) -> tuple[Words, Words, int]:
    to, source = words_of(dst, writable=True), words_of(src, writable=writable)
    apart(to, source)
    (pages,) = numbers(pages)
    fits("dst", to.nbytes, 0, pages)
    fits("src", source.nbytes, 0, pages)
    return to, source, pages
