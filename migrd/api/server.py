"""Sockets and connections: where the API listens, and what a slow or hostile client may cost.

    async with serving(app) as server:
        await server.serve_unix(path, mode=0o660, gid=gid)
        await server.serve_tcp("127.0.0.1", 7441, tokens=tokens)

aiohttp (3.14) bounds the size of a request's head but no time: its one clock is the keep-alive. So
each connection here has two more:

    head     from the first byte of a request to the end of its head        else 408 and closed
    unread   from the moment the client stops taking what is sent           else cut off

(the body has its own in `bodies`), there are at most so many connections, and what aiohttp answers
by itself (bytes that are not HTTP, an unknown expectation) becomes problem details, too.

The unix socket: bound, given its owner and mode, and only then listening, so nobody connects before
the permissions are right. A file left by a daemon that died is replaced; one on which somebody
listens is an error. Both are decided under a lock on the directory, so two daemons that start
together cannot take each other's. TCP: never without tokens, and off the loopback never without
TLS.
"""

import asyncio
import errno
import fcntl
import ipaddress
import os
import socket
import ssl
import stat
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import structlog
from aiohttp import web

from migrd.api.app import SITE, of_http, problem_response
from migrd.api.auth import Token
from migrd.api.problems import PROBLEM_TYPE, Malformed, TooManyConnections, TooSlow, problem_of
from migrd.api.table import Limits, to_json
from migrd.engine.threads import in_thread
from migrd.errors import ConfigError, MigrdError

log = structlog.get_logger(__name__)

BACKLOG: Final = 128


class Connection(web.RequestHandler):
    """One client's connection, with its clocks."""

    __slots__ = ("_body", "_head_clock", "_limits", "_unread_clock")

    def __init__(self, server: "Connections", limits: Limits, **kwargs: Any) -> None:
        super().__init__(server, **kwargs)
        self._limits = limits
        self._head_clock: asyncio.TimerHandle | None = None
        self._unread_clock: asyncio.TimerHandle | None = None
        self._body: Any = None
        """Of the newest request: bytes may still belong to it, and not to a head."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        sock = transport.get_extra_info("socket")
        is_unix = sock is not None and sock.family == socket.AF_UNIX
        most = self._limits.max_connections // (1 if is_unix else 2)
        if self._manager is not None and len(self._manager.connections) > most:
            self._refuse(TooManyConnections("there are too many connections"))
        else:
            self._start_head_clock()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._stop(self._head_clock, self._unread_clock)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        was_body = self._body is not None and not self._body.is_eof()
        super().data_received(data)
        if self._messages:
            self._body = self._messages[-1][1]
        if self._messages or self._current_request is not None:
            self._stop(self._head_clock)
            self._head_clock = None
        elif self._head_clock is None and data and not was_body:
            self._start_head_clock()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread_clock = self._loop.call_later(self._limits.unread_within_s, self._cut_off)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop(self._unread_clock)
        self._unread_clock = None

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """What aiohttp answers by itself: bytes that are not HTTP, errors outside the routes."""
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun: there is no other now")
        error: BaseException | None = exc
        if status == 400:
            error = Malformed("this is not a request in HTTP/1.1", code="bad_http")
        else:
            log.error("request failed outside the routes", exc_info=exc)
        response = problem_response(error or MigrdError("internal error"), request)
        response.force_close()
        return response

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        if isinstance(resp, web.HTTPException):
            resp = problem_response(of_http(resp), request)
        return await super().finish_response(request, resp, start_time)

    def _start_head_clock(self) -> None:
        self._head_clock = self._loop.call_later(self._limits.head_within_s, self._head_too_slow)

    def _head_too_slow(self) -> None:
        self._head_clock = None
        if self._messages or self._current_request is not None:
            return
        self._refuse(TooSlow(f"no whole head within {self._limits.head_within_s:g} s"))

    def _refuse(self, error: MigrdError) -> None:
        """Answer without having read a request, and close."""
        if self.transport is None:
            return
        problem = problem_of(error, instance="/", request_id="-")
        body = to_json(problem)
        head = (
            f"HTTP/1.1 {problem.status} {problem.title}\r\n"
            f"Content-Type: {PROBLEM_TYPE}\r\nContent-Length: {len(body)}\r\n"
            "Connection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.force_close()

    def _cut_off(self) -> None:
        self._unread_clock = None
        if isinstance(self.transport, asyncio.Transport):
            self.transport.abort()

    @staticmethod
    def _stop(*clocks: asyncio.TimerHandle | None) -> None:
        for clock in clocks:
            if clock is not None:
                clock.cancel()


class Connections(web.Server):
    """Makes one Connection for each client."""

    def __init__(self, limits: Limits, handler: Any, **kwargs: Any) -> None:
        super().__init__(handler, **kwargs)
        self._limits = limits

    def __call__(self) -> web.RequestHandler:
        return Connection(self, self._limits, loop=self._loop, **self._kwargs)


class _Runner(web.AppRunner):
    """aiohttp's runner, with our connections."""

    async def _make_server(self) -> web.Server:
        made = await super()._make_server()
        return Connections(
            self.app[SITE].limits,
            made.request_handler,
            request_factory=made.request_factory,
            **made._kwargs,
        )


