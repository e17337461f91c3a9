"""Buffers as numpy words, and the checks that every operation on bits makes of what it is given.

A word is 64 bits, little-endian; bit 0 of word 0 is the first page.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any, Final, cast

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from _typeshed import ReadableBuffer, WriteableBuffer
    from numpy.typing import NDArray

    Words = NDArray[np.uint64]
    Bytes = NDArray[np.uint8]
    # Before Python 3.12 a type checker cannot see that an array is a buffer.
    Readable = ReadableBuffer | NDArray[Any]
    Writable = WriteableBuffer | NDArray[Any]

CHUNK_WORDS: Final = 1 << 18
"""2 MiB: so large that calling numpy costs nothing, so small that it stays in the cache."""
ALL: Final = 2**64 - 1
_LARGEST: Final = 2**63 - 1


def bytes_of(buffer: Readable, *, writable: bool = False) -> Bytes:
    """The same memory. TypeError: not a buffer; BufferError: in pieces, or read-only."""
    view = memoryview(cast("ReadableBuffer", buffer))
    if not view.c_contiguous:
        raise BufferError("the buffer is not contiguous")
    if writable and view.readonly:
        raise BufferError("the buffer is read-only")
    if not view.nbytes:
        return np.empty(0, np.uint8)
    return np.frombuffer(view, np.uint8)


def words_of(buffer: Readable, *, writable: bool = False) -> Words:
    """The same memory; ValueError if it is not whole words."""
    each = bytes_of(buffer, writable=writable)
    if len(each) % 8:
        raise ValueError(f"a buffer of {len(each)} bytes is not one of 64-bit words")
    return each.view(np.uint64)


def apart(first: NDArray[Any], second: NDArray[Any]) -> None:
    """ValueError if one is (partly) the other: it would be read while it is written."""
    if np.may_share_memory(first, second):
        raise ValueError("the buffers overlap")


def numbers(*given: int) -> tuple[int, ...]:
    """As integers from 0 to 2**63 - 1; TypeError or ValueError."""
    taken = tuple(operator.index(one) for one in given)
    for one in taken:
        if not 0 <= one <= _LARGEST:
            raise ValueError(f"{one} is not between 0 and 2**63 - 1")
    return taken


def fits(name: str, size_bytes: int, first: int, pages: int) -> None:
    """ValueError if the bits are not all in a buffer of that size."""
    if pages < 0:
        raise ValueError("the end is before the beginning")
    if first + pages > size_bytes * 8:
        raise ValueError(
            f"{name} has {size_bytes * 8} bits: too short for {pages} from bit {first}"
        )


def low(bits: int) -> int:
    """A word with only the lowest bits set."""
    return (1 << bits) - 1


def chunks(words: int) -> Iterator[slice]:
    """All of that many words, in pieces that stay in the cache."""
    for first in range(0, words, CHUNK_WORDS):
        yield slice(first, min(first + CHUNK_WORDS, words))


def popcount(words: Words, counts: Bytes) -> int:
    """How many bits are set; `counts` is where to work: a byte for each word."""
    each = np.bitwise_count(words, out=counts[: len(words)])
    half = len(each) // 2
    # Two counts of at most 64 fit a byte: the sum over wider integers, which is slow, is of half.
    total = int(np.add.reduce(each[:half] + each[half : 2 * half], dtype=np.uint64))
    return total + (int(each[-1]) if len(each) % 2 else 0)
