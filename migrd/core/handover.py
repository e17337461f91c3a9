"""The handover: a guest changes hosts and never runs twice, whatever is lost, late or repeated.

Two journals, no third party. The destination QEMU waits with `-S`, so only an explicit `cont` runs
it.

    source                                   destination
    seen: own QEMU cannot resume itself      seen: own QEMU has the guest, paused   (loaded)
    journal GRANTED  (point of no return)
    ----------------- GRANT ---------------> journal OWNED, STARTING
                                             cont; seen running
                                             journal RUNNING
    <---------------- OWNED ----------------
    journal DESTINATION_RAN; quit QEMU

Rules
1. GRANT is sent only when granted is durable; after that the source resumes on REFUSED alone (or
   on an operator's proof). A lost answer is asked again; it is never an answer.
2. A destination that never journalled STARTING may journal REFUSED; that is durable and final.
   After STARTING it may not refuse: whether the guest ran is decided by looking at its QEMU. When
   that is dead, an operator decides at the source, whose discard takes the guest back (TAKEN_BACK).
3. Every message is idempotent by migration id and epoch. An epoch grows by one with each migration
   of a VM; a message of an older epoch is refused and changes nothing.
4. The source may not be granted away while its QEMU could still resume by itself: in precopy that
   is over when it is seen `completed`; in postcopy when the destination is seen in postcopy and
   after that the source's monitor still says so (QEMU's start of postcopy holds the lock the
   monitor needs, so an answer after the destination has arrived proves that it can no longer fail
   and resume).
5. A loaded destination never refuses by time-out: its copy may be the last one (in postcopy the
   source cannot take the guest back, in precopy the source's host may be gone). It asks on, and
   says that an operator is needed.

    preparing > receiving > loaded > owned > starting > running
        |           |          |       |
        +-----------+----------+-------+--> refused
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from migrd.core.facts import TransferAddress
from migrd.core.migration import Mode
from migrd.core.phases import IllegalTransition


class DestinationPhase(StrEnum):
    """Where the destination's side of a migration stands."""

    PREPARING = "preparing"
    RECEIVING = "receiving"
    LOADED = "loaded"
    OWNED = "owned"
    STARTING = "starting"
    RUNNING = "running"
    REFUSED = "refused"


class DestinationTrigger(StrEnum):
    """What moves the destination's side."""

    INCOMING_READY = "incoming_ready"
    GUEST_LOADED = "guest_loaded"
    GRANT_RECEIVED = "grant_received"
    START_ORDERED = "start_ordered"
    GUEST_RAN = "guest_ran"
    REFUSAL_DECIDED = "refusal_decided"
    TAKEN_BACK = "taken_back"


_MAY_REFUSE: Final = {DestinationTrigger.REFUSAL_DECIDED: DestinationPhase.REFUSED}

DESTINATION_TRANSITIONS: Final[
    Mapping[DestinationPhase, Mapping[DestinationTrigger, DestinationPhase]]
] = MappingProxyType(
    {
        DestinationPhase.PREPARING: {
            DestinationTrigger.INCOMING_READY: DestinationPhase.RECEIVING,
            **_MAY_REFUSE,
        },
        DestinationPhase.RECEIVING: {
            DestinationTrigger.GUEST_LOADED: DestinationPhase.LOADED,
            **_MAY_REFUSE,
        },
        DestinationPhase.LOADED: {
            DestinationTrigger.GRANT_RECEIVED: DestinationPhase.OWNED,
            **_MAY_REFUSE,
        },
        DestinationPhase.OWNED: {
            DestinationTrigger.START_ORDERED: DestinationPhase.STARTING,
            **_MAY_REFUSE,
        },
        DestinationPhase.STARTING: {
            DestinationTrigger.GUEST_RAN: DestinationPhase.RUNNING,
            # its QEMU is proven dead, and an operator has given the guest back to the source
            DestinationTrigger.TAKEN_BACK: DestinationPhase.REFUSED,
        },
        DestinationPhase.RUNNING: {},
        DestinationPhase.REFUSED: {},
    }
)


@dataclass(frozen=True)
class DestinationEvent:
    """Something that happened on the destination's side."""

    trigger: DestinationTrigger
    wall_s: float
    monotonic_s: float
    address: TransferAddress | None = None
    mode: Mode | None = None
    """With GUEST_LOADED."""
    run_guest: bool | None = None
    """With GRANT_RECEIVED."""
    reason: str | None = None
    """With REFUSAL_DECIDED."""


@dataclass(frozen=True)
class DestinationState:
    """The destination's side of one migration."""

    id: str
    epoch: int
    phase: DestinationPhase = DestinationPhase.PREPARING
    address: TransferAddress | None = None
    mode: Mode = Mode.PRECOPY
    run_guest: bool = True
    reason: str | None = None

    @property
    def may_refuse(self) -> bool:
        return DestinationTrigger.REFUSAL_DECIDED in DESTINATION_TRANSITIONS[self.phase]

    @property
    def may_refuse_by_time_out(self) -> bool:
        """Rule 5: a copy that may be the last one is not thrown away on silence."""
        return self.phase in (DestinationPhase.PREPARING, DestinationPhase.RECEIVING)


def advance_destination(state: DestinationState, event: DestinationEvent) -> DestinationState:
    """Apply one event; raises IllegalTransition, and changes nothing, where it has no place."""
    try:
        phase = DESTINATION_TRANSITIONS[state.phase][event.trigger]
    except KeyError:
        raise IllegalTransition(state.phase, event.trigger) from None
    return replace(
        state,
        phase=phase,
        address=event.address or state.address,
        mode=event.mode or state.mode,
        run_guest=state.run_guest if event.run_guest is None else event.run_guest,
        reason=event.reason or state.reason,
    )


def fold_destination(
    state: DestinationState, events: Sequence[DestinationEvent]
) -> DestinationState:
    """Replay journalled events."""
    for event in events:
        state = advance_destination(state, event)
    return state
