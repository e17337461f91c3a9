"""A simulator of a source of dirty pages, with the real ones' rules.

    reading clears             what a read took is nowhere else
    switching on clears        also the second time; written before, never told of
    switching off drops        what was not read
    off, or lost               a read is refused, and never an empty answer
    granularity                one write makes a whole granule dirty, as far as it is covered

Each call may fail at a planned place, before or after it had its effect; a read that fails after
its effect has given to `into` what it took, as the port demands. A read may be held up, in its
thread, to see what others do meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from migrd.core.bitmap import PAGE_BYTES, DirtyBitmap
from migrd.core.harvest_round import SourceRead, Tracker
from migrd.engine.dirty_ports import PageRun
from migrd.errors import KernelBusy, KernelGone, KernelRejected, LogLost


@dataclass(frozen=True)
class Strike:
    """What is to happen to one call."""

    after_effect: bool
    error: type[Exception] = KernelBusy


Plan = Callable[[str, int], Strike | None]
"""(call, its number among all calls from 1) -> what is to happen to it."""


class SimSource:
    """One source, and the pages written to under it."""

    def __init__(
        self,
        name: str,
        covers: tuple[PageRun, ...],
        *,
        tracker: Tracker = Tracker.IOMMU,
        page_size_bytes: int = PAGE_BYTES,
        plan: Plan = lambda call, number: None,
    ) -> None:
        self.name = name
        self.covers = covers
        self.tracker = tracker
        self.page_size_bytes = page_size_bytes
        self.plan = plan
        self.calls: list[str] = []
        self.is_tracking = False
        self.is_lost = False
        self.is_closed = False
        self.hold: threading.Event | None = None
        """A read waits for it, after it has cleared and before it returns."""
        self.entered = threading.Event()
        self._written: set[int] = set()
        self._lock = threading.Lock()
        self._in_call = False

    def write(self, *pages: int) -> None:
        """Somebody writes to these; what is not covered is not seen."""
        size = self.page_size_bytes // PAGE_BYTES
        with self._lock:
            for page in pages if self.is_tracking else ():
                for first, count in self.covers:
                    if first <= page < first + count:
                        begin = first + (page - first) // size * size
                        self._written |= set(range(begin, min(begin + size, first + count)))

    def lose(self) -> None:
        """Until it is switched on again."""
        with self._lock:
            self.is_lost = True
            self._written.clear()

    def start_tracking(self) -> None:
        with self._call("start_tracking"):
            self._check_open()
            with self._lock:
                self.is_tracking, self.is_lost = True, False
                self._written.clear()

    def stop_tracking(self) -> None:
        with self._call("stop_tracking"), self._lock:
            self.is_tracking = False
            self._written.clear()

    def read_and_clear(self, into: DirtyBitmap) -> SourceRead:
        with self._call("read_and_clear"):
            return self._read(into, clear=True)

    def peek(self, into: DirtyBitmap) -> SourceRead:
        with self._call("peek"):
            return self._read(into, clear=False)

    def close(self) -> None:
        self.is_tracking, self.is_closed = False, True

    def _read(self, into: DirtyBitmap, *, clear: bool) -> SourceRead:
        self._check_open()
        if not self.is_tracking:
            raise KernelRejected(f"tracking of {self.name} is not on", code="tracking_is_off")
        with self._lock:
            found = sorted(self._written)
            if clear:
                self._written.clear()
            is_lost = self.is_lost
        self.entered.set()
        if self.hold is not None:
            assert self.hold.wait(60.0)
        for page in found:
            into.mark(page, 1)
        if is_lost:
            raise LogLost(f"the log of {self.name} is lost")
        return SourceRead(self.name, self.tracker, len(found), self.page_size_bytes, 0.001)

    def _check_open(self) -> None:
        if self.is_closed:
            raise KernelGone(f"{self.name} is closed")

    def _call(self, name: str) -> _Call:
        return _Call(self, name)

    def enter(self, name: str) -> Strike | None:
        assert not self._in_call, f"two calls of {self.name} at once"
        self._in_call = True
        self.calls.append(name)
        return self.plan(name, len(self.calls))

    def leave(self) -> None:
        self._in_call = False


class _Call:
    """One call: struck before or after its effect, or not at all."""

    def __init__(self, source: SimSource, name: str) -> None:
        self._source = source
        self._name = name
        self._strike: Strike | None = None

    def __enter__(self) -> None:
        self._strike = self._source.enter(self._name)
        if self._strike is not None and not self._strike.after_effect:
            self._source.leave()
            raise self._error(self._strike)

    def __exit__(self, kind: object, *_: object) -> None:
        self._source.leave()
        if kind is None and self._strike is not None:
            raise self._error(self._strike)

    def _error(self, strike: Strike) -> Exception:
        return strike.error(f"{self._name} of {self._source.name} was struck")
