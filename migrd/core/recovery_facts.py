"""What a daemon that has just started can find out about what it left behind; nothing is decided.

    SourceFound       a migration away, as this host journalled it, and what is said of it now
    DestinationFound  one to this host, the same
    AtRest            a VM of the journal that no migration is at work on
    Stray             a process that no journal names

Everything that may be unknown is a value of its own: silence is never read as an answer, and what
was not found is never read as dead. The engine asks with short deadlines (`engine.recovery_facts`);
what has not answered by then is unknown.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from migrd.core.facts import QemuStatus, RunState, TransferSample
from migrd.core.handover import DestinationPhase
from migrd.core.migration import Mode
from migrd.core.phases import Phase


class Fate(StrEnum):
    """What became of a process of this host."""

    NEVER = "never_launched"
    ANSWERS = "lives_and_answers"
    SILENT = "lives_and_is_silent"
    DEAD = "proven_dead"
    EARLIER_BOOT = "of_an_earlier_boot"
    """As good as proven dead: no process outlives its host's boot."""
    NOT_FOUND = "not_found"
    """Of this boot, and nowhere to be seen: it may live."""

    @property
    def is_dead(self) -> bool:
        """On proof."""
        return self in (Fate.DEAD, Fate.EARLIER_BOOT)


class Transfer(StrEnum):
    """How far a process's transfer is, as far as recovery needs to tell apart."""

    NONE = "none"
    """Of this migration there is none, or not yet."""
    MOVING = "moving"
    WAITING = "waiting_for_migrate_continue"
    LEAVING = "leaving"
    """After migrate-continue: it may still fail, and then the source runs on by itself."""
    OVER = "over"
    """`completed`: the source cannot run on by itself; a destination has everything."""
    POSTCOPY = "postcopy"
    BROKEN = "broken"
    UNKNOWN = "unknown"


class Guest(StrEnum):
    """What the guest does in a process."""

    RUNS = "runs"
    STANDS = "stands"
    GAVE_AWAY = "given_away"
    """`postmigrate`: its migration to elsewhere is over."""
    AWAITED = "awaited"
    """`inmigrate`: no guest is in it yet."""
    ENDED_ITSELF = "ended_itself"
    """Shut down, panicked, suspended: only a guest that has run does that."""
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Own:
    """This host's process of a migration or VM."""

    fate: Fate
    transfer: Transfer = Transfer.UNKNOWN
    """Known only of one that answers."""
    guest: Guest = Guest.UNKNOWN

    def __str__(self) -> str:
        if self.fate is not Fate.ANSWERS:
            return self.fate.value
        return f"transfer {self.transfer.value}, guest {self.guest.value}"


class NoWord(StrEnum):
    """What the other side may say without saying where it stands."""

    SILENT = "silent"
    REFUSES = "will_not_say"
    KNOWS_NOTHING = "knows_nothing_of_it"


class DiedStarting(StrEnum):
    """What a destination says that is `starting` and whose process is proven dead."""

    DIED_STARTING = "died_starting"


SaidByDestination = DestinationPhase | DiedStarting | NoWord
SaidBySource = Phase | NoWord


class Record(StrEnum):
    """What the arbiter says about who may run the VM, for this migration's epoch."""

    JOURNALS = "journals_decide"
    """There is none, or it has no say in this migration (postcopy)."""
    UNREACHABLE = "unreachable"
    ABSENT = "none_of_this_migration"
    MINE = "this_host_not_started"
    MINE_STARTED = "this_host_started"
    TAKEN_BACK = "this_host_taken_back"
    """Newer than what the grant was decided on: no grant can take effect any more."""
    THEIRS = "other_host_not_started"
    THEIRS_STARTED = "other_host_started"

    @property
    def is_theirs(self) -> bool:
        return self in (Record.THEIRS, Record.THEIRS_STARTED)


