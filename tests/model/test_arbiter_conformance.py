"""The model of the arbiter's protocol and the real core are the same machine.

Random paths of the model run through `advance` and `advance_destination`; and at each state what
the model allows by the record is what the engine reads in it (`as_source`, `as_target`).
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
from migrd.core.migration import MigrationEvent, MigrationState, Mode, Request, advance, begin, fold
from migrd.core.phases import Trigger
from migrd.engine.arbiter_port import Ownership
from migrd.engine.ownership import Standing, as_source, as_target
from tests.model.arbiter import DESTINATION, SOURCE, Rules, State, Step, steps

PATHS = 5_000
LONGEST = 60
SEED = 20261123
TROUBLE = ("fault:", "step_failed", "outcome_unknown", "DISCARD", "refusal_decided")
BEFORE = (
    Trigger.STARTED,
    Trigger.PREFLIGHT_PASSED,
    Trigger.DESTINATION_PREPARED,
    Trigger.SWITCHOVER_REACHED,
)
MET = {
    *("transfer_completed", "step_failed", "destination_ran", "destination_refused"),
    *("outcome_unknown", "source_released", "source_kept", "guest_died"),
    *("grant_received", "start_ordered", "guest_ran", "refusal_decided", "taken_back"),
}


class Core:
    """Both sides, and their journals."""

    def __init__(self) -> None:
        self.first = begin("m", Request("vm", DESTINATION), 1, 0.0, 0.0)
        self.events = [
            MigrationEvent(trigger, 0.0, 0.0, arbitrated=trigger is Trigger.DESTINATION_PREPARED)
            for trigger in BEFORE
        ]
        self.source: MigrationState = fold(self.first, self.events)
        self.there_first = DestinationState("m", 1)
        self.there_events = [
            DestinationEvent(DestinationTrigger.INCOMING_READY, 0.0, 0.0),
            DestinationEvent(DestinationTrigger.GUEST_LOADED, 0.0, 0.0, mode=Mode.PRECOPY),
        ]
        self.there = fold_destination(self.there_first, self.there_events)

    def take(self, step: Step) -> None:
        side, _, name = (step.event or "").partition(":")
        if side == "source":
            event = _event(step, Trigger(name))
            self.source, _ = advance(self.source, event)
            self.events.append(event)
        elif side == "destination":
            there = DestinationEvent(DestinationTrigger(name), 0.0, 0.0)
            self.there = advance_destination(self.there, there)
            self.there_events.append(there)
        elif "daemon killed" in step.name:
            self.source = fold(self.first, self.events)
            self.there = fold_destination(self.there_first, self.there_events)

    def agrees(self, model: State) -> bool:
        decided_on = self.source.decided_on_revision
        core = (
            self.source.phase.value,
            self.source.source_died,
            self.source.fenced,
            -1 if decided_on is None else decided_on,
            self.there.phase.value,
        )
        said = (model.phase, model.source_died, model.fenced, model.granted_on, model.there)
        return self.source.arbitrated and core == said


def _event(step: Step, trigger: Trigger) -> MigrationEvent:
    after = step.state
    is_grant = trigger is Trigger.TRANSFER_COMPLETED
    return MigrationEvent(
        trigger,
        0.0,
        0.0,
        source_died=is_grant and after.source_died,
        decided_on_revision=after.granted_on if is_grant and after.granted_on >= 0 else None,
        by_operator="a person" in step.name,
    )


def _check_reading(model: State, names: set[str]) -> None:
    """What the engine concludes from the record is what the model may do."""
    record = Ownership("vm", model.owner, 1, model.started, model.revision)
    decided_on = model.granted_on if model.granted_on >= 0 else None
    here = as_source(record, SOURCE, DESTINATION, 1, decided_on)
    if "destination_refused (read: mine)" in names:
        assert here is Standing.BACK, model
    if "write: owner = source" in names:
        assert here in (Standing.OURS, Standing.GIVEN), model
    if "GRANT" in names:
        assert here in (Standing.GIVEN, Standing.STARTED), model
    there = as_target(record, DESTINATION, 1)
    if "write: started" in names:
        assert there is Standing.GIVEN, model
    assert "start_ordered" not in names or there is Standing.STARTED, model


def _weight(step: Step, trouble: float) -> float:
    return trouble if step.name.startswith(TROUBLE) else 1.0


def _walk(random_: random.Random, seen: Counter[str]) -> None:
    model, core = State(crashes_left=3, deaths_left=2), Core()
    trail: list[str] = []
    trouble = random_.choice((0.01, 0.1, 1.0))
    for _ in range(LONGEST):
        ways = list(steps(model, Rules()))
        if not ways:
            break
        _check_reading(model, {way.name for way in ways})
        step = random_.choices(ways, [_weight(way, trouble) for way in ways])[0]
        trail.append(step.name)
        core.take(step)
        model = step.state
        seen.update([(step.event or "").partition(":")[2]])
        assert core.agrees(model), (trail, core.source, model)


def test_random_paths_of_the_model_run_through_the_real_core() -> None:
    seen: Counter[str] = Counter()
    for number in range(PATHS):
        _walk(random.Random(SEED + number), seen)
    assert set(seen) - {""} == MET, "every event of the protocol is met, and no other"
