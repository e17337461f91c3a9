"""What reading the dirty pages of process memory costs: 4 GiB of this very process.

ours        ProcessSource.read_and_clear: scan, protect anew, merge, look at the mappings
bare ioctl  the same PAGEMAP_SCAN calls and nothing else, after the same pages were written
mincore     of the same range: what any walk of its page tables costs

All is processor time of the one thread that does it; the runs are interleaved.
"""

import asyncio
import ctypes
import gc
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from migrd.core.bitmap import PAGE_BYTES, DirtyBitmap
from migrd.core.memory_map import MemoryMap
from migrd.kernel.dirty_process import ProcessRange, ProcessSource
from migrd.kernel.pagemap import Pagemap
from tests.bench.figures import Figure, Judge, Table, median
from tests.contract.dirty_writer import WatchedMemory

BYTES: Final = 4 << 30
SHARES: Final = (0.0, 0.001, 0.01)
WALK_BYTES: Final = 1 << 30
MOST_PAGES: Final = 32768
OVERHEAD: Final = 1.05
MINCORE: Final = 2.0
LONGEST_MS: Final = 5.0


class Rig:
    """Memory that is all there, watched."""

    def __init__(self, length_bytes: int, kind: str = "anonymous") -> None:
        self.watched = WatchedMemory(kind, [length_bytes])
        self.memory = self.watched.memories[0]
        self.pages = length_bytes // PAGE_BYTES
        self.length_bytes = length_bytes
        self.memory.counts[:] = 1
        self.fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        self.source = ProcessSource(
            self.fd, [ProcessRange(self.memory.hva, length_bytes, 0)], "bench"
        )
        self.pagemap = Pagemap(self.fd)
        self.into = DirtyBitmap(MemoryMap.of([(0, 0, length_bytes)]).pages)
        self.libc = ctypes.CDLL(None)
        self.libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
        self._resident = np.zeros(self.pages, np.uint8)
        self.chance = np.random.default_rng(11)
        self.source.start_tracking()

    def dirty(self, share: float) -> None:
        wanted = int(self.pages * share)
        if wanted >= self.pages:
            self.memory.counts[:] += 1
        elif wanted:
            self.memory.write(self.chance.choice(self.pages, wanted, replace=False))

    def ours(self) -> None:
        self.source.read_and_clear(self.into)

    def bare(self) -> None:
        at, end = self.memory.hva, self.memory.hva + self.length_bytes
        while at < end:
            _, at = self.pagemap.scan(
                at, min(end, at + WALK_BYTES), clear=True, max_pages=MOST_PAGES
            )

    def mincore(self) -> None:
        assert not self.libc.mincore(self.memory.hva, self.length_bytes, self._resident.ctypes.data)

    def close(self) -> None:
        self.source.close()
        self.pagemap.close()
        os.close(self.fd)
        self.watched.close()


def cost_s(func: Callable[[], Any]) -> float:
    began_s = time.thread_time()
    func()
    return time.thread_time() - began_s


async def run(runs: int, *, length_bytes: int = BYTES) -> Table:
    return await asyncio.to_thread(_run, runs, length_bytes)


def _run(runs: int, length_bytes: int) -> Table:
    rig = Rig(length_bytes)
    gc.disable()
    try:
        figures = [figure for share in SHARES for figure in _at(rig, share, runs)]
        dense = median([_after(rig, 1.0, rig.ours) for _ in range(min(runs, 3))])
        sparse = median([_after(rig, 0.001, rig.ours) for _ in range(runs)])
        figures.append(_longest(rig))
    finally:
        gc.enable()
        rig.close()
    per_gib = length_bytes / (1 << 30)
    note = (
        f"a harvest of process memory costs {sparse / per_gib * 1e3:.2f} ms per GiB with 0.1 % of"
        f" its pages dirty, {dense / per_gib * 1e3:.1f} ms with all (pages of 4 KiB)"
    )
    return Table.of("harvest", runs, figures, [note])


def _after(rig: Rig, share: float, func: Callable[[], None]) -> float:
    rig.dirty(share)
    return cost_s(func)


def _at(rig: Rig, share: float, runs: int) -> Sequence[Figure]:
    for func in (rig.ours, rig.bare):  # both have found their pace
        _after(rig, share, func)
    ours, bare, mincore = [], [], []
    for _ in range(runs):
        ours.append(_after(rig, share, rig.ours))
        bare.append(_after(rig, share, rig.bare))
        mincore.append(cost_s(rig.mincore))
    told = f"{rig.length_bytes >> 30 or 1} GiB of process memory, {share:.1%} dirty"
    made = [
        Figure(
            f"harvest of {told}",
            "ms",
            median(ours) * 1e3,
            median(bare) * 1e3,
            "the bare ioctls",
            Judge.RATIO,
            OVERHEAD,
        )
    ]
    if share in (SHARES[0], SHARES[-1]):
        made.append(
            Figure(
                f"scan and protect anew, {told}",
                "ms",
                median(ours) * 1e3,
                median(mincore) * 1e3,
                "mincore",
                Judge.RATIO,
                MINCORE,
            )
        )
    return made


def _longest(rig: Rig) -> Figure:
    """Of one ioctl, while little to everything is dirty: the best of three, as other work on the
    machine only adds."""
    longest = []
    for _ in range(3):
        rig.source.longest_s = 0.0
        for share in (0.001, 0.1, 1.0):
            _after(rig, share, rig.ours)
        longest.append(rig.source.longest_s * 1e3)
    name = "the longest ioctl of a harvest, 0.1 to 100 % dirty"
    return Figure(name, "ms", min(longest), None, "", Judge.VALUE, LONGEST_MS)
