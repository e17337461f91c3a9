"""Drives a C extension that was built with the compiler's checks: bits_sanitized.py FILE ROUNDS

Every buffer is memory of exactly its size, so that one byte too many is caught; what comes out is
compared with numpy's answer. Ends with an error, or is ended by the checks.
"""

import importlib.util
import random
import sys
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from migrd.core import bits_numpy

Bytes = NDArray[np.uint8]


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("_bits", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def some(chance: random.Random, size_bytes: int) -> Bytes:
    """Sparse, dense, random or constant; it need not begin at a word of memory."""
    skip, density = chance.choice([0, 0, 1, 5]), chance.choice([0, 1, 8, 128, 256])
    memory = np.frombuffer(bytearray(chance.randbytes(skip + size_bytes)), np.uint8).copy()
    there = np.frombuffer(chance.randbytes(skip + size_bytes), np.uint8) < density
    memory[~there] = 0
    if density == 128:
        memory[there] = 255
    return memory[skip:]


def both(extension: ModuleType, name: str, *arguments: Any) -> None:
    """The same answer, and the same in all memory, from C and from numpy."""
    copies = [
        [one.copy() for one in given] if isinstance(given, list) else given for given in arguments
    ]
    copies = [one.copy() if isinstance(one, np.ndarray) else one for one in copies]
    ours = getattr(extension, name)(*arguments)
    theirs = getattr(bits_numpy, name)(*copies)
    assert ours == theirs, (name, arguments, ours, theirs)
    for given, copy in zip(arguments, copies, strict=True):
        if isinstance(given, np.ndarray):
            assert bytes(given) == bytes(copy), (name, arguments)


def drive(extension: ModuleType, chance: random.Random) -> None:
    pages = chance.choice([0, 1, 64, 65, 2048, *[chance.randrange(3000)] * 4])
    if not chance.randrange(30):
        pages += 20_000
    size = -(-pages // 64) * 8
    first = chance.randrange(pages + 1)
    length = chance.randrange(pages - first + 1)
    if chance.randrange(2):  # whole words
        first -= first % 64
        length -= length % 64
    skip, per = chance.choice([0, 0, 8, chance.randrange(70)]), chance.choice([1, 1, 2, 7, 64, 512])
    exactly = -(-(skip + -(-length // per)) // 8)
    dst, src = some(chance, size), some(chance, size)
    both(extension, "or_bits", dst, first, length, some(chance, exactly), skip, per)
    sources = [some(chance, size) for _ in range(chance.randrange(11))]
    both(extension, "or_all", dst, pages, sources)
    both(extension, "and_not", dst, pages, src)
    both(extension, "count", dst, first, length)
    room = np.zeros(-(-pages // per) * 8, np.uint8)
    both(extension, "region_counts", dst, pages, per, room)
    pairs = np.zeros(16 * chance.randrange(1, 20), np.uint8)
    both(extension, "extents", src, first, first + length, pairs, chance.choice([0, 0, 1, 70]))
    both(extension, "move", dst, pages, src)
    edges = sorted(chance.choices(range(pages + 1), k=2 * chance.randrange(9)))
    rows = np.array(edges, np.uint64).reshape(-1, 2)
    both(extension, "mark_runs", dst, pages, rows, 2, 0, 0, 0)


def main(path: str, rounds: int) -> None:
    extension = load(path)
    chance = random.Random(20261123)
    levels = {"portable", extension.use("portable")}
    for level in sorted(levels):
        extension.use(level)
        for _ in range(rounds):
            drive(extension, chance)
    sys.stdout.write(f"{rounds} rounds\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
