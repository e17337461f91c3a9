"""What a route is: one declaration that documents, checks and calls.

    @route("GET", "/v1/migrations/{migration_id}", ...)
    async def get_migration(call, path: MigrationPath, query: WatchQuery) -> Reply: ...

The models of `path`, `query`, `headers` and `body` are read from the function's annotations: the
same models check the request here and are written into the OpenAPI document, so neither can be
wrong about the other. All parts are checked before the function is called, and everything that is
wrong with any of them is reported together.
"""

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from typing import Any, Final, NamedTuple, TypeAlias, TypeVar, get_type_hints

import structlog
from aiohttp import web
from pydantic import TypeAdapter

from migrd.api.auth import Gate, Identity, Scope
from migrd.api.bodies import Violations, check_media_type, parse, parse_strings, read_body
from migrd.api.models_migration import Defaults
from migrd.api.problems import TimedOut
from migrd.api.wire import WireModel
from migrd.engine.service import Service
from migrd.errors import Invalid, Violation

T = TypeVar("T")
V = TypeVar("V")

log = structlog.get_logger(__name__)

_AT_A_TIME: Final = 25
"""Items of a list that are rendered before other calls get their turn."""
_MOST_KEPT: Final = 2048
_TOO_LONG: Final = "it takes too long; it may or may not take effect: look before you ask again"
JSON_TYPE: Final = "application/json"


class Scrape(NamedTuple):
    """Rendered metrics."""

    body: bytes
    content_type: str
    etag: str
    """With its quotes."""
    gzipped: bytes | None = None


MetricsSnapshot: TypeAlias = Callable[[], tuple[bytes, str, str] | Scrape]


@dataclass(frozen=True)
class Limits:
    """What a client may cost."""

    body_limit_bytes: int = 64 * 1024
    body_within_s: float = 10.0
    head_within_s: float = 10.0
    """From the first byte of a request to the end of its head."""
    answer_within_s: float = 60.0
    """For one call into the engine; long polls add what they wait."""
    keepalive_s: float = 75.0
    """An idle connection is closed after so long (longer than common proxies keep theirs)."""
    unread_within_s: float = 60.0
    """A client that takes nothing of what is sent for so long is cut off."""
    linger_s: float = 2.0
    """So long what a refused client still sends is read away, so that it sees the answer."""
    max_connections: int = 512
    """Of these at most half on TCP: whoever floods the port does not lock out the unix socket."""
    max_streams: int = 64
    """Event streams at one time."""
    heartbeat_s: float = 15.0
    shutdown_within_s: float = 5.0


@dataclass
class Site:
    """What the calls work on: one for each application."""

    service: Service
    metrics: MetricsSnapshot
    defaults: Defaults
    limits: Limits
    gate: Gate
    closing: asyncio.Event = field(default_factory=asyncio.Event)
    """Set at shutdown: streams and long polls end."""
    streams: int = 0
    openapi: bytes | None = None
    unfinished: set[asyncio.Task[Any]] = field(default_factory=set)
    """Calls whose clients have been told that they took too long."""

    kept: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    """Id of an ended migration -> its generation and JSON: it will not change any more."""

    def keep(self, id_: str, generation: int, rendered: bytes) -> bytes:
        """Remember `rendered`; the oldest is forgotten when there are too many."""
        if len(self.kept) >= _MOST_KEPT:
            del self.kept[next(iter(self.kept))]
        self.kept[id_] = generation, rendered
        return rendered

    async def in_time(self, doing: Awaitable[T], *, within_s: float) -> T:
        """What `doing` returns or raises, or TimedOut.

        A call that takes too long is not broken off, which could leave half of it done: it goes on
        without its client, and is ended only when the daemon stops (`end_unfinished`).
        """
        task = asyncio.ensure_future(doing)
        try:
            done, _ = await asyncio.wait((task,), timeout=within_s)
        except asyncio.CancelledError:
            task.cancel()
            await asyncio.wait((task,))
            raise
        if not done:
            self.unfinished.add(task)
            task.add_done_callback(self._finished_late)
            raise TimedOut(_TOO_LONG)
        try:
            return task.result()
        except TimeoutError as error:  # of a step inside that has a deadline of its own
            raise TimedOut(_TOO_LONG) from error

    def _finished_late(self, task: asyncio.Task[Any]) -> None:
        self.unfinished.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.warning("a call failed after its client was told to look", exc_info=error)

    async def end_unfinished(self) -> None:
        """Cancel what clients no longer wait for, and wait for its end."""
        for task in self.unfinished:
            task.cancel()
        if self.unfinished:
            await asyncio.wait(self.unfinished)


@dataclass(frozen=True)
class Call:
    """One request, identified and checked."""

    site: Site
    request: web.Request
    by: Identity

    @property
    def service(self) -> Service:
        return self.site.service


@dataclass(frozen=True)
class Reply:
    """An answer, ready to be sent."""

    status: int
    body: bytes = b""
    content_type: str = JSON_TYPE
    headers: Mapping[str, str] = field(default_factory=dict)

    def response(self) -> web.Response:
        # a fresh object: aiohttp writes into it
        headers = {"Content-Type": self.content_type, **self.headers} if self.body else self.headers
        return web.Response(status=self.status, body=self.body or None, headers=headers)


@cache
def _adapter(kind: type[WireModel]) -> TypeAdapter[WireModel]:
    return TypeAdapter(kind)


def to_json(model: WireModel) -> bytes:
    """One pass from objects to bytes, without a dict in between."""
    return _adapter(type(model)).dump_json(model)


