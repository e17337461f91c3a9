"""Server-sent events (WHATWG HTML, "Server-sent events"): what the engine publishes, as a stream.

    engine's bounded queue --next--> one task here --write, awaiting the client--> socket

- The queue is the engine's and bounded: a client that reads too slowly gets `events.lost` from it
  and goes on. Nothing piles up here: one event is in hand at a time.
- A client that takes nothing at all is cut off by the connection's own clock (`server`).
- A heartbeat is a block without data: it keeps proxies from closing the stream, finds clients that
  are gone, and moves the client's last event id past events that its filter left out.
- Trap: `anext` on a generator is never cancelled for a heartbeat: that would end the generator.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Final

from aiohttp import web
from pydantic import Field
from pydantic_core import to_json

from migrd.api.problems import TooManyStreams
from migrd.api.table import Call
from migrd.api.wire import LARGEST_EXACT, MigrationId, Name, WireModel, at
from migrd.engine.service import Published

RETRY_MS: Final = 1000
"""What a browser waits before it connects again."""
LOST: Final = "events.lost"

EventId = Annotated[int, Field(ge=0, le=LARGEST_EXACT)]


class EventsQuery(WireModel):
    vm: Name | None = None
    """Only events of this VM."""
    migration_id: MigrationId | None = None
    """Only events of this migration."""
    after_id: EventId | None = None
    """As Last-Event-ID, for clients that cannot send it; the header wins."""


class EventsHeaders(WireModel):
    last_event_id: Annotated[EventId | None, Field(alias="Last-Event-ID")] = None
    """The id of the last event seen: the stream goes on after it."""


async def stream(call: Call, query: EventsQuery, headers: EventsHeaders) -> web.StreamResponse:
    """Stream events until the client goes or the daemon stops. Raises TooManyStreams."""
    site = call.site
    if site.streams >= site.limits.max_streams:
        raise TooManyStreams(f"{site.streams} event streams are open, the most there may be")
    site.streams += 1
    try:
        after_id = query.after_id if headers.last_event_id is None else headers.last_event_id
        async with call.service.events(after_id=after_id) as published:
            response = web.StreamResponse(
                headers={
                    "Content-Type": "text/event-stream; charset=utf-8",
                    "Cache-Control": "no-store",
                    "X-Accel-Buffering": "no",
                }
            )
            await response.prepare(call.request)
            await response.write(b"retry: %d\n\n" % RETRY_MS)
            await _copy(call, query, published, response)
            return response
    finally:
        site.streams -= 1


async def _copy(
    call: Call,
    query: EventsQuery,
    published: AsyncIterator[Published],
    response: web.StreamResponse,
) -> None:
    """Write every wanted event, and a heartbeat in quiet times, until the end."""
    loop, site, seen = asyncio.get_running_loop(), call.site, None
    closing = loop.create_task(site.closing.wait())
    coming = loop.create_task(_next(published))
    spoke_s = loop.time()
    try:
        while not closing.done():
            quiet_s = spoke_s + site.limits.heartbeat_s - loop.time()
            await asyncio.wait(
                (coming, closing), timeout=max(0.0, quiet_s), return_when=asyncio.FIRST_COMPLETED
            )
            if coming.done():
                event = coming.result()
                seen = seen if event.kind == LOST else event.id
                coming = loop.create_task(_next(published))
                if _is_wanted(event, query):
                    await response.write(block(event))
                    spoke_s = loop.time()
            if loop.time() - spoke_s >= site.limits.heartbeat_s:
                await response.write(_heartbeat(seen))
                spoke_s = loop.time()
    except (StopAsyncIteration, ConnectionError):
        pass  # the engine stops, or the client is gone: both are the end of a stream
    finally:
        for task in (closing, coming):
            task.cancel()
        await asyncio.gather(closing, coming, return_exceptions=True)


async def _next(published: AsyncIterator[Published]) -> Published:
    return await anext(published)


def _is_wanted(event: Published, query: EventsQuery) -> bool:
    if event.kind == LOST:
        return True
    return (query.vm is None or event.vm == query.vm) and (
        query.migration_id is None or event.migration_id == query.migration_id
    )


def block(event: Published) -> bytes:
    """One event as it goes over the wire.

    `events.lost` has no `id` line: what comes after it may be older than the daemon's counter, and
    a client that is cut off right here must be told of the loss again.
    """
    told = {
        "id": event.id,
        "at": at(event.wall_s),
        "kind": event.kind,
        "vm": event.vm,
        "migration_id": event.migration_id,
        "body": event.body,
    }
    content = to_json(told, fallback=str, inf_nan_mode="null")  # never holds a raw line end
    id_line = b"" if event.kind == LOST else b"id: %d\n" % event.id
    return b"%bevent: %b\ndata: %b\n\n" % (id_line, event.kind.encode(), content)


def _heartbeat(seen: int | None) -> bytes:
    return b": alive\n\n" if seen is None else b"id: %d\n: alive\n\n" % seen
