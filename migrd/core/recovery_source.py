"""Recovery of a migration away from this host; see `core.recovery`.

The step is always that of the journalled phase. What is decided here is what it must come to, and
whether a person has to be told.
"""

from dataclasses import replace

from migrd.core.handover import DestinationPhase
from migrd.core.migration import Mode
from migrd.core.phases import INSTRUCTION_OF, TERMINAL, Phase
from migrd.core.recovery_action import (
    FENCE_OR_WAIT,
    FIND_PROCESS,
    LEFT_BY_POSTCOPY,
    LOOK_THERE,
    OLD_COPY,
    Action,
    Deed,
)
from migrd.core.recovery_facts import (
    DiedStarting,
    Fate,
    Granted,
    Guest,
    NoWord,
    Record,
    SourceFound,
    Transfer,
)

_BACK = frozenset({Record.JOURNALS, Record.MINE_STARTED, Record.TAKEN_BACK})
"""Records by which a guest that was given back by a person's word may run here."""
_MAY_BE_GIVEN = frozenset({Record.JOURNALS, Record.MINE_STARTED})
_MAY_START_THERE = frozenset(
    {Record.JOURNALS, Record.MINE_STARTED, Record.THEIRS, Record.THEIRS_STARTED}
)
_HAS_IT = frozenset({DestinationPhase.LOADED, DestinationPhase.OWNED, DestinationPhase.STARTING})
_REFUSED = DestinationPhase.REFUSED
_RUNS = DestinationPhase.RUNNING


def of_source(found: SourceFound) -> Action:
    """The action for a migration away."""
    if found.phase in TERMINAL:
        return Action(Deed.SHOW, "it has ended, and the journal says how")
    action = _granted(found) if _is_granted(found) else _not_granted(found)
    if found.own.guest is Guest.RUNS and _is_granted(found):
        why = f"{action.why}; the guest RUNS HERE after it was granted away"
        return replace(action, why=why, alarm=True, expects=None)
    return action


def _is_granted(found: SourceFound) -> bool:
    is_past = found.phase in (Phase.GRANTED, Phase.COMPLETING)
    return is_past or found.granted in (Granted.YES, Granted.YES_SOURCE_DIED)


def _go_on(found: SourceFound, why: str, expects: Phase | None = None) -> Action:
    step = INSTRUCTION_OF.get(found.phase)
    goes_back = found.phase in (Phase.ROLLING_BACK, Phase.NEEDS_OPERATOR)
    is_ours = found.granted is Granted.NO or _is_back(found)
    may_run = goes_back and is_ours and not _is_granted(found) and not found.own.fate.is_dead
    return Action(Deed.GO_ON, why, step, expects, may_run=may_run)


def _is_back(found: SourceFound) -> bool:
    return found.granted is Granted.FENCED and found.record in _BACK


def _ask(found: SourceFound, why: str, settles: str) -> Action:
    """A person is needed, now or very soon. The step of the phase is begun all the same."""
    action = _go_on(found, why)
    if found.phase is Phase.NEEDS_OPERATOR:
        return replace(action, deed=Deed.CALL_OPERATOR, settles=settles)
    return replace(action, expects=Phase.NEEDS_OPERATOR, settles=settles)


# Granted ------------------------------------------------------------------------------------------


def _granted(found: SourceFound) -> Action:
    if found.phase is Phase.COMPLETING:
        if found.mode is Mode.PRECOPY:
            text = "the guest has run on the destination: this copy is ended"
            return _go_on(found, text, Phase.SUCCEEDED)
        return _go_on(found, "the guest runs on the destination, the rest of its memory follows")
    if found.record is Record.TAKEN_BACK and found.there is not _RUNS:
        text = "granted, and the arbiter has given it back: it never starts there"
        sure = found.own.fate is Fate.ANSWERS and found.granted is Granted.YES
        return _go_on(found, text, found.aim.end if sure else None)
    match found.there:
        case DestinationPhase.RUNNING:
            end = Phase.SUCCEEDED if found.mode is Mode.PRECOPY else None
            return _go_on(found, "granted, and the destination says that the guest runs there", end)
        case DestinationPhase.REFUSED:
            return _refused_after_grant(found)
        case DestinationPhase.LOADED | DestinationPhase.OWNED | DestinationPhase.STARTING:
            text = f"granted; the destination is {found.there.value}: it is told again"
            return _go_on(found, text, Phase.SUCCEEDED if _is_sure_to_start(found) else None)
        case DiedStarting.DIED_STARTING:
            text = "granted; the process on the destination died while it was being started"
            return _ask(found, text, LOOK_THERE)
        case _:
            text = f"granted, and the destination is {found.there.value}: the guest may run there"
            if found.phase is Phase.NEEDS_OPERATOR:
                return _ask(found, text, FENCE_OR_WAIT)
            return _go_on(found, text)


def _is_sure_to_start(found: SourceFound) -> bool:
    if found.mode is not Mode.PRECOPY:
        return False
    if found.phase is Phase.NEEDS_OPERATOR:  # with an arbiter it is taken back as soon as may be
        return found.record in (Record.JOURNALS, Record.THEIRS_STARTED)
    return found.record in _MAY_START_THERE


