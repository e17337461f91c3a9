"""The two parameters of a workload are found within the error that is stated, or are unknown."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migrd.core.rate_reading import MIB, Z_95, Figure, RateReading
from migrd.core.working_set import FitQuality, WorkingSet, distinct_bytes, fit

WINDOWS = (0.25, 1.0, 4.0)
GIB = 1 << 30


def reading(window_s: float, found: float, error: float) -> RateReading:
    """A window that found `found`, with a standard error."""
    half = Z_95 * error
    return RateReading(window_s, 4096, Figure(found, found - half, found + half))


def readings(
    rate: float,
    set_bytes: float,
    *,
    relative_error: float = 1e-3,
    off: Sequence[float] = (0.0, 0.0, 0.0, 0.0),
    windows: Sequence[float] = WINDOWS,
) -> list[RateReading]:
    """What windows find of a guest with these parameters, each `off` standard errors wrong."""
    found = []
    for window_s, wrong in zip(windows, off, strict=False):
        true = distinct_bytes(rate, set_bytes, window_s)
        error = max(relative_error * true, 4096.0)
        found.append(reading(window_s, max(0.0, true + wrong * error), error))
    return found


def covers(figure: Figure | None, truth: float) -> bool:
    assert figure is not None
    slack = 1e-6 * truth
    return figure.low - slack <= truth and (figure.high is None or truth <= figure.high + slack)


rates = st.floats(0.1 * MIB, 10_000 * MIB)
sets = st.floats(1.0 * MIB, 100_000 * MIB)
within_an_error = st.tuples(*[st.floats(-0.9, 0.9)] * 3)


@settings(deadline=None)
@given(rates, sets, st.floats(1e-4, 0.3), within_an_error)
def test_the_truth_is_within_the_stated_error(
    rate: float, set_bytes: float, relative_error: float, off: tuple[float, float, float]
) -> None:
    """Whenever each window is within its own error of the truth."""
    seen = readings(rate, set_bytes, relative_error=relative_error, off=off)
    found = fit(seen)
    if found.quality is FitQuality.NOTHING_WRITTEN:
        return
    assert covers(found.first_bytes_per_s, rate), found
    assert covers(found.set_bytes, set_bytes), found


@settings(deadline=None)
@given(st.floats(10 * MIB, 1000 * MIB), st.floats(0.5, 3.0))
def test_a_workload_whose_bend_the_windows_see_is_recovered(rate: float, bend_s: float) -> None:
    set_bytes = rate * bend_s
    found = fit(readings(rate, set_bytes))
    assert found.first_bytes_per_s is not None
    assert found.set_bytes is not None
    assert found.first_bytes_per_s.value == pytest.approx(rate, rel=0.02)
    assert found.set_bytes.value == pytest.approx(set_bytes, rel=0.02)
    assert found.first_bytes_per_s.low > 0.9 * rate
    assert found.set_bytes.high is not None
    assert found.set_bytes.high < 1.1 * set_bytes
    assert found.misfit == pytest.approx(0, abs=0.5)


def test_nineteen_of_twenty_intervals_hold_the_truth() -> None:
    chance = random.Random(4)
    rate, set_bytes = 200.0 * MIB, 300.0 * MIB
    hits = {"rate": 0, "set": 0}
    for _ in range(400):
        off = [chance.gauss(0, 1) for _ in WINDOWS]
        found = fit(readings(rate, set_bytes, relative_error=0.1, off=off))
        hits["rate"] += covers(found.first_bytes_per_s, rate)
        hits["set"] += covers(found.set_bytes, set_bytes)
    assert min(hits.values()) >= 0.93 * 400, hits


@settings(deadline=None)
@given(rates, st.lists(st.floats(0.25, 0.3), max_size=4))
def test_windows_of_one_length_tell_neither(rate: float, windows: list[float]) -> None:
    found = fit(readings(rate, 100 * MIB, windows=windows))
    assert found == WorkingSet(FitQuality.TOO_FEW_WINDOWS)


def test_a_set_too_large_for_the_windows_is_only_known_from_below() -> None:
    found = fit(readings(100.0 * MIB, 1e6 * MIB, relative_error=0.05))
    assert found.set_bytes is not None
    assert found.set_bytes.value is None
    assert found.set_bytes.high is None
    assert found.set_bytes.low > 400 * MIB, "so much was seen to be written in 4 s"
    assert found.first_bytes_per_s is not None
    assert found.first_bytes_per_s.value == pytest.approx(100 * MIB, rel=0.1)


def test_the_memory_there_is_bounds_the_set() -> None:
    found = fit(readings(100.0 * MIB, 1e6 * MIB, relative_error=0.05), total_bytes=GIB)
    assert found.set_bytes is not None
    assert found.set_bytes.high == GIB


def test_a_set_that_every_window_has_seen_whole_hides_its_rate() -> None:
    found = fit(readings(1e6 * MIB, 64.0 * MIB))
    assert found.first_bytes_per_s is not None
    assert found.first_bytes_per_s.value is None
    assert found.first_bytes_per_s.high is None
    assert found.first_bytes_per_s.low > 64 * MIB / 0.25
    assert found.set_bytes is not None
    assert found.set_bytes.value == pytest.approx(64 * MIB, rel=0.01)


def test_an_idle_guest_has_a_rate_of_nearly_nothing_and_no_known_set() -> None:
    found = fit([reading(window_s, 0.0, 2.0 * MIB) for window_s in WINDOWS])
    assert found.quality is FitQuality.NOTHING_WRITTEN
    assert found.first_bytes_per_s is not None
    assert found.first_bytes_per_s.value == 0
    assert found.first_bytes_per_s.high is not None
    assert 0 < found.first_bytes_per_s.high < 5 * MIB
    assert found.set_bytes is None


def test_a_guest_that_changes_between_windows_is_a_misfit_with_wider_errors() -> None:
    steady = fit(readings(100.0 * MIB, 200.0 * MIB, relative_error=0.01))
    seen = [reading(w, f * MIB, 1.0 * MIB) for w, f in ((0.25, 60.0), (1.0, 20.0), (4.0, 400.0))]
    changing = fit(seen)
    assert steady.misfit is not None
    assert changing.misfit is not None
    assert changing.misfit > 3 > steady.misfit
    assert width(changing.first_bytes_per_s) > 3 * width(steady.first_bytes_per_s)


def width(figure: Figure | None) -> float:
    assert figure is not None
    return (figure.high or 1e18) - figure.low


def test_what_is_not_known_in_a_window_leaves_that_window_out() -> None:
    seen = readings(100.0 * MIB, 200.0 * MIB)
    unknown = RateReading(2.0, 4096, None, why="busy")
    assert fit([*seen, unknown]) == fit(seen)
    assert fit([seen[0], unknown]).quality is FitQuality.TOO_FEW_WINDOWS


@settings(deadline=None)
@given(
    st.lists(
        st.builds(
            lambda window_s, found, low, high: RateReading(
                window_s, 4096, Figure(found, found - low, found + high)
            ),
            st.floats(0, 100),
            st.floats(0, 1e15),
            st.floats(0, 1e15),
            st.floats(0, 1e15),
        ),
        max_size=6,
    ),
    st.one_of(st.none(), st.integers(1, 1 << 45)),
)
def test_no_reading_breaks_it(seen: list[RateReading], total_bytes: int | None) -> None:
    found = fit(seen, total_bytes=total_bytes)
    for figure in (found.first_bytes_per_s, found.set_bytes):
        if figure is not None:
            value = figure.low if figure.value is None else figure.value
            assert 0 <= figure.low <= value * (1 + 1e-9)
            assert figure.high is None or figure.high >= figure.low * (1 - 1e-9)
