"""Recovery of a migration to this host; see `core.recovery`."""

from dataclasses import replace
from typing import Final

from migrd.core.handover import DestinationPhase, DestinationState
from migrd.core.migration import Mode
from migrd.core.phases import TERMINAL, Phase
from migrd.core.recovery_action import (
    FIND_PROCESS,
    LOOK_THERE,
    SECOND_COPY,
    SOURCE_JOURNAL,
    Action,
    Deed,
    DestinationStep,
    Proof,
)
from migrd.core.recovery_facts import (
    DestinationFound,
    Fate,
    Guest,
    NoWord,
    Record,
    Transfer,
)

_STEPS: Final = {
    DestinationPhase.PREPARING: DestinationStep.PREPARE,
    DestinationPhase.RECEIVING: DestinationStep.RECEIVE,
    DestinationPhase.LOADED: DestinationStep.AWAIT_GRANT,
    DestinationPhase.OWNED: DestinationStep.START_GUEST,
    DestinationPhase.STARTING: DestinationStep.START_GUEST,
    DestinationPhase.RUNNING: DestinationStep.AWAIT_REST,
}
_ENDED_AT_SOURCE: Final = TERMINAL - {Phase.SUCCEEDED}
"""The guest stayed there, or is lost; it never comes here by this migration."""
_PAST_GRANT: Final = frozenset({Phase.COMPLETING, Phase.SUCCEEDED})
_REFUSED: Final = DestinationPhase.REFUSED


def of_destination(found: DestinationFound) -> Action:
    """The action for a migration to this host."""
    match found.phase:
        case DestinationPhase.REFUSED:
            return _refused(found)
        case DestinationPhase.RUNNING:
            return _running(found)
        case DestinationPhase.OWNED | DestinationPhase.STARTING:
            return _owned(found)
        case _:
            return _not_granted(found)


def _go_on(found: DestinationFound, why: str, expects: DestinationPhase | None = None) -> Action:
    return Action(Deed.GO_ON, why, _STEPS[found.phase], expects)


def _refused(found: DestinationFound) -> Action:
    if found.own.fate in (Fate.ANSWERS, Fate.SILENT):
        text = "durably refused: its copy is dead data, and is ended"
        runs = found.own.guest is Guest.RUNS
        if runs:
            text += "; the guest RUNS in it, started by nobody here"
        return Action(Deed.REAP, text, proof=Proof.REFUSED, alarm=runs)
    return Action(Deed.NOTHING_LEFT, "durably refused, and nothing of it lives")


def _running(found: DestinationFound) -> Action:
    if found.mode is Mode.PRECOPY:
        return Action(Deed.SHOW, "the guest came here, and the VM is this host's")
    if found.own.fate is Fate.NOT_FOUND:
        text = "the guest runs here by postcopy, and its process is not to be found"
        action = _go_on(found, text)
        return replace(action, deed=Deed.CALL_OPERATOR, settles=FIND_PROCESS, alarm=True)
    return _go_on(found, "the guest runs here by postcopy, the rest of its memory follows")


def _owned(found: DestinationFound) -> Action:
    own, record = found.own, found.record
    starting = found.phase is DestinationPhase.STARTING
    if starting and record.is_theirs and own.fate.is_dead:
        text = "its process died while it was started, and the arbiter has given the guest back"
        return _go_on(found, text)  # over here; the source says so when it next asks for the VM
    if starting and record.is_theirs:
        text = "starting, and the arbiter has given the guest to another host since: nothing is run"
        return Action(Deed.LEAVE_ALONE, text, settles=SECOND_COPY, alarm=True)
    if own.fate.is_dead and starting:
        text = "its process died while it was being started: nobody can know whether the guest ran"
        return replace(_go_on(found, text), deed=Deed.CALL_OPERATOR, settles=LOOK_THERE, alarm=True)
    if own.fate in (Fate.NOT_FOUND, Fate.NEVER):
        text = f"{found.phase.value}, and its process is not to be found"
        action = _go_on(found, text)
        return replace(action, deed=Deed.CALL_OPERATOR, settles=FIND_PROCESS, alarm=True)
    if not starting and (own.fate.is_dead or record.is_theirs or record is Record.ABSENT):
        text = f"owned, and not started: {own}, arbiter {record.value}"
        is_said = own.fate.is_dead or record is not Record.ABSENT  # else its source has to say it
        is_said = is_said and record not in (Record.JOURNALS, Record.UNREACHABLE)
        return _go_on(found, text, _REFUSED if is_said else None)
    # starting is journalled only after the record was read as started here
    may_run = starting or record in (Record.JOURNALS, Record.MINE, Record.MINE_STARTED)
    sure = may_run and own.fate is Fate.ANSWERS and own.guest is not Guest.UNKNOWN
    sure = sure and own.transfer in (Transfer.OVER, Transfer.POSTCOPY)
    text = f"{found.phase.value}: the guest is run here ({own})"
    action = _go_on(found, text, DestinationPhase.RUNNING if sure else None)
    return replace(action, may_run=may_run)


def _not_granted(found: DestinationFound) -> Action:
    """Nothing here may run the guest, and as long as nothing is proven nothing is thrown away."""
    own, source = found.own, found.source
    if own.guest is Guest.RUNS:
        text = f"{found.phase.value}, and the guest RUNS in its process, started by nobody here"
        action = _go_on(found, text)
        return replace(action, deed=Deed.CALL_OPERATOR, settles=SECOND_COPY, alarm=True)
    if source in _ENDED_AT_SOURCE and found.record in (Record.MINE, Record.MINE_STARTED):
        text = f"it ended as {source.value} at its source, and the arbiter names this host"
        return replace(_go_on(found, text), alarm=True)
    if source in _ENDED_AT_SOURCE:
        text = f"it ended as {source.value} at its source, which never granted it"
        return Action(
            Deed.REAP, text, _STEPS[found.phase], expects=_REFUSED, proof=Proof.SOURCE_ENDED
        )
    if source in _PAST_GRANT:
        text = f"the source says {source.value}, and no grant is in this journal"
        action = _go_on(found, text)
        return replace(action, deed=Deed.CALL_OPERATOR, settles=SOURCE_JOURNAL, alarm=True)
    if own.fate.is_dead and found.phase is not DestinationPhase.PREPARING:
        return _go_on(found, "its process is dead, and never ran the guest", _REFUSED)
    if source is NoWord.KNOWS_NOTHING:
        return _unknown_at_source(found)
    if found.phase is DestinationPhase.RECEIVING and own.transfer is Transfer.BROKEN:
        return _go_on(found, "the stream broke", _REFUSED)
    return _go_on(found, f"{found.phase.value}: {own}; source {source.value}")


def _unknown_at_source(found: DestinationFound) -> Action:
    text = "the source knows nothing of this migration"
    state = DestinationState("", 0, found.phase)
    if state.may_refuse_by_time_out:
        return _go_on(found, f"{text}: refused when it still does in a while", _REFUSED)
    text += ", and this copy is whole: it is kept"
    action = _go_on(found, text)
    return replace(action, deed=Deed.CALL_OPERATOR, settles=SOURCE_JOURNAL, alarm=True)