def _refused_after_grant(found: SourceFound) -> Action:
    text = "granted, and durably refused: the guest never runs there"
    own = found.own
    if found.granted is Granted.YES_SOURCE_DIED or own.fate.is_dead:
        return _go_on(found, f"{text}; this copy is dead too", Phase.GUEST_LOST)
    if own.fate is Fate.NOT_FOUND:
        return replace(_ask(found, text, FIND_PROCESS), expects=Phase.NEEDS_OPERATOR)
    if own.fate is not Fate.ANSWERS:
        return _go_on(found, text)
    if own.transfer is Transfer.POSTCOPY:
        lost = Phase.GUEST_LOST if found.mode is Mode.POSTCOPY else None
        return _go_on(found, text, lost)
    return _go_on(found, text, found.aim.end if found.mode is Mode.PRECOPY else None)


# Not granted --------------------------------------------------------------------------------------


def _not_granted(found: SourceFound) -> Action:
    phase, own = found.phase, found.own
    if phase is Phase.PENDING:
        return _go_on(found, "it waits for a slot")
    if phase in (Phase.PREFLIGHT, Phase.PREPARING):
        end = Phase.GUEST_LOST if phase is Phase.PREPARING and own.fate.is_dead else None
        return _go_on(found, "nothing has moved yet", end)
    if own.fate.is_dead:
        return _source_dead(found)
    if own.fate in (Fate.NOT_FOUND, Fate.NEVER):
        text = "its process is not to be found here, and whether it lives is not known"
        return _ask(found, text, FIND_PROCESS)
    if own.fate is Fate.SILENT:
        text = "its process lives and does not answer yet"
        if phase is Phase.NEEDS_OPERATOR:
            return _ask(found, text, FIND_PROCESS)
        return _go_on(found, text)
    if found.granted is Granted.FENCED and not _is_back(found):
        text = "given back by a person's word: the arbiter's record has to say so first"
        return _go_on(found, text)
    if found.mode is Mode.POSTCOPY:
        return _in_postcopy(found)
    return _in_precopy(found)


def _source_dead(found: SourceFound) -> Action:
    """No copy runs here any more. Nobody watched it stand still, so it may have run on after the
    destination had its copy."""
    if found.there is _REFUSED or (
        found.there is NoWord.KNOWS_NOTHING and found.phase is Phase.ROLLING_BACK
    ):
        text = "its process is dead, and the destination has no whole copy"
        return _go_on(found, text, Phase.GUEST_LOST)
    if found.there in _HAS_IT or found.phase is Phase.NEEDS_OPERATOR:
        text = "its process died unwatched, and the destination may have a whole copy, perhaps old"
        return _ask(found, text, OLD_COPY)
    return _go_on(found, "its process is dead; the destination is asked for what it has")


def _in_postcopy(found: SourceFound) -> Action:
    own, there = found.own, found.there
    if own.transfer is Transfer.POSTCOPY and there is _REFUSED:
        text = "the guest had left by postcopy, and the destination lost it"
        return _go_on(found, text, Phase.GUEST_LOST)
    if own.transfer is Transfer.POSTCOPY and there is DestinationPhase.LOADED:
        return _go_on(found, "the guest has left by postcopy, and is there", Phase.SUCCEEDED)
    text = f"on its way by postcopy: {own}, destination {there.value}"
    if found.phase is Phase.NEEDS_OPERATOR:
        return _ask(found, text, LEFT_BY_POSTCOPY)
    return _go_on(found, text)


def _in_precopy(found: SourceFound) -> Action:
    own, there, phase = found.own, found.there, found.phase
    if phase in (Phase.ROLLING_BACK, Phase.NEEDS_OPERATOR):
        text = f"never granted: brought back here ({own})"
        sure = own.guest is not Guest.UNKNOWN and own.transfer is not Transfer.UNKNOWN
        action = _go_on(found, text, found.aim.end if sure else None)
        if phase is Phase.NEEDS_OPERATOR and not sure:
            return replace(action, deed=Deed.CALL_OPERATOR, settles=FIND_PROCESS)
        return action
    broken = own.transfer is Transfer.BROKEN
    gone = phase is Phase.SWITCHOVER and own.transfer is Transfer.NONE
    if broken or gone or there is _REFUSED:
        why = "the destination refused" if there is _REFUSED else "its transfer is over, and failed"
        known = own.transfer is not Transfer.UNKNOWN and own.transfer is not Transfer.POSTCOPY
        return _go_on(found, why, Phase.ROLLED_BACK if known else None)
    if own.transfer is Transfer.OVER and there is DestinationPhase.LOADED:
        sure = found.record in _MAY_BE_GIVEN
        text = "the destination has all of it, nothing is granted yet"
        return _go_on(found, text, Phase.SUCCEEDED if sure else None)
    return _go_on(found, f"{own}; destination {there.value}")
