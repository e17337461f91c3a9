"""One device's blocking calls: one at a time, in a thread of its own, each with a deadline.

    run(call) ──► queue ──► thread ──► future ──► run returns
       │                       │
       └─ deadline: DeviceTimedOut    the call goes on; the next one waits for it first

Traps
- A call that hangs in the kernel cannot be ended, and what it uses must not be closed under it: the
  number of a closed descriptor may be another file's by the time that the call looks. So `close`
  takes its turn behind the call, whenever that ends; nobody waits for it longer than the deadline.
- The thread is a daemon thread: the interpreter would wait for any other at its exit.
- A cancelled caller waits for its call too, within the deadline: what it changes is then known.
"""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

from migrd.errors import DeviceTimedOut

T = TypeVar("T")


class Lane:
    """`name` is for messages."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._calls: SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = SimpleQueue()
        self._turn = asyncio.Lock()
        self._stuck: asyncio.Future[Any] | None = None
        self._stuck_in = ""
        self._is_closed = False
        threading.Thread(target=self._work, name=f"device {name}", daemon=True).start()

    async def run(self, what: str, call: Callable[[], T], *, limit_s: float) -> T:
        """Returns what `call` returns and raises what it raises. `what` is a gerund, for messages.

        Raises DeviceTimedOut when it has not ended in time, or an earlier one has not.
        """
        async with self._turn:
            await self._wait_for_stuck(limit_s)
            future: Future[T] = Future()
            self._calls.put((call, future))
            return await self._ended(what, asyncio.wrap_future(future), limit_s)

    async def close(self, last: Callable[[], None], *, limit_s: float) -> bool:
        """Make `last` the last call, whenever its turn comes; False: it has not come in time."""
        async with self._turn:
            if not self._is_closed:
                self._is_closed = True
                future: Future[None] = Future()
                self._calls.put((last, future))
                self._calls.put(None)
                self._stuck, self._stuck_in = asyncio.wrap_future(future), "closing"
            try:
                await self._wait_for_stuck(limit_s)
            except DeviceTimedOut:
                return False
            return True

    async def _ended(self, what: str, call: asyncio.Future[T], limit_s: float) -> T:
        loop = asyncio.get_running_loop()
        end_s = loop.time() + limit_s
        cancelled: asyncio.CancelledError | None = None
        while not call.done() and loop.time() < end_s:
            try:
                await asyncio.wait([call], timeout=end_s - loop.time())
            except asyncio.CancelledError as exc:
                cancelled = exc
        if not call.done():
            call.add_done_callback(_look_at)
            self._stuck, self._stuck_in = call, what
            late = DeviceTimedOut(
                f"{self._name}: the kernel has not ended {what} within {limit_s:g} s; the call"
                " cannot be broken off, and nothing else is asked of the device before it ends"
            )
            raise cancelled or late
        if cancelled is not None:
            raise cancelled from call.exception()
        return call.result()

    async def _wait_for_stuck(self, limit_s: float) -> None:
        if self._stuck is None:
            return
        await asyncio.wait([self._stuck], timeout=limit_s)
        if not self._stuck.done():
            raise DeviceTimedOut(
                f"{self._name}: the kernel is still {self._stuck_in} it, after a deadline and"
                f" another {limit_s:g} s"
            )
        self._stuck = None

    def _work(self) -> None:
        while (turn := self._calls.get()) is not None:
            call, future = turn
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = call()
            except BaseException as error:  # it is the caller's, whatever it is
                future.set_exception(error)
            else:
                future.set_result(result)


def _look_at(call: asyncio.Future[Any]) -> None:
    """Nobody asks any more what it ended with: asyncio would complain."""
    if not call.cancelled():
        call.exception()
