"""Operations on bits: what they refuse, at any size, and that no byte beyond a buffer is touched.

What they compute is `test_bitmap`'s matter; here buffers and numbers are hostile.
"""

import mmap
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from migrd.core import bits, bits_numpy
from tests.core.bit_backends import BACKENDS

CORE = Path(bits.__file__).parent
DRIVER = Path(__file__).parent / "bits_sanitized.py"
WARNINGS = ("-Wall", "-Wextra", "-Wconversion", "-Werror")
NUMBERS = [-1, -(2**63), 2**63, 2**64, 10**30]
Operation = Callable[..., Any]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    with BACKENDS[request.param]() as chosen:
        yield chosen


def words(count: int = 2) -> bytearray:
    return bytearray(b"\x5a" * 8 * count)


def calls(dst: Any, src: Any, number: Any) -> list[tuple[str, tuple[Any, ...]]]:
    """Each operation with these buffers, and with this number in each place in turn."""
    return [
        ("or_bits", (dst, number, 0, src)),
        ("or_bits", (dst, 0, number, src)),
        ("or_bits", (dst, 0, 0, src, number)),
        ("or_bits", (dst, 0, 0, src, 0, number or 1)),
        ("or_all", (dst, number, [src])),
        ("and_not", (dst, number, src)),
        ("move", (dst, number, src)),
        ("count", (dst, number, 0)),
        ("count", (dst, 0, number)),
        ("region_counts", (dst, number, 1, src)),
        ("region_counts", (dst, 0, number or 1, src)),
        ("extents", (src, number, 0, dst)),
        ("extents", (src, 0, number, dst)),
        ("extents", (src, 0, 0, dst, number)),
    ]


def test_the_c_extension_is_built_for_the_tests() -> None:
    assert bits.BACKEND == "c", "build it with: sh deploy/setup --tests"
    assert {"numpy", "c-portable"} <= set(BACKENDS)


def test_both_back_ends_offer_the_same() -> None:
    from migrd.core import _bits

    offered = {name for name in vars(_bits) if not name.startswith("_")} - {"use"}
    assert offered == set(bits_numpy.__all__)
    assert all(getattr(bits, name) is getattr(_bits, name) for name in offered)


def test_only_what_the_processor_can_do_is_used() -> None:
    from migrd.core import _bits

    with pytest.raises(ValueError, match="not possible here: mmx"):
        _bits.use("mmx")


@pytest.mark.parametrize("number", NUMBERS)
def test_numbers_out_of_range_are_refused(backend: ModuleType, number: int) -> None:
    for name, arguments in calls(words(), words(), number):
        with pytest.raises(ValueError, match=r"is not between|beginning"):
            getattr(backend, name)(*arguments)


@pytest.mark.parametrize("number", [2**63 - 1, 2**62, 129])
def test_numbers_that_no_buffer_has_are_refused(backend: ModuleType, number: int) -> None:
    dst, src = words(), words()
    for name, arguments in calls(dst, src, number):
        if arguments in ((dst, 0, 0, src, 0, number), (src, 0, 0, dst, number)):
            continue  # pages per bit and the gap may be anything
        if name == "region_counts" and arguments[1] == 0:
            continue  # no pages in regions of any size: right, and empty
        with pytest.raises(ValueError, match=r"too short|beginning"):
            getattr(backend, name)(*arguments)
    assert dst == src == words()


@pytest.mark.parametrize("number", [1.0, "1", b"1", (1,)])
def test_what_is_no_integer_is_refused(backend: ModuleType, number: object) -> None:
    for name, arguments in calls(words(), words(), number):
        with pytest.raises(TypeError):
            getattr(backend, name)(*arguments)


@pytest.mark.parametrize("thing", [None, 3, "text", [b"12345678"], object()])
def test_what_is_no_buffer_is_refused(backend: ModuleType, thing: object) -> None:
    for dst, src in ((thing, words()), (words(), thing)):
        for name, arguments in calls(dst, src, 0):
            if thing in arguments or name != "count":
                with pytest.raises(TypeError):
                    getattr(backend, name)(*arguments)


def test_memory_that_cannot_be_written_or_is_in_pieces_is_refused(backend: ModuleType) -> None:
    pieces = np.zeros(8, np.uint64)[::2]
    for dst in (bytes(16), pieces, memoryview(bytearray(32))[::2]):
        for name, arguments in calls(dst, words(), 0):
            if name in ("count", "region_counts"):
                continue  # only read it
            with pytest.raises((BufferError, ValueError, TypeError)):
                getattr(backend, name)(*arguments)


