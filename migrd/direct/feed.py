"""A transfer as it goes, for whoever watches: each status and round at once, figures at a pace.

    tell(sample) ──► latest ──► a bounded queue for each reader ──► newer

Nothing is asked of anybody here: this daemon itself does what the samples tell of. A slow reader
loses no status and no round: only samples between the first and the last of the same status and
round are dropped.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Final

from migrd.core.facts import TransferSample
from migrd.errors import VmmDied

BOUND: Final = 512


class DirectFeed:
    """One reader's."""

    def __init__(self, look: Callable[[], TransferSample]) -> None:
        self._queue: deque[TransferSample] = deque()
        self._latest = look()
        self._queue.append(self._latest)
        self._ready = asyncio.Event()
        self._death: VmmDied | None = None

    @property
    def latest(self) -> TransferSample | None:
        return self._latest

    async def newer(self, *, within_s: float) -> TransferSample | None:
        """The next sample in order; None when none came. Raises VmmDied after the last one."""
        if not self._queue and self._death is None:
            self._ready.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(within_s):
                    await self._ready.wait()
        if self._queue:
            return self._queue.popleft()
        if self._death is not None:
            raise self._death
        return None

    def take(self, sample: TransferSample) -> None:
        queue, self._latest = self._queue, sample
        if len(queue) >= 2 and _key(queue[-1]) == _key(queue[-2]) == _key(sample):
            queue[-1] = sample
        else:
            if len(queue) >= BOUND:
                queue.popleft()
            queue.append(sample)
        self._ready.set()

    def end(self, death: VmmDied) -> None:
        self._death = death
        self._ready.set()


class Feeds:
    """All readers of one VMM."""

    def __init__(self, look: Callable[[], TransferSample]) -> None:
        """`look` gives the sample of this moment."""
        self._look = look
        self._readers: set[DirectFeed] = set()
        self._death: VmmDied | None = None

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[DirectFeed]:
        reader = DirectFeed(self._look)
        if self._death is not None:
            reader.end(self._death)
        self._readers.add(reader)
        try:
            yield reader
        finally:
            self._readers.discard(reader)

    def tell(self) -> None:
        """Something has changed."""
        if self._readers:
            sample = self._look()
            for reader in self._readers:
                reader.take(sample)

    def end(self, death: VmmDied) -> None:
        """The process is proven dead."""
        self._death = death
        for reader in self._readers:
            reader.end(death)


def _key(sample: TransferSample) -> tuple[object, ...]:
    """What may not be dropped from a queue: a change of any of these."""
    return (
        sample.qemu_status,
        sample.run_state,
        sample.qemu_dirty_sync_count,
        sample.stopped_at_s,
        sample.resumed_at_s,
        sample.device_states,
    )
