"""How late the event loop wakes while a guest's bitmap is merged, counted and taken apart.

A beat each millisecond, first on an idle loop, then while a worker thread (`in_thread`) does a
round's work on bitmaps of 768 MiB; by turns, each as long as the other.
"""

import asyncio
import time
from typing import Final

from migrd.core import bits
from migrd.core.bitmap import DirtyBitmap
from migrd.engine.threads import in_thread
from tests.bench.bitmap import PATTERNS, walk
from tests.bench.figures import Figure, Judge, Table, median, percentile

BITMAP_MIB: Final = 768
BEAT_S: Final = 0.001
SPARSE: Final = PATTERNS[1]


async def run(runs: int, bitmap_mib: int = BITMAP_MIB) -> Table:
    pending, *sources = [DirtyBitmap(bitmap_mib << 23) for _ in range(4)]
    for seed, source in enumerate(sources):
        SPARSE.make(source, seed)
    work(pending, sources)
    idle_ms: list[list[float]] = []
    busy_ms: list[list[float]] = []
    for _ in range(runs):
        job = asyncio.create_task(in_thread(work, pending, sources))
        began_s = time.perf_counter()
        busy_ms.append(await beats(job))
        rest = asyncio.create_task(asyncio.sleep(time.perf_counter() - began_s))
        idle_ms.append(await beats(rest))
    named = f"event loop late during a round over {bitmap_mib} MiB"
    ours, idle = (
        (percentile([ms for each in lists for ms in each], 0.99), median([*map(max, lists)]))
        for lists in (busy_ms, idle_ms)
    )
    figures = [
        Figure(f"{named}: 99 of 100 beats", "ms", ours[0], idle[0], "idle", Judge.MORE, 5.0),
        Figure(f"{named}: the worst beat", "ms", ours[1], idle[1], "idle", Judge.MORE, 20.0),
    ]
    beats_seen = sum(map(len, busy_ms))
    note = f"event loop: {beats_seen} beats during the rounds; back end {bits.BACKEND}"
    return Table.of("loop_lag", runs, figures, [note])


def work(pending: DirtyBitmap, sources: list[DirtyBitmap]) -> None:
    """What one harvest round does with its bitmaps."""
    pending.clear()
    merged = pending.merge_all(sources)
    assert merged == pending.count()
    assert walk(pending) <= merged


async def beats(work: asyncio.Task[None]) -> list[float]:
    """How late each beat came, in ms, until the work is done."""
    late_ms = []
    while not work.done():
        began_s = time.perf_counter()
        await asyncio.sleep(BEAT_S)
        late_ms.append((time.perf_counter() - began_s - BEAT_S) * 1e3)
    await work
    return late_ms
