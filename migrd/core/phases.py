"""The life of one migration on its source, as a table.

Rule 1: every change of phase is a row here; nothing else assigns a phase. Empty rows are written.
Rule 2: this module does no I/O, reads no clock, and does not know which host it runs on.

    pending > preflight > preparing > precopy > switchover > granted > completing > succeeded
       |          |           |          |          |           |          |
       |          |           +----------+----------+           |          +--> guest_lost
       v          v                      v                      |
    cancelled  refused              rolling_back <--(refused)---+--(nobody knows)--> needs_operator
                                      |    |   |                                     |  |   |
                           rolled_back  cancelled  guest_lost       (asked again, or resolved)

`granted` is the point of no return: the destination may already be running, so the source never
resumes except on the destination's durable refusal or an operator's proof (handover rules, see
`core.handover`). A time-out there leads to `needs_operator`, which keeps asking: it is a state of
knowledge, not an end.

`guest_lost` is reached only on proof that the process holding the only copy is gone.
"""

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Final


class Phase(StrEnum):
    """Where a migration stands; the same words in code, API, metrics and logs."""

    PENDING = "pending"
    PREFLIGHT = "preflight"
    PREPARING = "preparing"
    PRECOPY = "precopy"
    SWITCHOVER = "switchover"
    GRANTED = "granted"
    COMPLETING = "completing"
    SUCCEEDED = "succeeded"
    ROLLING_BACK = "rolling_back"
    ROLLED_BACK = "rolled_back"
    CANCELLED = "cancelled"
    REFUSED = "refused"
    GUEST_LOST = "guest_lost"
    NEEDS_OPERATOR = "needs_operator"


class Trigger(StrEnum):
    """What moves a migration from phase to phase. Past tense: each has happened."""

    STARTED = "started"
    PREFLIGHT_PASSED = "preflight_passed"
    PREFLIGHT_REFUSED = "preflight_refused"
    DESTINATION_PREPARED = "destination_prepared"
    SWITCHOVER_REACHED = "switchover_reached"
    TRANSFER_COMPLETED = "transfer_completed"
    DESTINATION_RAN = "destination_ran"
    DESTINATION_REFUSED = "destination_refused"
    OUTCOME_UNKNOWN = "outcome_unknown"
    SOURCE_RELEASED = "source_released"
    STEP_FAILED = "step_failed"
    CANCEL_REQUESTED = "cancel_requested"
    SOURCE_KEPT = "source_kept"
    CANCEL_COMPLETED = "cancel_completed"
    GUEST_DIED = "guest_died"
    POSTCOPY_CHOSEN = "postcopy_chosen"
    POLICY_CHANGED = "policy_changed"
    SWITCHOVER_FORCED = "switchover_forced"


_UNDO: Final = {
    Trigger.STEP_FAILED: Phase.ROLLING_BACK,
    Trigger.CANCEL_REQUESTED: Phase.ROLLING_BACK,
    Trigger.GUEST_DIED: Phase.GUEST_LOST,
}

