"""The model and the real core are the same machine: random paths of the one through the other.

A path's events are folded through `advance` and `advance_destination`, as the engine does it, with
a journal beside: a crash forgets what is not in it. After each step the real states say what the
model says.
"""

from __future__ import annotations

import random
from collections import Counter

from migrd.core.handover import (
    DestinationEvent,
    DestinationState,
    DestinationTrigger,
    advance_destination,
    fold_destination,
)
from migrd.core.handover import DestinationPhase as There
from migrd.core.migration import MigrationEvent, MigrationState, Request, advance, begin, fold
from migrd.core.phases import TERMINAL, Trigger
from tests.model.embedded import Rules, State, Step, steps

PATHS = 10_000
LONGEST = 60
SEED = 20261123
TROUBLE = (
    "fault:",
    "step_failed",
    "cancel_requested",
    "outcome_unknown",
    "refusal_decided",
    "the stream",
)
BEFORE = (Trigger.STARTED, Trigger.PREFLIGHT_PASSED, Trigger.DESTINATION_PREPARED)
OUTSIDE_THE_MODEL = {
    *BEFORE,
    Trigger.PREFLIGHT_REFUSED,  # nothing has begun
    Trigger.POSTCOPY_CHOSEN,  # the model is of precopy
    Trigger.POLICY_CHANGED,
    Trigger.SWITCHOVER_FORCED,
}


class Source:
    """The real core on the source, and its journal."""

    def __init__(self) -> None:
        self.first = begin("m", Request("vm", "beta"), 1, 0.0, 0.0)
        self.journal = [_event(trigger) for trigger in BEFORE]
        self.unsaved: list[MigrationEvent] = []
        self.state = fold(self.first, self.journal)

    def take(self, step: Step, after: State, trigger: Trigger) -> None:
        died = trigger is Trigger.TRANSFER_COMPLETED and after.source_died
        event = MigrationEvent(trigger, 0.0, 0.0, source_died=died)
        self.state, _ = advance(self.state, event)
        self.unsaved.append(event)
        if not after.unsaved:
            self.save()

    def save(self) -> None:
        self.journal += self.unsaved
        self.unsaved = []

    def crash(self) -> None:
        self.unsaved = []
        self.state = fold(self.first, self.journal)

    def agrees(self, model: State) -> bool:
        return (
            self.state.phase.value,
            self.state.granted,
            self.state.undoing,
            self.state.cancelled,
            self.state.source_died,
        ) == (model.phase, model.granted, model.undoing, model.cancelled, model.source_died)


class Destination:
    """The real core on the destination, and its journal."""

    def __init__(self) -> None:
        self.first = DestinationState("m", 1)
        self.journal = [DestinationEvent(DestinationTrigger.INCOMING_READY, 0.0, 0.0)]
        self.unsaved: list[DestinationEvent] = []
        self.state = fold_destination(self.first, self.journal)

    def take(self, after: State, triggers: list[DestinationTrigger]) -> None:
        for trigger in triggers:
            event = DestinationEvent(trigger, 0.0, 0.0)
            self.state = advance_destination(self.state, event)
            self.unsaved.append(event)
        if not after.there_unsaved:
            self.save()

    def save(self) -> None:
        self.journal += self.unsaved
        self.unsaved = []

    def crash(self) -> None:
        self.unsaved = []
        self.state = fold_destination(self.first, self.journal)


def _event(trigger: Trigger) -> MigrationEvent:
    return MigrationEvent(trigger, 0.0, 0.0, run_guest=True)


def _carry_out(step: Step, source: Source, destination: Destination) -> None:
    side, _, names = (step.event or "").partition(":")
    if side == "source":
        source.take(step, step.state, Trigger(names))
    elif side == "destination":
        destination.take(step.state, [DestinationTrigger(name) for name in names.split("+")])
    elif step.name == "fault: source daemon killed":
        source.crash()
    elif step.name in ("fault: destination daemon killed", "fault: destination host gone for good"):
        destination.crash()
    elif step.name == "switchover_reached is saved":
        source.save()
    elif step.name == "guest_loaded is saved":
        destination.save()


def _weight(step: Step, trouble: float) -> float:
    """Most of what may go wrong at any moment must not, or no path gets far."""
    goes_on = not step.name.startswith(TROUBLE)
    return 1.0 if goes_on else trouble


def _walk(random_: random.Random, seen: Counter[str]) -> None:
    model, source, destination = State(crashes_left=3, deaths_left=2), Source(), Destination()
    trail: list[str] = []
    trouble = random_.choice((0.01, 0.1, 1.0))
    for _ in range(LONGEST):
        ways = list(steps(model, Rules()))
        if not ways:
            break
        step = random_.choices(ways, [_weight(way, trouble) for way in ways])[0]
        trail.append(step.name)
        _carry_out(step, source, destination)
        model = step.state
        if step.event is not None:
            seen.update(step.event.partition(":")[2].split("+"))
        assert source.agrees(model), (trail, source.state, model)
        assert destination.state.phase.value == model.there or model.host_gone, (trail, model)
        assert source.state.is_terminal == (source.state.phase in TERMINAL)


def test_ten_thousand_random_paths_of_the_model_run_through_the_real_core() -> None:
    seen: Counter[str] = Counter()
    for number in range(PATHS):
        _walk(random.Random(SEED + number), seen)
    triggers = {t.value for t in Trigger if t not in OUTSIDE_THE_MODEL}
    triggers |= {t.value for t in DestinationTrigger if t is not DestinationTrigger.INCOMING_READY}
    assert triggers == set(seen), "every event of the core is met, and no other"


def test_what_the_model_calls_a_phase_is_one() -> None:
    assert There(State().there) is There.RECEIVING
    assert isinstance(Source().state, MigrationState)
