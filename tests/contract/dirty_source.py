"""What holds of every source of dirty pages, simulated or real.

class TestHere(DirtySourceContract):
    @pytest.fixture
    def rig(self) -> Iterator[DirtyRig]: ...
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import pytest

from migrd.core.bitmap import PAGE_BYTES, DirtyBitmap
from migrd.core.harvest_round import ReadOutcome, SourceRead, Tracker
from migrd.core.memory_map import MemoryMap
from migrd.engine.dirty_ports import DirtySource
from migrd.errors import KernelError, KernelUnsupported, LogLost


class DirtyRig(Protocol):
    """A source, and who writes to the memory it watches."""

    @property
    def memory(self) -> MemoryMap: ...

    @property
    def source(self) -> DirtySource:
        """Tracking is off; watches all of `memory`, of which there are at least 256 pages."""

    @property
    def tracker(self) -> Tracker: ...

    @property
    def can_peek(self) -> bool: ...

    def write(self, *pages: int) -> None:
        """Pages of the merged page space."""

    def lose(self) -> None:
        """Spoil the log."""


def dirty_pages(bitmap: DirtyBitmap) -> list[int]:
    """Their numbers."""
    bits = np.unpackbits(bitmap.words.view(np.uint8), bitorder="little")
    return [int(page) for page in np.flatnonzero(bits)]


def granules(rig: DirtyRig, *pages: int) -> list[int]:
    """All pages that a write to these may make dirty, in the source's own page size."""
    size = rig.source.page_size_bytes // PAGE_BYTES
    found = set()
    for page in pages:
        for first, count in rig.source.covers:
            if first <= page < first + count:
                begin = first + (page - first) // size * size
                found |= set(range(begin, min(begin + size, first + count)))
    return sorted(found)


class DirtySourceContract:
    """Give it a fixture `rig`."""

    def read(self, rig: DirtyRig) -> tuple[SourceRead, list[int]]:
        into = DirtyBitmap(rig.memory.pages)
        told = rig.source.read_and_clear(into)
        assert told.dirty_pages == into.count()
        assert told.outcome is ReadOutcome.READ
        return told, dirty_pages(into)

    def test_it_says_what_it_is(self, rig: DirtyRig) -> None:
        source = rig.source
        assert source.name
        assert source.tracker is rig.tracker
        assert all(rig.memory.is_memory(*run) for run in source.covers)
        source.start_tracking()
        told, _ = self.read(rig)
        assert (told.source, told.tracker) == (source.name, source.tracker)
        assert told.page_size_bytes == source.page_size_bytes
        assert told.took_s >= 0

    def test_each_written_page_is_told_of_once(self, rig: DirtyRig) -> None:
        rig.source.start_tracking()
        self.read(rig)
        assert self.read(rig)[1] == []
        rig.write(0, 5, 63, 64, 200)
        assert self.read(rig)[1] == granules(rig, 0, 5, 63, 64, 200)
        assert self.read(rig)[1] == []
        rig.write(5)
        assert self.read(rig)[1] == granules(rig, 5)

    def test_the_first_read_misses_nothing_that_was_written_since_the_start(
        self, rig: DirtyRig
    ) -> None:
        rig.source.start_tracking()
        rig.write(7, 8, 9, 255)
        assert set(self.read(rig)[1]) >= {7, 8, 9, 255}

    def test_the_first_and_last_page_of_each_region_are_watched(self, rig: DirtyRig) -> None:
        rig.source.start_tracking()
        self.read(rig)
        edges = [page for r in rig.memory.regions for page in (r.first_page, r.end_page - 1)]
        rig.write(*edges)
        assert self.read(rig)[1] == granules(rig, *edges)

    def test_what_is_in_the_bitmap_already_stays(self, rig: DirtyRig) -> None:
        rig.source.start_tracking()
        self.read(rig)
        into = DirtyBitmap(rig.memory.pages)
        into.mark(100, 3)
        rig.write(101, 150)
        told = rig.source.read_and_clear(into)
        assert set(dirty_pages(into)) == {100, 101, 102} | set(granules(rig, 101, 150))
        assert told.dirty_pages == len(granules(rig, 101, 150))

    def test_a_peek_changes_nothing(self, rig: DirtyRig) -> None:
        rig.source.start_tracking()
        self.read(rig)
        rig.write(3, 77)
        into = DirtyBitmap(rig.memory.pages)
        if not rig.can_peek:
            with pytest.raises(KernelUnsupported):
                rig.source.peek(into)
            return
        for _ in range(2):
            into.clear()
            rig.source.peek(into)
            assert dirty_pages(into) == granules(rig, 3, 77)
        assert self.read(rig)[1] == granules(rig, 3, 77)

    def test_nothing_is_read_while_tracking_is_off(self, rig: DirtyRig) -> None:
        into = DirtyBitmap(rig.memory.pages)
        for _ in range(2):
            with pytest.raises(KernelError, match="not on"):
                rig.source.read_and_clear(into)
            rig.source.start_tracking()
            rig.source.stop_tracking()
            rig.source.stop_tracking()

    def test_tracking_that_was_stopped_can_be_started_again(self, rig: DirtyRig) -> None:
        rig.source.start_tracking()
        rig.source.stop_tracking()
        rig.source.start_tracking()
        self.read(rig)
        rig.write(9)
        assert self.read(rig)[1] == granules(rig, 9)

    def test_a_lost_log_is_never_taken_for_clean(self, rig: DirtyRig) -> None:
        rig.source.start_tracking()
        self.read(rig)
        rig.write(1)
        rig.lose()
        into = DirtyBitmap(rig.memory.pages)
        with pytest.raises(LogLost, match=rig.source.name):
            rig.source.read_and_clear(into)

    def test_what_is_closed_says_so(self, rig: DirtyRig) -> None:
        rig.source.start_tracking()
        rig.source.close()
        rig.source.close()
        with pytest.raises(KernelError):
            rig.source.read_and_clear(DirtyBitmap(rig.memory.pages))
