"""The bitmap pipeline beside memory itself: merge, count, extents, at 2 TiB and 24 TiB of guest.

The references are the shortest loops in C, compiled when this runs and for the processor it runs
on: one that only reads a bitmap, one that only ORs three into a fourth. All sides take turns in one
process; times are processor time of the thread, so that a busy machine changes both alike.
"""

import ctypes
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from migrd.core import bits, bits_numpy
from migrd.core.bitmap import DirtyBitmap
from tests.bench.figures import Figure, Judge, Table, median

SIZES_MIB: Final = (64, 768)
"""Of one bitmap: guests of 2 TiB and 24 TiB."""
RUN_PAGES: Final = 512
"""2 MiB."""
TILE_WORDS: Final = 1 << 17
PLAIN_C: Final = """
#include <stddef.h>
#include <stdint.h>
uint64_t read_all(const uint64_t *p, size_t n)
{
    uint64_t any = 0;
    for (size_t i = 0; i < n; i++)
        any |= p[i];
    return any;
}
void or_three(uint64_t *restrict d, const uint64_t *restrict a, const uint64_t *restrict b,
              const uint64_t *restrict c, size_t n)
{
    for (size_t i = 0; i < n; i++)
        d[i] |= a[i] | b[i] | c[i];
}
"""
Job = Callable[[], object]


class Plain:
    """The references."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def read(self, one: DirtyBitmap) -> None:
        self._library.read_all(_at(one.words), ctypes.c_size_t(len(one.words)))

    def or_three(self, to: DirtyBitmap, sources: list[DirtyBitmap]) -> None:
        each = [_at(source.words) for source in sources]
        self._library.or_three(_at(to.words), *each, ctypes.c_size_t(len(to.words)))


def _at(words: NDArray[np.uint64]) -> ctypes.c_void_p:
    return ctypes.c_void_p(words.ctypes.data)


@contextmanager
def compiled() -> Iterator[Plain]:
    with tempfile.TemporaryDirectory(prefix="migrd-bench-") as made:
        source, library = Path(made) / "plain.c", Path(made) / "plain.so"
        source.write_text(PLAIN_C)
        options = ["-O3", "-march=native", "-shared", "-fPIC"]
        subprocess.run(["gcc", *options, str(source), "-o", library], check=True, timeout=60)
        yield Plain(ctypes.CDLL(str(library)))


@dataclass(frozen=True)
class Pattern:
    """Which pages are dirty."""

    name: str
    share: float
    run_pages: int = 1
    is_sparse: bool = True
    """Bound by memory: judged against reading. Otherwise by the cost of each extent."""
    largest_mib: int = 768

    def make(self, bitmap: DirtyBitmap, seed: int = 1) -> None:
        """A dense one is made once for 1 MiB and repeated: that is as random, and much sooner."""
        if not self.is_sparse and len(bitmap.words) > TILE_WORDS:
            tile = DirtyBitmap(TILE_WORDS * 64)
            self.make(tile, seed)
            bitmap.words.reshape(-1, TILE_WORDS)[:] = tile.words
            return
        chance = np.random.default_rng(seed)
        bitmap.clear()
        runs = int(bitmap.pages * self.share / self.run_pages)
        at = chance.integers(0, bitmap.pages - self.run_pages, runs, dtype=np.uint64)
        if self.run_pages == 1:
            ones = np.left_shift(np.uint64(1), at & np.uint64(63))
            np.bitwise_or.at(bitmap.words, at >> np.uint64(6), ones)
        else:
            for first in at.tolist():
                bitmap.mark(first, self.run_pages)


PATTERNS: Final = (
    Pattern("0.001 % random", 1e-5),
    Pattern("0.01 % random", 1e-4),
    Pattern("1 % in runs of 2 MiB", 1e-2, RUN_PAGES),
    Pattern("0.1 % random", 1e-3, is_sparse=False),
    Pattern("1 % random", 1e-2, is_sparse=False, largest_mib=64),
    Pattern("10 % random", 1e-1, is_sparse=False, largest_mib=64),
)


async def run(runs: int, sizes_mib: tuple[int, ...] = SIZES_MIB) -> Table:
    table = Table()
    with compiled() as plain:
        for mib in sizes_mib:
            bitmaps = [DirtyBitmap(mib << 23) for _ in range(4)]
            figures = [
                *merging(plain, mib, bitmaps, runs),
                *finding(plain, mib, bitmaps[0], runs),
            ]
            note = f"{mib} MiB of bits: back end {bits.BACKEND}"
            table.add(Table.of("bitmap", runs, figures, [note]))
    return table


def taking_turns(jobs: Mapping[str, Job], runs: int) -> dict[str, float]:
    """Median of each, in ms of the thread's processor time; one round before is not counted."""
    took_ms: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(runs + 1):
        for name, job in jobs.items():
            began_s = time.thread_time()
            job()
            if turn:
                took_ms[name].append((time.thread_time() - began_s) * 1e3)
    return {name: median(each) for name, each in took_ms.items()}


