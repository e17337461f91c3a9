"""Which migrations may be forgotten, so that the journal does not grow for ever.

Never: one that has not ended (as the phase tables say, nothing else), and never the newest of a VM
on either side: its other side may still ask how it ended, and refusing or having run the guest is
an answer that only this journal can give.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from migrd.core.handover import (
    DESTINATION_TRANSITIONS,
    DestinationEvent,
    DestinationState,
    fold_destination,
)
from migrd.core.migration import MigrationEvent, begin, fold
from migrd.core.phases import IllegalTransition
from migrd.engine.ports import StoredIncoming, StoredRequest
from migrd.journal.store import Role

_DAY_S: Final = 86_400.0


@dataclass(frozen=True)
class Retention:
    """How much of the past is kept."""

    max_age_s: float = 90 * _DAY_S
    """Ended migrations older than this are forgotten."""
    max_ended: int = 2000
    """Of the younger ones, the newest are kept, up to this number."""


@dataclass(frozen=True)
class Past:
    """One migration, as far as retention is concerned."""

    role: Role
    id: str
    vm: str
    epoch: int
    ended_wall_s: float | None
    """None: it has not ended."""


def end_of_outgoing(stored: StoredRequest, events: Sequence[MigrationEvent]) -> float | None:
    """When it ended (wall clock); None while it has not."""
    state = begin(stored.id, stored.request, stored.epoch, stored.created_wall_s, 0.0)
    try:
        state = fold(state, events)
    except IllegalTransition:
        return None  # not understood: certainly not to be forgotten
    return events[-1].wall_s if events and state.is_terminal else None


def end_of_incoming(stored: StoredIncoming, events: Sequence[DestinationEvent]) -> float | None:
    try:
        state = fold_destination(DestinationState(stored.id, stored.epoch), events)
    except IllegalTransition:
        return None
    return events[-1].wall_s if events and not DESTINATION_TRANSITIONS[state.phase] else None


def to_forget(
    past: Sequence[Past], now_wall_s: float, retention: Retention
) -> list[tuple[Role, str]]:
    """Which of all migrations to remove."""
    newest: dict[tuple[Role, str], Past] = {}
    for one in past:
        best = newest.get((one.role, one.vm))
        if best is None or (one.epoch, one.ended_wall_s or 0) >= (
            best.epoch,
            best.ended_wall_s or 0,
        ):
            newest[one.role, one.vm] = one
    kept = {(one.role, one.id) for one in newest.values()}
    ended = sorted(
        ((one.ended_wall_s, one) for one in past if one.ended_wall_s is not None),
        key=lambda pair: pair[0],
        reverse=True,
    )
    return [
        (one.role, one.id)
        for rank, (ended_wall_s, one) in enumerate(ended)
        if (one.role, one.id) not in kept
        and (rank >= retention.max_ended or now_wall_s - ended_wall_s > retention.max_age_s)
    ]
