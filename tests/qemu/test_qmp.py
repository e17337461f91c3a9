"""The QMP connection against a fake QEMU with faults: what each error proves, and who survives."""

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from migrd.errors import VmmRefused, VmmTimedOut, VmmUnreachable
from migrd.qemu.calls import IN_BAND_WINDOW, WAITING_LIMIT
from migrd.qemu.qmp import QmpConnection, connect_qmp
from migrd.qemu.wire import (
    AnswerLost,
    CommandRefused,
    MonitorBusy,
    NotSent,
    QmpEvent,
    ReplyLate,
    WireBroken,
)
from tests.fakes.qmp_server import Fault
from tests.qemu.conftest import Served


def ignore(event: QmpEvent) -> None:
    del event


@contextlib.asynccontextmanager
async def connected(path: Path, **options: Any) -> AsyncIterator[QmpConnection]:
    connection = await connect_qmp(path, options.pop("on_event", ignore), **options)
    try:
        yield connection
    finally:
        await connection.end()


async def until(condition: Callable[[], bool], within_s: float = 5.0) -> None:
    """Wait for a condition; fail loudly when it does not come."""
    deadline_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline_s, "the condition did not come"
        await asyncio.sleep(0.002)


async def test_a_command_returns_what_qemu_returns(served: Served) -> None:
    async with connected(served.path) as qmp:
        assert qmp.has_oob
        assert qmp.greeting["version"]["package"] == "fake"
        assert (await qmp.execute("query-status"))["status"] == "prelaunch"
        assert await qmp.execute("echo", {"text": "käse", "n": 2**40}) == {
            "text": "käse",
            "n": 2**40,
        }


async def test_many_commands_at_once_each_get_their_own_answer(served: Served) -> None:
    async with connected(served.path) as qmp:
        answers = await asyncio.gather(*(qmp.execute("echo", {"n": n}) for n in range(60)))
        assert [answer["n"] for answer in answers] == list(range(60))


async def test_qemus_own_error_says_that_nothing_happened(served: Served) -> None:
    async with connected(served.path) as qmp:
        with pytest.raises(CommandRefused, match="has not been found") as caught:
            await qmp.execute("no-such-command")
    assert isinstance(caught.value, VmmRefused)
    assert caught.value.error_class == "CommandNotFound"
    assert caught.value.command == "no-such-command"


async def test_a_time_out_says_that_the_outcome_is_unknown(served: Served) -> None:
    async with connected(served.path) as qmp:
        served.qemu.block()
        with pytest.raises(ReplyLate, match="may still take effect") as caught:
            await qmp.execute("query-status", deadline_s=0.02)
        assert isinstance(caught.value, VmmTimedOut)
        assert qmp.unanswered == 1


async def test_a_late_reply_after_a_time_out_is_dropped_and_the_reader_survives(
    served: Served,
) -> None:
    async with connected(served.path) as qmp:
        served.qemu.block()
        with pytest.raises(ReplyLate):
            await qmp.execute("echo", {"n": 1}, deadline_s=0.02)
        served.qemu.unblock()
        assert await qmp.execute("echo", {"n": 2}) == {"n": 2}
        assert qmp.late_replies == 1
        assert qmp.unanswered == 0


async def test_a_cancelled_call_leaves_the_connection_usable(served: Served) -> None:
    async with connected(served.path) as qmp:
        served.qemu.block()
        call = asyncio.create_task(qmp.execute("echo", {"n": 1}))
        await until(lambda: "echo" in served.qemu.received)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        served.qemu.unblock()
        assert await qmp.execute("echo", {"n": 2}) == {"n": 2}
        assert qmp.late_replies == 1


async def test_a_broken_connection_answers_every_call_under_way_with_unknown(
    served: Served,
) -> None:
    async with connected(served.path) as qmp:
        served.qemu.block()
        calls = [asyncio.create_task(qmp.execute("echo", {"n": n})) for n in range(3)]
        await until(lambda: served.qemu.received.count("echo") == 3)
        served.qemu.monitors[0].hang_up()
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [AnswerLost] * 3
        assert "effect unknown" in str(outcomes[0])
        assert not qmp.is_open
        with pytest.raises(NotSent):  # and what comes after certainly had no effect
            await qmp.execute("echo")
        served.qemu.unblock()


