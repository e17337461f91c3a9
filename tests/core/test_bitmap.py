"""A bitmap of dirty pages does what a set of page numbers does, with both back ends."""

from collections.abc import Iterator
from itertools import pairwise
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migrd.core import bitmap as bitmap_module
from migrd.core.bitmap import DirtyBitmap
from tests.core.bit_backends import BACKENDS

SIZES = [0, 1, 63, 64, 65, 127, 128, 129, 640, 1000, 4096, 70_001]


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    with BACKENDS[request.param]() as chosen, pytest.MonkeyPatch.context() as patch:
        patch.setattr(bitmap_module, "_bits", chosen)
        yield chosen


def bitmap_of(pages: int, dirty: set[int]) -> DirtyBitmap:
    bitmap = DirtyBitmap(pages)
    for page in dirty:
        bitmap.words[page // 64] |= np.uint64(1 << page % 64)
    return bitmap


def dirty_in(bitmap: DirtyBitmap) -> set[int]:
    dirty = np.flatnonzero(bitmap.words).tolist()
    return {n * 64 + bit for n in dirty for bit in range(64) if int(bitmap.words[n]) >> bit & 1}


def runs_of(dirty: set[int], gap: int = 0) -> list[tuple[int, int]]:
    """Extents, the slow way."""
    ordered = sorted(dirty)
    begins = [b for a, b in pairwise([-gap - 2, *ordered]) if b - a > gap + 1]
    ends = [a for a, b in pairwise([*ordered, 2**70]) if b - a > gap + 1]
    return [(begin, end + 1 - begin) for begin, end in zip(begins, ends, strict=True)]


def all_extents(bitmap: DirtyBitmap, limit: int, gap: int = 0) -> list[tuple[int, int]]:
    told: list[tuple[int, int]] = []
    page: int | None = 0
    while page is not None:
        rows, page = bitmap.extents(page, limit=limit, gap_pages=gap)
        assert len(rows) == limit or page is None
        told += [(int(a), int(b)) for a, b in rows]
    return told


@st.composite
def sets(draw: st.DrawFn, pages: int | None = None) -> tuple[int, set[int]]:
    """Some pages of a space: single ones and long runs, at edges of words or anywhere."""
    pages = draw(st.integers(0, 1500)) if pages is None else pages
    dirty: set[int] = set()
    for _ in range(draw(st.integers(0, 8)) if pages else 0):
        first = draw(st.integers(0, pages - 1))
        if draw(st.booleans()):
            first -= first % 64
        length = draw(st.sampled_from([1, 1, 2, 63, 64, 65, 128, 300, 1500]))
        dirty.update(range(first, min(first + length, pages)))
    return pages, dirty


@st.composite
def two_sets(draw: st.DrawFn) -> tuple[int, set[int], set[int]]:
    pages, one = draw(sets())
    return pages, one, draw(sets(pages))[1]


@pytest.mark.parametrize("pages", SIZES)
def test_a_new_bitmap_is_clean(pages: int) -> None:
    bitmap = DirtyBitmap(pages)
    assert bitmap.pages == pages
    assert len(bitmap.words) == -(-pages // 64)
    assert bitmap.words.dtype == np.dtype("<u8")
    assert bitmap.count() == 0
    rows, going_on = bitmap.extents()
    assert (rows.shape, going_on) == ((0, 2), None)


@pytest.mark.parametrize("pages", SIZES)
def test_all_pages_are_one_extent(pages: int) -> None:
    bitmap = DirtyBitmap(pages)
    bitmap.mark(0, pages)
    assert bitmap.count() == pages
    assert all_extents(bitmap, 10) == ([(0, pages)] if pages else [])
    bitmap.unmark(0, pages)
    assert not bitmap.words.any()


@given(sets(), st.data())
def test_marking_and_unmarking_touch_exactly_their_pages(
    made: tuple[int, set[int]], data: st.DataObject
) -> None:
    pages, dirty = made
    bitmap = bitmap_of(pages, dirty)
    first = data.draw(st.integers(0, pages))
    length = data.draw(st.integers(0, pages - first))
    bitmap.mark(first, length)
    assert dirty_in(bitmap) == dirty | set(range(first, first + length))
    bitmap.unmark(first, length)
    assert dirty_in(bitmap) == dirty - set(range(first, first + length))


@given(two_sets())
def test_merging_tells_what_is_newly_dirty(made: tuple[int, set[int], set[int]]) -> None:
    pages, one, two = made
    bitmap, other = bitmap_of(pages, one), bitmap_of(pages, two)
    assert bitmap.merge(other) == len(two - one)
    assert dirty_in(bitmap) == one | two
    assert dirty_in(other) == two


@given(sets(), st.data())
def test_merging_many_at_once_tells_what_is_dirty_then(
    made: tuple[int, set[int]], data: st.DataObject
) -> None:
    pages, dirty = made
    others = [data.draw(sets(pages))[1] for _ in range(data.draw(st.integers(0, 9)))]
    bitmap = bitmap_of(pages, dirty)
    after = dirty.union(*others)
    assert bitmap.merge_all([bitmap_of(pages, other) for other in others]) == len(after)
    assert dirty_in(bitmap) == after


@pytest.mark.parametrize("sources", [1, 2, 3, 4, 5, 9])
def test_merging_many_words_of_many_sources(sources: int) -> None:
    pages = 2 * 2048 * 64 + 77
    each = [{n, 2048 * 64 + n * n, pages - 1 - n} for n in range(sources)]
    bitmap = bitmap_of(pages, {1, 2, 300})
    after = {1, 2, 300}.union(*each)
    assert bitmap.merge_all([bitmap_of(pages, one) for one in each]) == len(after)
    assert dirty_in(bitmap) == after


@given(two_sets())
def test_subtracting_makes_clean(made: tuple[int, set[int], set[int]]) -> None:
    pages, one, two = made
    bitmap, other = bitmap_of(pages, one), bitmap_of(pages, two)
    bitmap.subtract(other)
    assert dirty_in(bitmap) == one - two
    assert dirty_in(other) == two


@given(two_sets())
def test_moving_loses_nothing_and_leaves_nothing(made: tuple[int, set[int], set[int]]) -> None:
    pages, one, two = made
    bitmap, other = bitmap_of(pages, one), bitmap_of(pages, two)
    bitmap.move_into(other)
    assert dirty_in(other) == one | two
    assert dirty_in(bitmap) == set()


@given(sets(), st.data())
def test_a_count_and_a_slice_of_some_pages(made: tuple[int, set[int]], data: st.DataObject) -> None:
    pages, dirty = made
    first = data.draw(st.integers(0, pages))
    length = data.draw(st.integers(0, pages - first))
    within = {page for page in dirty if first <= page < first + length}
    bitmap = bitmap_of(pages, dirty)
    assert bitmap.count(first, length) == len(within)
    assert bitmap.count(first) == sum(page >= first for page in dirty)
    part = bitmap.slice(first, length)
    assert (part.pages, dirty_in(part)) == (length, {page - first for page in within})


@given(sets(), st.integers(1, 400))
def test_counts_of_regions(made: tuple[int, set[int]], per: int) -> None:
    pages, dirty = made
    counts = bitmap_of(pages, dirty).region_counts(per)
    assert counts.tolist() == [
        sum(begin <= page < begin + per for page in dirty) for begin in range(0, pages, per)
    ]


@given(sets(), st.integers(1, 12), st.sampled_from([0, 0, 1, 2, 63, 64, 200, 2**62]))
def test_extents_in_any_number_of_steps_are_those_of_one(
    made: tuple[int, set[int]], limit: int, gap: int
) -> None:
    pages, dirty = made
    assert all_extents(bitmap_of(pages, dirty), limit, gap) == runs_of(dirty, gap)


@given(sets(), st.data())
def test_extents_between_two_pages(made: tuple[int, set[int]], data: st.DataObject) -> None:
    pages, dirty = made
    first = data.draw(st.integers(0, pages))
    end = data.draw(st.integers(first, pages))
    rows, going_on = bitmap_of(pages, dirty).extents(first, end_page=end)
    assert rows.tolist() == [list(run) for run in runs_of(dirty & set(range(first, end)))]
    assert going_on is None


@given(st.data())
@settings(max_examples=200)
def test_bits_of_a_source_at_any_alignment_and_page_size(data: st.DataObject) -> None:
    pages, dirty = data.draw(sets())
    bit_pages = data.draw(st.sampled_from([1, 1, 1, 2, 3, 8, 64, 100, 512]))
    first = data.draw(st.integers(0, pages))
    cut = data.draw(st.integers(0, pages - first))
    bits_count = -(-cut // bit_pages)
    source = data.draw(st.binary(min_size=-(-bits_count // 8), max_size=-(-bits_count // 8)))
    told = int.from_bytes(source, "little")
    meant = {first + page for page in range(cut) if told >> page // bit_pages & 1}
    bitmap = bitmap_of(pages, dirty)
    newly = bitmap.merge_bits(
        source, first_page=first, bit_pages=bit_pages, bits_count=bits_count, pages=cut
    )
    assert dirty_in(bitmap) == dirty | meant
    assert newly == len(meant - dirty)


@pytest.mark.parametrize("pattern", [0, 1, 2**63, 2**64 - 1, 0xAAAAAAAAAAAAAAAA])
def test_every_pair_of_offsets_within_a_word(pattern: int) -> None:
    source = pattern.to_bytes(8, "little") * 9
    told = int.from_bytes(source, "little")
    for offset in range(64):
        bitmap = DirtyBitmap(9 * 64 + 128)
        newly = bitmap.merge_bits(source, first_page=offset, bits_count=9 * 64 - 5)
        wanted = (told & (1 << 9 * 64 - 5) - 1) << offset
        assert int.from_bytes(bitmap.words.tobytes(), "little") == wanted
        assert newly == wanted.bit_count()
        part = bitmap.slice(offset, 9 * 64 - 5)
        assert int.from_bytes(part.words.tobytes(), "little") == wanted >> offset


def test_bits_that_do_not_begin_at_a_word_of_memory() -> None:
    source = bytes(range(256)) * 8
    for skip in range(1, 9):
        bitmap = DirtyBitmap(2048 * 8)
        some = memoryview(source)[skip:]
        bitmap.merge_bits(some, first_page=0, bits_count=len(some) * 8)
        assert bitmap.words.tobytes() == bytes(some) + bytes(skip)


def test_one_bit_of_a_huge_page_dirties_all_of_it() -> None:
    pages = 3 << 18
    bitmap = DirtyBitmap(pages)
    assert bitmap.merge_bits(b"\x02", first_page=0, bit_pages=1 << 18, bits_count=3) == 1 << 18
    assert all_extents(bitmap, 4) == [(1 << 18, 1 << 18)]


def test_a_copy_is_another() -> None:
    bitmap = bitmap_of(100, {3, 99})
    other = bitmap.copy()
    other.clear()
    assert (dirty_in(bitmap), dirty_in(other)) == ({3, 99}, set())


def test_bits_beyond_the_last_page_mean_nothing() -> None:
    dirtied = DirtyBitmap(70)
    dirtied.words[:] = 2**64 - 1
    bitmap = DirtyBitmap(70)
    assert bitmap.merge(dirtied) == bitmap.count() == 70
    assert bitmap.words[1] == 2**6 - 1
    assert dirtied.count() == 70
    assert all_extents(dirtied, 1) == [(0, 70)]
    assert dirtied.region_counts(64).tolist() == [64, 6]
    assert dirty_in(dirtied.slice(60, 10)) == set(range(10))


@pytest.mark.parametrize(
    ("first", "pages"), [(-1, 1), (0, 101), (100, 1), (0, -1), (2**63, 1), (1, 2**63 - 1)]
)
def test_pages_that_are_not_there_are_refused(first: int, pages: int) -> None:
    bitmap = bitmap_of(100, {5})
    for ask in (bitmap.mark, bitmap.unmark, bitmap.count, bitmap.slice):
        with pytest.raises(ValueError, match="not in a bitmap of 100 pages"):
            ask(first, pages)
    with pytest.raises(ValueError, match="not in a bitmap of 100 pages"):
        bitmap.merge_bits(bytes(100), first_page=first, bits_count=800, pages=min(pages, 800))
    assert dirty_in(bitmap) == {5}


def test_what_does_not_fit_together_is_refused() -> None:
    bitmap = DirtyBitmap(128)
    for other in (DirtyBitmap(127), DirtyBitmap(129)):
        for ask in (bitmap.merge, bitmap.subtract, bitmap.move_into):
            with pytest.raises(ValueError, match="128 pages"):
                ask(other)
        with pytest.raises(ValueError, match="128 pages"):
            bitmap.merge_all([DirtyBitmap(128), other])
    with pytest.raises(ValueError, match="overlap"):
        bitmap.merge(bitmap)
    with pytest.raises(ValueError, match="too short"):
        bitmap.merge_bits(bytes(3), first_page=0, bits_count=25)
    with pytest.raises(ValueError, match="do not tell of"):
        bitmap.merge_bits(bytes(3), first_page=0, bits_count=24, pages=25)
    with pytest.raises(ValueError, match="no bitmap"):
        bitmap.merge_bits(bytes(3), first_page=0, bits_count=24, bit_pages=0)
    with pytest.raises(ValueError, match="limit"):
        bitmap.extents(limit=0)
    with pytest.raises(ValueError, match="region"):
        bitmap.region_counts(0)
    with pytest.raises(ValueError, match="pages"):
        DirtyBitmap(-1)
    with pytest.raises(ValueError, match="words of 64 bits"):
        DirtyBitmap.over(np.zeros(2, np.uint64), 129)
    assert bitmap.count() == 0
