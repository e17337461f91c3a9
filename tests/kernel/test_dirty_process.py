"""Process memory as a source of dirty pages: a real process, on the kernel that this runs on."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from migrd.core.bitmap import PAGE_BYTES, DirtyBitmap
from migrd.core.harvest_round import Tracker
from migrd.core.memory_map import MemoryMap, Region
from migrd.errors import (
    KernelError,
    KernelGone,
    KernelRejected,
    KernelTooOld,
    KernelUnsupported,
    LogLost,
)
from migrd.kernel import dirty_process
from migrd.kernel.calls import system_ioctl
from migrd.kernel.dirty_process import ProcessRange, ProcessSource
from migrd.kernel.process_maps import ProcessMaps
from tests.contract.dirty_source import DirtySourceContract, dirty_pages
from tests.contract.dirty_writer import HUGE, KINDS, Writer

ENOUGH = 20_000
PATIENCE_S = 60.0
LENGTHS = [3 * HUGE + 5 * PAGE_BYTES, 100 * PAGE_BYTES]


class ProcessRig:
    tracker = Tracker.PROCESS
    can_peek = True

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        lengths = [where.length_bytes for where in writer.regions]
        starts = [number << 32 for number in range(len(lengths))]
        self.memory = MemoryMap.of(list(zip(range(len(lengths)), starts, lengths, strict=True)))
        self.ranges = [
            ProcessRange(where.hva, where.length_bytes, region.first_page)
            for where, region in zip(writer.regions, self.memory.regions, strict=True)
        ]
        self.source = ProcessSource(writer.pagemap_fd, self.ranges, "ram")

    def write(self, *pages: int) -> None:
        for region in self.memory.regions:
            own = [page - region.first_page for page in pages if page in region_pages(region)]
            if own:
                self.writer.write(region.id, own)

    def lose(self) -> None:
        self.writer.ask("close_userfaultfd")


def region_pages(region: Region) -> range:
    return range(region.first_page, region.end_page)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def rig(kind: str) -> Iterator[ProcessRig]:
    with Writer(kind, LENGTHS) as writer:
        rig = ProcessRig(writer)
        yield rig
        rig.source.close()


def read(rig: ProcessRig) -> list[int]:
    into = DirtyBitmap(rig.memory.pages)
    rig.source.read_and_clear(into)
    return dirty_pages(into)


class TestProcess(DirtySourceContract):
    pass


class TestProcessPageByPage(DirtySourceContract):
    """Where the list of mappings cannot be found."""

    @pytest.fixture
    def kind(self) -> str:
        return "memfd"

    @pytest.fixture(autouse=True)
    def _hidden(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ProcessMaps, "beside", lambda fd: None)

    def test_unmapped_memory_is_not_taken_for_clean(self, rig: ProcessRig) -> None:
        rig.source.start_tracking()
        rig.writer.ask("unmap", 1, 99, 1)
        with pytest.raises(LogLost, match="not wholly mapped"):
            read(rig)


class TestProcessWithTheTextOfMappings(DirtySourceContract):
    """Before Linux 6.11."""

    @pytest.fixture
    def kind(self) -> str:
        return "anonymous"

    @pytest.fixture(autouse=True)
    def _older(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def too_old(self: ProcessMaps, start: int, end: int) -> None:
            raise KernelTooOld("as if")

        monkeypatch.setattr(ProcessMaps, "_query_gap", too_old)

    def test_unmapped_memory_is_not_taken_for_clean(self, rig: ProcessRig) -> None:
        rig.source.start_tracking()
        rig.writer.ask("unmap", 1, 99, 1)
        with pytest.raises(LogLost, match="not wholly mapped"):
            read(rig)


class TestProcessOnAnOlderKernel(DirtySourceContract):
    """One that says nothing of what has no page table: as released before it was mended."""

    @pytest.fixture
    def kind(self) -> str:
        return "huge"

    @pytest.fixture(autouse=True)
    def _older(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(dirty_process, "tells_of_holes", lambda: False)


# ---- pages that are not there


def test_the_first_write_to_an_untouched_page_is_told_of_and_it_alone(rig: ProcessRig) -> None:
    """Each way that a page may be missing: no page table, no entry, only read so far."""
    rig.source.start_tracking()
    read(rig)
    rig.writer.ask("touch", 0, [600, 601, 1030])
    assert read(rig) == []
    rig.write(600, 1030, 1200)
    assert read(rig) == [600, 1030, 1200]


def test_what_was_there_before_the_start_is_watched(rig: ProcessRig) -> None:
    rig.write(*range(0, 64), 700)
    rig.source.start_tracking()
    assert read(rig) == []
    rig.write(3, 700)
    assert read(rig) == [3, 700]


def test_pages_that_a_process_discards_are_told_of(rig: ProcessRig, kind: str) -> None:
    """They are zero afterwards; a memfd keeps what it has."""
    rig.writer.write(0, range(3 * 512))
    rig.source.start_tracking()
    read(rig)
    rig.writer.ask("discard", 0, 5, 3)
    rig.writer.ask("discard", 0, 512, 1024)  # whole page tables, or huge pages
    assert int.from_bytes(rig.writer.read(0, 600)[:8], "little") == (kind == "memfd")
    expected = [] if kind == "memfd" else [5, 6, 7, *range(512, 1536)]
    found = read(rig)
    assert set(found) >= set(expected)
    assert kind != "memfd" or found == []
    assert read(rig) == []


# ---- what goes wrong


def test_memory_that_is_not_registered_is_refused_with_the_cure(kind: str) -> None:
    with Writer(kind, LENGTHS, registered=False) as writer:
        rig = ProcessRig(writer)
        with pytest.raises(KernelRejected, match="UFFD_FEATURE_WP_ASYNC") as refused:
            rig.source.start_tracking()
        assert refused.value.code == "not_registered"
        writer.ask("register_again")
        rig.source.start_tracking()
        rig.source.close()


def test_memory_that_is_not_wholly_mapped_is_refused(rig: ProcessRig) -> None:
    rig.writer.ask("unmap", 0, 700, 5)
    with pytest.raises(KernelRejected, match="not wholly mapped") as refused:
        rig.source.start_tracking()
    assert refused.value.code == "range_not_mapped"
    assert f"{rig.ranges[0].hva + 700 * PAGE_BYTES:#x}" in refused.value.message


def test_unmapped_memory_is_not_taken_for_clean(rig: ProcessRig) -> None:
    """The scan itself succeeds and says nothing."""
    rig.source.start_tracking()
    read(rig)
    rig.writer.ask("unmap", 0, 700, 1)
    into = DirtyBitmap(rig.memory.pages)
    with pytest.raises(LogLost, match="not wholly mapped"):
        rig.source.read_and_clear(into)


def test_a_closed_userfaultfd_loses_the_log_and_one_made_anew_counts_all_as_written(
    rig: ProcessRig,
) -> None:
    rig.source.start_tracking()
    read(rig)
    rig.writer.ask("close_userfaultfd")
    rig.write(3)
    into = DirtyBitmap(rig.memory.pages)
    with pytest.raises(LogLost):
        rig.source.read_and_clear(into)
    whole = [pages for _, pages in rig.source.covers]
    assert into.count() in whole  # what the failed scan was to walk: that of the lower address
    rig.writer.ask("register_again")
    assert 3 in read(rig)
    rig.write(4)
    assert read(rig) == [4]


def test_a_process_that_has_exited_is_gone(rig: ProcessRig) -> None:
    rig.source.start_tracking()
    rig.writer.kill()
    with pytest.raises(KernelError) as gone:
        read(rig)
    assert isinstance(gone.value, KernelGone | LogLost)
    with pytest.raises(KernelError):
        rig.source.start_tracking()


def test_only_a_pagemap_is_scanned(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"")
    fd = os.open(path, os.O_RDONLY)
    source = ProcessSource(fd, [ProcessRange(PAGE_BYTES, PAGE_BYTES, 0)], "ram")
    os.close(fd)
    with pytest.raises(KernelTooOld, match="/proc/self/pagemap"):
        source.start_tracking()
    source.close()


@pytest.mark.parametrize(
    "ranges",
    [
        [],
        [(0, PAGE_BYTES, 0)],
        [(PAGE_BYTES, 0, 0)],
        [(PAGE_BYTES + 1, PAGE_BYTES, 0)],
        [(PAGE_BYTES, PAGE_BYTES + 1, 0)],
        [(PAGE_BYTES, PAGE_BYTES, -1)],
        [((1 << 64) - PAGE_BYTES, 2 * PAGE_BYTES, 0)],
        [(PAGE_BYTES, 3 * PAGE_BYTES, 0), (3 * PAGE_BYTES, PAGE_BYTES, 3)],
        [(PAGE_BYTES * (2 * n + 1), PAGE_BYTES, n) for n in range(1025)],
    ],
)
def test_ranges_that_cannot_be_are_refused(ranges: list[tuple[int, int, int]]) -> None:
    with pytest.raises(KernelRejected) as refused:
        ProcessSource(0, [ProcessRange(*one) for one in ranges], "ram")
    assert refused.value.code == "bad_ranges"


# ---- while it is being written


class Copy:
    """The memory, copied page by page as it is told of."""

    def __init__(self, rig: ProcessRig) -> None:
        self.rig = rig
        self.bytes = [bytearray(where.length_bytes) for where in rig.writer.regions]

    def take(self, told: DirtyBitmap) -> None:
        rows, _ = told.extents(limit=told.pages + 1)
        for first_page, pages in rows.tolist():
            for region, offset, length in self.rig.memory.pieces(first_page, pages):
                got = self.rig.writer.read(region.id, offset // PAGE_BYTES, length // PAGE_BYTES)
                self.bytes[region.id][offset : offset + length] = got

    def wrong_pages(self) -> int:
        wrong = 0
        for number, where in enumerate(self.rig.writer.regions):
            now = self.rig.writer.read(number, 0, where.length_bytes // PAGE_BYTES)
            pair = [np.frombuffer(each, np.uint64) for each in (now, self.bytes[number])]
            wrong += int((pair[0] != pair[1]).reshape(-1, PAGE_BYTES // 8).any(axis=1).sum())
        return wrong


def test_no_write_is_missed_while_threads_write_during_the_scans(rig: ProcessRig) -> None:
    copy, told = Copy(rig), rig.memory.full()
    rig.source.start_tracking()
    rig.writer.ask("storm", 2, 7)
    deadline_s, seen = time.monotonic() + PATIENCE_S, 0
    while seen < ENOUGH and time.monotonic() < deadline_s:
        copy.take(told)
        told.clear()
        seen += rig.source.read_and_clear(told).dirty_pages
    writes = rig.writer.ask("calm")
    copy.take(told)
    told.clear()
    rig.source.read_and_clear(told)
    copy.take(told)
    assert writes >= seen >= ENOUGH
    assert copy.wrong_pages() == 0


def test_the_copy_shows_a_missed_page(rig: ProcessRig) -> None:
    """The check of the test above."""
    copy = Copy(rig)
    copy.take(rig.memory.full())
    rig.write(9)
    assert copy.wrong_pages() == 1


class Failing:
    """PAGEMAP_SCAN that fails now and then, before or after it had its effect."""

    def __init__(self) -> None:
        self.calls = 0
        self.fail_at = 0
        self.after_effect = False

    def __call__(self, fd: int, request: int, argument: Any, /) -> int:
        self.calls += 1
        strikes = self.calls == self.fail_at
        if strikes and not self.after_effect:
            raise OSError(12, "struck")
        found = system_ioctl(fd, request, argument)
        if strikes:
            raise OSError(12, "struck")
        return found


def test_pages_that_the_kernel_does_not_protect_are_refused(rig: ProcessRig) -> None:
    """As PAGEMAP_SCAN does with huge pages of 1 GiB, of which there are none here: it says nothing,
    and comes back to the beginning of the page."""

    def stays(fd: int, request: int, argument: Any, /) -> int:
        if not isinstance(argument, bytearray):
            argument.walk_end = argument.start
        return 0

    rig.source.close()
    rig.source = ProcessSource(rig.writer.pagemap_fd, rig.ranges, "ram", stays)
    with pytest.raises(KernelUnsupported, match="2 MiB alone") as caught:
        rig.source.start_tracking()
    assert caught.value.code == "pages_too_large"


@pytest.mark.parametrize("after_effect", [False, True])
def test_a_scan_that_fails_loses_nothing(
    kind: str, after_effect: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many small scans, each of which fails once."""
    monkeypatch.setattr(dirty_process, "_FIRST_WALK_BYTES", HUGE)
    monkeypatch.setattr(dirty_process, "_MOST_WALK_BYTES", HUGE)
    with Writer(kind, LENGTHS) as writer:
        rig, failing = ProcessRig(writer), Failing()
        rig.source.close()
        rig.source = ProcessSource(writer.pagemap_fd, rig.ranges, "ram", failing)
        rig.source.start_tracking()
        read(rig)
        failing.after_effect = after_effect
        for fail_at in range(1, 6):
            written = {fail_at, 600 + fail_at, 1100, 1536 + fail_at % 5, 1600 + fail_at}
            rig.write(*written)
            failing.calls, failing.fail_at = 0, fail_at
            into = DirtyBitmap(rig.memory.pages)
            with pytest.raises(KernelError):
                rig.source.read_and_clear(into)
            failing.fail_at = 0
            told = set(dirty_pages(into)) | set(read(rig))
            assert told >= written
        rig.source.close()


def test_reads_of_a_process_that_keeps_writing_do_not_stop_other_threads(rig: ProcessRig) -> None:
    """The GIL is free while the kernel walks: another thread gets on."""
    rig.source.start_tracking()
    beats, done = 0, threading.Event()

    def scan() -> None:
        into = DirtyBitmap(rig.memory.pages)
        for _ in range(200):
            rig.source.read_and_clear(into)
        done.set()

    thread = threading.Thread(target=scan)
    thread.start()
    while not done.is_set():
        beats += 1
    thread.join()
    assert beats > 200
