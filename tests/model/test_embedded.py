"""The embedded handover, every interleaving: the invariants hold, no way leads nowhere, and each
mutant of the protocol is caught."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace

import pytest

from tests.model.embedded import Rules, State, Step, steps
from tests.model.explore import Explored, explore
from tests.model.invariants import violation

MUTANTS = [field.name for field in fields(Rules)]


def explored(first: State, *, with_a_person: bool = True) -> Explored[State]:
    def following(state: State) -> Iterator[Step]:
        every = steps(state, Rules())
        return (step for step in every if with_a_person or "a person" not in step.name)

    return explore(first, following, violation)


@pytest.mark.parametrize(("crashes", "deaths"), [(0, 0), (3, 0), (2, 1), (1, 2)])
def test_no_order_of_crashes_deaths_and_messages_breaks_an_invariant(
    crashes: int, deaths: int
) -> None:
    found = explored(State(crashes_left=crashes, deaths_left=deaths))
    assert not found.violations, found.story()
    assert {"succeeded", "rolled_back", "cancelled"} <= {s.phase for s in found.came_by}
    assert not found.dead_ends(), "with a person's word, every state has a way to an end"


def test_without_deaths_nobody_needs_a_person() -> None:
    found = explored(State(crashes_left=3, deaths_left=0), with_a_person=False)
    assert not found.dead_ends()
    assert "guest_lost" not in {state.phase for state in found.came_by}


def test_a_person_is_needed_only_where_the_one_copy_that_may_run_cannot_be_told() -> None:
    found = explored(State(), with_a_person=False)
    stuck = found.dead_ends()
    assert stuck, "the known cases are there"
    for state in stuck:
        died_while_starting = state.there == "starting" and state.copy == "dead"
        copy_may_be_old = state.source == "dead" and not state.watched
        assert state.host_gone or died_while_starting or copy_may_be_old, found.path(state)


@pytest.mark.parametrize("name", MUTANTS)
def test_each_mutant_is_caught(name: str) -> None:
    rules = replace(Rules(), **{name: False})
    found = explore(State(), lambda state: steps(state, rules), violation, stop_at_first=True)
    assert found.violations, f"{name} changes nothing that the invariants see"