def merging(plain: Plain, mib: int, bitmaps: list[DirtyBitmap], runs: int) -> list[Figure]:
    """Merge with its count; count alone; a source whose first page is not that of a word."""
    to, *sources = bitmaps
    for seed, one in enumerate(bitmaps):
        PATTERNS[1].make(one, seed)
    words, pages = [one.words for one in sources], to.pages - 64
    bits_given: dict[str, Any] = {"bits": words[0], "bits_count": pages}
    took = taking_turns(
        {
            "or": lambda: plain.or_three(to, sources),
            "merge": lambda: to.merge_all(sources),
            "numpy": lambda: bits_numpy.or_all(to.words, to.pages, words),
            "read": lambda: plain.read(to),
            "count": to.count,
            "aligned": lambda: to.merge_bits(first_page=0, **bits_given),
            "unaligned": lambda: to.merge_bits(first_page=13, **bits_given),
        },
        runs,
    )
    assert to.merge_all(sources) == bits_numpy.count(to.words, 0, to.pages)
    three = f"merge of three sources and count, {mib} MiB"
    ors, reads = ("C that only ORs", took["or"]), ("C that only reads", took["read"])
    return [
        _figure(three, took["merge"], *ors, 0.8),
        _figure(f"{three}, in numpy", took["numpy"], *ors, 0.5),
        _figure(f"count, {mib} MiB", took["count"], *reads, 0.7),
        _figure(
            f"merge at page 13, {mib} MiB",
            *(took["unaligned"], "at page 0", took["aligned"], 0.8),
        ),
    ]


def finding(plain: Plain, mib: int, bitmap: DirtyBitmap, runs: int) -> list[Figure]:
    """Extents of each pattern."""
    figures = []
    for pattern in PATTERNS:
        if mib > pattern.largest_mib:
            continue
        pattern.make(bitmap)
        found = walk(bitmap)
        took = taking_turns(
            {"read": lambda: plain.read(bitmap), "walk": lambda: walk(bitmap)}, runs
        )
        named = f"extents, {pattern.name}, {mib} MiB"
        if pattern.is_sparse:
            figures.append(_figure(named, took["walk"], "C that only reads", took["read"], 0.7))
        else:
            each_ns = (took["walk"] - took["read"]) * 1e6 / found
            told = f"{found:,} extents, beyond reading"
            figures.append(
                Figure(named, "ns per extent", each_ns, None, told, Judge.VALUE, 40.0),
            )
    return figures


def walk(bitmap: DirtyBitmap) -> int:
    """All extents, in rows as the mover takes them; how many."""
    found, page = 0, 0
    while True:
        rows, going_on = bitmap.extents(page)
        found += len(rows)
        if going_on is None:
            return found
        page = going_on


def _figure(name: str, ours: float, told: str, reference: float, speed: float) -> Figure:
    """At least `speed` of the reference's, told as time."""
    return Figure(name, "ms", ours, reference, told, Judge.RATIO, round(1 / speed, 2))
