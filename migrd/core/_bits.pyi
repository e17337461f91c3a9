"""The C extension. Memory is bits of little-endian 64-bit words; a number is 0 to 2**63 - 1.

Each function raises TypeError (not a buffer, not an integer), BufferError (in pieces, read-only) or
ValueError (bits that are not in the buffer, buffers that overlap, not whole words), and then has
changed nothing. The GIL is released.
"""

from collections.abc import Sequence

from migrd.core.bits_words import Readable, Writable

def or_bits(
    dst: Writable,
    dst_bit: int,
    pages: int,
    src: Readable,
    src_bit: int = 0,
    bit_pages: int = 1,
    /,
) -> int:
    """dst[dst_bit + i] |= src[src_bit + i // bit_pages] for i < pages; how many were newly set."""

def or_all(dst: Writable, pages: int, sources: Sequence[Readable], /) -> int:
    """The first bits of dst |= those of every source; how many are set then."""

def and_not(dst: Writable, pages: int, src: Readable, /) -> None:
    """The first bits of dst &= ~src."""

def move(dst: Writable, pages: int, src: Writable, /) -> None:
    """The first bits of dst |= src, and those of src are cleared, in one pass."""

def count(src: Readable, first: int, pages: int, /) -> int:
    """How many are set."""

def region_counts(src: Readable, pages: int, pages_per_region: int, out: Writable, /) -> None:
    """How many are set in each region, as words in `out`; the last region may be shorter."""

def extents(src: Readable, first: int, end: int, out: Writable, gap: int = 0, /) -> tuple[int, int]:
    """Runs of ones among bits [first, end), as pairs (first, length) of words in `out`.

    Runs with at most `gap` zeros between them are one. Returns how many were written, and where the
    next one begins (-1: there is none); going on from there gives the same as all at once.
    """

def mark_runs(
    dst: Writable,
    pages: int,
    rows: Readable,
    row_words: int,
    base: int,
    shift: int,
    first: int,
    /,
) -> int:
    """Set what `rows` tell of, among the first bits of dst; how many bits they are in all.

    A row is `row_words` words (2 to 64): where a run begins, where it ends (exclusive), and what
    is not looked at. Address `base` is bit `first`, and a bit is 2**`shift` of them. Rows are
    ascending and apart.
    """

def use(level: str, /) -> str:
    """Compute with "avx2" or "portable" from now on; the level in use before. For tests.

    ValueError: no such level, or this processor does not have it.
    """
