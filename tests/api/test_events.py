"""The event stream: replay, filters, slow and absent readers, the end."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from migrd.api.events import block
from migrd.api.table import Limits
from migrd.core.phases import Phase
from migrd.engine.service import Published
from tests.api.running import DEADLINE_S, Api, running, until
from tests.fakes.service import FakeService


@dataclass
class Block:
    """One block of the stream, as a client parses it."""

    id: str | None = None
    kind: str | None = None
    data: Any = None
    comment: str | None = None
    retry: str | None = None


class Reader:
    """Reads a stream as the standard wants."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response = response

    async def next(self) -> Block:
        """The next block, of whatever kind."""
        found = Block()
        async with asyncio.timeout(DEADLINE_S):
            while line := (await self.response.content.readline()).decode():
                if line == "\n":
                    return found
                name, _, value = line.rstrip("\n").partition(":")
                value = value.removeprefix(" ")
                match name:
                    case "id":
                        found.id = value
                    case "event":
                        found.kind = value
                    case "data":
                        found.data = json.loads(value)
                    case "retry":
                        found.retry = value
                    case "":
                        found.comment = value
                    case _:
                        raise AssertionError(line)
        raise EOFError

    async def to_the_end(self) -> None:
        """Until the server closes, whatever comes until then."""
        with suppress(EOFError, aiohttp.ClientError):
            while True:
                await self.next()

    async def event(self) -> Block:
        """The next event, past comments."""
        while (found := await self.next()).kind is None:
            pass
        return found


@asynccontextmanager
async def stream(api: Api, query: str = "", **headers: str) -> AsyncIterator[Reader]:
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    async with api.session.get(
        f"http://migrd/v1/events{query}", headers=sent, timeout=aiohttp.ClientTimeout(total=None)
    ) as response:
        assert response.status == 200, await response.text()
        assert response.content_type == "text/event-stream"
        reader = Reader(response)
        assert (await reader.next()).retry == "1000"
        yield reader


async def test_what_happens_arrives_as_it_happens_with_growing_ids(api: Api) -> None:
    async with stream(api) as reader:
        id_ = await api.begun()
        api.service.drive_to(id_, Phase.PRECOPY)
        got = [await reader.event() for _ in range(5)]
    assert [b.kind for b in got] == ["migration.phase", "vm.changed", *["migration.phase"] * 3]
    ids = [int(b.id or "") for b in got]
    assert ids == sorted(set(ids))
    last = got[-1].data
    assert (last["id"], last["kind"], last["vm"]) == (ids[-1], "migration.phase", "web-1")
    assert last["migration_id"] == id_
    assert last["body"]["phase"] == "precopy"
    assert last["at"].endswith("Z")


async def test_a_broken_stream_goes_on_where_it_ended(api: Api) -> None:
    async with stream(api) as reader:
        id_ = await api.begun()
        first = await reader.event()
    api.service.drive_to(id_, Phase.SWITCHOVER)
    for header, query in (({"Last_Event_ID": first.id}, ""), ({}, f"?after_id={first.id}")):
        async with stream(api, query, **header) as reader:  # type: ignore[arg-type]  # an id
            kinds = [(await reader.event()).data["body"].get("phase") for _ in range(5)]
        assert kinds == [None, "preflight", "preparing", "precopy", "switchover"]


async def test_what_the_history_no_longer_has_is_said_to_be_lost(tmp_path: Path) -> None:
    async with running(tmp_path, service=FakeService(history=3)) as api:
        for number in range(10):
            api.service.add_vm(f"vm-{number}")
        async with stream(api, Last_Event_ID="1") as reader:
            lost = await reader.event()
            rest = [await reader.event() for _ in range(3)]
        assert (lost.kind, lost.id) == ("events.lost", None)
        assert [b.data["vm"] for b in rest] == ["vm-7", "vm-8", "vm-9"]


async def test_a_slow_reader_is_told_what_it_lost_and_goes_on(tmp_path: Path) -> None:
    async with (
        running(tmp_path, service=FakeService(queue=5)) as api,
        stream(api) as reader,
    ):
        for number in range(50):  # faster than any reader: the loop never turns
            api.service.add_vm(f"vm-{number}")
        kinds = [(await reader.event()).kind]
        while kinds[-1] != "events.lost":
            kinds.append((await reader.event()).kind)
        assert len(kinds) < 10
        api.service.add_vm("the-last")
        while (await reader.event()).data["vm"] != "the-last":
            pass


