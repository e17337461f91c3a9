"""An event loop for simulations: virtual time, no selector, no threads, nothing left behind.

What asyncio's own loop spends on sockets, threads and debugging is most of a simulated run's time.
Here is only what tasks need: a queue of what is ready, in the order in which it became so, and a
heap of timers. When nothing is ready, time jumps to the next timer. A call into a thread is made on
the spot, and its caller is told in its turn.

`run` fails when tasks are left that nobody ended (I9), and tells of errors that nobody took.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context, copy_context
from heapq import heappop, heappush
from typing import Any, TypeVar
from weakref import ref

from tests.fakes.virtual_time import BOOT_S, Deadlock

T = TypeVar("T")
LATER_S = 1e-9
"""Timers so close are one."""
MOST_STEPS = 2_000_000
"""A run that takes more goes round in circles."""


class Handle:
    """What will be called."""

    __slots__ = ("args", "callback", "context", "is_cancelled", "when_s")

    def __init__(
        self,
        callback: Callable[..., object],
        args: tuple[Any, ...],
        context: Context,
        when_s: float,
    ) -> None:
        self.callback = callback
        self.args = args
        self.context = context
        self.when_s = when_s
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True

    def cancelled(self) -> bool:
        return self.is_cancelled

    def when(self) -> float:
        return self.when_s


class SimLoop:
    """For one run. It has what tasks ask of a loop, and nothing that they do not."""

    def __init__(self) -> None:
        self._myself: Any = self
        self.now_s = BOOT_S
        self.steps = 0
        self.untaken: list[str] = []
        """Errors that nobody took."""
        self._ready: deque[Handle] = deque()
        self._timers: list[tuple[float, int, Handle]] = []
        self._tasks: list[ref[asyncio.Task[Any]]] = []
        self._count = 0
        self._is_closed = False

    # What tasks and futures ask for -------------------------------------------------------------

    def time(self) -> float:
        return self.now_s

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return asyncio._get_running_loop() is self._myself

    def is_closed(self) -> bool:
        return self._is_closed

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self._myself)

    def create_task(
        self,
        coro: Coroutine[Any, Any, T],
        *,
        name: object = None,
        context: Context | None = None,
    ) -> asyncio.Task[T]:
        task = asyncio.Task(coro, loop=self._myself, name=str(name), context=context)
        self._tasks.append(ref(task))
        return task

    def call_soon(
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> Handle:
        handle = Handle(callback, args, copy_context() if context is None else context, 0.0)
        self._ready.append(handle)
        return handle

    def call_at(
        self,
        when: float,
        callback: Callable[..., object],
        *args: Any,
        context: Context | None = None,
    ) -> Handle:
        handle = Handle(callback, args, copy_context() if context is None else context, when)
        self._count += 1
        heappush(self._timers, (when, self._count, handle))
        return handle

    def call_later(
        self,
        delay: float,
        callback: Callable[..., object],
        *args: Any,
        context: Context | None = None,
    ) -> Handle:
        return self.call_at(self.now_s + delay, callback, *args, context=context)

    def run_in_executor(self, executor: object, func: Any, *args: Any) -> asyncio.Future[Any]:
        call = self.create_future()
        try:
            call.set_result(func(*args))
        except Exception as exc:  # it is the caller's, in its turn
            call.set_exception(exc)
        return call

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self.untaken.append(f"{context.get('message')}: {context.get('exception')!r}")

    # Running ------------------------------------------------------------------------------------

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Until it is done. Raises what it raises."""
        asyncio._set_running_loop(self._myself)
        try:
            task = self.create_task(work)
            self._turn(task)
            left = [each for of in self._tasks if (each := of()) is not None and not each.done()]
            assert task.exception() is not None or not left, f"I9: nobody ended {left}"
            assert task.exception() is not None or not self.untaken, self.untaken
            return task.result()
        finally:
            asyncio._set_running_loop(None)
            self._is_closed = True

    def _turn(self, task: asyncio.Task[Any]) -> None:
        ready, timers = self._ready, self._timers
        while not task.done():
            if not ready:
                while timers and timers[0][2].is_cancelled:
                    heappop(timers)
                if not timers:
                    raise Deadlock("all tasks wait, and no timer is set")
                self.now_s = max(self.now_s, timers[0][0])
                end_s = self.now_s + LATER_S
                while timers and timers[0][0] <= end_s:
                    handle = heappop(timers)[2]
                    if not handle.is_cancelled:
                        ready.append(handle)
            for _ in range(len(ready)):
                handle = ready.popleft()
                if not handle.is_cancelled:
                    self.steps += 1
                    handle.context.run(handle.callback, *handle.args)
            if self.steps > MOST_STEPS:
                raise Deadlock(f"{self.steps} steps without an end")
