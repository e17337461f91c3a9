"""QMP's words on the wire: errors and events, shared by the connection and by its users.

What a caller may conclude from each error decides whether a guest is lost, so the classes differ in
exactly that (they refine the branches of `migrd.errors`):

    CommandRefused (VmmRefused)       QEMU answered with an error: no effect
    NotSent        (VmmUnreachable)   the command never left this process: certainly no effect
    AnswerLost     (VmmUnreachable)   sent, then the connection broke: effect UNKNOWN
    ReplyLate      (VmmTimedOut)      sent, no reply in time: effect UNKNOWN, it may still take place
    MonitorBusy    (VmmUnreachable)   no greeting: another client holds the monitor, or QEMU is stuck
    WireBroken     (VmmUnreachable)   what came was not QMP: the connection is closed
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from migrd.errors import VmmRefused, VmmTimedOut, VmmUnreachable

Arguments: TypeAlias = Mapping[str, object]


class CommandRefused(VmmRefused):
    """QEMU's own error answer. `error_class` is nearly always GenericError: the text is all there is."""

    code = "qmp_refused"

    def __init__(self, command: str, error_class: str, description: str) -> None:
        super().__init__(f"QEMU refused {command}: {description}")
        self.command = command
        self.error_class = error_class
        self.description = description


class NotSent(VmmUnreachable):
    """Nothing left this process: the command certainly had no effect."""

    code = "qmp_not_sent"


class AnswerLost(VmmUnreachable):
    """The connection broke after the command was sent: not known whether it took effect."""

    code = "qmp_answer_lost"


class ReplyLate(VmmTimedOut):
    """Sent, and no reply within the call's limit: not known whether it took or will take effect."""

    code = "qmp_reply_late"


class MonitorBusy(VmmUnreachable):
    """QEMU serves one client per monitor, and greets the next only when that one has left."""

    code = "qmp_monitor_busy"


class WireBroken(VmmUnreachable):
    """What came over the socket was not QMP. Where one line is lost, no later one can be trusted."""

    code = "qmp_wire_broken"


@dataclass(frozen=True, slots=True)
class QmpEvent:
    """Something QEMU told without being asked. Never repeated: one missed is gone."""

    name: str
    data: Mapping[str, object]
    received_s: float
    """time.monotonic() when it was read here."""
    sent_s: float | None
    """QEMU's own stamp: seconds of its host's real-time clock, which may jump. None: not given."""
