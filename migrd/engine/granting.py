"""GRANT: one asking, and what its answer comes to."""

import asyncio
from typing import Final

from migrd.core.handover import DestinationPhase
from migrd.core.migration import Cause, MigrationEvent
from migrd.core.phases import Trigger
from migrd.engine.outgoing import Outgoing
from migrd.engine.ports import DestinationView
from migrd.errors import PeerError, PeerRefused
from migrd.failpoints import around

FIRST_RETRY_S: Final = 0.02
LONGEST_RETRY_S: Final = 2.0


async def ask_until_answered(m: Outgoing, *, died_is_unknown: bool = True) -> MigrationEvent:
    """GRANT again and again, until the answer settles it."""
    pause_s = FIRST_RETRY_S
    while True:
        event = await grant_once(m, died_is_unknown)
        if event is not None:
            return event
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, LONGEST_RETRY_S)


async def grant_once(m: Outgoing, died_is_unknown: bool) -> MigrationEvent | None:
    """One GRANT; None when the answer settles nothing."""
    try:
        with around("source.grant"):
            view = await m.peer.grant(m.id, m.state.epoch, run_guest=m.state.run_guest)
    except PeerError as exc:
        note_silence(m, exc)
        return None
    return settled(m, view, died_is_unknown)


async def view_once(m: Outgoing, died_is_unknown: bool) -> MigrationEvent | None:
    """The same question without GRANT: has it been settled already?"""
    try:
        view = await m.peer.view(m.id)
    except PeerError as exc:
        note_silence(m, exc)
        return None
    return settled(m, view, died_is_unknown)


def note_silence(m: Outgoing, exc: PeerError) -> None:
    """An error is no answer."""
    if isinstance(exc, PeerRefused):
        m.trouble("DestinationUnclear", f"{m.peer.name}: {exc.message}")
    else:
        m.trouble("DestinationUnreachable", exc.message)


def settled(m: Outgoing, view: DestinationView, died_is_unknown: bool) -> MigrationEvent | None:
    """What the destination's word comes to; None when it settles nothing."""
    m.settle("DestinationUnreachable")
    m.settle("DestinationUnclear")
    now_s = m.world.clock.monotonic_s()
    if view.phase is DestinationPhase.RUNNING:
        return m.event(Trigger.DESTINATION_RAN, resumed_at_s=now_s)
    if view.phase is DestinationPhase.REFUSED:
        cause = Cause("destination_refused", f"{m.peer.name} refused: {view.reason}")
        trigger = Trigger.GUEST_DIED if m.state.source_died else Trigger.DESTINATION_REFUSED
        return m.event(trigger, cause=cause)
    if view.vmm_died and died_is_unknown:
        cause = Cause(
            "destination_died_starting",
            f"the VMM on {m.peer.name} died while it was being started ({view.reason}): nobody "
            "can know whether the guest ran there; the copy here is kept, stopped",
        )
        return m.event(Trigger.OUTCOME_UNKNOWN, cause=cause)
    return None