async def test_what_qemu_said_before_it_went_is_read_though_a_write_failed_first() -> None:
    """A busy daemon writes its next question before it has read why its QEMU has ended."""
    here, there = socket.socketpair()
    here.setblocking(False)
    heard: list[str] = []
    qmp = QmpConnection(lambda event: heard.append(event.name))
    there.sendall(b'{"QMP": {"version": {}, "capabilities": []}}\r\n')
    opening = asyncio.create_task(qmp.open(here, deadline_s=5, want_oob=False))
    await until(lambda: bool(qmp.greeting))
    there.sendall(b'{"return": {}, "id": 1}\r\n')
    await opening
    asked = qmp.begin("query-status", None, deadline_s=5)
    there.sendall(b'{"return": {"status": "shutdown"}, "id": 2}\r\n')
    there.sendall(b'{"event": "SHUTDOWN", "data": {"guest": true}}\r\n')
    there.close()
    lost = qmp.begin("query-migrate", None, deadline_s=5)
    assert await asked == {"status": "shutdown"}
    with pytest.raises(AnswerLost):
        await lost
    assert isinstance(await qmp.closed, OSError)  # it was the write that failed
    assert heard == ["SHUTDOWN"]


async def test_the_error_classes_can_be_told_apart_by_the_engine() -> None:
    assert issubclass(CommandRefused, VmmRefused)
    assert issubclass(ReplyLate, VmmTimedOut)
    for unreachable in (NotSent, AnswerLost, MonitorBusy, WireBroken):
        assert issubclass(unreachable, VmmUnreachable)
    assert not issubclass(AnswerLost, NotSent | VmmTimedOut | VmmRefused)


@pytest.mark.parametrize("fault", [Fault.GARBAGE, Fault.NOT_AN_OBJECT])
async def test_garbage_closes_the_connection_and_names_what_came(
    served: Served, fault: Fault
) -> None:
    async with connected(served.path) as qmp:
        served.qemu.faults = [fault]
        with pytest.raises(AnswerLost, match=r"not JSON|not a QMP message"):
            await qmp.execute("query-status")
        assert isinstance(await qmp.closed, WireBroken)


async def test_an_oversized_line_closes_the_connection_before_it_fills_the_memory(
    served: Served,
) -> None:
    served.qemu.oversize_bytes = 256 * 1024
    async with connected(served.path, line_limit_bytes=64 * 1024) as qmp:
        served.qemu.faults = [Fault.OVERSIZED]
        with pytest.raises(AnswerLost, match="more than 65536 bytes"):
            await qmp.execute("query-status")


async def test_a_line_cut_off_by_the_end_of_file_is_an_unknown_outcome(served: Served) -> None:
    async with connected(served.path) as qmp:
        served.qemu.faults = [Fault.EOF_MID_REPLY]
        with pytest.raises(AnswerLost):
            await qmp.execute("query-status")


async def test_half_a_line_is_waited_for_until_the_deadline(served: Served) -> None:
    async with connected(served.path) as qmp:
        served.qemu.faults = [Fault.HALF_LINE]
        with pytest.raises(ReplyLate):
            await qmp.execute("query-status", deadline_s=0.05)
        assert qmp.is_open


async def test_silence_is_a_time_out_and_the_next_command_works(served: Served) -> None:
    async with connected(served.path) as qmp:
        served.qemu.faults = [Fault.SILENCE]
        with pytest.raises(ReplyLate):
            await qmp.execute("query-status", deadline_s=0.02)
        assert (await qmp.execute("query-status"))["running"] is False


@pytest.mark.parametrize("fault", [Fault.UNKNOWN_MESSAGE, Fault.UNKNOWN_ID, Fault.ODD_ID])
async def test_unknown_messages_and_ids_are_counted_and_passed_over(
    served: Served, fault: Fault
) -> None:
    async with connected(served.path) as qmp:
        served.qemu.faults = [fault]
        assert (await qmp.execute("query-status"))["status"] == "prelaunch"
        assert qmp.unknown_messages == 1


async def test_a_held_monitor_gives_a_clear_error_and_serves_once_it_is_free(
    served: Served,
) -> None:
    async with connected(served.path):
        with pytest.raises(MonitorBusy, match="another client holds it"):
            await connect_qmp(served.path, ignore, deadline_s=0.05)
    async with connected(served.path) as qmp:
        assert await qmp.execute("query-status")


