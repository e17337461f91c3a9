"""advance and fold: what an event leaves behind, and that a replay comes to the same."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migrd.core.admission import Admission, admit_cancel, admit_policy, admit_switchover
from migrd.core.facts import TransferAddress
from migrd.core.migration import (
    Cause,
    MigrationEvent,
    MigrationState,
    Mode,
    Policy,
    Refusal,
    Request,
    WhenNotConverging,
    advance,
    begin,
    fold,
)
from migrd.core.phases import INSTRUCTION_OF, IllegalTransition, Phase, Trigger

PROPERTY = settings(max_examples=60, deadline=None)
REQUEST = Request("vm1", "beta")
FIRST = begin("m1", REQUEST, 7, 1000.0, 10.0)
HAPPY = (
    Trigger.STARTED,
    Trigger.PREFLIGHT_PASSED,
    Trigger.DESTINATION_PREPARED,
    Trigger.SWITCHOVER_REACHED,
    Trigger.TRANSFER_COMPLETED,
    Trigger.DESTINATION_RAN,
    Trigger.SOURCE_RELEASED,
)


def event(trigger: Trigger, at_s: float = 11.0, **facts: object) -> MigrationEvent:
    return MigrationEvent(trigger, 990.0 + at_s, at_s, **facts)  # type: ignore[arg-type]  # facts


def after(*triggers: Trigger) -> MigrationState:
    return fold(FIRST, [event(t, 11.0 + n) for n, t in enumerate(triggers)])


def at(phase: Phase) -> MigrationState:
    """A state in that phase, by the shortest way."""
    ways: dict[Phase, tuple[Trigger, ...]] = {
        Phase.PENDING: (),
        **{after(*HAPPY[: n + 1]).phase: HAPPY[: n + 1] for n in range(len(HAPPY))},
        Phase.REFUSED: (Trigger.STARTED, Trigger.PREFLIGHT_REFUSED),
        Phase.ROLLING_BACK: (*HAPPY[:3], Trigger.STEP_FAILED),
        Phase.ROLLED_BACK: (*HAPPY[:3], Trigger.STEP_FAILED, Trigger.SOURCE_KEPT),
        Phase.CANCELLED: (*HAPPY[:3], Trigger.CANCEL_REQUESTED, Trigger.CANCEL_COMPLETED),
        Phase.GUEST_LOST: (*HAPPY[:3], Trigger.GUEST_DIED),
        Phase.NEEDS_OPERATOR: (*HAPPY[:5], Trigger.OUTCOME_UNKNOWN),
    }
    state = after(*ways[phase])
    assert state.phase is phase
    return state


def test_the_happy_path_leaves_a_timeline_whose_phases_sum_to_the_total() -> None:
    state = after(*HAPPY)
    assert [entry.phase for entry in state.timeline] == [
        Phase.PENDING,
        Phase.PREFLIGHT,
        Phase.PREPARING,
        Phase.PRECOPY,
        Phase.SWITCHOVER,
        Phase.GRANTED,
        Phase.COMPLETING,
        Phase.SUCCEEDED,
    ]
    assert state.total_s == pytest.approx(7.0)
    assert after(*HAPPY[:-1]).total_s is None


def test_each_change_of_phase_comes_with_the_instruction_of_the_new_one() -> None:
    state = FIRST
    for trigger in HAPPY:
        state, instructions = advance(state, event(trigger))
        wanted = INSTRUCTION_OF.get(state.phase)
        assert instructions == (() if wanted is None else (wanted,))


def test_an_event_that_stays_in_its_phase_begins_nothing_anew() -> None:
    state, instructions = advance(at(Phase.PRECOPY), event(Trigger.SWITCHOVER_FORCED))
    assert (instructions, state.phase, state.switchover_forced) == ((), Phase.PRECOPY, True)
    assert len(state.timeline) == len(at(Phase.PRECOPY).timeline)


def test_an_event_without_a_place_changes_nothing() -> None:
    state = at(Phase.GRANTED)
    with pytest.raises(IllegalTransition):
        advance(state, event(Trigger.CANCEL_REQUESTED))
    assert state == at(Phase.GRANTED)


def test_what_an_event_says_is_kept() -> None:
    address = TransferAddress("192.0.2.1", 49152)
    state = fold(
        FIRST,
        [
            event(Trigger.STARTED),
            event(Trigger.PREFLIGHT_PASSED, run_guest=False),
            event(Trigger.DESTINATION_PREPARED, address=address),
            event(Trigger.POLICY_CHANGED, policy=Policy(downtime_limit_s=2.0)),
            event(Trigger.POSTCOPY_CHOSEN),
            event(Trigger.SWITCHOVER_REACHED, stopped_at_s=20.0),
            event(Trigger.TRANSFER_COMPLETED, source_died=True),
            event(Trigger.DESTINATION_RAN, resumed_at_s=20.5),
        ],
    )
    assert (state.run_guest, state.address, state.mode) == (False, address, Mode.POSTCOPY)
    assert (state.granted, state.source_died) == (True, True)
    assert state.policy.downtime_limit_s == 2.0
    assert state.request.policy.downtime_limit_s == 0.3, "what was asked for at first is kept"
    assert state.blackout_s is None, "a guest that did not run missed nothing"


def test_the_blackout_is_from_stop_to_resume_on_one_clock_and_never_negative() -> None:
    def measured(stopped_at_s: float | None, resumed_at_s: float | None) -> float | None:
        events = [event(t) for t in HAPPY[:3]]
        events += [
            event(Trigger.SWITCHOVER_REACHED, stopped_at_s=stopped_at_s),
            event(Trigger.TRANSFER_COMPLETED),
            event(Trigger.DESTINATION_RAN, resumed_at_s=resumed_at_s),
        ]
        return fold(FIRST, events).blackout_s

    assert measured(20.0, 20.25) == pytest.approx(0.25)
    assert measured(20.0, 19.0) == 0.0
    assert measured(None, 20.0) is None
    assert measured(20.0, None) is None


def test_a_refusal_after_the_grant_takes_the_grant_back() -> None:
    cause = Cause("destination_refused", "it said so")
    state, _ = advance(at(Phase.GRANTED), event(Trigger.DESTINATION_REFUSED, cause=cause))
    assert (state.phase, state.granted, state.undoing) == (Phase.ROLLING_BACK, False, True)
    assert state.cause == cause


def test_the_cause_of_a_doubt_is_gone_when_the_answer_comes() -> None:
    doubt, _ = advance(
        at(Phase.GRANTED), event(Trigger.OUTCOME_UNKNOWN, cause=Cause("grant_unanswered", "?"))
    )
    assert doubt.cause is not None
    state, _ = advance(doubt, event(Trigger.DESTINATION_RAN))
    assert (state.phase, state.cause) == (Phase.COMPLETING, None)


def test_refusals_are_kept() -> None:
    refusals = (Refusal("a", "b"), Refusal("c", "d", "e"))
    state, _ = advance(at(Phase.PREFLIGHT), event(Trigger.PREFLIGHT_REFUSED, refusals=refusals))
    assert (state.phase, state.refusals) == (Phase.REFUSED, refusals)


@PROPERTY
@given(st.lists(st.sampled_from(Trigger), max_size=40))
def test_a_replay_comes_to_the_state_that_was_lived_through(triggers: list[Trigger]) -> None:
    state, lived = FIRST, []
    for number, trigger in enumerate(triggers):
        happened = event(trigger, 11.0 + number)
        try:
            state, _ = advance(state, happened)
        except IllegalTransition:
            continue
        lived.append(happened)
    assert fold(FIRST, lived) == state
    assert state.events_applied == len(lived)
    assert state.epoch == FIRST.epoch
    times = [entry.monotonic_s for entry in state.timeline]
    assert times == sorted(times)


def test_a_journal_that_makes_no_sense_is_not_replayed() -> None:
    with pytest.raises(IllegalTransition):
        fold(FIRST, [event(Trigger.DESTINATION_RAN)])


# Admission ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("phase", "admission"),
    [
        (Phase.PENDING, Admission.QUEUED),
        (Phase.PREFLIGHT, Admission.QUEUED),
        (Phase.PREPARING, Admission.QUEUED),
        (Phase.PRECOPY, Admission.QUEUED),
        (Phase.SWITCHOVER, Admission.QUEUED),
        (Phase.GRANTED, Admission.DENIED),
        (Phase.NEEDS_OPERATOR, Admission.DENIED),
        (Phase.COMPLETING, Admission.DENIED),
        (Phase.ROLLING_BACK, Admission.ALREADY_SO),
        (Phase.CANCELLED, Admission.ALREADY_SO),
        (Phase.ROLLED_BACK, Admission.DENIED),
        (Phase.REFUSED, Admission.DENIED),
        (Phase.GUEST_LOST, Admission.DENIED),
        (Phase.SUCCEEDED, Admission.DENIED),
    ],
)
def test_a_cancel_is_admitted_up_to_the_grant(phase: Phase, admission: Admission) -> None:
    assert admit_cancel(at(phase))[0] is admission


@pytest.mark.parametrize("phase", Phase)
def test_a_cancel_that_is_queued_has_its_place_in_the_table(phase: Phase) -> None:
    if admit_cancel(at(phase))[0] is Admission.QUEUED:
        advance(at(phase), event(Trigger.CANCEL_REQUESTED))


@pytest.mark.parametrize("phase", Phase)
def test_a_forced_switchover_is_admitted_in_precopy_alone(phase: Phase) -> None:
    admission, _ = admit_switchover(at(phase))
    assert (admission is Admission.QUEUED) == (phase is Phase.PRECOPY)
    if admission is Admission.QUEUED:
        forced, _ = advance(at(phase), event(Trigger.SWITCHOVER_FORCED))
        assert admit_switchover(forced)[0] is Admission.ALREADY_SO


@pytest.mark.parametrize("phase", Phase)
def test_a_policy_may_change_until_the_guest_stops(phase: Phase) -> None:
    admission, _ = admit_policy(at(phase))
    before = (Phase.PENDING, Phase.PREFLIGHT, Phase.PREPARING, Phase.PRECOPY)
    assert (admission is Admission.QUEUED) == (phase in before)
    if admission is Admission.QUEUED:
        advance(at(phase), event(Trigger.POLICY_CHANGED, policy=Policy()))


def test_a_cancel_is_denied_once_postcopy_was_chosen() -> None:
    state, _ = advance(at(Phase.PRECOPY), event(Trigger.POSTCOPY_CHOSEN))
    assert admit_cancel(state) == (Admission.DENIED, "postcopy_started")


def test_the_policy_to_use_postcopy_implies_that_it_is_prepared() -> None:
    policy = Policy(when_not_converging=WhenNotConverging.POSTCOPY)
    assert Request("v", "d", policy).may_postcopy
    assert Request("v", "d", allow_postcopy=True).may_postcopy
    assert not Request("v", "d").may_postcopy