def reply(model: WireModel, status: int = 200, **headers: str) -> Reply:
    """`model` as the answer; header names with `_` for `-`."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply(status, to_json(model), headers=named)


async def reply_list(
    version: int | None, items: Sequence[V], render: Callable[[V], bytes], page_token: str | None
) -> Reply:
    """A list model's JSON, put together from the JSON of its items.

    Other calls get their turn in between: a thousand items are tens of milliseconds.
    """
    rendered: list[bytes] = []
    for start in range(0, len(items), _AT_A_TIME):
        if start:
            await asyncio.sleep(0)
        rendered += map(render, items[start : start + _AT_A_TIME])
    head = b"{" if version is None else b'{"resource_version":%d,' % version
    token = b"null" if page_token is None else b'"%b"' % page_token.encode()
    body = b'%b"items":[%b],"next_page_token":%b}' % (head, b",".join(rendered), token)
    return Reply(200, body)


class Tag(StrEnum):
    """Groups of routes in the document."""

    HOST = "host"
    DEVICES = "devices"
    VMS = "vms"
    MIGRATIONS = "migrations"
    EVENTS = "events"
    SERVICE = "service"


@dataclass(frozen=True)
class Answer:
    """One good answer of a route, for the document."""

    meaning: str
    model: type[WireModel] | None = None
    content_type: str = JSON_TYPE
    headers: tuple[str, ...] = ()


Function: TypeAlias = Callable[..., Awaitable[Reply | web.StreamResponse]]


@dataclass(frozen=True)
class Route:
    """One method on one path."""

    method: str
    path: str
    tag: Tag
    scope: Scope
    answers: Mapping[int, Answer]
    problems: tuple[int, ...]
    """Statuses this route adds to those that every route may answer."""
    function: Function
    path_model: type[WireModel] | None
    query_model: type[WireModel] | None
    headers_model: type[WireModel] | None
    body_model: type[WireModel] | None
    is_stream: bool

    @property
    def name(self) -> str:
        return self.function.__name__

    async def call(self, call: Call) -> web.StreamResponse:
        """Check all parts, call the function, send what it answers."""
        arguments = await self._arguments(call)
        waits_s = float(getattr(arguments.get("query"), "timeout_s", 0.0))
        within_s = call.site.limits.answer_within_s + waits_s
        answer: Reply | web.StreamResponse
        if self.is_stream or self.scope is Scope.OPEN:
            answer = await self.function(call, **arguments)
        elif self.method == "GET":
            try:
                async with asyncio.timeout(within_s):
                    answer = await self.function(call, **arguments)
            except TimeoutError as error:
                raise TimedOut(_TOO_LONG) from error
        else:
            answer = await call.site.in_time(self.function(call, **arguments), within_s=within_s)
        return answer.response() if isinstance(answer, Reply) else answer

    async def _arguments(self, call: Call) -> dict[str, WireModel]:
        arguments: dict[str, WireModel] = {}
        wrong: list[Violation] = []

        def take(name: str, parsed: Callable[[], WireModel]) -> None:
            try:
                arguments[name] = parsed()
            except Violations as found:
                wrong.extend(found.violations)

        request = call.request
        body = await self._body(call)
        if path_model := self.path_model:
            segments = list(request.match_info.items())
            take("path", lambda: parse_strings(path_model, segments, "the path's"))
        if self.query_model is not None or request.query_string:
            query_model = self.query_model or NoQuery
            queries = list(request.query.items())
            take("query", lambda: parse_strings(query_model, queries, "parameter"))
        if headers_model := self.headers_model:
            headers = _known_headers(headers_model, request)
            take("headers", lambda: parse_strings(headers_model, headers, "header"))
        if body_model := self.body_model:
            take("body", lambda: parse(body_model, body))
        if wrong:
            raise Invalid(_summary(wrong), wrong)
        if self.query_model is None:
            arguments.pop("query", None)
        return arguments

    async def _body(self, call: Call) -> bytes:
        """The body where one is wanted; any other is read away only to keep the framing."""
        if self.body_model is None:
            return b""
        check_media_type(call.request)
        limits = call.site.limits
        return await read_body(
            call.request, limit_bytes=limits.body_limit_bytes, within_s=limits.body_within_s
        )


class NoQuery(WireModel):
    """For routes that take no parameters: any is an error, not something silently ignored."""


def _summary(wrong: list[Violation]) -> str:
    first = wrong[0].message
    return first if len(wrong) == 1 else f"{first} (and {len(wrong) - 1} more: see violations)"


def _known_headers(model: type[WireModel], request: web.Request) -> list[tuple[str, str]]:
    names = {(f.alias or name).lower(): f.alias or name for name, f in model.model_fields.items()}
    return [
        (names[key.lower()], value)
        for key, value in request.headers.items()
        if key.lower() in names
    ]


ROUTES: Final[list[Route]] = []
"""Every route there is, in the order of the document."""


def route(
    method: str,
    path: str,
    *,
    tag: Tag,
    scope: Scope,
    answers: Mapping[int, Answer],
    problems: tuple[int, ...] = (),
) -> Callable[[Function], Function]:
    """Declare a route; the function's docstring is its documentation."""

    def declare(function: Function) -> Function:
        hints: dict[str, Any] = get_type_hints(function)
        assert inspect.getdoc(function), f"{function.__name__} says nothing"
        ROUTES.append(
            Route(
                method=method,
                path=path,
                tag=tag,
                scope=scope,
                answers=answers,
                problems=problems,
                function=function,
                path_model=hints.get("path"),
                query_model=hints.get("query"),
                headers_model=hints.get("headers"),
                body_model=hints.get("body"),
                is_stream=hints["return"] is web.StreamResponse,
            )
        )
        return function

    return declare
