"""What must hold in every reachable state: the invariants of the handover, on the truth itself."""

from __future__ import annotations

from tests.model.embedded import State

ALIVE = frozenset({"run", "frozen", "sending", "done"})


def violation(state: State) -> str | None:
    """The first invariant that is broken here, in words; None: all hold."""
    if state.source == "run" and state.copy == "run":
        return "I1: the guest runs twice"
    if state.ran_there and state.source == "run" and not state.overruled:
        return "I4: the source runs after the destination ran"
    if state.copy == "run" and state.stale:
        return "I4: the destination runs a copy older than the guest"
    if not _has_copy(state) and not state.died:
        return "I2: no copy is left, and nobody died"
    return _false_answer(state)


def _has_copy(state: State) -> bool:
    return state.source in ALIVE or state.copy in ("load", "run")


def _false_answer(state: State) -> str | None:
    match state.phase:
        case "succeeded" if not state.ran_there:
            return "I3: succeeded, and the destination never ran"
        case "succeeded" if state.source == "run":
            return "I3: succeeded, and the source runs"
        case "rolled_back" | "cancelled" if state.ran_there and not state.overruled:
            return f"I3: {state.phase}, and the destination ran"
        case "guest_lost" if state.copy == "run" or state.source == "run":
            return "I3: guest_lost, and it runs"
        case "guest_lost" if state.source in ALIVE:
            return "I3: guest_lost, and the source has it"
    return None
