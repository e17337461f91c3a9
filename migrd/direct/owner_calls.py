"""Coroutines of the event loop, called from other threads: one at a time, in one owned task.

thread ── ask(call) ──► queue ──► task: await call() ──► thread goes on, or gets its error
"""

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import Future

from migrd.errors import MigrdError, StreamError

Call = Callable[[], Awaitable[None]]


class OwnerCalls:
    """Made on the event loop; `ask` is for other threads, each of which waits for its answer."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._asked: asyncio.Queue[tuple[Call, Future[None]]] = asyncio.Queue()
        # no bound of its own: each asking thread has one call in it at most
        self._stopped: MigrdError | None = None

    def ask(self, call: Call) -> None:
        """Raises what the call raises; StreamError when the task ends first."""
        answer: Future[None] = Future()
        self._loop.call_soon_threadsafe(self._put, call, answer)
        answer.result()

    async def run(self) -> None:
        """The task; ended by cancelling it, which cancels the call under way."""
        try:
            while True:
                call, answer = await self._asked.get()
                await self._answer(call, answer)
        finally:
            self._stopped = StreamError("the transfer was ended here", code="stream_ended")
            while not self._asked.empty():
                self._asked.get_nowait()[1].set_exception(self._stopped)

    def _put(self, call: Call, answer: Future[None]) -> None:
        if self._stopped is not None:
            answer.set_exception(self._stopped)
        else:
            self._asked.put_nowait((call, answer))

    @staticmethod
    async def _answer(call: Call, answer: Future[None]) -> None:
        try:
            await call()
        except asyncio.CancelledError:
            answer.set_exception(StreamError("the transfer was ended here", code="stream_ended"))
            raise
        except Exception as failure:
            answer.set_exception(failure)
        else:
            answer.set_result(None)