@pytest.mark.parametrize("query", ["?vm=web-2", "?migration_id={}"])
async def test_a_filter_leaves_out_what_is_of_others(api: Api, query: str) -> None:
    mine = await api.begun("web-2")
    theirs = await api.begun("web-3")
    async with stream(api, query.format(mine)) as reader:
        api.service.drive_to(theirs, Phase.PRECOPY)
        api.service.drive_to(mine, Phase.PREFLIGHT)
        got = await reader.event()
        assert (got.data["vm"], got.data["migration_id"]) == ("web-2", mine)


async def test_in_quiet_times_a_heartbeat_moves_the_last_id_past_what_was_left_out(
    tmp_path: Path,
) -> None:
    async with (
        running(tmp_path, limits=Limits(heartbeat_s=0.1)) as api,
        stream(api, "?vm=web-1") as reader,
    ):
        assert (await reader.next()).comment == "alive"
        for _ in range(3):
            api.service.add_vm("other")
        beat = await reader.next()
        while beat.id is None:
            beat = await reader.next()
        assert (beat.comment, beat.data) == ("alive", None)
        assert int(beat.id) == api.service.stream.resource_version


async def test_unwanted_events_do_not_keep_the_heartbeat_away(tmp_path: Path) -> None:
    async with (
        running(tmp_path, limits=Limits(heartbeat_s=0.1)) as api,
        stream(api, "?vm=web-1") as reader,
    ):

        async def chatter() -> None:
            while True:
                api.service.add_vm("other")
                await asyncio.sleep(0.01)

        async with asyncio.TaskGroup() as tasks:
            noise = tasks.create_task(chatter())
            assert (await reader.next()).comment == "alive"
            assert (await reader.next()).comment == "alive"
            noise.cancel()


async def test_stopping_ends_streams_at_once(tmp_path: Path) -> None:
    async with running(tmp_path) as api, stream(api) as reader:
        begun_s = asyncio.get_running_loop().time()
        await api.server.close()
        await reader.to_the_end()
        assert asyncio.get_running_loop().time() - begun_s < 2.0


async def test_a_reader_that_goes_is_forgotten(tmp_path: Path) -> None:
    async with running(tmp_path, limits=Limits(heartbeat_s=0.05)) as api:
        async with stream(api):
            assert len(api.service.stream._readers) == 1
        await until(lambda: not api.service.stream._readers)


async def test_there_are_only_so_many_streams(tmp_path: Path) -> None:
    limits = Limits(max_streams=2, heartbeat_s=0.05)
    async with running(tmp_path, limits=limits) as api:
        async with stream(api), stream(api):
            (await api("GET", "/v1/events")).problem(503, "too_many_streams")
        await until(lambda: not api.service.stream._readers)
        async with stream(api):
            pass


@pytest.mark.parametrize("last", ["", "x", "-1", "1.5", "99999999999999999999"])
async def test_a_last_id_that_was_never_given_is_refused(api: Api, last: str) -> None:
    problem = (await api("GET", "/v1/events", Last_Event_ID=last)).problem(422, "invalid")
    assert problem.violations[0].field == "Last-Event-ID"


async def test_an_error_before_the_stream_begins_is_a_problem(api: Api) -> None:
    api.service.failures["events"] = RuntimeError("boom")
    (await api("GET", "/v1/events")).problem(500, "internal_error")


def test_whatever_an_event_holds_it_stays_one_line_of_json() -> None:
    body = {"a": float("nan"), "b": "x\ny\r\u2028", "c": Phase.PRECOPY, "d": {1, 2}, "e": object()}
    event = Published(7, 1_795_000_000.0, "vm.changed", "v", None, body)
    lines = block(event).split(b"\n")
    assert [line.split(b":")[0] for line in lines] == [b"id", b"event", b"data", b"", b""]
    told = json.loads(lines[2].removeprefix(b"data: "))
    assert (told["body"]["a"], told["body"]["c"]) == (None, "precopy")


async def test_a_reader_that_takes_nothing_is_cut_off_and_forgotten(tmp_path: Path) -> None:
    limits = Limits(unread_within_s=0.2)
    async with running(tmp_path, limits=limits) as api, api.wire() as wire:
        await wire.send(b"GET /v1/events HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"200 OK" in await wire.some()
        readers = api.service.stream._readers
        async with asyncio.timeout(DEADLINE_S):
            while readers:  # says more than any buffer holds, and nobody reads it
                api.service.stream.publish("vm.changed", {"x": "x" * 10_000})
                await asyncio.sleep(0.001)
