"""The guest's memory, compared byte for byte with a prediction.

All of the guest's RAM is predicted from the parameters of its image and from how far the guest
says it is (`visits` of its two cursors):

    0        zeros | stack | statistics | code | IDT | page tables | zeros        640 KiB
    640 KiB  ROM and holes: no RAM of the guest, not compared                       1 MiB
    1 MiB    zeros | working set | cold pages | zeros                         end of RAM

Not predicted are LIVE_BYTES: the stack, counters of time, and the cursors themselves.

Traps: memory can only be compared while the guest is stopped, and it may be stopped in the
middle of a visit. Then one page, the next of a cursor, may already have been written: it must
equal exactly one of the steps of that visit.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from migrd.demo.errors import ProofFailed
from migrd.demo.image import (
    CODE_ADDRESS,
    PAGE_BYTES,
    GuestImage,
    permutation_bits,
    permutation_shift,
)
from migrd.engine.threads import in_thread

Words = NDArray[np.uint64]
SaveMemory = Callable[[int, int, Path], Awaitable[None]]
"""(guest-physical address, bytes, file to write): the shape of QEMU's `pmemsave`."""

_WORD_BITS: Final = (1 << 64) - 1
_SIGNATURE: Final = 0x9E3779B97F4A7C15
_LCG_FACTOR: Final = 6364136223846793005
_LCG_STEP: Final = 1442695040888963407
_STACK = slice(0x5F80, 0x6000)
_STATS: Final = 0x6000
_CURSORS: Final = (_STATS + 0x80, _STATS + 0xC0)
_IDT_GATE: Final = 0xA000 + 0x20 * 16
_TABLES: Final = 0x10000
_TABLE_GIBIBYTES: Final = 16
_HOLE = slice(0xA0000, 0x100000)
_RUNNING: Final = 2
_LIVE_WORDS: Final = (
    *(_STATS + offset for offset in (0x18, 0x30, 0x38)),  # heartbeats, ticks, turn
    *(cursor + offset for cursor in _CURSORS for offset in (0x00, 0x18, 0x20, 0x28, 0x30)),
)
LIVE_BYTES: Final = _STACK.stop - _STACK.start + 8 * len(_LIVE_WORDS)
_CHUNK_PAGES: Final = 64  # what is computed at once should fit into the processor's cache
_NOISE_WORDS: Final = PAGE_BYTES // 8 - 2


@dataclass(frozen=True, slots=True)
class MemoryMatch:
    """All of the memory is as predicted."""

    compared_bytes: int
    visits: int
    """Pages dirtied since boot."""
    generations: tuple[int, int]
    """Completed rounds over the hot spot, and over the rest of the working set."""
    took_s: float


async def verify_memory(
    image: GuestImage, memory_bytes: int, save: SaveMemory, directory: Path
) -> MemoryMatch:
    """Have a stopped guest's RAM written to a file in `directory`, and compare all of it.

    Raises ProofFailed, with the first differing address. The file is removed.
    """
    if memory_bytes < image.memory_needed_bytes:
        raise ProofFailed(f"this guest does not fit into {memory_bytes} bytes of memory")
    low_bytes = min(memory_bytes, image.low_memory_end_bytes)
    ranges = [(0, low_bytes)]
    if memory_bytes > low_bytes:
        ranges.append((1 << 32, memory_bytes - low_bytes))
    path = directory / "memory.proof"
    started_s = time.monotonic()
    try:
        state: _Progress | None = None
        for address, size in ranges:
            await save(address, size, path)
            state = await in_thread(compare_range, image, path, address, size, state)
    finally:
        await in_thread(path.unlink, missing_ok=True)
    assert state is not None, "there is always a low range"
    return MemoryMatch(
        compared_bytes=memory_bytes - (_HOLE.stop - _HOLE.start) - LIVE_BYTES,
        visits=sum(state.visits),
        generations=(state.generation(0), state.generation(1)),
        took_s=time.monotonic() - started_s,
    )


