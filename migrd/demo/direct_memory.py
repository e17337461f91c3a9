"""What stands in the memory of the direct demo's guest: a rule, so that all of it can be predicted.

    page i, visited v times       word k = NOISE[k] ^ (i << 32 | v)
    a page of the filling         the same with v = 0
    any other page                zero

The working set is shared out: worker t of T has the pages i with i % T == t, and visits them in one
order, round and round, each once in a round. So its n-th visit says which page it goes to and how
often that page has been visited; and a memory says of itself how many visits each worker has made.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from migrd.demo.errors import ProofFailed

PAGE_BYTES: Final = 4096
WORDS: Final = PAGE_BYTES // 8
NOISE: Final[npt.NDArray[np.uint64]] = np.random.default_rng(1).integers(
    1 << 63, 1 << 64, WORDS, dtype=np.uint64
)
_AT_ONCE_PAGES: Final = 4096

Words = npt.NDArray[np.uint64]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Layout:
    """How much of the memory is what; in pages, the working set first."""

    memory_pages: int
    working_set_pages: int
    filling_pages: int
    workers: int

    def pages_of(self, worker: int) -> int:
        return len(range(worker, self.working_set_pages, self.workers))

    def place(self, worker: int, visit: int) -> tuple[int, int]:
        """(page, how often it has been visited with this visit), of a worker's n-th from 0."""
        count = self.pages_of(worker)
        turn = (visit * _stride(count)) % count
        return turn * self.workers + worker, visit // count + 1


def content(page: int, visits: int) -> Words:
    """What stands in a page that was visited so often, or was filled (0)."""
    return NOISE ^ np.uint64(page << 32 | visits)


def fill(words: Words, layout: Layout) -> None:
    """The filling; `words` is all memory."""
    first = layout.working_set_pages
    for page in range(first, first + layout.filling_pages):
        words[page * WORDS : (page + 1) * WORDS] = content(page, 0)


def prove_memory(pid: int, layout: Layout) -> int:
    """Compare the memory of the process with its rule; returns the visits made.

    The caller has stopped it (SIGSTOP): each worker may be in the middle of one page, no more.
    Blocking. Raises ProofFailed.
    """
    visits = np.zeros(layout.memory_pages, np.int64)
    broken: list[int] = []
    at = 0
    for chunk in _chunks(pid, layout):
        keys = chunk[:, 0] ^ NOISE[0]
        pages = np.arange(at, at + len(chunk), dtype=np.uint64)
        is_zero = ~chunk.any(axis=1)
        is_right = (chunk == (NOISE ^ keys[:, None])).all(axis=1) & (keys >> 32 == pages)
        broken += (at + np.flatnonzero(~is_right & ~is_zero)).tolist()
        visits[at : at + len(chunk)] = np.where(is_right, keys & 0xFFFFFFFF, 0)
        expected_zero = pages >= layout.working_set_pages + layout.filling_pages
        expected_still = pages >= layout.working_set_pages
        wrong = (is_zero & expected_still & ~expected_zero) | (~is_zero & expected_zero)
        if wrong.any() or (visits[at : at + len(chunk)][expected_still] != 0).any():
            raise ProofFailed(f"memory changed where nothing writes, near page {at}")
        at += len(chunk)
    workers = range(layout.workers)
    return sum([_prove_worker(worker, visits, broken, layout) for worker in workers])


def _prove_worker(worker: int, visits: Counts, broken: list[int], layout: Layout) -> int:
    """That there is a number of visits from which this worker's pages follow."""
    mine = [page for page in broken if page % layout.workers == worker]
    count = layout.pages_of(worker)
    own = visits[worker : layout.working_set_pages : layout.workers]
    made = int(own.sum())
    if len(mine) > 1:
        raise ProofFailed(f"{len(mine)} pages of worker {worker} are not as it left them: {mine}")
    if mine:  # the page that it was writing: it had been visited once for each round before
        lap = max(int(own.max()) - 1, 0)
        candidates = [made + lap, made + lap + 1]
    else:
        candidates = [made]
    for visit in candidates:
        predicted = np.full(count, visit // count, np.int64)
        turns = (np.arange(visit % count) * _stride(count)) % count
        predicted[turns] += 1
        differ = np.flatnonzero(predicted != own)
        if not set((differ * layout.workers + worker).tolist()) - set(mine):
            return visit
    raise ProofFailed(f"worker {worker}: its pages are not of one moment ({made} visits)")


def _chunks(pid: int, layout: Layout) -> Iterator[Words]:
    """All memory, some pages at a time, by the file that the process has open for it."""
    fd = os.open(_memory_of(pid, layout.memory_pages * PAGE_BYTES), os.O_RDONLY)
    try:
        left = layout.memory_pages
        while left:
            got = os.read(fd, min(left, _AT_ONCE_PAGES) * PAGE_BYTES)
            if not got or len(got) % PAGE_BYTES:
                raise ProofFailed(f"the memory of process {pid} ends early")
            yield np.frombuffer(got, np.uint64).reshape(-1, WORDS)
            left -= len(got) // PAGE_BYTES
    finally:
        os.close(fd)


def _memory_of(pid: int, length_bytes: int) -> Path:
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if "memfd:guest-" in os.readlink(entry) and entry.stat().st_size == length_bytes:
                return entry
        except OSError:
            continue  # closed meanwhile
    raise ProofFailed(f"the guest's memory was not found in process {pid}")


def _stride(count: int) -> int:
    """About the golden part of it: neighbours in time are far apart in memory."""
    stride = max(1, int(count * 0.618))
    while gcd(stride, count) != 1:
        stride += 1
    return stride
