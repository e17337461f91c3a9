"""An HTTP server that answers as a test has it: cut, late, too long, or not as etcd does.

    server = OddServer(); async with server: server.answer = Odd(body=b"{")

A real etcd may stand behind it (`target`): then what is not odd is passed on, and its answer is
passed back or kept.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import aiohttp
from aiohttp import web


@dataclass(frozen=True)
class Odd:
    """One answer. `is_cut`: the connection is closed within it; `is_delivered`: etcd gets the
    request first."""

    status: int = 200
    body: bytes = b"{}"
    is_cut: bool = False
    is_silent: bool = False
    is_delivered: bool = False


Answers = Callable[[str, bytes], Odd | None]
"""(path, body) -> what is answered; None: what etcd says."""


class OddServer:
    """On a port of the loopback."""

    def __init__(self, target: str | None = None) -> None:
        self.answers: Answers = lambda path, body: Odd()
        self.paths: list[str] = []
        self._target = target
        self._runner: web.ServerRunner | None = None
        self._port = 0
        self._over = asyncio.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession()
        self._runner = web.ServerRunner(web.Server(self._serve), shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self._port = self._runner.addresses[0][1]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._runner is not None
        self._over.set()
        await self._runner.cleanup()
        await self._session.close()

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        body = await request.read()
        self.paths.append(request.path)
        odd = self.answers(request.path, body)
        told = None
        if odd is None or odd.is_delivered:
            async with self._session.post(f"{self._target}{request.path}", data=body) as answer:
                told = web.Response(status=answer.status, body=await answer.read())
        if odd is None:
            assert told is not None
            return told
        if odd.is_silent:
            await self._over.wait()
        if not odd.is_cut:
            return web.Response(status=odd.status, body=odd.body)
        response = web.StreamResponse(status=odd.status)
        response.content_length = len(odd.body) + 100
        await response.prepare(request)
        await response.write(odd.body)
        assert request.transport is not None
        request.transport.abort()
        return response
