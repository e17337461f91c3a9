"""Harvest rounds: every source read and cleared, and nothing of it ever lost.

    sources ── read_and_clear, in threads ──► buffers ──► fresh ──► pending ──► the mover takes it
                                              (reused)   (a round)  (what is dirty and not moved)

`Harvest` is the sole owner of `pending`, one for each transfer:

    start     tracking on for all, then every page is pending
    round     all sources read at the same time; what they told is pending when it returns
    stop      tracking off for all, whatever fails

Rules
1. A clearing read destroys what it reads. So reading and merging are one call in one worker thread,
   which nothing can cancel; a cancelled `round` ends when that call has ended, with all bits in
   `pending`. The same holds for start and stop: none is left half done in the background.
2. A failed round takes nothing back: what was cleared stays pending, for the next attempt too.
3. A source that cannot be read is never taken for clean. What then happens is its OnLoss, and
   stands in the record (`SourceRead.outcome`, `reason`).
4. Tracking is switched off only by `stop` (or by a start that fails): stopping twice is fine.

`pending` may be used while no round goes on, or under `pending_lock` in a worker thread.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Final, TypeVar

from migrd.core.bitmap import DirtyBitmap
from migrd.core.harvest_round import HarvestRound, ReadOutcome, SourceRead
from migrd.core.memory_map import MemoryMap
from migrd.engine.dirty_ports import DirtySource, OnLoss
from migrd.engine.ports import Clock, SystemClock
from migrd.engine.threads import in_thread
from migrd.errors import (
    Invalid,
    KernelError,
    KernelUnsupported,
    LogLost,
    MigrdError,
    Violation,
)

T = TypeVar("T")
MOST_AT_ONCE: Final = 4
"""Sources that are read at the same time: each needs a buffer as large as `pending`."""


@dataclass
class _Watched:
    """A source, and when it was last known to have told all."""

    source: DirtySource
    on_loss: OnLoss
    read_at_s: float | None = None
    error: MigrdError | None = None


class Harvest:
    """The rounds of one transfer, and what is pending. Methods one at a time, but for `stop`."""

    def __init__(
        self,
        memory: MemoryMap,
        sources: Sequence[DirtySource],
        *,
        on_loss: OnLoss | Mapping[str, OnLoss],
        clock: Clock | None = None,
        publish: Callable[[HarvestRound], object] = lambda _: None,
    ) -> None:
        """`on_loss`: for all, or by the name of the source. `publish` is called on the event loop
        after each round. Raises Invalid: two sources of one name; pages that are no memory."""
        _check(memory, sources)
        self.memory = memory
        self.pending = DirtyBitmap(memory.pages)
        self.pending_lock = threading.Lock()
        self.rounds = 0
        self._watched = [_Watched(source, _policy(on_loss, source)) for source in sources]
        self._clock = clock or SystemClock()
        self._publish = publish
        self._fresh = DirtyBitmap(memory.pages)
        self._buffers: list[DirtyBitmap] = []
        self._merging = threading.Lock()
        self._turn = threading.Lock()
        self._is_started = False
        self._round_at_s: float | None = None

    @property
    def sources(self) -> tuple[DirtySource, ...]:
        return tuple(watched.source for watched in self._watched)

    def unwatched_pages(self) -> int:
        """Pages of memory that no source watches, which is for the caller to judge. Blocks."""
        left = self.memory.full()
        for watched in self._watched:
            for first_page, pages in watched.source.covers:
                left.unmark(first_page, pages)
        return left.count()

    async def start(self) -> None:
        """Switch tracking on for all sources; then all pages are pending. Raises KernelError: one
        could not be; then tracking is off for all."""
        await in_thread(self._start)

    async def round(self) -> HarvestRound:
        """Read and clear all sources; what they told is pending. Raises LogLost: a source is lost
        and its policy is to give up; all was read and is pending all the same."""
        round_, lost = await in_thread(self._read_all)
        self._publish(round_)
        if lost is not None:
            raise lost
        return round_

    async def rest(self) -> int:
        """How many pages were written since the last round, when there is to be none any more. What
        is found is pending. Raises KernelError, LogLost: a source cannot tell."""
        return await in_thread(self._rest)

    async def stop(self) -> None:
        """Switch tracking off for all sources, each of them tried. What is pending stays. Raises
        KernelError: the first that failed, with the others as notes."""
        await in_thread(self._stop)

    async def close(self) -> None:
        """`stop`, and the sources' descriptors given back. Idempotent; raises nothing."""
        await in_thread(self._close)

    # ---- in worker threads

    def _start(self) -> None:
        with self._turn:
            try:
                for watched in self._watched:
                    watched.source.start_tracking()
                    watched.read_at_s = self._clock.monotonic_s()
            except BaseException:
                self._stop_sources()
                raise
            with self.pending_lock:
                for region in self.memory.regions:
                    self.pending.mark(region.first_page, region.pages)
            self._is_started = True
            self._round_at_s = self._clock.monotonic_s()

    def _read_all(self) -> tuple[HarvestRound, MigrdError | None]:
        with self._turn:
            if not self._is_started:
                raise RuntimeError("a harvest round before tracking was switched on")
            started_s = self._clock.monotonic_s()
            self.rounds += 1
            newly = pending_pages = 0
            try:
                reads = self._in_threads(self._read)
            finally:
                with self.pending_lock:
                    newly = self.pending.merge(self._fresh)
                    told = self._fresh.count()
                    self._fresh.clear()
                    pending_pages = self.pending.count()
            ended_s = self._clock.monotonic_s()
            since_s = started_s - (self._round_at_s if self._round_at_s is not None else started_s)
            self._round_at_s = started_s
            is_measured = since_s > 0 and all(r.outcome is ReadOutcome.READ for r in reads)
            round_ = HarvestRound(
                self.rounds,
                started_s,
                ended_s - started_s,
                tuple(reads),
                newly,
                pending_pages,
                told / since_s if is_measured else None,
            )
            return round_, next((w.error for w in self._watched if w.error is not None), None)

    def _read(self, watched: _Watched) -> SourceRead:
        """Its bits are in `_fresh` when this ends, in whatever way."""
        buffer = self._take_buffer()
        began_s, before_s = self._clock.monotonic_s(), watched.read_at_s
        watched.error = None
        is_told = False
        try:
            read = watched.source.read_and_clear(buffer)
            is_told = True
        except KernelError as error:
            read = self._lost(watched, error, began_s)
        finally:
            if not is_told:
                for first_page, pages in watched.source.covers:
                    buffer.mark(first_page, pages)
            with self._merging:
                self._fresh.merge(buffer)
                buffer.clear()
                self._buffers.append(buffer)
        watched.read_at_s = began_s
        since_s = began_s - before_s if before_s is not None else 0.0
        if is_told and since_s > 0:
            return replace(read, dirty_pages_per_s=read.dirty_pages / since_s)
        return read

    def _lost(self, watched: _Watched, error: KernelError, began_s: float) -> SourceRead:
        source, reason = watched.source, error.message
        outcome = ReadOutcome.MARKED_ALL
        if watched.on_loss is OnLoss.RESTART:
            outcome = ReadOutcome.RESTARTED
            try:
                _restart(source)
            except KernelError as again:
                outcome, watched.error = ReadOutcome.FAILED, _gave_up(source, again)
                reason = f"{reason}; and it cannot be restarted: {again.message}"
        elif watched.on_loss is OnLoss.GIVE_UP:
            outcome, watched.error = ReadOutcome.FAILED, _gave_up(source, error)
        return SourceRead(
            source.name,
            source.tracker,
            sum(pages for _, pages in source.covers),
            source.page_size_bytes,
            self._clock.monotonic_s() - began_s,
            outcome,
            reason,
        )

    def _rest(self) -> int:
        with self._turn:
            try:
                for watched in self._watched:
                    try:
                        watched.source.peek(self._fresh)
                    except KernelUnsupported:  # a device's log tells only once
                        watched.source.read_and_clear(self._fresh)
                return self._fresh.count()
            finally:
                with self.pending_lock:
                    self.pending.merge(self._fresh)
                    self._fresh.clear()

    def _stop(self) -> None:
        with self._turn:
            self._is_started = False
            errors = self._stop_sources()
        if errors:
            first, *others = errors
            for other in others:
                first.add_note(f"and: {other}")
            raise first

    def _close(self) -> None:
        with self._turn:
            self._is_started = False
            self._stop_sources()
            for watched in self._watched:
                watched.source.close()

    def _stop_sources(self) -> list[Exception]:
        return [error for error in self._in_threads(_stopped) if error is not None]

    def _in_threads(self, func: Callable[[_Watched], T]) -> list[T]:
        """`func` of each source, some at the same time; all have ended when it returns or
        raises."""
        if len(self._watched) <= 1:
            return [func(watched) for watched in self._watched]
        with ThreadPoolExecutor(min(MOST_AT_ONCE, len(self._watched)), "harvest") as pool:
            return [done.result() for done in [pool.submit(func, w) for w in self._watched]]

    def _take_buffer(self) -> DirtyBitmap:
        with self._merging:
            if self._buffers:
                return self._buffers.pop()
        return DirtyBitmap(self.memory.pages)


