"""Hours of a rate in bounded memory: what is kept is right, and what is not kept is a gap."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migrd.core.rate_history import BYTES, KEPT_S, RateHistory

HOUR_S = 3600.0
START_S = 86_400.0 * 30


def filled(seconds: float, every_s: float = 10.0) -> tuple[RateHistory, float]:
    """A rate that grows by 1 byte/s each second; (history, now)."""
    history = RateHistory()
    steps = int(seconds / every_s)
    for step in range(steps):
        history.add(START_S + step * every_s, float(step) * every_s, 100.0)
    return history, START_S + (steps - 1) * every_s


def test_memory_is_bounded_whatever_comes() -> None:
    history, _ = filled(30 * HOUR_S, 30.0)
    assert history.bytes_held == RateHistory().bytes_held == BYTES < 10_240
    rings = history.__dict__["_rings"]
    whole = sum(sys.getsizeof(each) for ring in rings for each in vars(ring).values())
    assert whole < 2 * BYTES, "arrays, not objects"


def test_the_last_ten_minutes_are_kept_at_ten_seconds_and_six_hours_at_a_minute() -> None:
    history, now_s = filled(10 * HOUR_S)
    recent = history.points(now_s - 300, now_s)
    assert {point.step_s for point in recent} == {10}
    assert len(recent) == 31
    assert recent[-1].mean == pytest.approx(now_s - START_S)
    older = history.points(now_s - 6 * HOUR_S, now_s)
    assert {point.step_s for point in older} == {60}
    assert KEPT_S / 60 - 1 <= len(older) <= KEPT_S / 60
    assert older[0].start_s >= now_s - KEPT_S


def test_a_minute_says_what_its_six_samples_were() -> None:
    history, now_s = filled(2 * HOUR_S)
    minute = next(p for p in history.points(now_s - 3000, now_s) if p.start_s == START_S + 4800)
    assert (minute.least, minute.most, minute.samples) == (4800, 4850, 6)
    assert minute.mean == pytest.approx(4825)
    assert minute.set_bytes == 100


def test_a_gap_stays_a_gap() -> None:
    history = RateHistory()
    history.add(START_S, 5.0)
    history.add(START_S + 200, 7.0)
    points = history.points(START_S, START_S + 205)
    assert [(point.start_s - START_S, point.mean) for point in points] == [(0, 5.0), (200, 7.0)]
    assert points[0].set_bytes is None


def test_what_was_overwritten_is_not_shown_as_new() -> None:
    history = RateHistory()
    history.add(START_S, 5.0)
    assert history.points(START_S + KEPT_S, START_S + KEPT_S + 60) == []
    assert history.points(START_S - HOUR_S, START_S + 2 * KEPT_S) == []


@pytest.mark.parametrize("rate", [float("nan"), float("inf"), -1.0])
def test_what_is_no_rate_is_left_out(rate: float) -> None:
    history = RateHistory()
    history.add(START_S, rate)
    assert history.points(START_S - 60, START_S + 60) == []


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 4000), st.floats(0, 1e9)), min_size=1, max_size=60),
    st.integers(1, 2000),
)
def test_steps_of_any_length_lose_no_sample(seen: list[tuple[int, float]], step_s: int) -> None:
    history = RateHistory()
    for second, rate in sorted(seen):
        history.add(START_S + second, rate)
    now_s = START_S + 4000
    points = history.points(START_S, now_s, step_s)
    assert sum(point.samples for point in points) == len(seen)
    assert all(point.step_s >= step_s for point in points)
    assert len({point.start_s for point in points}) == len(points)
    most = max(rate for _, rate in seen)
    assert max(point.most for point in points) == pytest.approx(most, rel=1e-6)
    for point in points:
        assert point.least * (1 - 1e-5) <= point.mean <= point.most * (1 + 1e-5)