async def test_something_that_is_no_qmp_server_is_told_as_such(run_dir: Path) -> None:
    path = run_dir / "other"

    async def speak(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail.example ESMTP\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_unix_server(speak, path):
        with pytest.raises(WireBroken, match="not JSON"):
            await connect_qmp(path, ignore)


async def test_out_of_band_answers_while_in_band_is_blocked_on_every_monitor(
    served: Served,
) -> None:
    async def commands(command: str, arguments: Any) -> Any:
        return {"did": command}

    served.qemu.commands = commands
    async with connected(served.path) as first, connected(served.second) as second:
        served.qemu.block()
        for lane in (first, second):
            with pytest.raises(ReplyLate):
                await lane.execute("query-status", deadline_s=0.02)
        for lane in (first, second):
            assert await lane.execute_oob("yank") == {"did": "yank"}
        served.qemu.unblock()


async def test_out_of_band_gets_through_behind_any_number_of_blocked_commands(
    served: Served,
) -> None:
    async def commands(command: str, arguments: Any) -> Any:
        return {"did": command}

    served.qemu.commands = commands
    async with connected(served.path) as qmp:
        served.qemu.block()
        calls = [asyncio.create_task(qmp.execute("query-status")) for _ in range(20)]
        await until(lambda: served.qemu.received.count("query-status") == IN_BAND_WINDOW)
        assert await qmp.execute_oob("yank", deadline_s=1.0) == {"did": "yank"}
        served.qemu.unblock()
        assert len(await asyncio.gather(*calls)) == 20


async def test_a_command_that_waited_behind_a_blocked_monitor_was_certainly_never_sent(
    served: Served,
) -> None:
    async with connected(served.path) as qmp:
        served.qemu.block()
        calls = [
            asyncio.create_task(qmp.execute("echo", {"n": n}, deadline_s=0.05))
            for n in range(IN_BAND_WINDOW + 2)
        ]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        late = [type(outcome) for outcome in outcomes]
        assert late == [ReplyLate] * IN_BAND_WINDOW + [NotSent] * 2
        served.qemu.unblock()
        await qmp.execute("query-status")
        assert served.qemu.received.count("echo") == IN_BAND_WINDOW


async def test_what_waits_for_a_blocked_monitor_is_bounded(served: Served) -> None:
    async with connected(served.path) as qmp:
        served.qemu.block()
        calls = [
            asyncio.create_task(qmp.execute("echo", {"n": n}))
            for n in range(IN_BAND_WINDOW + WAITING_LIMIT)
        ]
        await asyncio.sleep(0)
        with pytest.raises(NotSent, match="wait already"):
            await qmp.execute("echo")
        served.qemu.unblock()
        assert len(await asyncio.gather(*calls)) == IN_BAND_WINDOW + WAITING_LIMIT


async def test_without_the_oob_capability_the_lane_is_refused_before_sending(
    served: Served,
) -> None:
    served.qemu.offers_oob = False
    async with connected(served.path) as qmp:
        assert not qmp.has_oob
        with pytest.raises(NotSent, match="no out-of-band lane"):
            await qmp.execute_oob("yank")


async def test_events_carry_both_clocks(served: Served) -> None:
    seen: list[QmpEvent] = []
    async with connected(served.path, on_event=seen.append):
        before_s = time.monotonic()
        await served.qemu.emit("MIGRATION", {"status": "active"})
        await until(lambda: len(seen) == 1)
    event = seen[0]
    assert (event.name, event.data) == ("MIGRATION", {"status": "active"})
    assert before_s <= event.received_s <= time.monotonic()
    assert event.sent_s is not None
    assert abs(event.sent_s - time.time()) < 60


async def test_a_subscriber_that_raises_does_not_end_the_reading(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(event: QmpEvent) -> None:
        raise RuntimeError(event.name)

    async with connected(served.path, on_event=broken) as qmp:
        await served.qemu.emit("STOP")
        assert await qmp.execute("query-status")
    assert "STOP could not be delivered" in caplog.text


def test_an_event_with_odd_members_is_still_an_event() -> None:
    odd = QmpEvent.of({"event": 5, "data": [1], "timestamp": {"seconds": -1}}, 1.0)
    assert (odd.name, odd.data, odd.sent_s) == ("5", {}, None)
    assert QmpEvent.of({"event": "X", "timestamp": "now"}, 1.0).sent_s is None


async def test_calls_are_observed_with_their_outcome(served: Served) -> None:
    seen: list[tuple[str, str]] = []
    async with connected(served.path, observe=lambda c, o, _s: seen.append((c, o))) as qmp:
        await qmp.execute("query-status")
        with pytest.raises(CommandRefused):
            await qmp.execute("nothing")
        served.qemu.faults = [Fault.SILENCE]
        with pytest.raises(ReplyLate):
            await qmp.execute("query-status", deadline_s=0.02)
    assert seen == [
        ("qmp_capabilities", "ok"),
        ("query-status", "ok"),
        ("nothing", "refused"),
        ("query-status", "late"),
    ]
