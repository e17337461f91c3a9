"""What recovery can do about one thing that it found, with the reason a person is told."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from migrd.core.handover import DestinationPhase
from migrd.core.phases import Instruction, Phase


class Deed(StrEnum):
    """What is done."""

    NOTHING_LEFT = "nothing_is_left"
    """It has ended, and there is no process of it; files at most."""
    SHOW = "show_as_it_is"
    GO_ON = "go_on"
    """Begin `step`."""
    REAP = "reap"
    """End the process, by `proof`."""
    ADOPT = "adopt"
    """A VM of this host from here on."""
    LEAVE_ALONE = "leave_alone"
    """Nothing is proven: it is left as it is, and said aloud."""
    CALL_OPERATOR = "call_operator"
    """`step` keeps asking; `settles` is what would settle it."""


class Proof(StrEnum):
    """What allows a process to be ended."""

    REFUSED = "durable_refusal"
    SOURCE_ENDED = "ended_at_the_source_never_granted"
    RELEASED = "journalled_release"


class DestinationStep(StrEnum):
    """The steps of an incoming migration (`engine.incoming`)."""

    PREPARE = "prepare"
    RECEIVE = "receive"
    AWAIT_GRANT = "await_grant"
    START_GUEST = "start_guest"
    AWAIT_REST = "await_rest"


@dataclass(frozen=True)
class Action:
    """What is done about one thing that was found, and why."""

    deed: Deed
    why: str
    step: Instruction | DestinationStep | None = None
    expects: Phase | DestinationPhase | None = None
    """Where the migration must come to; None: not foretold."""
    proof: Proof | None = None
    settles: str | None = None
    """What a person could do to settle it."""
    alarm: bool = False
    """A person should look at it, whatever comes of it."""
    may_run: bool = False
    """The step may say `cont`."""

    @property
    def ends_process(self) -> bool:
        """The deed or its step ends a process of this host."""
        return self.deed is Deed.REAP or self.step is Instruction.RELEASE_SOURCE


FIND_PROCESS: Final = (
    "look for the VM's process on this host (ps, its monitor); if it lives, bring its directory "
    "below runtime_dir back and restart migrd; if it is gone, a reboot of this host proves that; "
    "of a migration away from here, a person may say so: migrd resolve ID guest_lost --evidence "
    "'...'"
)
FENCE_OR_WAIT: Final = (
    "bring migrd on the destination back; or, when that host is proven off: migrd resolve ID "
    "destination_fenced --evidence '...'"
)
LEFT_BY_POSTCOPY: Final = (
    "bring migrd on the destination back, and kill neither QEMU: each may hold memory that the "
    "other lacks; or, when that host is gone for good: migrd resolve ID guest_lost --evidence '...'"
)
OLD_COPY: Final = (
    "find out whether the guest did anything after the destination had its copy: migrd resolve ID "
    "use_destination_copy, or guest_lost, with --evidence '...'"
)
LOOK_THERE: Final = "look at the VM's process on the destination, then resolve at the source"
SOURCE_JOURNAL: Final = (
    "find out on the source what became of the guest; if that host is gone for good: migrd resolve "
    "ID use_destination_copy, or guest_lost, with --evidence '...'"
)
SECOND_COPY: Final = "find out which process runs the guest (pid in the log) and end the other"
