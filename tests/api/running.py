"""A running API over a simulated engine, and ways to talk to it: politely, or by the byte."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
from multidict import CIMultiDict

from migrd.api.app import build_app
from migrd.api.auth import Gate
from migrd.api.models import Problem
from migrd.api.server import ApiServer, serving
from migrd.api.table import Limits
from tests.fakes.service import FakeService

DEADLINE_S = 10.0
METRICS = (b"# HELP x y\n", "text/plain; version=0.0.4; charset=utf-8", '"m1"')


@dataclass(frozen=True)
class Got:
    """An answer, whole."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def problem(self, status: int, code: str) -> Problem:
        """The problem details; fails unless they are just these."""
        assert self.status == status, (self.status, self.body)
        assert self.headers["Content-Type"] == "application/problem+json", self.headers
        problem = Problem.model_validate_json(self.body)
        assert problem.status == status
        assert problem.code == code, problem
        return problem


@dataclass
class Api:
    """One running API."""

    service: FakeService
    server: ApiServer
    path: Path
    session: aiohttp.ClientSession

    async def __call__(
        self,
        method: str,
        where: str,
        body: object = None,
        *,
        content: bytes | None = None,
        **headers: str,
    ) -> Got:
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if body is not None:
            content = json.dumps(body).encode()
        if content is not None:
            sent.setdefault("Content-Type", "application/json")
        async with (
            asyncio.timeout(DEADLINE_S),
            self.session.request(
                method, f"http://migrd{where}", data=content, headers=sent, allow_redirects=False
            ) as response,
        ):
            return Got(response.status, response.headers.copy(), await response.read())

    async def begun(self, vm: str = "web-1") -> str:
        """The id of a fresh migration."""
        if vm not in self.service.known_vms:
            self.service.add_vm(vm)
        got = await self("POST", "/v1/migrations", {"vm": vm, "destination": "host-b"})
        assert got.status == 202, got
        id_: str = got.json["id"]
        return id_

    async def raw(self, sent: bytes) -> Got | None:
        """Send bytes, then read what comes until the server closes; None: nothing came."""
        async with self.wire() as wire:
            await wire.send(sent)
            return parse_http(await wire.to_the_end())

    @asynccontextmanager
    async def wire(self) -> AsyncIterator["Wire"]:
        """A bare connection."""
        sock = socket.socket(socket.AF_UNIX)
        sock.setblocking(False)
        with sock:
            async with asyncio.timeout(DEADLINE_S):
                await asyncio.get_running_loop().sock_connect(sock, str(self.path))
                yield Wire(sock)


class Wire:
    """A connection by the byte. (Streams would forget what arrived when the server resets.)"""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._loop = asyncio.get_running_loop()

    async def send(self, content: bytes) -> None:
        with suppress(ConnectionError):  # it may have answered already and closed
            await self._loop.sock_sendall(self._sock, content)

    async def some(self) -> bytes:
        """What comes next; b"" when the server has closed."""
        try:
            return await self._loop.sock_recv(self._sock, 65536)
        except ConnectionResetError:
            return b""

    async def to_the_end(self) -> bytes:
        content = bytearray()
        while chunk := await self.some():
            content += chunk
        return bytes(content)

    async def trickled(self, first: bytes, rest: bytes) -> bytes:
        """What the server says to `first`, followed by `rest` again and again, until it closes."""

        async def trickle() -> None:
            await self.send(first)
            while True:
                await self.send(rest)
                await asyncio.sleep(0.02)

        async with asyncio.TaskGroup() as tasks:
            slowly = tasks.create_task(trickle())
            content = await self.to_the_end()
            slowly.cancel()
        return content


def parse_http(content: bytes) -> Got | None:
    """The first answer in what a server sent."""
    if not content:
        return None
    head, _, body = content.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers: CIMultiDict[str] = CIMultiDict()
    for line in lines:
        name, _, value = line.partition(": ")
        headers[name] = value
    length = int(headers.get("Content-Length", len(body)))
    return Got(int(first.split(" ")[1]), headers, body[:length])


@asynccontextmanager
async def running(
    tmp_path: Path,
    *,
    service: FakeService | None = None,
    limits: Limits | None = None,
    gate: Gate | None = None,
    **more: Any,
) -> AsyncIterator[Api]:
    """An API on a unix socket, with a client."""
    service = service or FakeService()
    limits = replace(limits or Limits(), linger_s=0.2)
    app = build_app(service, metrics=lambda: METRICS, limits=limits, gate=gate, **more)
    path = tmp_path / "api.sock"
    async with serving(app) as server:
        await server.serve_unix(path)
        connector = aiohttp.UnixConnector(path=str(path))
        async with aiohttp.ClientSession(connector=connector) as session:
            yield Api(service, server, path, session)


async def until(condition: Any, *, deadline_s: float = DEADLINE_S) -> None:
    """Wait until `condition()` holds; fail at the deadline."""
    async with asyncio.timeout(deadline_s):
        while not condition():  # noqa: ASYNC110 - the condition is anything
            await asyncio.sleep(0.005)
