"""What clients see change: one counter, one bounded history, bounded queues.

Every visible change takes the next `resource_version`. A watcher waits for "newer than n"; a reader
of events gets each once, from the history where it still has it, and is told (`events.lost`) when
it has not, or when the reader was too slow. Publishing never waits for anybody.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

from migrd.engine.service import Published


class Stream:
    """The daemon's event stream."""

    def __init__(
        self, *, history: int, queue: int, wall_s: Callable[[], float] = time.time
    ) -> None:
        self._wall_s = wall_s
        self._history: deque[Published] = deque(maxlen=history)
        self._queue = queue
        self._readers: set[_Reader] = set()
        # Starts at the wall clock in microseconds, so that ids still grow after a restart.
        self._version = int(wall_s() * 1_000_000)
        self._newer = asyncio.Event()

    @property
    def resource_version(self) -> int:
        return self._version

    def publish(
        self,
        kind: str,
        body: Mapping[str, object],
        *,
        vm: str | None = None,
        migration_id: str | None = None,
    ) -> int:
        """Tell everyone; returns the resource version of the change."""
        self._version += 1
        event = Published(self._version, self._wall_s(), kind, vm, migration_id, body)
        self._history.append(event)
        for reader in self._readers:
            reader.offer(event)
        self._newer.set()
        self._newer = asyncio.Event()
        return self._version

    async def wait_newer(self, resource_version: int, *, within_s: float) -> int:
        """The version as soon as it exceeds the one given, or when time is over."""
        try:
            async with asyncio.timeout(within_s):
                while self._version <= resource_version:
                    await self._newer.wait()
        except TimeoutError:
            pass  # nothing newer: the caller compares
        return self._version

    @asynccontextmanager
    async def events(self, *, after_id: int | None) -> AsyncIterator[AsyncIterator[Published]]:
        """Read the stream; see `service.Service.events`."""
        reader = _Reader(self._queue, self._lost)
        if after_id is not None:
            self._replay(reader, after_id)
        self._readers.add(reader)
        try:
            yield reader
        finally:
            self._readers.discard(reader)

    def _replay(self, reader: "_Reader", after_id: int) -> None:
        missed = [event for event in self._history if event.id > after_id]
        complete = bool(self._history) and self._history[0].id <= after_id + 1
        if not complete and after_id < self._version:
            reader.offer(self._lost(after_id))
        for event in missed[-self._queue :]:
            reader.offer(event)

    def _lost(self, after_id: int) -> Published:
        body = {"after_id": after_id, "cure": "list migrations and VMs again, then go on reading"}
        return Published(self._version, self._wall_s(), "events.lost", None, None, body)


class _Reader:
    """One reader's bounded queue; overflow empties it and leaves `events.lost`."""

    def __init__(self, limit: int, lost: Callable[[int], Published]) -> None:
        self._limit = limit
        self._lost = lost
        self._events: deque[Published] = deque()
        self._ready = asyncio.Event()
        self._last_id = 0

    def offer(self, event: Published) -> None:
        if len(self._events) > self._limit:
            self._events.clear()
            self._events.append(self._lost(self._last_id))
        self._events.append(event)
        self._ready.set()

    def __aiter__(self) -> "_Reader":
        return self

    async def __anext__(self) -> Published:
        while not self._events:
            self._ready.clear()
            await self._ready.wait()
        event = self._events.popleft()
        self._last_id = event.id
        return event
