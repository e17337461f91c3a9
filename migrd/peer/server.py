"""The listener for other hosts' migrd: HTTP around `answering`, inside mutual TLS.

    TCP > TLS 1.3 with a certificate of our CA > its name is on the roster > /peer/v1/<call>

- A caller that hangs up does not stop its call (`peer_service`, rule 4): each call is a task of its
  own, and only the waiting for it ends with the connection. A `view` has nothing to finish and ends
  too, else each lost connection would leave one behind. When the listener closes, the calls get a
  moment to end by themselves.
- aiohttp sets no limit on the time a body takes, and keeps connections for an hour: both are set
  here. The handshake has its own limit, so a stranger holds a socket for five seconds at most.
- TCP_NODELAY is on: asyncio sets it on every TCP connection.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Container
from dataclasses import dataclass
from typing import Final

import structlog
from aiohttp import web
from aiohttp.typedefs import Handler

from migrd.core.certificate import identity
from migrd.engine.peer_service import PeerService
from migrd.errors import ConfigError, MigrdError, NotAuthorized, TooLarge
from migrd.peer.answering import Reply, answer, problem, problem_reply
from migrd.peer.messages import CALLS, MAX_REQUEST_BYTES, PATH, PROTOCOL_HEADER, Observe
from migrd.peer.tls import PeerTls

KEEP_ALIVE_S: Final = 150.0
"""Longer than clients keep theirs, so that it is the client who hangs up an idle connection."""
BODY_S: Final = 5.0
HANDSHAKE_S: Final = 5.0
_SHUTDOWN_S: Final = 2.0
_BACKLOG: Final = 128

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class PeerListener:
    """The listener, once it accepts connections."""

    host: str
    port: int


@contextlib.asynccontextmanager
async def serve_peers(
    service: PeerService,
    roster: Container[str],
    tls: PeerTls,
    host: str,
    port: int,
    *,
    observe: Observe | None = None,
) -> AsyncIterator[PeerListener]:
    """Listen on `host`:`port` (0: any) for as long as the context lasts.

    `roster` holds the names of the other hosts, in lower case; it may change at any time.
    Raises ConfigError when the address cannot be had.
    """
    runner = web.AppRunner(
        peer_app(service, roster, observe=observe),
        access_log=None,
        keepalive_timeout=KEEP_ALIVE_S,
        shutdown_timeout=_SHUTDOWN_S,
        handler_cancellation=True,
    )
    await runner.setup()
    try:
        server = await _listen(runner, tls, host, port)
        try:
            address = server.sockets[0].getsockname()
            yield PeerListener(str(address[0]), int(address[1]))
        finally:
            server.close()
    finally:
        await runner.cleanup()


async def _listen(runner: web.AppRunner, tls: PeerTls, host: str, port: int) -> asyncio.Server:
    """By ourselves, since aiohttp's sites offer no limit on the handshake."""
    assert runner.server is not None
    try:
        return await asyncio.get_running_loop().create_server(
            runner.server,
            host,
            port,
            ssl=tls.server,
            ssl_handshake_timeout=HANDSHAKE_S,
            ssl_shutdown_timeout=_SHUTDOWN_S,
            backlog=_BACKLOG,
            reuse_address=True,
        )
    except OSError as failure:
        raise ConfigError(
            f"cannot listen for peers on {host}:{port}: {failure.strerror or failure}"
        ) from failure


def peer_app(
    service: PeerService, roster: Container[str], *, observe: Observe | None = None
) -> web.Application:
    """The application alone; it believes the TLS of the connection it runs on, and needs one."""

    calls: set[asyncio.Task[Reply]] = set()

    async def serve(request: web.Request) -> web.Response:
        started_s = time.monotonic()
        call = request.match_info["call"]
        try:
            caller = _caller(request, roster)
            body = await _body(request)
            protocol = request.headers.get(PROTOCOL_HEADER)
            task = asyncio.create_task(answer(service, caller, call, protocol, body))
            calls.add(task)
            task.add_done_callback(calls.discard)
            reply = await (task if call == "view" else asyncio.shield(task))
        except MigrdError as error:
            return _response(problem_reply(error))
        if observe is not None and call in CALLS:
            outcome = "ok" if reply.status == 200 else "problem"
            observe(caller, call, outcome, time.monotonic() - started_s)
        return _response(reply)

    async def end_calls(app: web.Application) -> None:
        if calls:
            _, late = await asyncio.wait(calls, timeout=_SHUTDOWN_S)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late)

    app = web.Application(middlewares=[_only_problems], client_max_size=MAX_REQUEST_BYTES)
    app.router.add_post(PATH + "{call}", serve)
    app.on_cleanup.append(end_calls)
    return app


@web.middleware
async def _only_problems(request: web.Request, handler: Handler) -> web.StreamResponse:
    """The framework's own errors (404, 405, 413) as problems too."""
    try:
        return await handler(request)
    except web.HTTPException as failure:
        reason = failure.reason or "refused"
        return _response(problem(failure.status, reason, reason, "bad_request"))


def _caller(request: web.Request, roster: Container[str]) -> str:
    """The roster's name for whoever is at the other end. Raises NotAuthorized."""
    transport = request.transport
    names = identity(None if transport is None else transport.get_extra_info("peercert"))
    known = [name for name in names if name in roster]
    if len(known) == 1:
        return known[0]
    log.warning("peer.stranger", names=names, remote=request.remote)
    if known:
        raise NotAuthorized(
            f"the certificate names several hosts of the roster ({', '.join(known)}): each host"
            " needs its own",
            code="ambiguous_identity",
        )
    raise NotAuthorized(
        f"{', '.join(names) or 'a certificate without a name'} is not on this host's roster:"
        " add it there if it belongs to the fleet",
        code="not_on_roster",
    )


async def _body(request: web.Request) -> bytes:
    try:
        async with asyncio.timeout(BODY_S):
            return await request.read()
    except TimeoutError:
        raise web.HTTPRequestTimeout(reason=f"the body took longer than {BODY_S:g} s") from None
    except web.HTTPRequestEntityTooLarge:
        raise TooLarge(
            f"a message may have {MAX_REQUEST_BYTES} bytes at most", code="message_too_large"
        ) from None


def _response(reply: Reply) -> web.Response:
    kind = "application/json" if reply.status == 200 else "application/problem+json"
    headers = {} if reply.protocol is None else {PROTOCOL_HEADER: reply.protocol}
    return web.Response(status=reply.status, body=reply.body, content_type=kind, headers=headers)
