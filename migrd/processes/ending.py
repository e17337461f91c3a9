"""Undoing a start that did not work: never left half done, however often it is cancelled."""

import asyncio
from collections.abc import Coroutine
from typing import Any

from migrd.errors import VmmError


async def to_the_end(work: Coroutine[Any, Any, VmmError]) -> VmmError:
    """Run `work` to its end, however often this task is cancelled; then be cancelled."""
    task = asyncio.create_task(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
    return task.result()
