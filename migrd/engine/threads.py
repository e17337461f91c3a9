"""Blocking calls, away from the event loop and never abandoned.

`asyncio.to_thread` returns at once when it is cancelled and leaves the call running on something
its owner is about to close. Here a cancellation waits for the call to end, then goes on its way.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from contextvars import copy_context
from functools import partial
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def in_thread(func: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Run `func` in a worker thread; return, or be cancelled, only once it has ended.

    Raises what `func` raises; CancelledError (caused by func's error, if any) when cancelled.
    """
    return await in_executor(None, func, *args, **kwargs)


async def in_executor(
    executor: Executor | None, func: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
) -> T:
    """`in_thread` on a named executor, for callers that need one particular thread."""
    work = partial(copy_context().run, func, *args, **kwargs)
    call = asyncio.get_running_loop().run_in_executor(executor, work)
    cancelled: asyncio.CancelledError | None = None
    while not call.done():
        try:
            await asyncio.wait([call])  # unlike `await call`, does not cancel the call itself
        except asyncio.CancelledError as exc:
            cancelled = exc
    if cancelled is not None:
        raise cancelled from call.exception()
    return call.result()
