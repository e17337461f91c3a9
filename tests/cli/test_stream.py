"""Server-sent events: the standard's rules, reconnection, and streams that do not end a line."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web

from migrd.cli.address import Address
from migrd.cli.client import Client, Problem
from migrd.cli.exits import Unreachable
from migrd.cli.stream import Connected, Event, EventStream, Lost, Parser

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


def fed(text: str) -> list[Event]:
    parser = Parser()
    events = [parser.feed(line) for line in text.split("\n")]
    return [event for event in events if event is not None]


def test_an_event_ends_at_the_empty_line() -> None:
    (event,) = fed('id: 7\nevent: vm.changed\ndata: {"vm":\ndata: "web1"}\n\n')
    assert (event.id, event.kind, event.body.text("vm")) == ("7", "vm.changed", "web1")


def test_comments_and_heartbeats_are_no_events_but_an_id_counts() -> None:
    parser = Parser()
    for line in (": alive", "", "id: 9", ": alive", "", "retry: 1000", ""):
        assert parser.feed(line) is None
    assert parser.last_id == "9"


def test_an_event_that_is_no_json_has_an_empty_body() -> None:
    (event,) = fed("event: odd\ndata: not json\n\n")
    assert not event.body


def test_an_event_of_endless_data_is_dropped_and_the_next_is_read() -> None:
    endless = "data: " + "x" * 600_000 + "\n"
    events = fed(endless * 3 + "\n" + "event: next\ndata: {}\n\n")
    assert [event.kind for event in events] == ["next"]


@asynccontextmanager
async def serving(path: Path, answer: Answer) -> AsyncIterator[Client]:
    """A server of one route, and a client that speaks with it."""
    app = web.Application()
    app.router.add_get("/v1/events", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.UnixSite(runner, str(path)).start()
    try:
        async with Client(Address(socket=path)) as client:
            yield client
    finally:
        await runner.cleanup()


async def streaming(request: web.Request, content: bytes) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    await response.write(content)
    return response


async def test_after_a_break_it_asks_for_what_came_after_the_last_event(
    short_tmp_path: Path,
) -> None:
    asked: list[str | None] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        asked.append(request.headers.get("Last-Event-ID"))
        number = len(asked)
        return await streaming(request, b"id: %d\nevent: a\ndata: {}\n\n" % number)

    async with (
        serving(short_tmp_path / "s", answer) as client,
        EventStream(client, give_up_after_s=5) as stream,
        asyncio.timeout(10),
    ):
        heard = [await stream.next() for _ in range(6)]
    assert [type(h) for h in heard] == [Connected, Event, Lost, Connected, Event, Lost]
    assert heard[3] == Connected(again=True)
    assert asked[:2] == [None, "1"]


async def test_an_event_cut_in_two_by_the_network_is_one_event(short_tmp_path: Path) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = await streaming(request, b'id: 1\r\nevent: a\r\ndata: {"vm": "w\xc3')
        await response.write(b'\xa9b"}\r\n\r\n')
        return response

    async with (
        serving(short_tmp_path / "s", answer) as client,
        EventStream(client, give_up_after_s=5) as stream,
        asyncio.timeout(10),
    ):
        await stream.next()
        event = await stream.next()
    assert isinstance(event, Event)
    assert event.body.text("vm") == "w\u00e9b"


async def test_a_line_without_end_breaks_the_connection_and_not_the_memory(
    short_tmp_path: Path,
) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = await streaming(request, b"data: ")
        for _ in range(64):
            await response.write(b"x" * 65536)
        return response

    async with (
        serving(short_tmp_path / "s", answer) as client,
        EventStream(client, give_up_after_s=5) as stream,
        asyncio.timeout(10),
    ):
        await stream.next()
        lost = await stream.next()
    assert isinstance(lost, Lost)
    assert "without end" in lost.error.message


async def test_an_id_that_is_no_number_is_not_sent_back(short_tmp_path: Path) -> None:
    asked: list[str | None] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        asked.append(request.headers.get("Last-Event-ID"))
        return await streaming(request, b"id: a\rX-Evil: 1\nevent: a\ndata: {}\n\n")

    async with (
        serving(short_tmp_path / "s", answer) as client,
        EventStream(client, give_up_after_s=5) as stream,
        asyncio.timeout(10),
    ):
        for _ in range(4):
            await stream.next()
    assert asked == [None, None]


async def test_a_daemon_without_the_stream_is_a_problem_at_once(short_tmp_path: Path) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        raise web.HTTPNotFound

    async with (
        serving(short_tmp_path / "s", answer) as client,
        EventStream(client, give_up_after_s=60) as stream,
        asyncio.timeout(10),
    ):
        with pytest.raises(Problem):
            await stream.next()


async def test_a_daemon_that_stays_away_is_given_up(short_tmp_path: Path) -> None:
    async with (
        Client(Address(socket=short_tmp_path / "none")) as client,
        EventStream(client, give_up_after_s=0.3) as stream,
        asyncio.timeout(10),
    ):
        with pytest.raises(Unreachable):
            await stream.next()
