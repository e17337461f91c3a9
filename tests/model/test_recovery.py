"""Recovery over every reachable state of the embedded protocol: what `core.recovery` decides there
is held against the truth, which no daemon can read.

Each state in which a daemon is down is one in which it may be started now. Its facts are what its
journal, its own process and the other side (which answers, or is silent) would say.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import pytest

from migrd.core.handover import DestinationPhase
from migrd.core.migration import Mode
from migrd.core.phases import Phase
from migrd.core.recovery import decide
from migrd.core.recovery_action import Action, Deed
from migrd.core.recovery_facts import (
    Aim,
    DestinationFound,
    DiedStarting,
    Fate,
    Granted,
    Guest,
    NoWord,
    Own,
    Record,
    SaidByDestination,
    SaidBySource,
    SourceFound,
    Transfer,
)
from tests.model.embedded import Rules, State, steps
from tests.model.explore import Explored, explore
from tests.model.invariants import violation

SOURCE_OWN = {
    "run": Own(Fate.ANSWERS, Transfer.MOVING, Guest.RUNS),
    "frozen": Own(Fate.ANSWERS, Transfer.WAITING, Guest.STANDS),
    "sending": Own(Fate.ANSWERS, Transfer.LEAVING, Guest.STANDS),
    "done": Own(Fate.ANSWERS, Transfer.OVER, Guest.GAVE_AWAY),
    "dead": Own(Fate.DEAD),
}
DESTINATION_OWN = {
    "wait": Own(Fate.ANSWERS, Transfer.MOVING, Guest.AWAITED),
    "bad": Own(Fate.ANSWERS, Transfer.BROKEN, Guest.AWAITED),
    "load": Own(Fate.ANSWERS, Transfer.OVER, Guest.STANDS),
    "run": Own(Fate.ANSWERS, Transfer.OVER, Guest.RUNS),
    "dead": Own(Fate.DEAD),
}


@pytest.fixture(scope="module")
def found() -> Explored[State]:
    """Without persons: what they may say is not recovery's to decide."""

    def following(state: State) -> Iterator[object]:
        return (s for s in steps(state, Rules()) if "a person" not in s.name)

    return explore(State(crashes_left=2, deaths_left=1), following, violation)  # type: ignore[arg-type]  # as its own tests do


def said_there(state: State) -> Iterator[SaidByDestination]:
    yield NoWord.SILENT
    if not state.there_up:
        return
    died = state.there == "starting" and state.copy == "dead"
    yield DiedStarting.DIED_STARTING if died else DestinationPhase(state.there)


def said_here(state: State) -> Iterator[SaidBySource]:
    yield NoWord.SILENT
    if state.source_up:
        yield Phase(state.phase)


def at_source(state: State) -> Iterator[Action]:
    aim = Aim.BACK if state.undoing else Aim.AWAY
    granted = Granted.YES if state.granted else Granted.NO
    for there in said_there(state):
        yield decide(
            SourceFound(
                Phase(state.phase),
                Mode.PRECOPY,
                Aim.BACK_BY_CANCEL if state.cancelled else aim,
                Granted.YES_SOURCE_DIED if state.source_died else granted,
                SOURCE_OWN[state.source],
                there,
                Record.JOURNALS,
            )
        )


def at_destination(state: State) -> Iterator[Action]:
    for here in said_here(state):
        phase, own = DestinationPhase(state.there), DESTINATION_OWN[state.copy]
        yield decide(DestinationFound(phase, Mode.PRECOPY, own, here, Record.JOURNALS))


def test_no_reachable_pair_of_journals_tells_both_sides_to_run(found: Explored[State]) -> None:
    """And neither is told to while the other runs."""
    told = 0
    for state in found.came_by:
        source = not state.source_up and any(a.may_run for a in at_source(state))
        there = not state.there_up and not state.host_gone
        destination = there and any(a.may_run for a in at_destination(state))
        assert not (source and destination), found.path(state)
        if source and not state.overruled:
            assert state.copy != "run", found.path(state)
            assert not state.ran_there, found.path(state)
        if destination:
            assert state.source != "run", found.path(state)
            assert not state.stale, found.path(state)
        told += source or destination
    assert told > 100, "the model gets there"


def test_no_reachable_state_loses_a_guest_to_a_reaping(found: Explored[State]) -> None:
    reaped = 0
    for state in found.came_by:
        if state.there_up or state.host_gone:
            continue
        if any(a.deed is Deed.REAP for a in at_destination(state)):
            assert state.copy != "run", found.path(state)
            kept = state.source in ("run", "frozen", "sending", "done")
            given_up = state.phase == "guest_lost" or state.stale or state.died
            assert kept or given_up, found.path(state)
            reaped += 1
    assert reaped > 10, "the model gets there"


def ends_from(found: Explored[State]) -> dict[State, frozenset[str]]:
    """The phases that each state comes to without a further fault, source's and destination's."""
    before: dict[State, list[State]] = {}
    for state, nexts in found.leads_to.items():
        for following in nexts:
            before.setdefault(following, []).append(state)
    ends: dict[State, set[str]] = {s: {s.phase, f"there:{s.there}"} for s in found.came_by}
    queue = deque(found.came_by)
    while queue:
        state = queue.popleft()
        for earlier in before.get(state, ()):
            if not ends[state] <= ends[earlier]:
                ends[earlier] |= ends[state]
                queue.append(earlier)
    return {state: frozenset(words) for state, words in ends.items()}


def is_unnoticed(state: State) -> bool:
    """A process of the other side has died, and that side has not seen it yet: as good as new."""
    return state.copy == "dead" and state.there in ("receiving", "loaded")


def test_what_is_foretold_can_come_from_every_reachable_state(found: Explored[State]) -> None:
    ends, foretold = ends_from(found), 0
    for state in found.came_by:
        if is_unnoticed(state):
            continue
        actions = [] if state.source_up else list(at_source(state))
        for action in actions:
            if action.expects is not None:
                assert action.expects.value in ends[state], (action, found.path(state))
                foretold += 1
        if state.there_up or state.host_gone:
            continue
        for action in at_destination(state):
            if action.expects is not None:
                word = f"there:{action.expects.value}"
                assert word in ends[state], (action, found.path(state))
                foretold += 1
    assert foretold > 1000, "the model gets there"
