"""Whether a harvest misses anything, at scale: ten million pages of a real process, dirtied in
random order and number, harvested round after round.

exact    pages are written between rounds: each must be told of, and nothing else
storm    threads write during the scans: a copy made of what is told must be the memory in the end
"""

import asyncio
import time
from typing import Any, Final

import numpy as np

from migrd.core.bitmap import PAGE_BYTES, DirtyBitmap
from migrd.core.memory_map import MemoryMap
from migrd.kernel.dirty_process import ProcessRange, ProcessSource
from tests.bench.figures import Figure, Judge, Table
from tests.contract.dirty_writer import KINDS, Writer

DIRTIED_PAGES: Final = 10_000_000
REGION_BYTES: Final = 512 << 20
REGIONS: Final = 2
OVER_REPORT: Final = 0.05
_STORM_S: Final = 5.0


class Count:
    """What a kind of memory came to."""

    def __init__(self) -> None:
        self.dirtied = self.told = self.missed = self.over = self.rounds = 0
        self.storm_told = self.storm_wrong = 0


class Pair:
    """A process and a source on it."""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        lengths = [where.length_bytes for where in writer.regions]
        self.memory = MemoryMap.of([(n, n << 40, length) for n, length in enumerate(lengths)])
        ranges = [
            ProcessRange(where.hva, where.length_bytes, region.first_page)
            for where, region in zip(writer.regions, self.memory.regions, strict=True)
        ]
        self.source = ProcessSource(writer.pagemap_fd, ranges, "ram")
        self.into = DirtyBitmap(self.memory.pages)
        self.written = DirtyBitmap(self.memory.pages)


async def run(
    runs: int,
    *,
    dirtied_pages: int = DIRTIED_PAGES,
    region_bytes: int = REGION_BYTES,
    storm_s: float = _STORM_S,
) -> Table:
    """`runs` is the seed: another number, another schedule."""
    return await asyncio.to_thread(_run, runs, dirtied_pages, region_bytes, storm_s)


def _run(runs: int, dirtied_pages: int, region_bytes: int, storm_s: float) -> Table:
    chance = np.random.default_rng(runs)
    figures, notes = [], []
    for kind in KINDS:
        count = Count()
        with Writer(kind, [region_bytes] * REGIONS) as writer:
            pair = Pair(writer)
            pair.source.start_tracking()
            pair.source.read_and_clear(pair.into)
            while count.dirtied < dirtied_pages // len(KINDS):
                _round(pair, chance, count)
            _storm(pair, count, storm_s)
            pair.source.close()
        figures += _figures(kind, count)
        notes.append(
            f"{kind}: {count.dirtied:,} pages dirtied in {count.rounds} rounds, {count.told:,} told"
            f" of; {count.storm_told:,} more told of while threads wrote during the scans"
        )
    return Table.of("harvest_correctness", runs, figures, notes)


def _round(pair: Pair, chance: np.random.Generator, count: Count) -> None:
    pair.into.clear()
    pair.written.clear()
    for region in pair.memory.regions:
        pages = _schedule(chance, region.pages)
        if len(pages):
            pair.writer.write(region.id, pages.tolist())
        for begin, end in _runs(pages):
            pair.written.mark(region.first_page + begin, end - begin)
    pair.source.read_and_clear(pair.into)
    count.rounds += 1
    count.dirtied += pair.written.count()
    count.told += pair.into.count()
    missed = pair.written.copy()
    missed.subtract(pair.into)
    count.missed += missed.count()
    pair.into.subtract(pair.written)
    count.over += pair.into.count()


def _schedule(chance: np.random.Generator, pages: int) -> Any:
    """Some pages: none, few, many, or runs."""
    match int(chance.integers(4)):
        case 0:
            return np.unique(chance.integers(0, pages, int(chance.integers(0, 200))))
        case 1:
            return np.flatnonzero(chance.random(pages) < chance.random())
        case 2:
            begin = int(chance.integers(pages))
            return np.arange(begin, min(pages, begin + int(chance.integers(1, pages))))
        case _:
            starts = chance.integers(0, pages, 64)
            parts = [np.arange(s, min(pages, s + int(chance.integers(1, 600)))) for s in starts]
            return np.unique(np.concatenate(parts))


def _runs(pages: Any) -> list[tuple[int, int]]:
    if not len(pages):
        return []
    cuts = np.flatnonzero(np.diff(pages) > 1)
    begins = pages[np.concatenate(([0], cuts + 1))]
    ends = pages[np.concatenate((cuts, [len(pages) - 1]))] + 1
    return list(zip(begins.tolist(), ends.tolist(), strict=True))


def _storm(pair: Pair, count: Count, storm_s: float) -> None:
    """The counts at the beginning of the pages are the copy: nothing else of a page changes."""
    copy = [np.zeros(region.pages, np.uint64) for region in pair.memory.regions]
    told = pair.memory.full()
    pair.writer.ask("storm", 2, count.rounds)
    end_s = time.monotonic() + storm_s
    while time.monotonic() < end_s:
        count.storm_told += _copy(pair, copy, told)
    pair.writer.ask("calm")
    _copy(pair, copy, told)
    _copy(pair, copy, told)
    for region, copied in zip(pair.memory.regions, copy, strict=True):
        now = pair.writer.counts(region.id, 0, region.pages)
        count.storm_wrong += int(np.count_nonzero(now != copied))


def _copy(pair: Pair, copy: list[Any], told: DirtyBitmap) -> int:
    start: int | None = 0
    while start is not None:
        rows, start = told.extents(start, gap_pages=64)
        for first_page, pages in rows.tolist():
            for region, offset, length in pair.memory.pieces(first_page, pages):
                at, many = offset // PAGE_BYTES, length // PAGE_BYTES
                copy[region.id][at : at + many] = pair.writer.counts(region.id, at, many)
    told.clear()
    return pair.source.read_and_clear(told).dirty_pages


def _figures(kind: str, count: Count) -> list[Figure]:
    return [
        Figure(f"pages missed, {kind}", "pages", count.missed, None, "", Judge.VALUE, 0),
        Figure(
            f"pages wrong after a storm, {kind}",
            "pages",
            count.storm_wrong,
            None,
            "",
            Judge.VALUE,
            0,
        ),
        Figure(
            f"pages told of that were not written, {kind}",
            "of those written",
            count.over / max(1, count.dirtied),
            None,
            "",
            Judge.VALUE,
            OVER_REPORT,
        ),
    ]
