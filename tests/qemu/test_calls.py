"""The book-keeping of calls alone: ids, the window, and what each end of a call proves."""

import asyncio
from typing import Any

import orjson
import pytest

from migrd.qemu.calls import IN_BAND_WINDOW, Calls
from migrd.qemu.wire import AnswerLost, NotSent

LONG_S = 60.0


class Wire:
    """What was written, as messages."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def write(self, payload: bytes) -> None:
        self.lines.append(orjson.loads(payload))

    @property
    def last_id(self) -> int:
        return int(self.lines[-1]["id"])


def open_calls() -> tuple[Calls, Wire]:
    calls, wire = Calls(None), Wire()
    calls.write = wire.write
    return calls, wire


def blocked() -> tuple[Calls, Wire, list[asyncio.Future[Any]]]:
    """A monitor that has taken all it takes, with one call more."""
    calls, wire = open_calls()
    futures = [calls.submit("stop", None, LONG_S, True) for _ in range(IN_BAND_WINDOW + 1)]
    assert len(wire.lines) == IN_BAND_WINDOW == calls.unanswered
    return calls, wire, futures


async def test_a_line_sent_by_other_means_keeps_its_own_id() -> None:
    calls, wire = open_calls()
    calls.hold()
    call_id, _line = calls.encode("execute", "getfd", {"fdname": "f"})
    other = calls.submit("query-status", None, LONG_S, True)  # comes in between, and waits
    getfd = calls.expect(call_id, "getfd", LONG_S)
    calls.release()
    assert calls.answer({"id": wire.last_id, "return": "status"})
    assert calls.answer({"id": call_id, "return": {}})
    assert (await other, await getfd) == ("status", {})
    calls.end(None)


async def test_a_reply_to_a_command_that_was_never_sent_is_no_reply() -> None:
    calls, wire, futures = blocked()
    assert not calls.answer({"id": wire.last_id + 1, "return": "a lie"})
    assert calls.answer({"id": wire.last_id, "return": {}})  # room for the one that waited
    assert len(wire.lines) == IN_BAND_WINDOW + 1
    assert not futures[-1].done()
    calls.end(None)
    await asyncio.gather(*futures, return_exceptions=True)


async def test_the_end_is_unknown_for_what_was_sent_and_certain_for_what_waited() -> None:
    calls, _wire, futures = blocked()
    calls.end(ConnectionResetError("gone"))
    outcomes = await asyncio.gather(*futures, return_exceptions=True)
    assert [type(o) for o in outcomes] == [AnswerLost] * IN_BAND_WINDOW + [NotSent]
    assert "gone" in str(outcomes[0])
    with pytest.raises(NotSent):
        await calls.submit("stop", None, LONG_S, True)


async def test_a_waiting_call_whose_caller_left_is_never_sent() -> None:
    calls, wire, futures = blocked()
    futures[-1].cancel()
    assert calls.answer({"id": wire.last_id, "return": {}})
    assert len(wire.lines) == IN_BAND_WINDOW
    assert calls.unanswered == IN_BAND_WINDOW - 1
    calls.end(None)
    await asyncio.gather(*futures, return_exceptions=True)


async def test_out_of_band_passes_everything_that_waits() -> None:
    calls, wire, futures = blocked()
    yank = calls.submit("yank", None, LONG_S, False)
    assert wire.lines[-1] == {"exec-oob": "yank", "id": wire.last_id}
    assert calls.answer({"id": wire.last_id, "return": {}})
    assert await yank == {}
    calls.end(None)
    await asyncio.gather(*futures, return_exceptions=True)


@pytest.mark.parametrize("odd", [None, "1", 1.0, True, [1], {}, -1, 2**70])
async def test_an_id_that_is_not_ours_belongs_to_nothing(odd: object) -> None:
    calls, _wire = open_calls()
    future = calls.submit("stop", None, LONG_S, True)
    assert not calls.answer({"id": odd, "return": {}})
    assert not future.done()
    calls.end(None)
    await asyncio.gather(future, return_exceptions=True)
