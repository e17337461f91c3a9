"""QMP's words on the wire: errors and events, shared by the connection and by its users.

What a caller may conclude from each error decides whether a guest is lost, so the classes differ in
exactly that (they refine the branches of `migrd.errors`):

    CommandRefused (VmmRefused)       QEMU answered with an error: no effect
    NotSent        (VmmUnreachable)   the command never left this process: certainly no effect
    AnswerLost     (VmmUnreachable)   sent, then the connection broke: effect UNKNOWN
    ReplyLate      (VmmTimedOut)      sent, no reply in time: effect UNKNOWN, and may still come
    MonitorBusy    (VmmUnreachable)   no greeting: another client holds it, or QEMU is stuck
    WireBroken     (VmmUnreachable)   what came was not QMP: the connection is closed
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

from migrd.errors import VmmRefused, VmmTimedOut, VmmUnreachable

Arguments: TypeAlias = Mapping[str, object]


class CommandRefused(VmmRefused):
    """QEMU's own error answer. `error_class` is nearly always GenericError: the text is all."""

    code = "qmp_refused"

    def __init__(self, command: str, error_class: str, description: str) -> None:
        super().__init__(f"QEMU refused {command}: {description}")
        self.command = command
        self.error_class = error_class
        self.description = description

    @classmethod
    def of(cls, command: str, error: object) -> Self:
        """From the `error` member of a reply, whatever its shape."""
        fields = json_object(error)
        error_class = str(fields.get("class", "unknown"))
        return cls(command, error_class, str(fields.get("desc", "it gave no description")))


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
    """What came was not QMP. Where one line is lost, no later one can be trusted."""

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

    @classmethod
    def of(cls, message: Mapping[str, object], received_s: float) -> Self:
        """From a message with an `event` member; anything else in it may be missing or odd."""
        return cls(
            name=str(message.get("event")),
            data=json_object(message.get("data")),
            received_s=received_s,
            sent_s=_stamp_s(message.get("timestamp")),
        )


def json_object(value: object) -> dict[str, Any]:
    """`value` where it is a JSON object, else an empty one: for what others may leave out."""
    return value if isinstance(value, dict) else {}


def lost_call(command: str, outcome: str, failure: Exception | None) -> VmmUnreachable:
    """What a call under way ends with when its connection does."""
    why = f": {failure}" if failure is not None else ""
    if outcome == "not_sent":
        return NotSent(f"{command} not sent: the connection ended{why}")
    return AnswerLost(f"the connection ended before {command} was answered{why}: effect unknown")


def _stamp_s(stamp: object) -> float | None:
    fields = json_object(stamp)
    seconds, micros = fields.get("seconds"), fields.get("microseconds")
    if not isinstance(seconds, int) or not isinstance(micros, int) or seconds < 0:
        return None  # QEMU sends -1 where its clock failed
    return seconds + micros / 1e6
