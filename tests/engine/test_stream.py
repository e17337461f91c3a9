"""The event stream: each event once, in order; what is missed is said to be missed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from migrd.engine.service import Published
from migrd.engine.stream import Stream
from tests.fakes.virtual_time import now_s


async def take(events: AsyncIterator[Published], count: int) -> list[Published]:
    async with asyncio.timeout(5.0):
        return [await anext(events) for _ in range(count)]


def filled(count: int, *, history: int = 100, queue: int = 100) -> Stream:
    stream = Stream(history=history, queue=queue, wall_s=lambda: 1.0)
    for number in range(count):
        stream.publish("test", {"number": number})
    return stream


async def test_a_reader_from_now_on_gets_what_comes() -> None:
    stream = filled(3)
    async with stream.events(after_id=None) as events:
        stream.publish("test", {"number": 3})
        (event,) = await take(events, 1)
    assert event.body == {"number": 3}


async def test_a_reader_that_was_away_gets_what_it_missed_once() -> None:
    stream = filled(5)
    seen = stream.resource_version - 3
    async with stream.events(after_id=seen) as events:
        stream.publish("test", {"number": 5})
        got = await take(events, 4)
    assert [e.body["number"] for e in got] == [2, 3, 4, 5]
    assert [e.id for e in got] == list(range(seen + 1, seen + 5))


async def test_a_reader_that_was_away_for_too_long_is_told_first() -> None:
    stream = filled(20, history=5)
    async with stream.events(after_id=stream.resource_version - 10) as events:
        got = await take(events, 6)
    assert got[0].kind == "events.lost"
    assert [e.body.get("number") for e in got[1:]] == [15, 16, 17, 18, 19]


async def test_a_reader_of_an_earlier_daemons_ids_is_told_too() -> None:
    stream = filled(2)
    async with stream.events(after_id=17) as events:
        assert (await take(events, 1))[0].kind == "events.lost"


async def test_a_slow_reader_is_told_and_goes_on_and_takes_no_memory() -> None:
    stream = filled(0, queue=10)
    async with stream.events(after_id=None) as events:
        for number in range(1000):
            stream.publish("test", {"number": number})
        got = [await anext(events)]
        while got[-1].body.get("number") != 999:
            got.append(await anext(events))
    assert got[0].kind == "events.lost"
    assert len(got) <= 12
    ids = [e.id for e in got[1:]]
    assert ids == sorted(ids)


async def test_a_slow_reader_does_not_harm_the_others() -> None:
    stream = filled(0, queue=10)
    async with stream.events(after_id=None), stream.events(after_id=None) as quick:
        for number in range(100):
            stream.publish("test", {"number": number})
            assert (await take(quick, 1))[0].body["number"] == number


async def test_waiting_for_something_newer_ends_with_it_or_with_the_time() -> None:
    stream = filled(1)
    before = stream.resource_version
    started_s = now_s()
    assert await stream.wait_newer(before, within_s=3.0) == before
    assert now_s() - started_s >= 3.0
    waiting = asyncio.create_task(stream.wait_newer(before, within_s=60.0))
    await asyncio.sleep(0.01)
    stream.publish("test", {})
    assert await waiting == before + 1
    assert await stream.wait_newer(before, within_s=60.0) == before + 1


async def test_ids_grow_over_a_restart() -> None:
    first = Stream(history=1, queue=1, wall_s=lambda: 1000.0)
    first.publish("test", {})
    second = Stream(history=1, queue=1, wall_s=lambda: 1001.0)
    assert second.resource_version > first.resource_version