def _stopped(watched: _Watched) -> Exception | None:
    try:
        watched.source.stop_tracking()
    except Exception as error:
        return error
    return None


def _restart(source: DirtySource) -> None:
    _stopped(_Watched(source, OnLoss.RESTART))
    source.start_tracking()


def _gave_up(source: DirtySource, error: KernelError) -> LogLost:
    lost = LogLost(f"dirty pages of {source.name} are not known: {error.message}")
    lost.__cause__ = error
    return lost


def _policy(on_loss: OnLoss | Mapping[str, OnLoss], source: DirtySource) -> OnLoss:
    return on_loss if isinstance(on_loss, OnLoss) else on_loss.get(source.name, OnLoss.GIVE_UP)


def _check(memory: MemoryMap, sources: Sequence[DirtySource]) -> None:
    """Raises Invalid with all that is wrong."""
    violations, names = [], set()
    for source in sources:
        if source.name in names:
            told = f"two sources are named {source.name}: the record could not tell them apart"
            violations.append(Violation("sources", "repeated_name", told))
        names.add(source.name)
        for first_page, pages in source.covers:
            if not memory.is_memory(first_page, pages):
                told = f"{source.name} claims {pages} pages from {first_page}: not all are memory"
                violations.append(Violation("sources", "not_memory", told))
    if violations:
        raise Invalid(
            "; ".join(one.message for one in violations), violations, code="bad_dirty_sources"
        )
