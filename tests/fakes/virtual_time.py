"""An event loop whose time passes only when nobody has anything to do.

A test of a 30 s deadline takes as long as the work around it. Time jumps to the next timer whenever
no callback is ready, so the order of events depends on the simulated durations alone: a run is
repeatable. Calls into threads are waited for in real time, and take none of the virtual one.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, TypeVar, TypeVarTuple, Unpack

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

BOOT_S = 1_000.0
SOON_S = 0.002
LATER_S = 0.2
THREAD_S = 10.0
WALL_S = 1_700_000_000.0
"""The wall clock at the loop's beginning; far from the monotonic one, so that mixing them shows."""


class Deadlock(BaseException):
    """Everybody waits, and no timer will ever wake anybody."""


class _Jumping(selectors.DefaultSelector):
    loop: VirtualTimeLoop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if self.loop.calls_in_threads:
            return super().select(0 if timeout == 0 else THREAD_S)
        # With nothing but the loop's own pipe, which only threads write to, nothing can be ready.
        ready = super().select(0) if len(self.get_map()) > 1 else []
        if ready or timeout == 0:
            return ready
        if timeout is None:
            raise Deadlock("all tasks wait, and no timer is set")
        self.loop.now_s += max(timeout, 0.0)
        return []


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """`asyncio.new_event_loop` for tests that own the time."""

    def __init__(self) -> None:
        selector = _Jumping()
        selector.loop = self
        self.now_s = BOOT_S
        self.calls_in_threads = 0
        super().__init__(selector)

    def time(self) -> float:
        return self.now_s

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[Unpack[Ts]], T], *args: *Ts
    ) -> asyncio.Future[T]:
        call = super().run_in_executor(executor, func, *args)
        self._begin_call()
        call.add_done_callback(self._end_call)
        return call

    async def shutdown_default_executor(self, *args: Any, **named: Any) -> None:
        self._begin_call()
        try:
            await super().shutdown_default_executor(*args, **named)
        finally:
            self._end_call()

    def _begin_call(self) -> None:
        self.calls_in_threads += 1

    def _end_call(self, _: object = None) -> None:
        self.calls_in_threads -= 1


class LoopClock:
    """The engine's Clock, by the running loop. `jumped_s`: how far its wall clock is off now."""

    def __init__(self, jumped_s: Callable[[], float] = lambda: 0.0) -> None:
        self._jumped_s = jumped_s

    def monotonic_s(self) -> float:
        return asyncio.get_running_loop().time()

    def wall_s(self) -> float:
        return WALL_S + asyncio.get_running_loop().time() - BOOT_S + self._jumped_s()


def now_s() -> float:
    """The simulated monotonic time."""
    return asyncio.get_running_loop().time()


GROWTH = 1.02


async def until(condition: Callable[[], object], *, within_s: float = 60.0, what: str = "") -> None:
    """Wait for a condition; fails the test when it does not come true in time.

    It is looked at often at first, and less so the longer it takes.
    """
    deadline_s, step_s = now_s() + within_s, SOON_S
    while not condition():
        if now_s() >= deadline_s:
            raise AssertionError(f"not within {within_s:g} s: {what or condition}")
        await asyncio.sleep(step_s)
        step_s = min(GROWTH * step_s, LATER_S)
