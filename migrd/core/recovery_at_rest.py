"""Recovery of VMs that no migration is at work on, and of processes in no journal; see
`core.recovery`."""

from migrd.core.recovery_action import SECOND_COPY, Action, Deed, Proof
from migrd.core.recovery_facts import AtRest, Fate, Guest, Known, Stray


def of_vm(found: AtRest) -> Action:
    """The action for a VM of the journal."""
    if not found.here:
        return Action(Deed.SHOW, "it has moved away")
    match found.fate:
        case Fate.NEVER:
            return Action(Deed.SHOW, "it is stopped")
        case Fate.DEAD:
            return Action(Deed.SHOW, "its process died while nobody watched")
        case Fate.EARLIER_BOOT:
            return Action(Deed.SHOW, "its process ended with an earlier boot of this host")
        case Fate.NOT_FOUND:
            text = "its process is not to be found; it is not taken for dead"
            return Action(Deed.LEAVE_ALONE, text, alarm=True)
        case _:
            return Action(Deed.ADOPT, "its process lives")


def of_stray(found: Stray) -> Action:
    """The action for a process that no journal names."""
    own = found.own
    if own.fate.is_dead:
        return Action(Deed.NOTHING_LEFT, "a process that has ended")
    match found.known:
        case Known.RUNS_ELSEHOW:
            text = "a second process of a VM that runs here"
            return Action(Deed.LEAVE_ALONE, text, settles=SECOND_COPY, alarm=True)
        case Known.MIGRATING:
            text = "a process of a VM in a migration, and not that of the migration"
            return Action(Deed.LEAVE_ALONE, text, settles=SECOND_COPY, alarm=True)
        case Known.DEPARTED:
            return _of_departed(found)
        case _:
            return _of_one_here(found)


def _of_departed(found: Stray) -> Action:
    gave_away = found.own.guest is Guest.GAVE_AWAY
    if found.managed and gave_away and found.released:
        text = "the process that the guest left from; the guest was seen to run elsewhere"
        return Action(Deed.REAP, text, proof=Proof.RELEASED)
    if found.managed or gave_away:
        text = "an old process of a VM that has moved away; end it by hand"
        return Action(Deed.LEAVE_ALONE, text, settles=SECOND_COPY, alarm=True)
    text = "others launched it, and it may run a VM that has moved away: no copy is let in here"
    return Action(Deed.ADOPT, text, alarm=True)


def _of_one_here(found: Stray) -> Action:
    """A VM of that name is here without a process, or none is known."""
    if found.managed and found.own.guest is Guest.AWAITED:
        text = "waits for a guest of which no journal knows: kept, end it with migrd stop"
        return Action(Deed.ADOPT, text, alarm=True)
    if found.managed and found.own.guest is Guest.GAVE_AWAY:
        text = "its guest has left, and where to is not in this journal: kept"
        return Action(Deed.ADOPT, text, alarm=True)
    return Action(Deed.ADOPT, "a VM found running")
