"""Runs of pages, as a scan tells them, into a bitmap: against marking one by one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from migrd.core.bitmap import DirtyBitmap
from tests.core.bit_backends import BACKENDS

BASE = 0x7F00_0000_0000


def rows_of(runs: list[tuple[int, int]]) -> NDArray[np.uint64]:
    rows = [(BASE + begin * 4096, BASE + end * 4096, 2) for begin, end in runs]
    return np.array(rows, np.uint64).reshape(-1, 3)


def marked(backend: str, into: DirtyBitmap, rows: NDArray[np.uint64], first_page: int) -> int:
    with BACKENDS[backend]() as bits:
        told = bits.mark_runs(into.words, into.pages, rows, 3, BASE, 12, first_page)
    assert isinstance(told, int)
    return told


gaps = st.lists(
    st.tuples(
        st.one_of(st.integers(0, 3), st.integers(0, 300)),
        st.one_of(st.integers(0, 3), st.integers(60, 68), st.integers(1, 400)),
    ),
    max_size=120,
)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(gaps=gaps, first_page=st.integers(0, 200), beyond=st.integers(0, 70))
def test_runs_are_marked_as_one_by_one(
    backend: str, gaps: list[tuple[int, int]], first_page: int, beyond: int
) -> None:
    runs, at = [], 0
    for gap, length in gaps:  # adjacent ones too: a scan may tell of one run in two pieces
        runs.append((at + gap, at + gap + length))
        at += gap + length
    fast, slow = (DirtyBitmap(first_page + at + beyond) for _ in range(2))
    for bitmap in (fast, slow):
        if bitmap.pages:
            bitmap.mark(0, 1)
    for begin, end in runs:
        slow.mark(first_page + begin, end - begin)
    told = marked(backend, fast, rows_of(runs), first_page)
    assert told == sum(end - begin for begin, end in runs)
    assert (fast.words == slow.words).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("runs", "first_page"),
    [([(0, 1), (99, 101)], 0), ([(0, 1)], 100), ([(0, 1)], 101), ([(-1, 1)], 1), ([(3, 2)], 0)],
)
def test_runs_that_are_not_in_the_bitmap_are_refused_and_nothing_is_marked(
    backend: str, runs: list[tuple[int, int]], first_page: int
) -> None:
    bitmap = DirtyBitmap(100)
    with pytest.raises(ValueError, match=r"100 pages|128 bits"):
        marked(backend, bitmap, rows_of(runs), first_page)
    assert bitmap.count() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_are_no_rows_is_refused(backend: str) -> None:
    bitmap = DirtyBitmap(100)
    with BACKENDS[backend]() as bits:
        for words, width, shift in ((4, 3, 12), (4, 1, 12), (130, 65, 12), (3, 3, 63)):
            rows = np.zeros(words, np.uint64)
            with pytest.raises(ValueError, match="rows"):
                bits.mark_runs(bitmap.words, 100, rows, width, 0, shift, 0)


def test_a_bitmap_takes_the_rows_of_a_scan() -> None:
    bitmap = DirtyBitmap(100)
    assert bitmap.mark_runs(rows_of([(0, 1), (70, 75)]), BASE, 20) == 6
    assert bitmap.extents()[0].tolist() == [[20, 1], [90, 5]]
