"""All samples together cost no more than their share, whoever asks for them."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from migrd.core.sampling_budget import SamplingBudget


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0.001, 0.2), st.floats(0.001, 0.5)), min_size=1, max_size=80))
def test_what_is_begun_within_any_time_fits_the_share(wishes: list[tuple[float, float]]) -> None:
    """(cost, time until the next wish): however dense the wishes are."""
    budget, now_s = SamplingBudget(0.01, burst_s=2.0), 1000.0
    begun: list[tuple[float, float]] = []
    for cost_s, gap_s in wishes:
        begun.append((now_s + budget.book(cost_s, now_s), cost_s))
        now_s += gap_s
    first_s = begun[0][0]
    spent_s = 0.0
    for begins_s, cost_s in begun:
        assert spent_s <= 0.01 * (begins_s - first_s + 2.0) + 1e-9
        spent_s += cost_s


def test_a_few_begin_at_once_and_the_rest_wait_in_turn() -> None:
    budget = SamplingBudget(0.01, burst_s=2.0)
    waits = [budget.book(0.01, 5.0) for _ in range(5)]
    assert [round(wait, 6) for wait in waits] == [0, 0, 0, 1, 2]


def test_what_was_booked_and_not_spent_is_given_back() -> None:
    budget = SamplingBudget(0.01, burst_s=0.0)
    assert budget.book(1.0, 0.0) == 0
    budget.settle(1.0, 0.0)
    assert budget.book(0.01, 0.0) == 0
    budget.settle(0.01, 0.05)
    assert round(budget.book(0.0, 0.0), 6) == 5.0


def test_an_idle_time_earns_no_more_than_the_burst() -> None:
    budget = SamplingBudget(0.01, burst_s=1.0)
    budget.book(0.01, 0.0)
    assert [round(budget.book(0.01, 5000.0), 6) for _ in range(3)] == [0, 0, 1]
