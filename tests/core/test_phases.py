"""The two tables, by their properties: what can follow what, and what never can."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Collection
from enum import StrEnum
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migrd.core.handover import (
    DESTINATION_TRANSITIONS,
    DestinationEvent,
    DestinationPhase,
    DestinationState,
    DestinationTrigger,
    advance_destination,
    fold_destination,
)
from migrd.core.phases import (
    INSTRUCTION_OF,
    PAST_NO_RETURN,
    TERMINAL,
    TRANSITIONS,
    IllegalTransition,
    Phase,
    Trigger,
    next_phase,
)

PROPERTY = settings(max_examples=60, deadline=None)
TRIGGERS_OF_STARTING = set(DESTINATION_TRANSITIONS[DestinationPhase.STARTING])


def reachable(start: StrEnum, table: Any, *, without: Collection[StrEnum] = ()) -> set[StrEnum]:
    """Every phase that can come after `start`, itself included; some triggers never happen."""
    seen, todo = {start}, [start]
    while todo:
        for trigger, phase in table[todo.pop()].items():
            if phase not in seen and trigger not in without:
                seen.add(phase)
                todo.append(phase)
    return seen


def test_every_phase_has_a_row_and_every_trigger_a_use() -> None:
    assert set(TRANSITIONS) == set(Phase)
    assert {t for row in TRANSITIONS.values() for t in row} == set(Trigger)
    assert set(DESTINATION_TRANSITIONS) == set(DestinationPhase)
    used = {t for row in DESTINATION_TRANSITIONS.values() for t in row}
    assert used == set(DestinationTrigger)


def test_every_phase_can_be_reached_and_every_one_can_end() -> None:
    assert reachable(Phase.PENDING, TRANSITIONS) == set(Phase)
    for phase in Phase:
        assert reachable(phase, TRANSITIONS) & TERMINAL, phase
    first = DestinationPhase.PREPARING
    assert reachable(first, DESTINATION_TRANSITIONS) == set(DestinationPhase)


def test_the_terminal_phases_are_the_documented_ones_and_have_no_way_out() -> None:
    assert {phase.value for phase in TERMINAL} == {
        "succeeded",
        "rolled_back",
        "cancelled",
        "refused",
        "guest_lost",
    }
    assert all(TRANSITIONS[phase] == {} for phase in TERMINAL)


def test_every_phase_that_works_has_one_instruction() -> None:
    assert set(INSTRUCTION_OF) == set(Phase) - TERMINAL - {Phase.PENDING}
    assert len(set(INSTRUCTION_OF.values())) == len(INSTRUCTION_OF)


def test_after_the_grant_only_a_refusal_or_a_word_of_the_operator_leads_back() -> None:
    back = {Phase.ROLLING_BACK, Phase.ROLLED_BACK, Phase.CANCELLED, Phase.REFUSED}
    there = reachable(
        Phase.GRANTED,
        TRANSITIONS,
        without={
            Trigger.DESTINATION_REFUSED,
            Trigger.SOURCE_KEPT,  # from needs_operator, of a roll-back that was never granted
            Trigger.CANCEL_COMPLETED,
        },
    )
    assert not there & back
    assert (
        TRANSITIONS[Phase.GRANTED].keys()
        & {
            Trigger.STEP_FAILED,
            Trigger.CANCEL_REQUESTED,
            Trigger.SOURCE_KEPT,
        }
        == set()
    )


def test_a_guest_that_ran_at_the_destination_never_comes_back() -> None:
    assert reachable(Phase.COMPLETING, TRANSITIONS) == {
        Phase.COMPLETING,
        Phase.SUCCEEDED,
        Phase.GUEST_LOST,
    }
    assert {Phase.GRANTED, Phase.COMPLETING, Phase.SUCCEEDED} == PAST_NO_RETURN


def test_nothing_succeeds_without_a_grant_and_an_answer() -> None:
    no_grant = reachable(Phase.PENDING, TRANSITIONS, without={Trigger.TRANSFER_COMPLETED})
    assert Phase.GRANTED not in no_grant
    no_answer = reachable(Phase.PENDING, TRANSITIONS, without={Trigger.DESTINATION_RAN})
    assert Phase.SUCCEEDED not in no_answer


def test_a_destination_that_may_have_started_never_refuses_of_itself() -> None:
    """Only the source takes it back, on an operator's word."""
    of_itself = {DestinationTrigger.TAKEN_BACK}
    for phase in (DestinationPhase.STARTING, DestinationPhase.RUNNING):
        there = reachable(phase, DESTINATION_TRANSITIONS, without=of_itself)
        assert DestinationPhase.REFUSED not in there
        assert not DestinationState("m", 1, phase).may_refuse
    assert {DestinationTrigger.GUEST_RAN, DestinationTrigger.TAKEN_BACK} == TRIGGERS_OF_STARTING


def test_a_refusal_is_final() -> None:
    assert DESTINATION_TRANSITIONS[DestinationPhase.REFUSED] == {}
    assert DESTINATION_TRANSITIONS[DestinationPhase.RUNNING] == {}


def test_a_loaded_destination_does_not_refuse_by_time_out() -> None:
    """Its copy may be the last one."""
    for phase in DestinationPhase:
        may = DestinationState("m", 1, phase).may_refuse_by_time_out
        assert may == (phase in (DestinationPhase.PREPARING, DestinationPhase.RECEIVING))


@PROPERTY
@given(st.lists(st.sampled_from(Trigger), max_size=60))
def test_no_order_of_events_completes_without_a_grant_or_leaves_an_end(
    triggers: list[Trigger],
) -> None:
    trail = [Phase.PENDING]
    for trigger in triggers:
        with contextlib.suppress(IllegalTransition):
            trail.append(next_phase(trail[-1], trigger))
    for before, after in itertools.pairwise(trail):
        assert before not in TERMINAL
        if after is Phase.SUCCEEDED:
            assert before is Phase.COMPLETING
    if Phase.SUCCEEDED in trail:
        assert Phase.GRANTED in trail or Phase.NEEDS_OPERATOR in trail


@PROPERTY
@given(st.lists(st.sampled_from(DestinationTrigger), max_size=30))
def test_no_order_of_events_starts_a_guest_that_was_refused(
    triggers: list[DestinationTrigger],
) -> None:
    state = DestinationState("m", 3)
    seen = [state.phase]
    applied: list[DestinationEvent] = []
    for trigger in triggers:
        event = DestinationEvent(trigger, 0.0, 0.0)
        try:
            state = advance_destination(state, event)
        except IllegalTransition:
            continue
        applied.append(event)
        seen.append(state.phase)
    taken_back = any(e.trigger is DestinationTrigger.TAKEN_BACK for e in applied)
    if DestinationPhase.STARTING in seen and DestinationPhase.REFUSED in seen:
        assert taken_back
    assert not (DestinationPhase.RUNNING in seen and DestinationPhase.REFUSED in seen)
    assert fold_destination(DestinationState("m", 3), applied) == state


@pytest.mark.parametrize("phase", Phase)
def test_what_has_no_row_is_refused_by_name(phase: Phase) -> None:
    for trigger in set(Trigger) - set(TRANSITIONS[phase]):
        with pytest.raises(IllegalTransition, match=phase.value):
            next_phase(phase, trigger)
