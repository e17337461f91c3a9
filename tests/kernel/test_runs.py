"""Runs of pages, as a scan tells them, into a bitmap: against marking one by one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from migrd.core.bitmap import DirtyBitmap
from migrd.kernel.runs import mark_runs

BASE = 0x7F00_0000_0000


def rows_of(runs: list[tuple[int, int]]) -> NDArray[np.uint64]:
    rows = [(BASE + begin * 4096, BASE + end * 4096, 2) for begin, end in runs]
    return np.array(rows, np.uint64).reshape(-1, 3)


gaps = st.lists(
    st.tuples(
        st.one_of(st.integers(0, 3), st.integers(0, 300)),
        st.one_of(st.integers(1, 3), st.integers(60, 68), st.integers(1, 400)),
    ),
    max_size=120,
)


@settings(max_examples=300, deadline=None)
@given(gaps, st.integers(0, 200), st.integers(0, 70))
def test_runs_are_marked_as_one_by_one(
    gaps: list[tuple[int, int]], first_page: int, beyond: int
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
    told = mark_runs(fast, rows_of(runs), BASE, first_page)
    assert told == sum(end - begin for begin, end in runs)
    assert (fast.words == slow.words).all()


def test_pages_that_the_bitmap_does_not_have_are_refused_and_nothing_is_marked() -> None:
    bitmap = DirtyBitmap(100)
    with pytest.raises(ValueError, match="100 pages"):
        mark_runs(bitmap, rows_of([(0, 1), (99, 101)]), BASE, 0)
    assert bitmap.count() == 0
