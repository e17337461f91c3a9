"""The estimate of a device's dirty rate: right where it claims to be, and silent elsewhere."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrd.core.dma_rate import (
    DmaRate,
    RateQuality,
    Window,
    estimate,
    granule,
    poisson_interval,
    spread_over,
)

PAGE = 4096
SLICE_PAGES = 16384


def of(windows: list[Window], *, total_pages: int | None = None, **more: object) -> DmaRate:
    pages = sum(window.pages for window in windows) if total_pages is None else total_pages
    return estimate(windows, page_size_bytes=PAGE, total_bytes=pages * PAGE, **more)  # type: ignore[arg-type]  # passed through


def test_what_is_new_between_two_looks_is_the_rate() -> None:
    rate = of([Window(10_000, 0, 500, 0.5)])
    assert rate.quality is RateQuality.MEASURED
    assert rate.dirty_pages_per_s == pytest.approx(1000)
    assert rate.dirty_bytes_per_s == pytest.approx(1000 * PAGE)
    assert rate.low_pages_per_s is not None
    assert rate.high_pages_per_s is not None
    assert 900 < rate.low_pages_per_s < 1000 < rate.high_pages_per_s < 1100


def test_slices_stand_for_all_of_the_memory() -> None:
    rate = of([Window(1000, 0, 10, 1.0)] * 4, total_pages=40_000)
    assert rate.dirty_pages_per_s == pytest.approx(400)
    assert rate.sampled_bytes == 4000 * PAGE


def test_pages_dirty_before_do_not_make_the_rate_smaller() -> None:
    assert of([Window(1000, 500, 550, 1.0)]).dirty_pages_per_s == pytest.approx(100)


def test_a_window_in_which_the_vmm_cleared_is_left_out_and_never_counted_as_zero() -> None:
    alone = of([Window(1000, 400, 3, 1.0)])
    assert alone.quality is RateQuality.CLEARED
    assert alone.dirty_pages_per_s is None
    beside = of([Window(1000, 400, 3, 1.0), Window(1000, 0, 100, 1.0)])
    assert beside.dirty_pages_per_s == pytest.approx(200)


def test_a_full_bitmap_tells_no_rate() -> None:
    rate = of([Window(1000, 990, 995, 1.0)])
    assert rate.quality is RateQuality.SATURATED
    assert rate.dirty_pages_per_s is None


def test_nothing_dirty_is_no_zero_unless_tracking_is_known_to_be_on() -> None:
    silent = [Window(1000, 0, 0, 1.0)]
    assert of(silent).quality is RateQuality.UNPROVEN
    assert of(silent).dirty_pages_per_s is None
    known = of(silent, tracking_is_on=True)
    assert known.dirty_pages_per_s == 0.0
    assert known.high_pages_per_s is not None
    assert known.high_pages_per_s > 0, "none seen is not none at all"


def test_no_window_is_said_to_be_none() -> None:
    assert of([]).quality is RateQuality.NOTHING_MAPPED


def test_large_page_table_entries_widen_the_interval_and_are_told() -> None:
    small = of([Window(SLICE_PAGES, 0, 5120, 1.0)])
    large = of([Window(SLICE_PAGES, 0, 5120, 1.0)], granule_bytes=2 << 20)
    assert large.amplification == 512
    assert small.amplification is None
    assert large.high_pages_per_s is not None
    assert small.high_pages_per_s is not None
    assert large.high_pages_per_s > small.high_pages_per_s


@pytest.mark.parametrize(
    ("by_size", "expected"),
    [
        ({4096: 0, 2 << 20: 0}, None),
        ({4096: 512, 2 << 20: 1}, 2 << 20),
        ({4096: 513, 2 << 20: 2}, 4096),
        ({4096: 32, 65536: 2, 2 << 20: 1}, 65536),
        ({}, None),
    ],
)
def test_the_granule_is_the_largest_size_in_which_all_came_whole(
    by_size: dict[int, int], expected: int | None
) -> None:
    assert granule(by_size) == expected


def test_the_interval_holds_the_true_rate_about_as_often_as_it_says() -> None:
    seeded, held, runs = random.Random(20261123), 0, 300
    per_page = 0.01
    for _ in range(runs):
        windows = [
            Window(500, 0, sum(seeded.random() < per_page for _ in range(500)), 1.0)
            for _ in range(8)
        ]
        rate = of(windows, total_pages=100_000)
        assert rate.low_pages_per_s is not None
        assert rate.high_pages_per_s is not None
        held += rate.low_pages_per_s <= per_page * 100_000 <= rate.high_pages_per_s
    assert held / runs > 0.93


@given(st.integers(0, 10_000))
def test_poisson_intervals_hold_what_was_seen(count: int) -> None:
    low, high = poisson_interval(count)
    assert 0 <= low <= count < high
    assert math.isfinite(high)


@given(st.integers(0, 1000), st.integers(1, 50), st.integers(0, 10**6))
def test_parts_are_spread_and_different(total: int, parts: int, turn: int) -> None:
    chosen = list(spread_over(total, parts, turn))
    assert len(set(chosen)) == min(total, parts)
    assert all(0 <= index < total for index in chosen)


def test_every_slice_has_its_turn() -> None:
    assert {index for turn in range(128) for index in spread_over(128, 1, turn)} == set(range(128))
