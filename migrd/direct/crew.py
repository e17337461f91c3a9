"""The threads of one stream: owned, one per channel, always joined.

What all channels do together ends together: the first failure, or a cancellation, interrupts the
others, and only when every thread is out of its call does the caller go on.
"""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from migrd.direct.channel import Channel
from migrd.engine.threads import in_executor
from migrd.errors import MigrdError, PeerRefused, ReceiveError, StreamError

T = TypeVar("T")


class Crew:
    """As many threads as there are channels; made and used on the event loop."""

    def __init__(self, threads: int, name: str) -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix=name)

    async def together(
        self, calls: Sequence[Callable[[], T]], interrupt: Callable[[MigrdError], None]
    ) -> list[T]:
        """Each call in a thread of its own. Raises the failure that tells most."""
        tasks = [asyncio.ensure_future(in_executor(self._threads, call)) for call in calls]
        cancelled: asyncio.CancelledError | None = None
        while pending := [task for task in tasks if not task.done()]:
            try:
                await asyncio.wait(pending, return_when=asyncio.FIRST_EXCEPTION)
            except asyncio.CancelledError as exc:
                cancelled = exc
            if cancelled is not None or any(t.done() and t.exception() for t in tasks):
                interrupt(StreamError("the transfer was ended here", code="stream_ended"))
        failures = [failure for task in tasks if (failure := task.exception()) is not None]
        if cancelled is not None:
            raise cancelled
        if failures:
            raise min(failures, key=_rank)
        return [task.result() for task in tasks]

    async def alone(self, call: Callable[[], T], interrupt: Callable[[MigrdError], None]) -> T:
        """One call."""
        return (await self.together([call], interrupt))[0]

    def dismiss(self) -> None:
        """When no call is running any more."""
        self._threads.shutdown(wait=True)


def _rank(failure: BaseException) -> int:
    """What the other side said, or did wrong, tells more than that a connection broke."""
    if isinstance(failure, PeerRefused):
        return 0
    if isinstance(failure, ReceiveError):
        return 1
    if isinstance(failure, StreamError):
        return 3 if failure.code == "stream_ended" else 2
    return 1


def interrupt_all(channels: Sequence[Channel], why: MigrdError) -> None:
    for channel in channels:
        with contextlib.suppress(OSError):
            channel.interrupt(why)