def compare_range(
    image: GuestImage, path: Path, address: int, size: int, progress: _Progress | None = None
) -> _Progress:
    """Compare one range of RAM, as written to `path` by `pmemsave`, with the prediction.

    The low range (address 0) comes first: it tells how far the guest is. Raises ProofFailed.
    """
    memory: Words = np.memmap(path, dtype=np.uint64, mode="r", shape=(size // 8,))
    if progress is None:
        if address != 0:
            raise ValueError("the range at address 0 comes first")
        progress = _read_progress(image, memory)
        _compare_low(image, memory)
    ram = _Ram(memory, address)
    base, low_end = image.base_bytes, image.low_memory_end_bytes
    predicted = _Prediction(image, progress)
    first_free = base
    for first_page in range(0, image.filled_pages, _CHUNK_PAGES):
        count = min(_CHUNK_PAGES, image.filled_pages - first_page)
        start = base + first_page * PAGE_BYTES
        # A chunk that straddles the end of low memory is compared piece by piece.
        for page, pages, where in _pieces(first_page, count, start, low_end):
            if ram.start <= where < ram.end:
                predicted.compare(ram, page, pages, where)
                first_free = where + pages * PAGE_BYTES
    ram.compare_zeros(max(ram.start, _HOLE.stop), min(base, ram.end))
    ram.compare_zeros(max(first_free, ram.start), ram.end)
    return progress


def _pieces(
    first_page: int, count: int, start: int, low_end: int
) -> Iterator[tuple[int, int, int]]:
    """(first page, pages, guest-physical address) below and above the end of low memory."""
    below = max(0, min(count, (low_end - start) // PAGE_BYTES))
    if below:
        yield first_page, below, start
    if below < count:
        above = start + below * PAGE_BYTES - low_end + (1 << 32)
        yield first_page + below, count - below, above


@dataclass(frozen=True, slots=True)
class _Progress:
    """How far the guest says it is: the one thing that the prediction takes from it."""

    visits: tuple[int, int]
    pages: tuple[int, int]

    def generation(self, cursor: int) -> int:
        return self.visits[cursor] // self.pages[cursor] if self.pages[cursor] else 0


def _read_progress(image: GuestImage, memory: Words) -> _Progress:
    def word(address: int) -> int:
        return int(memory[address // 8])

    if memory[_STATS // 8 : _STATS // 8 + 1].tobytes() != b"MIGRDSTA":
        raise ProofFailed("there is no lab guest in this memory, or it has not started")
    if word(_STATS + 0x08) != _RUNNING:
        raise ProofFailed("the guest is still filling its memory; wait for its first heartbeat")
    if errors := word(_STATS + 0x20):
        page = word(_STATS + 0x28)
        raise ProofFailed(f"the guest found {errors} pages changed, page {page} last")
    spot = image.hot_spot_pages
    visits = (word(_CURSORS[0]), word(_CURSORS[1]))
    return _Progress(visits, (spot, image.working_set_pages - spot))


def _compare_low(image: GuestImage, memory: Words) -> None:
    """Below 640 KiB: code, tables, statistics; all else zero."""
    low: NDArray[np.uint8] = np.zeros(_HOLE.start, np.uint8)
    code = image.code()
    low[CODE_ADDRESS : CODE_ADDRESS + len(code)] = np.frombuffer(code, np.uint8)
    words = low.view(np.uint64)
    words[_TABLES // 8] = _TABLES + 0x1023
    third = _TABLES + 0x2000
    gibibytes = np.arange(_TABLE_GIBIBYTES, dtype=np.uint64)
    words[(_TABLES + 0x1000) // 8 :][:_TABLE_GIBIBYTES] = third + 0x23 + gibibytes * PAGE_BYTES
    blocks = np.arange(_TABLE_GIBIBYTES * 512, dtype=np.uint64)
    words[third // 8 :][: len(blocks)] = blocks * np.uint64(2 << 20) + np.uint64(0xE3)
    spot = image.hot_spot_pages
    regions = ((0, spot), (spot, image.working_set_pages - spot))
    words[_STATS // 8 : _STATS // 8 + 3] = (
        int.from_bytes(b"MIGRDSTA", "little"),
        _RUNNING,
        image.filled_pages if image.noise else 0,
    )
    for cursor, (first, pages) in zip(_CURSORS, regions, strict=True):
        words[cursor // 8 + 1 : cursor // 8 + 3] = (pages, first)
        words[cursor // 8 + 7] = (1 << permutation_bits(pages)) - 1
    found = np.array(memory[: len(words)])
    for live in _LIVE_WORDS:
        words[live // 8] = found[live // 8]
    found_bytes = found.view(np.uint8)
    low[_STACK] = found_bytes[_STACK]
    # The gate's handler lies where the assembler put it; its other bytes are known.
    gate = slice(_IDT_GATE, _IDT_GATE + 8)
    low[gate] = _interrupt_gate(found_bytes[gate].tobytes(), len(code))
    _Ram(found, 0).compare(0, words)


def _interrupt_gate(found: bytes, code_bytes: int) -> NDArray[np.uint8]:
    target = int.from_bytes(found[0:2] + found[6:8], "little")
    if not CODE_ADDRESS <= target < CODE_ADDRESS + code_bytes:
        raise ProofFailed(f"address {_IDT_GATE:#x}: the interrupt gate leads to {target:#x}")
    gate = found[0:2] + b"\x18\x00\x00\x8e" + found[6:8]
    return np.frombuffer(gate, np.uint8)


class _Ram:
    """A range of RAM as found, comparable piece by piece."""

    def __init__(self, words: Words, start: int) -> None:
        self.words = words
        self.start = start
        self.end = start + words.nbytes

    def at(self, address: int, words: int) -> Words:
        first = (address - self.start) // 8
        return self.words[first : first + words]

    def compare(self, address: int, expected: Words) -> None:
        found = self.at(address, len(expected))
        differing = found != expected
        if differing.any():
            raise _difference(address, found, expected, int(differing.argmax()))

    def compare_zeros(self, start: int, end: int) -> None:
        step = _CHUNK_PAGES * PAGE_BYTES
        for address in range(start, end, step):
            found = self.at(address, min(step, end - address) // 8)
            if found.any():
                first = int((found != 0).argmax())
                raise _difference(address, found, np.zeros_like(found), first)


def _difference(address: int, found: Words, expected: Words, word: int) -> ProofFailed:
    pair = [int(words[word]).to_bytes(8, "little") for words in (found, expected)]
    byte = next(index for index in range(8) if pair[0][index] != pair[1][index])
    return ProofFailed(
        f"memory differs first at address {address + word * 8 + byte:#x}: "
        f"found {pair[0][byte]:#04x}, expected {pair[1][byte]:#04x}"
    )


class _Prediction:
    """What each page of the working set and each cold page must hold."""

    def __init__(self, image: GuestImage, progress: _Progress) -> None:
        self._noise = image.noise
        self._written = np.zeros(image.filled_pages, np.uint64)
        self._next: set[int] = set()  # pages whose visit may have begun
        first = 0
        for cursor, pages in enumerate(progress.pages):
            if pages:
                generation, index = divmod(progress.visits[cursor], pages)
                order = visit_order(pages, generation, is_random=image.is_random_order)
                region = self._written[first : first + pages]
                region[:] = generation
                region[order[:index]] += np.uint64(1)
                self._next.add(first + int(order[index]))
            first += pages
        self._factors, self._steps = _lcg_powers(_NOISE_WORDS)

    def compare(self, ram: _Ram, first_page: int, pages: int, address: int) -> None:
        expected = self._expected(first_page, pages)
        for page in self._next & set(range(first_page, first_page + pages)):
            row = expected[page - first_page]
            found = ram.at(address + (page - first_page) * PAGE_BYTES, 2)
            self._allow_visit_in_progress(page, found, row)
        ram.compare(address, expected.reshape(-1))

    def _allow_visit_in_progress(self, page: int, found: Words, row: Words) -> None:
        """The guest writes the signature, then the count, and then moves its cursor on."""
        count, signature = int(row[0]), page * _SIGNATURE & _WORD_BITS
        if (int(found[0]), int(found[1])) in ((count, signature), (count + 1, signature)):
            row[0:2] = found

    def _expected(self, first_page: int, pages: int) -> Words:
        written = self._written[first_page : first_page + pages]
        numbers = np.arange(first_page, first_page + pages, dtype=np.uint64)
        signatures = numbers * np.uint64(_SIGNATURE)
        expected: Words = np.zeros((pages, PAGE_BYTES // 8), np.uint64)
        expected[:, 0] = written
        expected[:, 1] = signatures if self._noise else np.where(written > 0, signatures, 0)
        if self._noise:
            noise = signatures[:, None] * self._factors
            noise += self._steps
            np.right_shift(noise, np.uint64(32), out=expected[:, 2:])
            expected[:, 2:] ^= noise
        return expected


def visit_order(pages: int, generation: int, *, is_random: bool) -> NDArray[np.int64]:
    """The order in which the guest visits the `pages` of a region in one generation.

    The same arithmetic as guest.S (`seed` and `visit`), for all steps at once.
    """
    if not is_random:
        return np.arange(pages, dtype=np.int64)
    bits = permutation_bits(pages)
    mask, shift = np.uint64((1 << bits) - 1), np.uint64(permutation_shift(bits))
    seed = (generation + 1) * _SIGNATURE & _WORD_BITS
    seed = (seed ^ seed >> 29) * _LCG_FACTOR & _WORD_BITS
    factors, steps = _lcg_powers(1 << bits, seed | 1)
    mixed = (np.full(1, seed >> 32, np.uint64) * factors + steps) & mask
    mixed = ((mixed ^ mixed >> shift) * np.uint64(_SIGNATURE)) & mask
    mixed ^= mixed >> shift
    return mixed[mixed < pages].astype(np.int64)


def _lcg_powers(count: int, step: int = _LCG_STEP) -> tuple[Words, Words]:
    """Arrays a, c such that the n-th value after x of the generator is a[n-1] * x + c[n-1]."""
    factors: Words = np.empty(count, np.uint64)
    steps: Words = np.empty(count, np.uint64)
    factor, offset, known = _LCG_FACTOR, step, 1
    factors[0], steps[0] = factor, offset
    while known < count:  # the next `known` values are the first ones, `known` steps further
        more = min(known, count - known)
        factors[known : known + more] = factors[:more] * np.uint64(factor)
        steps[known : known + more] = steps[:more] * np.uint64(factor) + np.uint64(offset)
        factor, offset = factor * factor & _WORD_BITS, (factor + 1) * offset & _WORD_BITS
        known += more
    return factors, steps
