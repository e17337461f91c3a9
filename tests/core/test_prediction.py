"""What is foretold of a migration, from how its guest writes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migrd.core.convergence import FIXED_COST_S
from migrd.core.prediction import Prediction, predict
from migrd.core.rate_reading import GIB, MIB, Figure
from migrd.core.working_set import FitQuality, WorkingSet


def guest(rate: float | None, set_bytes: float | None) -> WorkingSet:
    first = None if rate is None else Figure(rate, rate, rate)
    whole = Figure(set_bytes, 0, set_bytes)
    return WorkingSet(FitQuality.FITTED, first, whole)


def foretold(found: WorkingSet, bandwidth: float, limit_s: float = 0.3) -> Prediction | None:
    return predict(
        found, memory_bytes=4 * GIB, bandwidth_bytes_per_s=bandwidth, downtime_limit_s=limit_s
    )


def test_an_idle_guest_takes_its_memory_once() -> None:
    found = foretold(guest(0.0, None), 1000.0 * MIB)
    assert found is not None
    assert (found.converges, found.blackout_s) == (True, FIXED_COST_S)
    assert found.total_s == pytest.approx(4.096 + FIXED_COST_S)


def test_rounds_shrink_by_the_ratio_of_the_rates() -> None:
    """A straight line: Liu et al.'s geometric series."""
    found = foretold(guest(250.0 * MIB, None), 1000.0 * MIB)
    assert found is not None
    rounds_s = [4.096 * 0.25**n for n in range(6)]
    sent = next(n for n, s in enumerate(rounds_s) if FIXED_COST_S + s <= 0.3)
    assert found.blackout_s == pytest.approx(FIXED_COST_S + rounds_s[sent])
    assert found.total_s == pytest.approx(sum(rounds_s[:sent]) + found.blackout_s)


def test_a_guest_that_outruns_the_link_converges_only_by_its_working_set() -> None:
    small = foretold(guest(5000.0 * MIB, 100.0 * MIB), 1000.0 * MIB)
    assert small is not None
    assert small.converges
    assert small.blackout_s <= FIXED_COST_S + 0.1
    large = foretold(guest(5000.0 * MIB, 2000.0 * MIB), 1000.0 * MIB)
    assert large is not None
    assert not large.converges
    assert large.total_s is None
    assert large.blackout_s == pytest.approx(FIXED_COST_S + 2.0, rel=0.05)


def test_what_is_not_known_foretells_nothing() -> None:
    assert foretold(guest(None, None), 1000.0 * MIB) is None
    assert foretold(WorkingSet(FitQuality.TOO_FEW_WINDOWS), 1000.0 * MIB) is None
    assert foretold(guest(1.0, 1.0), 0.0) is None


@settings(deadline=None)
@given(
    st.floats(0, 1e12),
    st.one_of(st.none(), st.floats(0, 1e12)),
    st.floats(1, 1e12),
    st.floats(0.001, 2000),
)
def test_more_bandwidth_never_makes_it_worse(
    rate: float, set_bytes: float | None, bandwidth: float, limit_s: float
) -> None:
    slow = foretold(guest(rate, set_bytes), bandwidth, limit_s)
    fast = foretold(guest(rate, set_bytes), 4 * bandwidth, limit_s)
    assert slow is not None
    assert fast is not None
    assert fast.converges >= slow.converges
    if slow.converges:
        assert slow.blackout_s <= limit_s
        assert fast.total_s is not None
        assert slow.total_s is not None
        assert fast.total_s <= slow.total_s * (1 + 1e-6) + FIXED_COST_S
