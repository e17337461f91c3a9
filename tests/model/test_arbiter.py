"""The handover with an arbiter, every interleaving: nothing runs twice, and a host that is gone
needs no person until it may have started."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace

import pytest

from tests.model.arbiter import Rules, State, Step, steps, violation
from tests.model.explore import explore

MUTANTS = [field.name for field in fields(Rules)]


@pytest.mark.parametrize(("crashes", "deaths"), [(0, 0), (3, 0), (2, 1)])
def test_no_order_of_writes_crashes_and_deaths_breaks_an_invariant(
    crashes: int, deaths: int
) -> None:
    first = State(crashes_left=crashes, deaths_left=deaths)
    found = explore(first, lambda state: steps(state, Rules()), violation)
    assert not found.violations, found.story()
    assert {"succeeded", "rolled_back"} <= {state.phase for state in found.came_by}
    assert not found.dead_ends(), found.path(found.dead_ends()[0])


def test_without_a_fence_only_what_may_have_started_is_stuck() -> None:
    def unfenced(state: State) -> Iterator[Step]:
        return (step for step in steps(state, Rules()) if "a person" not in step.name)

    found = explore(State(), unfenced, violation)
    stuck = [state for state in found.dead_ends() if state.source != "dead"]
    assert stuck
    assert all(state.is_started_there and state.copy == "dead" for state in stuck)


@pytest.mark.parametrize("name", MUTANTS)
def test_each_mutant_is_caught(name: str) -> None:
    rules = replace(Rules(), **{name: False})
    found = explore(State(), lambda state: steps(state, rules), violation, stop_at_first=True)
    assert found.violations, f"{name} changes nothing that the invariants see"
