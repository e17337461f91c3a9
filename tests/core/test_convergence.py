"""Rounds in, estimate and decision out: arithmetic, checked by its properties and by cases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from migrd.core.convergence import (
    AIM,
    FIXED_COST_S,
    Decision,
    Situation,
    Verdict,
    decide,
    estimate,
    throttle_for,
)
from migrd.core.facts import Round
from migrd.core.migration import Policy, WhenNotConverging

PROPERTY = settings(max_examples=60, deadline=None)
MIB = 1 << 20
PAGE = 4096


def round_(
    number: int,
    remaining_mib: float,
    *,
    sent_mib: float = 100.0,
    duration_s: float = 1.0,
    dirty_mib_per_s: float | None = 50.0,
) -> Round:
    return Round(
        number=number,
        at_s=100.0 + number,
        duration_s=duration_s,
        transferred_bytes=int(sent_mib * MIB),
        remaining_bytes=int(remaining_mib * MIB),
        dirty_pages_per_s=None if dirty_mib_per_s is None else dirty_mib_per_s * MIB / PAGE,
        page_size_bytes=PAGE,
        bandwidth_bytes_per_s=sent_mib * MIB / duration_s if duration_s else None,
        throttle_percent=0,
    )


def stuck(count: int = 8, *, dirty_mib_per_s: float = 200.0) -> list[Round]:
    """Rounds that do not shrink: dirtied faster than sent."""
    return [round_(n, 200.0, dirty_mib_per_s=dirty_mib_per_s) for n in range(1, count + 1)]


def shrinking() -> list[Round]:
    return [round_(n, 400.0 * 0.5**n, dirty_mib_per_s=50.0) for n in range(1, 4)]


def judged(rounds: Sequence[Round], policy: Policy | None = None, **facts: object) -> Decision:
    situation = Situation(
        rounds=rounds, policy=policy or Policy(), at_s=200.0, deadline_at_s=1000.0
    )
    return decide(replace(situation, **facts))  # type: ignore[arg-type]  # facts of a Situation


WHEN = {word: Policy(when_not_converging=word) for word in WhenNotConverging}


@pytest.mark.parametrize(
    ("rounds", "policy", "facts", "verdict", "reason"),
    [
        ([], Policy(), {}, Verdict.CONTINUE, "too_few_rounds"),
        ([round_(1, 1000)], Policy(), {}, Verdict.CONTINUE, "too_few_rounds"),
        ([round_(1, 10)], Policy(), {}, Verdict.SWITCH_OVER, "fits_downtime_limit"),
        (shrinking(), Policy(), {}, Verdict.CONTINUE, "converging"),
        (stuck(), WHEN[WhenNotConverging.WAIT], {}, Verdict.CONTINUE, "waiting"),
        (stuck(), WHEN[WhenNotConverging.GIVE_UP], {}, Verdict.GIVE_UP, "not_converging"),
        (stuck(), WHEN[WhenNotConverging.THROTTLE], {}, Verdict.THROTTLE, "not_converging"),
        (
            stuck(),
            WHEN[WhenNotConverging.THROTTLE],
            {"throttle_percent": 80},
            Verdict.CONTINUE,
            "throttled",
        ),
        (
            stuck(),
            WHEN[WhenNotConverging.POSTCOPY],
            {"postcopy_possible": True},
            Verdict.START_POSTCOPY,
            "not_converging",
        ),
        (stuck(), WHEN[WhenNotConverging.POSTCOPY], {}, Verdict.CONTINUE, "waiting"),
        (stuck(), Policy(), {"at_s": 1000.0}, Verdict.GIVE_UP, "deadline"),
        ([], Policy(), {"at_s": 1000.0}, Verdict.GIVE_UP, "deadline"),
        (stuck(), Policy(), {"forced": True}, Verdict.SWITCH_OVER, "forced"),
        ([], Policy(), {"forced": True, "at_s": 2000.0}, Verdict.SWITCH_OVER, "forced"),
        (stuck(), Policy(), {"postcopy_started": True}, Verdict.CONTINUE, "postcopy_started"),
    ],
)
def test_each_situation_has_its_verdict_and_its_reason(
    rounds: list[Round], policy: Policy, facts: dict[str, object], verdict: Verdict, reason: str
) -> None:
    decision = judged(rounds, policy, **facts)
    assert (decision.verdict, decision.reason) == (verdict, reason), decision.message
    assert decision.message
    assert decision.round_number == (rounds[-1].number if rounds else 0)


def test_the_blackout_is_the_fixed_cost_and_the_rest_at_the_bandwidth_measured() -> None:
    guess = estimate([round_(1, 50.0, sent_mib=100.0)], Policy())
    assert guess.predicted_blackout_s == pytest.approx(FIXED_COST_S + 0.5)
    assert guess.bandwidth_bytes_per_s == pytest.approx(100 * MIB)
    assert guess.dirty_bytes_per_s == pytest.approx(50 * MIB)


def test_nothing_is_claimed_before_it_was_seen() -> None:
    guess = estimate([], Policy())
    assert (guess.predicted_blackout_s, guess.converges, guess.predicted_remaining_s) == (
        None,
        None,
        None,
    )
    silent = estimate([round_(1, 500.0, sent_mib=0.0, duration_s=0.0)], Policy())
    assert silent.predicted_blackout_s is None
    unknown_rate = estimate([round_(1, 500.0, dirty_mib_per_s=None)], Policy())
    assert unknown_rate.converges is None
    assert unknown_rate.predicted_remaining_s is None


def test_a_working_set_that_fits_converges_however_fast_it_is_dirtied() -> None:
    rounds = [round_(n, 20.0, dirty_mib_per_s=5000.0) for n in range(1, 9)]
    assert estimate(rounds, Policy()).converges is True


def test_the_time_to_go_counts_the_rounds_to_come() -> None:
    rounds = shrinking()
    guess = estimate(rounds, Policy(downtime_limit_s=0.1))
    assert guess.converges is True
    assert guess.predicted_remaining_s is not None
    limit_bytes = (0.1 - FIXED_COST_S) * 100 * MIB
    remaining, seconds = float(rounds[-1].remaining_bytes), 0.0
    while remaining > limit_bytes:
        seconds += remaining / (100 * MIB)
        remaining *= 0.5
    seconds += FIXED_COST_S + remaining / (100 * MIB)
    assert guess.predicted_remaining_s == pytest.approx(seconds, rel=0.05)


def test_a_throttle_is_computed_and_then_raised_by_ten_points() -> None:
    rounds = stuck(dirty_mib_per_s=200.0)
    policy = Policy(when_not_converging=WhenNotConverging.THROTTLE, max_throttle_percent=90)
    first = judged(rounds, policy)
    assert first.throttle_percent == round(100 * (1 - AIM * 100 / 200))
    second = judged(rounds, policy, throttle_percent=first.throttle_percent)
    assert second.throttle_percent is not None
    assert second.throttle_percent >= first.throttle_percent + 10
    assert judged(rounds, policy, throttle_percent=90).verdict is Verdict.CONTINUE


# Properties ---------------------------------------------------------------------------------------

some_rounds = st.lists(
    st.builds(
        round_,
        number=st.integers(1, 1000),
        remaining_mib=st.floats(0.0, 1e6),
        sent_mib=st.floats(0.0, 1e5),
        duration_s=st.floats(0.0, 1e4),
        dirty_mib_per_s=st.none() | st.floats(0.0, 1e6),
    ),
    max_size=12,
)
some_policies = st.builds(
    Policy,
    when_not_converging=st.sampled_from(WhenNotConverging),
    downtime_limit_s=st.floats(0.001, 60.0),
    max_throttle_percent=st.integers(1, 99),
)


@PROPERTY
@example([round_(1, 1.0, sent_mib=5e-324)], Policy(), 0, False)
@example([round_(1, 1.0, duration_s=5e-324)], Policy(), 0, False)
@given(some_rounds, some_policies, st.integers(0, 99), st.booleans())
def test_any_rounds_get_a_verdict_and_finite_figures(
    rounds: list[Round], policy: Policy, throttle: int, postcopy: bool
) -> None:
    decision = judged(rounds, policy, throttle_percent=throttle, postcopy_possible=postcopy)
    guess = decision.estimate
    for figure in (guess.predicted_blackout_s, guess.predicted_remaining_s):
        assert figure is None or (figure >= 0 and figure < float("inf"))
    if decision.verdict is Verdict.THROTTLE:
        assert decision.throttle_percent is not None
        assert throttle < decision.throttle_percent <= policy.max_throttle_percent
    else:
        assert decision.throttle_percent is None
    if decision.verdict is Verdict.START_POSTCOPY:
        assert postcopy
        assert policy.when_not_converging is WhenNotConverging.POSTCOPY


@PROPERTY
@given(some_rounds, some_policies)
def test_what_fits_a_limit_fits_every_longer_one(rounds: list[Round], policy: Policy) -> None:
    limits_s = [policy.downtime_limit_s * factor for factor in (1.0, 1.1, 2.0, 100.0, 1e6)]
    wider = [replace(policy, downtime_limit_s=limit_s) for limit_s in limits_s]
    fits = [judged(rounds, each).verdict is Verdict.SWITCH_OVER for each in wider]
    assert fits == sorted(fits), "from the first that fits on, all do"


@PROPERTY
@given(some_rounds, some_policies)
def test_a_guest_that_converges_is_never_throttled_nor_given_up(
    rounds: list[Round], policy: Policy
) -> None:
    decision = judged(rounds, policy)
    if decision.estimate.converges is not False:
        assert decision.verdict in (Verdict.CONTINUE, Verdict.SWITCH_OVER)


@PROPERTY
@given(some_rounds, some_policies, st.integers(0, 98))
def test_a_throttle_never_goes_down_and_never_above_its_ceiling(
    rounds: list[Round], policy: Policy, now: int
) -> None:
    situation = Situation(rounds, policy, 0.0, 1.0, throttle_percent=now)
    wanted = throttle_for(estimate(rounds, policy), situation)
    assert wanted >= now
    assert wanted <= max(now, policy.max_throttle_percent)


@PROPERTY
@given(some_rounds, some_policies)
def test_the_deadline_ends_everything_but_a_forced_switchover_and_postcopy(
    rounds: list[Round], policy: Policy
) -> None:
    assert judged(rounds, policy, at_s=1000.0).verdict is Verdict.GIVE_UP