TRANSITIONS: Final[Mapping[Phase, Mapping[Trigger, Phase]]] = MappingProxyType(
    {
        Phase.PENDING: {
            Trigger.STARTED: Phase.PREFLIGHT,
            Trigger.CANCEL_REQUESTED: Phase.CANCELLED,
            Trigger.PREFLIGHT_REFUSED: Phase.REFUSED,
            Trigger.GUEST_DIED: Phase.GUEST_LOST,
            Trigger.POLICY_CHANGED: Phase.PENDING,
        },
        Phase.PREFLIGHT: {
            Trigger.PREFLIGHT_PASSED: Phase.PREPARING,
            Trigger.PREFLIGHT_REFUSED: Phase.REFUSED,
            Trigger.CANCEL_REQUESTED: Phase.CANCELLED,
            Trigger.GUEST_DIED: Phase.GUEST_LOST,
            Trigger.POLICY_CHANGED: Phase.PREFLIGHT,
        },
        Phase.PREPARING: {
            Trigger.DESTINATION_PREPARED: Phase.PRECOPY,
            Trigger.POLICY_CHANGED: Phase.PREPARING,
            **_UNDO,
        },
        Phase.PRECOPY: {
            Trigger.SWITCHOVER_REACHED: Phase.SWITCHOVER,
            Trigger.POSTCOPY_CHOSEN: Phase.PRECOPY,
            Trigger.POLICY_CHANGED: Phase.PRECOPY,
            Trigger.SWITCHOVER_FORCED: Phase.PRECOPY,
            **_UNDO,
        },
        Phase.SWITCHOVER: {
            Trigger.TRANSFER_COMPLETED: Phase.GRANTED,
            # postcopy only: the source can no longer resume and the destination does not answer
            Trigger.OUTCOME_UNKNOWN: Phase.NEEDS_OPERATOR,
            **_UNDO,
        },
        Phase.GRANTED: {
            Trigger.DESTINATION_RAN: Phase.COMPLETING,
            Trigger.DESTINATION_REFUSED: Phase.ROLLING_BACK,
            Trigger.OUTCOME_UNKNOWN: Phase.NEEDS_OPERATOR,
            Trigger.GUEST_DIED: Phase.GUEST_LOST,
        },
        Phase.NEEDS_OPERATOR: {
            Trigger.TRANSFER_COMPLETED: Phase.GRANTED,
            Trigger.DESTINATION_RAN: Phase.COMPLETING,
            Trigger.DESTINATION_REFUSED: Phase.ROLLING_BACK,
            Trigger.GUEST_DIED: Phase.GUEST_LOST,
            Trigger.SOURCE_KEPT: Phase.ROLLED_BACK,
            Trigger.CANCEL_COMPLETED: Phase.CANCELLED,
        },
        Phase.COMPLETING: {
            Trigger.SOURCE_RELEASED: Phase.SUCCEEDED,
            Trigger.GUEST_DIED: Phase.GUEST_LOST,
        },
        Phase.ROLLING_BACK: {
            Trigger.SOURCE_KEPT: Phase.ROLLED_BACK,
            Trigger.CANCEL_COMPLETED: Phase.CANCELLED,
            Trigger.GUEST_DIED: Phase.GUEST_LOST,
            Trigger.OUTCOME_UNKNOWN: Phase.NEEDS_OPERATOR,
            # the source died while it was being resumed, and the destination holds all of the guest
            Trigger.TRANSFER_COMPLETED: Phase.GRANTED,
        },
        Phase.SUCCEEDED: {},
        Phase.ROLLED_BACK: {},
        Phase.CANCELLED: {},
        Phase.REFUSED: {},
        Phase.GUEST_LOST: {},
    }
)


class Instruction(StrEnum):
    """What is to be done in a phase; each ends in exactly one event."""

    CHECK_PREFLIGHT = "check_preflight"
    PREPARE_DESTINATION = "prepare_destination"
    RUN_PRECOPY = "run_precopy"
    COMPLETE_SWITCHOVER = "complete_switchover"
    OBTAIN_ANSWER = "obtain_answer"
    KEEP_ASKING = "keep_asking"
    RELEASE_SOURCE = "release_source"
    ROLL_BACK = "roll_back"


INSTRUCTION_OF: Final[dict[Phase, Instruction]] = {
    Phase.PREFLIGHT: Instruction.CHECK_PREFLIGHT,
    Phase.PREPARING: Instruction.PREPARE_DESTINATION,
    Phase.PRECOPY: Instruction.RUN_PRECOPY,
    Phase.SWITCHOVER: Instruction.COMPLETE_SWITCHOVER,
    Phase.GRANTED: Instruction.OBTAIN_ANSWER,
    Phase.NEEDS_OPERATOR: Instruction.KEEP_ASKING,
    Phase.COMPLETING: Instruction.RELEASE_SOURCE,
    Phase.ROLLING_BACK: Instruction.ROLL_BACK,
}
"""The work of each phase; pending and the terminal ones have none."""

TERMINAL: Final = frozenset(phase for phase, row in TRANSITIONS.items() if not row)

PAST_NO_RETURN: Final = frozenset({Phase.GRANTED, Phase.COMPLETING, Phase.SUCCEEDED})
"""The destination may run, or has run: no cancel, no resume of the source."""


class IllegalTransition(Exception):
    """An event that has no row in this phase; the phase is unchanged."""

    def __init__(self, phase: StrEnum, trigger: StrEnum) -> None:
        super().__init__(f"{trigger.value} has no place in phase {phase.value}")
        self.phase = phase
        self.trigger = trigger


def next_phase(phase: Phase, trigger: Trigger) -> Phase:
    """The phase that follows; raises IllegalTransition where the table has no row."""
    try:
        return TRANSITIONS[phase][trigger]
    except KeyError:
        raise IllegalTransition(phase, trigger) from None
