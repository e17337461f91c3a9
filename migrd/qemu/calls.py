"""The commands of one QMP connection, from asking to answering.

    submit ──► waiting (held back, not sent) ──► sent ──► answered: result, or CommandRefused
                  │ time-out, end: NotSent         │ time-out: ReplyLate, but kept until the end,
                  ▼ (certainly no effect)          │           to know its late reply
                                                   └ end of the connection: AnswerLost (unknown)

A monitor with eight in-band commands waiting stops reading altogether, and would not see the ninth
line even if it were out of band. Hence the window: at most seven in-band commands are under way,
later ones wait here, where a time-out still means "never sent". Out-of-band ones pass them by.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import orjson

from migrd.qemu.wire import Arguments, CommandRefused, NotSent, ReplyLate, lost_call

IN_BAND_WINDOW = 7
WAITING_LIMIT = 64

CallObserver = Callable[[str, str, float], None]
"""command, outcome ("ok", "refused", "late", "lost", "not_sent"), seconds."""


class Call:
    """One command; outlives its time-out, to know a late reply."""

    __slots__ = ("command", "future", "held", "in_band", "started_s", "timer")

    def __init__(self, command: str, future: asyncio.Future[Any], in_band: bool) -> None:
        self.command = command
        self.future = future
        self.in_band = in_band
        self.started_s = time.monotonic()
        self.held: bytes | None = None
        """What is still to be sent; None once it was."""
        self.timer: asyncio.TimerHandle | None = None


class Calls:
    """All calls of one connection. `write` sends bytes without waiting."""

    def __init__(self, observe: CallObserver | None) -> None:
        self._loop = asyncio.get_running_loop()
        self._observe = observe
        self._calls: dict[int, Call] = {}
        self._waiting: deque[int] = deque()
        self._last_id = 0
        self._in_flight = 0
        self._is_held = False
        self.write: Callable[[bytes], None] | None = None
        """None: nothing can be sent."""
        self.late_replies = 0

    @property
    def unanswered(self) -> int:
        """Sent and not answered, those given up included."""
        return len(self._calls) - len(self._waiting)

    def submit(
        self, command: str, arguments: Arguments | None, deadline_s: float, in_band: bool
    ) -> asyncio.Future[Any]:
        """Send or hold back; the future ends as the module says. Raises NotSent."""
        write = self.write
        if write is None:
            raise self.not_sent(command, "the connection is closed")
        must_wait = self._is_held or (in_band and self._in_flight >= IN_BAND_WINDOW)
        if must_wait and len(self._waiting) >= WAITING_LIMIT:
            raise self.not_sent(command, f"{WAITING_LIMIT} commands wait already")
        call_id, payload = self.encode("execute" if in_band else "exec-oob", command, arguments)
        call = Call(command, self._loop.create_future(), in_band)
        call.timer = self._loop.call_later(deadline_s, self._expire, call_id, deadline_s)
        self._calls[call_id] = call
        if must_wait:
            call.held = payload
            self._waiting.append(call_id)
        else:
            self._in_flight += in_band
            write(payload)
        return call.future

    def encode(self, lane: str, command: str, arguments: Arguments | None) -> tuple[int, bytes]:
        """An id, and the line to send under it."""
        self._last_id = call_id = self._last_id + 1
        message: dict[str, object] = {lane: command, "id": call_id}
        if arguments:
            message["arguments"] = arguments
        return call_id, orjson.dumps(message, option=orjson.OPT_APPEND_NEWLINE)

    def expect(self, call_id: int, command: str, deadline_s: float) -> asyncio.Future[Any]:
        """For a line that was encoded here and sent, in band, by other means."""
        call = Call(command, self._loop.create_future(), in_band=True)
        call.timer = self._loop.call_later(deadline_s, self._expire, call_id, deadline_s)
        self._calls[call_id] = call
        self._in_flight += 1
        return call.future

    def hold(self) -> None:
        """Send nothing until `release`."""
        self._is_held = True

    def release(self) -> None:
        self._is_held = False
        self._send_waiting()

    def answer(self, message: dict[str, Any]) -> bool:
        """Take one reply; False when it belongs to no command that was sent."""
        call_id = message.get("id")
        if type(call_id) is not int:
            return False
        call = self._calls.get(call_id)
        if call is None or call.held is not None:
            return False
        self._forget(call_id, call)
        if call.in_band:
            self._in_flight -= 1
            if self._waiting:
                self._send_waiting()
        if call.future.done():  # timed out or cancelled long ago
            self.late_replies += 1
        elif "return" in message:
            call.future.set_result(message["return"])
            self._note(call, "ok")
        else:
            call.future.set_exception(CommandRefused.of(call.command, message["error"]))
            self._note(call, "refused")
        return True

    def end(self, failure: Exception | None) -> None:
        """The connection is over: whatever was sent has an unknown outcome."""
        self.write = None
        self._waiting.clear()
        for call_id, call in list(self._calls.items()):
            self._forget(call_id, call)
            if not call.future.done():
                outcome = "lost" if call.held is None else "not_sent"
                call.future.set_exception(lost_call(call.command, outcome, failure))
                self._note(call, outcome)

    def not_sent(self, command: str, why: str) -> NotSent:
        """The error for a command that never became a call."""
        if self._observe is not None:
            self._observe(command, "not_sent", 0.0)
        return NotSent(f"{command} not sent: {why}")

    def _send_waiting(self) -> None:
        """Send what was held back, oldest first, as far as the window allows."""
        while self._waiting and not self._is_held and self.write is not None:
            call_id = self._waiting[0]
            call = self._calls[call_id]
            if call.in_band and self._in_flight >= IN_BAND_WINDOW:
                return
            self._waiting.popleft()
            payload, call.held = call.held, None
            if call.future.done() or payload is None:  # its caller has left: never sent
                self._forget(call_id, call)
                continue
            self._in_flight += call.in_band
            self.write(payload)

    def _expire(self, call_id: int, deadline_s: float) -> None:
        call = self._calls[call_id]
        if call.held is not None:
            self._waiting.remove(call_id)
            self._forget(call_id, call)
        if call.future.done():
            return
        if call.held is not None:
            text = f"{call.command} not sent within {deadline_s} s: QEMU answers nothing"
            call.future.set_exception(NotSent(text))
            self._note(call, "not_sent")
        else:
            text = f"no reply to {call.command} within {deadline_s} s; it may still take effect"
            call.future.set_exception(ReplyLate(text))
            self._note(call, "late")

    def _forget(self, call_id: int, call: Call) -> None:
        del self._calls[call_id]
        if call.timer is not None:
            call.timer.cancel()

    def _note(self, call: Call, outcome: str) -> None:
        if self._observe is not None:
            self._observe(call.command, outcome, time.monotonic() - call.started_s)
