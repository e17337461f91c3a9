"""An event loop whose time passes only when nobody has anything to do.

A test of a 30 s deadline takes as long as the work around it. Time jumps to the next timer whenever
no callback is ready, so the order of events depends on the simulated durations alone: a run is
repeatable. Calls into threads are made at once, on the loop, and take no time.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

BOOT_S = 1_000.0
SOON_S = 0.002
LATER_S = 0.2
WALL_S = 1_700_000_000.0
"""The wall clock at the loop's beginning; far from the monotonic one, so that mixing them shows."""


class Deadlock(BaseException):
    """Everybody waits, and no timer will ever wake anybody."""


class _Jumping(selectors.DefaultSelector):
    loop: VirtualTimeLoop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
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
        super().__init__(selector)

    def time(self) -> float:
        return self.now_s

    def run_in_executor(  # type: ignore[override]  # the same call, typed for what it returns here
        self, executor: object, func: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        done: asyncio.Future[T] = self.create_future()
        try:
            done.set_result(func(*args))
        except Exception as exc:
            done.set_exception(exc)
        return done


class LoopClock:
    """The engine's Clock, by the running loop."""

    def monotonic_s(self) -> float:
        return asyncio.get_running_loop().time()

    def wall_s(self) -> float:
        return WALL_S + asyncio.get_running_loop().time() - BOOT_S


def now_s() -> float:
    """The simulated monotonic time."""
    return asyncio.get_running_loop().time()


async def until(condition: Callable[[], object], *, within_s: float = 60.0, what: str = "") -> None:
    """Wait for a condition; fails the test when it does not come true in time.

    It is looked at often at first, and less so the longer it takes.
    """
    deadline_s, step_s = now_s() + within_s, SOON_S
    while not condition():
        if now_s() >= deadline_s:
            raise AssertionError(f"not within {within_s:g} s: {what or condition}")
        await asyncio.sleep(step_s)
        step_s = min(1.02 * step_s, LATER_S)
