"""The application: the route table on aiohttp, behind one middleware.

    request id > who asks > may they > the route (checks, call) > answer
                        any error on the way > problem details, logged once with the request id

Log levels: debug for every request; info for what was refused; error, with the traceback, for what
went wrong inside. A client sees the request id (X-Request-Id) and never a traceback.
"""

import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

import structlog
from aiohttp import web

from migrd.api import routes, routes_devices, routes_host, routes_plug, routes_sampling
from migrd.api.auth import Gate, Identity, Scope
from migrd.api.models_migration import Defaults
from migrd.api.problems import (
    PROBLEM_TYPE,
    Malformed,
    MethodNotAllowed,
    NoSuchRoute,
    Unexpected,
    ends_connection,
    headers_of,
    problem_of,
    status_of,
)
from migrd.api.table import ROUTES, Call, Limits, MetricsSnapshot, Route, Site, to_json
from migrd.engine.service import Service
from migrd.errors import MigrdError, NotAuthorized, RequestError, TooLarge

DECLARED_IN: Final = (routes_host, routes_devices, routes_plug, routes_sampling, routes)
"""Importing these fills ROUTES."""

log = structlog.get_logger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

SITE: Final = web.AppKey("SITE", Site)
BOUND: Final = web.AppKey("BOUND", dict[Handler, Route])
REQUEST_ID: Final = web.RequestKey("REQUEST_ID", str)
BY: Final = web.RequestKey("BY", Identity)
_NOBODY: Final = Identity("nobody", Scope.OPEN)
_ID_OF_CLIENT: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_PARAMETER: Final = re.compile(r"\{(\w+)\}")
_SEGMENT: Final = {"address": "(?:(?!:[a-z]{5,}$)[^/{}])+"}
"""PCI addresses hold colons: of theirs, only a verb at the end (`:probe`) is not part. No part of
an address has five letters."""


def build_app(
    service: Service,
    *,
    metrics: MetricsSnapshot,
    defaults: Defaults | None = None,
    limits: Limits | None = None,
    gate: Gate | None = None,
) -> web.Application:
    """The application over a running engine; `server.serving` puts it on sockets.

    `metrics` returns what was last rendered (bytes, content type, quoted ETag) and must not
    block. `defaults` stand in for what a request leaves out.
    """
    site = Site(service, metrics, defaults or Defaults(), limits or Limits(), gate or Gate())
    app = web.Application(middlewares=[_front], client_max_size=site.limits.body_limit_bytes)
    app[SITE] = site
    app[BOUND] = {}
    for route in ROUTES:
        _add(app, route)
    app.on_shutdown.append(_close_streams)
    app.on_cleanup.append(_end_unfinished)
    return app


def _add(app: web.Application, route: Route) -> None:
    async def bound(request: web.Request) -> web.StreamResponse:
        return await route.call(Call(app[SITE], request, request[BY]))

    app[BOUND][bound] = route
    resource = _PARAMETER.sub(_parameter, route.path)
    methods = ["GET", "HEAD"] if route.method == "GET" and not route.is_stream else [route.method]
    for method in methods:
        app.router.add_route(method, resource, bound, expect_handler=_expect)


def _parameter(found: re.Match[str]) -> str:
    name = found[1]
    return f"{{{name}:{_SEGMENT.get(name, '[^/:{}]+')}}}"


async def _close_streams(app: web.Application) -> None:
    app[SITE].closing.set()


async def _end_unfinished(app: web.Application) -> None:
    await app[SITE].end_unfinished()


async def _expect(request: web.Request) -> None:
    """`100-continue` is answered when the body is read: after all that could refuse it."""
    if request.headers.get("Expect", "").lower() != "100-continue":
        raise web.HTTPExpectationFailed


@web.middleware
async def _front(request: web.Request, handler: Handler) -> web.StreamResponse:
    request_id = request_id_of(request)
    structlog.contextvars.bind_contextvars(request_id=request_id)
    begun_s = time.monotonic()
    try:
        response = await _admit(request, handler)
    except Exception as error:
        mapped = of_http(error) if isinstance(error, web.HTTPException) else error
        if request.writer.output_size > 0:
            raise  # the answer has begun: the connection is cut
        response = problem_response(mapped, request)
        _log_error(mapped, request)
    if not response.prepared:
        response.headers["X-Request-Id"] = request_id
        response.headers["Server"] = "migrd"
    log.debug(
        "request answered",
        method=request.method,
        path=request.rel_url.raw_path[:256],
        status=response.status,
        duration_ms=round((time.monotonic() - begun_s) * 1000, 3),
    )
    return response


async def _admit(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Who asks is known before anything else is: also before what does not exist."""
    app = request.app
    route = app[BOUND].get(request.match_info.route.handler)
    scope = Scope.READ if route is None else route.scope
    if scope is Scope.OPEN:
        request[BY] = _NOBODY
    else:
        by = await app[SITE].gate.identify(request)
        by.require(scope)
        request[BY] = by
    return await handler(request)


def request_id_of(request: web.BaseRequest) -> str:
    """The client's X-Request-Id where it is plain, else one of ours; the same for one request."""
    if REQUEST_ID not in request:
        given = request.headers.get("X-Request-Id", "")
        request[REQUEST_ID] = given if _ID_OF_CLIENT.fullmatch(given) else secrets.token_hex(8)
    return request[REQUEST_ID]


def of_http(error: web.HTTPException) -> RequestError:
    """What the framework raises by itself, in our words."""
    match error:
        case web.HTTPNotFound():
            return NoSuchRoute("there is nothing at this path; /openapi.json lists what there is")
        case web.HTTPMethodNotAllowed():
            allow = [str(method) for method in error.allowed_methods]
            return MethodNotAllowed(
                f"{error.method[:32]} is not possible here; possible: {', '.join(sorted(allow))}",
                allow,
            )
        case web.HTTPRequestEntityTooLarge():
            return TooLarge("the body is too long")
        case web.HTTPExpectationFailed():
            return Unexpected("the only expectation met here is 100-continue")
        case _:
            return Malformed(f"{error.status} {error.reason}")


def problem_response(error: BaseException, request: web.BaseRequest) -> web.Response:
    """The answer to a request that failed."""
    request_id = request_id_of(request)
    problem = problem_of(error, instance=request.rel_url.raw_path[:512], request_id=request_id)
    response = web.Response(
        status=problem.status,
        body=to_json(problem),
        headers={"Content-Type": PROBLEM_TYPE, "X-Request-Id": request_id, **headers_of(error)},
    )
    if ends_connection(error):
        response.force_close()
    return response


def _log_error(error: BaseException, request: web.Request) -> None:
    where: Mapping[str, str] = {
        "method": request.method[:32],
        "path": request.rel_url.raw_path[:256],
    }
    if not isinstance(error, MigrdError) or status_of(type(error)) == 500:
        log.error("request failed inside", exc_info=error, **where)
    elif isinstance(error, RequestError | NotAuthorized):
        log.info("request refused", code=error.code, reason=error.message, **where)
    else:
        log.warning("request not done", code=error.code, reason=error.message, **where)