class ApiServer:
    """The listeners of one application."""

    def __init__(self, runner: web.AppRunner) -> None:
        self._runner = runner
        self._files: list[tuple[Path, tuple[int, int]]] = []

    async def serve_unix(
        self, path: Path, *, mode: int = 0o660, uid: int = -1, gid: int = -1
    ) -> None:
        """Listen on a unix socket; -1 leaves owner or group as they are.

        Raises ConfigError: the path is too long, is taken by a file that is no socket, or a daemon
        listens on it.
        """
        sock, identity = await in_thread(bind_unix, path, mode=mode, uid=uid, gid=gid)
        self._files.append((path, identity))
        await web.SockSite(self._runner, sock, backlog=BACKLOG).start()
        log.info("listening", path=str(path))

    async def serve_inherited(self, sock: socket.socket) -> None:
        """Listen on a unix socket that systemd has made, with the owner and mode it gave it."""
        if sock.family != socket.AF_UNIX:
            raise ConfigError("of the sockets systemd hands over, only unix sockets are served")
        await web.SockSite(self._runner, sock, backlog=BACKLOG).start()
        log.info("listening", path=str(sock.getsockname()), by="systemd")

    async def serve_tcp(
        self,
        host: str,
        port: int,
        *,
        tokens: Sequence[Token],
        tls: ssl.SSLContext | None = None,
    ) -> int:
        """Listen on TCP; the port is returned (0 asks for a free one).

        Raises ConfigError without tokens, without TLS off the loopback, or when it cannot be bound.
        """
        if not tokens:
            raise ConfigError("the API listens on TCP only with tokens: set api.tcp.token_file")
        address = "127.0.0.1" if host == "localhost" else host
        if tls is None and not is_loopback(address):
            raise ConfigError(
                f"the API listens on {host} only with TLS: set api.tcp.tls_cert and tls_key, or "
                "listen on 127.0.0.1"
            )
        self._runner.app[SITE].gate.tokens = tuple(tokens)
        site = web.TCPSite(self._runner, address, port, ssl_context=tls, backlog=BACKLOG)
        try:
            await site.start()
        except OSError as error:
            raise ConfigError(f"the API cannot listen on {host}:{port}: {error}") from error
        log.info("listening", host=host, port=site.port, tls=tls is not None)
        return site.port

    async def close(self) -> None:
        """Stop listening, end streams, let calls finish for a while, remove our socket files."""
        await self._runner.cleanup()
        for path, identity in self._files:
            await in_thread(_unlink_own, path, identity)
        self._files.clear()


@asynccontextmanager
async def serving(app: web.Application) -> AsyncIterator[ApiServer]:
    """Run the application; listeners are added to what this yields."""
    limits = app[SITE].limits
    runner = _Runner(
        app,
        access_log=None,
        auto_decompress=False,
        keepalive_timeout=limits.keepalive_s,
        lingering_time=limits.linger_s,
        shutdown_timeout=limits.shutdown_within_s,
    )
    await runner.setup()
    server = ApiServer(runner)
    try:
        yield server
    finally:
        await server.close()


def is_loopback(host: str) -> bool:
    """A literal loopback address; a name is never trusted to be one."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bind_unix(
    path: Path, *, mode: int, uid: int = -1, gid: int = -1
) -> tuple[socket.socket, tuple[int, int]]:
    """A listening socket with its final owner and mode, and its (device, inode). It listens before
    the next one looks: a socket that does not is taken for one that was left behind.

    Blocking. Raises ConfigError.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _locked(path.parent):
            _remove_stale(path)
            sock.bind(str(path))
            try:
                os.chown(path, uid, gid)
                os.chmod(path, mode)
            except OSError:
                path.unlink()
                raise
            sock.listen()
            found = os.stat(path)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise ConfigError(f"the API cannot listen on {path}: {error}") from error
    except BaseException:
        sock.close()
        raise
    return sock, (found.st_dev, found.st_ino)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Held while it is decided whose socket file this is."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _remove_stale(path: Path) -> None:
    try:
        kind = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(kind):
        raise ConfigError(f"{path} is not a socket: remove it, or set api.socket to another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except OSError as error:
            if error.errno == errno.ECONNREFUSED:
                path.unlink()
                return
            raise
    raise ConfigError(f"another daemon listens on {path}: stop it, or set api.socket")


def _unlink_own(path: Path, identity: tuple[int, int]) -> None:
    """Remove our socket file, unless somebody has put another in its place. Blocking."""
    with suppress(FileNotFoundError):
        found = os.lstat(path)
        if (found.st_dev, found.st_ino) == identity:
            path.unlink()