@pytest.mark.parametrize("size", [1, 7, 9, 15])
def test_memory_that_is_not_whole_words_is_refused(backend: ModuleType, size: int) -> None:
    for name, arguments in calls(bytearray(size), words(), 0):
        with pytest.raises(ValueError, match="not one of 64-bit words"):
            getattr(backend, name)(*arguments)


def test_the_same_memory_twice_is_refused(backend: ModuleType) -> None:
    both = memoryview(words(4))
    for dst, src in ((both, both), (both[:24], both[16:]), (both[8:], both[:16])):
        for name, arguments in calls(dst, src, 0):
            if name != "count":
                with pytest.raises(ValueError, match="overlap"):
                    getattr(backend, name)(*arguments)


def test_what_has_no_room_is_refused(backend: ModuleType) -> None:
    source = words()
    with pytest.raises(ValueError, match="room for at least one extent"):
        backend.extents(source, 0, 128, bytearray(8))
    with pytest.raises(ValueError, match="room for 1 regions, not for 2"):
        backend.region_counts(source, 128, 64, bytearray(8))
    with pytest.raises(ValueError, match="beginning"):
        backend.extents(source, 5, 4, bytearray(16))
    with pytest.raises(ValueError, match="bit_pages"):
        backend.or_bits(words(), 0, 0, source, 0, 0)
    with pytest.raises(ValueError, match="pages_per_region"):
        backend.region_counts(source, 128, 0, bytearray(16))


def test_sources_may_be_any_sequence_and_any_number(backend: ModuleType) -> None:
    dst = bytearray(8)
    each = [(1 << n).to_bytes(8, "little") for n in range(64)]
    assert backend.or_all(dst, 60, iter(each)) == 60
    assert int.from_bytes(dst, "little") == 2**60 - 1
    assert backend.or_all(dst, 60, ()) == 60
    with pytest.raises(TypeError):
        backend.or_all(dst, 60, [*each, None])
    with pytest.raises(TypeError):
        backend.or_all(dst, 60, None)


def test_no_bit_outside_the_range_is_changed(backend: ModuleType) -> None:
    for first in (0, 1, 63, 64, 65):
        for pages in (0, 1, 63, 64, 65, 130):
            dst = bytearray(40)
            newly = backend.or_bits(dst, first, pages, b"\xff" * 40, 3)
            assert newly == pages
            assert int.from_bytes(dst, "little") == (1 << pages) - 1 << first


@pytest.fixture
def terabytes() -> Iterator[mmap.mmap]:
    """The bits of a guest of 24 TiB; memory is there only for what is written."""
    memory = mmap.mmap(-1, 768 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    yield memory
    memory.close()


def test_a_guest_of_24_tib(backend: ModuleType, terabytes: mmap.mmap) -> None:
    pages = (24 << 40) // 4096
    assert backend.or_bits(terabytes, pages - 200, 200, b"\xff" * 26, 5) == 200
    assert backend.or_bits(terabytes, 2**32 - 3, 7, b"\x7f") == 7
    assert backend.or_bits(terabytes, 5 << 30, 1 << 18, b"\x01", 0, 1 << 18) == 1 << 18
    assert backend.count(terabytes, 0, pages) == 200 + 7 + (1 << 18)
    assert backend.count(terabytes, 2**32, pages - 2**32) == 200 + 4 + (1 << 18)
    out = np.zeros((2, 2), np.uint64)
    assert backend.extents(terabytes, 0, pages, out) == (2, pages - 200)
    assert out.tolist() == [[2**32 - 3, 7], [5 << 30, 1 << 18]]
    assert backend.extents(terabytes, pages - 200, pages, out) == (1, -1)
    assert out[0].tolist() == [pages - 200, 200]


@pytest.mark.timeout(300)
def test_the_c_code_touches_nothing_that_is_not_its_own(tmp_path: Path) -> None:
    """Built with the compiler's checks of addresses and undefined behaviour, and driven hard."""
    built = tmp_path / "_bits.so"
    checks = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    include = f"-I{sysconfig.get_path('include')}"
    source = str(CORE / "_bits.c")
    compiled = subprocess.run(
        ["gcc", *WARNINGS, *checks, "-O1", "-g", "-shared", "-fPIC", include, source, "-o", built],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert compiled.returncode == 0, compiled.stderr
    library = subprocess.run(
        ["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True, timeout=60
    ).stdout.strip()
    environment = {
        **os.environ,
        "LD_PRELOAD": library,
        "PYTHONMALLOC": "malloc",  # each object in memory of its own, with guards around it
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": str(CORE.parent.parent),
    }
    driven = subprocess.run(
        [sys.executable, str(DRIVER), str(built), "600"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert driven.returncode == 0, driven.stdout[-2000:] + driven.stderr[-6000:]
    assert driven.stdout.split() == ["600", "rounds"]
