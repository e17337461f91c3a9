"""Exit codes, and the errors that carry one.

A code says what a script can do next; the text on stderr is for people and may change. The table in
`MEANING` is the documentation: the help epilog and the README are made from it.

Trap: 5, 6 and 7 speak of the *migration*, all others of the *command*. A watch that ends by 8, 9 or
130 changed nothing: the migration goes on.
"""

from collections.abc import Mapping
from enum import IntEnum
from types import MappingProxyType
from typing import Final

from migrd.core.phases import Phase
from migrd.errors import MigrdError


class Exit(IntEnum):
    """What the process answers to the shell."""

    OK = 0
    UNEXPECTED = 1
    USAGE = 2
    NOT_FOUND = 3
    REFUSED = 4
    ENDED_OTHERWISE = 5
    GUEST_LOST = 6
    NEEDS_OPERATOR = 7
    UNREACHABLE = 8
    TIMED_OUT = 9
    INTERRUPTED = 130


MEANING: Final[Mapping[Exit, str]] = MappingProxyType(
    {
        Exit.OK: "done; with --watch: the guest runs on the destination",
        Exit.UNEXPECTED: "something unexpected went wrong",
        Exit.USAGE: "the command or the request is wrong in itself",
        Exit.NOT_FOUND: "no such VM, migration, host or profile",
        Exit.REFUSED: "refused, denied or in conflict; nothing was changed",
        Exit.ENDED_OTHERWISE: "the migration was rolled back or cancelled: the guest stayed",
        Exit.GUEST_LOST: "the guest is lost: it runs nowhere",
        Exit.NEEDS_OPERATOR: "it is not known where the guest runs: a person must settle it",
        Exit.UNREACHABLE: "the daemon does not answer, or is not ready",
        Exit.TIMED_OUT: "waiting took too long; the migration goes on",
        Exit.INTERRUPTED: "interrupted (Ctrl-C); a migration goes on",
    }
)

_OF_PHASE: Final[Mapping[str, Exit]] = MappingProxyType(
    {
        Phase.SUCCEEDED.value: Exit.OK,
        Phase.REFUSED.value: Exit.REFUSED,
        Phase.ROLLED_BACK.value: Exit.ENDED_OTHERWISE,
        Phase.CANCELLED.value: Exit.ENDED_OTHERWISE,
        Phase.GUEST_LOST.value: Exit.GUEST_LOST,
        Phase.NEEDS_OPERATOR.value: Exit.NEEDS_OPERATOR,
    }
)


def of_end(phase: str) -> Exit:
    """The code for a migration that ended in `phase`; UNEXPECTED for an end we do not know."""
    return _OF_PHASE.get(phase, Exit.UNEXPECTED)


def of_status(status: int, code: str) -> Exit:
    """The code for an HTTP answer that is a problem.

    A 404 may also mean that the daemon does not know the *route*, because it is older than this
    program: that is not "no such VM". And a 503 about a QEMU or another host is no word about the
    daemon that answered it.
    """
    if code.startswith(("vmm_", "peer_")):
        return Exit.REFUSED if code.endswith("_refused") else Exit.UNEXPECTED
    if status == 404:
        return Exit.UNEXPECTED if "route" in code else Exit.NOT_FOUND
    if status in (401, 403, 409, 412):
        return Exit.REFUSED
    if status in (429, 502, 503, 504):
        return Exit.UNREACHABLE
    return Exit.USAGE if 400 <= status < 500 else Exit.UNEXPECTED


def as_table() -> str:
    """Code and meaning, one a line, as in the help epilog."""
    return "\n".join(f"{code.value:>4}  {text}" for code, text in MEANING.items())


def as_markdown() -> str:
    """The same for the README."""
    rows = "\n".join(f"| {code.value} | {text} |" for code, text in MEANING.items())
    return f"| code | meaning |\n|---|---|\n{rows}"


class CommandError(MigrdError):
    """Ends the command: what went wrong, and what to do about it."""

    code = "command_failed"
    exit_code = Exit.UNEXPECTED

    def __init__(
        self,
        message: str,
        *,
        cure: str = "",
        code: str | None = None,
        exit_code: Exit | None = None,
    ) -> None:
        super().__init__(message, code=code)
        self.cure = cure
        if exit_code is not None:
            self.exit_code = exit_code


class Unreachable(CommandError):
    """The daemon did not answer; nothing was asked of it, except where the text says so."""

    code = "daemon_unreachable"
    exit_code = Exit.UNREACHABLE
    retryable = True


class NoAnswer(Unreachable):
    """Connected, but no answer in time: the request may or may not have taken effect."""

    code = "no_answer_in_time"


class NotUnderstood(CommandError):
    """Something answered that is not migrd, or not a migrd this program understands."""

    code = "answer_not_understood"


class WaitedTooLong(CommandError):
    """The time allowed for watching is over; the migration goes on."""

    code = "timed_out_waiting"
    exit_code = Exit.TIMED_OUT


class Usage(CommandError):
    """The command line is wrong in a way that click cannot see."""

    code = "usage"
    exit_code = Exit.USAGE
