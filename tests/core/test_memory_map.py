"""Guest memory as one row of pages."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrd.core.bitmap import PAGE_BYTES
from migrd.core.memory_map import MOST_BYTES, MOST_REGIONS, MemoryMap
from migrd.errors import Invalid

GIB = 1 << 30


def test_regions_stand_one_after_the_other_at_whole_words() -> None:
    memory = MemoryMap.of([(7, 0, 3 * PAGE_BYTES), (2, 4 * GIB, 64 * PAGE_BYTES)])
    assert [(one.id, one.first_page, one.pages) for one in memory.regions] == [
        (7, 0, 3),
        (2, 64, 64),
    ]
    assert memory.pages == 128
    assert memory.bytes == 67 * PAGE_BYTES
    assert memory.region(2).gpa == 4 * GIB
    assert memory.full().count() == 67


def test_a_run_is_the_memory_it_stands_for_without_gaps() -> None:
    memory = MemoryMap.of([(0, 0, 3 * PAGE_BYTES), (1, GIB, 5 * PAGE_BYTES)])
    low, high = memory.regions
    assert list(memory.pieces(1, 200)) == [
        (low, PAGE_BYTES, 2 * PAGE_BYTES),
        (high, 0, 5 * PAGE_BYTES),
    ]
    assert list(memory.pieces(3, 61)) == []
    assert memory.is_memory(65, 4)
    assert not memory.is_memory(2, 2)
    assert not memory.is_memory(65, 0)


@pytest.mark.parametrize(
    ("pieces", "code"),
    [
        ([], "bad_count"),
        ([(n, n * GIB, PAGE_BYTES) for n in range(MOST_REGIONS + 1)], "bad_count"),
        ([(0, 0, 0)], "empty"),
        ([(0, 0, -PAGE_BYTES)], "empty"),
        ([(0, 0, PAGE_BYTES + 1)], "unaligned"),
        ([(0, 7, PAGE_BYTES)], "unaligned"),
        ([(0, -PAGE_BYTES, PAGE_BYTES)], "out_of_reach"),
        ([(0, 1 << 57, PAGE_BYTES)], "out_of_reach"),
        ([(0, 0, MOST_BYTES + PAGE_BYTES)], "too_large"),
        ([(0, 0, GIB), (1, GIB - PAGE_BYTES, GIB)], "overlap"),
        ([(0, 0, 8 * GIB), (1, GIB, PAGE_BYTES), (2, 4 * GIB, PAGE_BYTES)], "overlap"),
        ([(5, 0, PAGE_BYTES), (5, GIB, PAGE_BYTES)], "repeated_id"),
        ([(-1, 0, PAGE_BYTES)], "bad_id"),
        ([(1 << 32, 0, PAGE_BYTES)], "bad_id"),
    ],
)
def test_a_map_that_cannot_be_is_refused_with_what_is_wrong(
    pieces: list[tuple[int, int, int]], code: str
) -> None:
    with pytest.raises(Invalid) as refused:
        MemoryMap.of(pieces)
    assert code in {one.code for one in refused.value.violations}
    assert all(one.message in refused.value.message for one in refused.value.violations)


def test_the_largest_guest_is_taken() -> None:
    memory = MemoryMap.of([(0, 0, MOST_BYTES)])
    assert memory.pages * PAGE_BYTES == MOST_BYTES


def test_a_region_that_is_not_there_is_said_not_to_be() -> None:
    with pytest.raises(Invalid, match="no region 3"):
        MemoryMap.of([(0, 0, PAGE_BYTES)]).region(3)


lengths = st.lists(st.integers(1, 300), min_size=1, max_size=8)


@given(lengths, st.integers(0, 3000), st.integers(0, 3000))
def test_pieces_are_exactly_the_memory_of_a_run(lengths: list[int], first: int, count: int) -> None:
    pieces = [(n, n << 40, pages * PAGE_BYTES) for n, pages in enumerate(lengths)]
    memory = MemoryMap.of(pieces)
    told = {
        region.first_page + offset // PAGE_BYTES + page
        for region, offset, length in memory.pieces(first, count)
        for page in range(length // PAGE_BYTES)
    }
    there = {page for one in memory.regions for page in range(one.first_page, one.end_page)}
    assert told == there & set(range(first, first + count))
    assert memory.is_memory(first, count) == (
        count > 0 and told == set(range(first, first + count))
    )