class Aim(StrEnum):
    """Where the journal says that a migration is to end."""

    AWAY = "away"
    BACK = "back"
    BACK_BY_CANCEL = "back_by_cancel"

    @property
    def end(self) -> Phase:
        """The end of a migration whose guest stays."""
        return Phase.CANCELLED if self is Aim.BACK_BY_CANCEL else Phase.ROLLED_BACK


class Granted(StrEnum):
    """Whether GRANT may have been sent."""

    NO = "no"
    """Never, or durably refused since."""
    FENCED = "given_back_by_word"
    """Given back by a person's proof: the arbiter's record has to say so before the guest runs."""
    YES = "yes"
    YES_SOURCE_DIED = "yes_source_died"


@dataclass(frozen=True)
class SourceFound:
    """A migration away from this host."""

    phase: Phase
    mode: Mode
    aim: Aim
    granted: Granted
    own: Own
    there: SaidByDestination
    record: Record


@dataclass(frozen=True)
class DestinationFound:
    """A migration to this host."""

    phase: DestinationPhase
    mode: Mode
    own: Own
    source: SaidBySource
    record: Record


@dataclass(frozen=True)
class AtRest:
    """A VM of the journal."""

    here: bool
    """False: it has moved away."""
    fate: Fate


class Known(StrEnum):
    """What is known of the VM whose process turned up."""

    NOT_AT_ALL = "not_at_all"
    STOPPED = "here_without_a_process"
    RUNS_ELSEHOW = "here_with_another_process"
    DEPARTED = "departed"
    MIGRATING = "in_a_migration"


@dataclass(frozen=True)
class Stray:
    """A process of this host that no journal names."""

    known: Known
    managed: bool
    """Launched by migrd (else adopted: others launched it, and others end it)."""
    own: Own
    released: bool
    """This host's journal says that the VM was released: it runs, and was seen to run, elsewhere,
    and has not come back since."""


_TRANSFERS: Final = {
    QemuStatus.NONE: Transfer.NONE,
    QemuStatus.PRE_SWITCHOVER: Transfer.WAITING,
    QemuStatus.DEVICE: Transfer.LEAVING,
    QemuStatus.COMPLETED: Transfer.OVER,
    QemuStatus.CANCELLED: Transfer.BROKEN,
    QemuStatus.FAILED: Transfer.BROKEN,
    QemuStatus.SETUP: Transfer.MOVING,
    QemuStatus.ACTIVE: Transfer.MOVING,
    QemuStatus.WAIT_UNPLUG: Transfer.MOVING,
}
_GUESTS: Final = {
    RunState.RUNNING: Guest.RUNS,
    RunState.PAUSED: Guest.STANDS,
    RunState.PRELAUNCH: Guest.STANDS,
    RunState.FINISH_MIGRATE: Guest.STANDS,
    RunState.POSTMIGRATE: Guest.GAVE_AWAY,
    RunState.INMIGRATE: Guest.AWAITED,
    RunState.SHUTDOWN: Guest.ENDED_ITSELF,
    RunState.GUEST_PANICKED: Guest.ENDED_ITSELF,
    RunState.IO_ERROR: Guest.ENDED_ITSELF,
    RunState.SUSPENDED: Guest.ENDED_ITSELF,
    RunState.WATCHDOG: Guest.ENDED_ITSELF,
    RunState.INTERNAL_ERROR: Guest.ENDED_ITSELF,
}


def as_seen(sample: TransferSample, *, at_source: bool) -> Own:
    """What a process's own words come to. A status that we have not met is unknown, and so is one
    in the middle of a change (`cancelling`, `failing`)."""
    status = sample.qemu_status
    if status.is_postcopy:
        transfer = Transfer.POSTCOPY
    elif at_source and sample.is_of_arrival:
        transfer = Transfer.NONE  # the `completed` by which its guest once came here
    else:
        transfer = _TRANSFERS.get(status, Transfer.UNKNOWN)
    return Own(Fate.ANSWERS, transfer, _GUESTS.get(sample.run_state, Guest.UNKNOWN))


def guest_of(state: RunState) -> Guest:
    """What a run state says of the guest."""
    return _GUESTS.get(state, Guest.UNKNOWN)
