"""The guest's heartbeat: recorded on each host, joined, and shown to be without a gap.

Each QEMU's COM1 is recorded with arrival times (`SerialTap`). The taps of all QEMUs that held
the guest, in order, joined byte by byte, must read as one log:

    source       ...H 0000000c ...\\nH 0000000d 000
    destination                                   00001 ...\\nH 0000000e ...

A line may be torn across the switchover, so bytes are joined before lines are parsed. A lost
heartbeat is a gap; two running copies print the same number twice, or garbage at the seam.

The guest counts heartbeats in its own time, which stands still while it is stopped. So the gap
between the ends of the last heartbeat on one side and the first on the other is one interval
plus the time it ran nowhere: blackout = gap - interval. The interval is the median of all other
gaps; what a blackout can be wrong by is their jitter, which is reported too.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import re
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

from migrd.demo.errors import ProofFailed

_HEARTBEAT = re.compile(rb"H ([0-9a-f]{8}) ([0-9a-f]{8}) ([0-9a-f]{8}) ([0-9a-f]{8}) ([0-9a-f]{8})")
_IN_MODIFY: Final = 2
_LINE_S: Final = 0.001
"""A UART gives one byte at a time; waiting so long takes a line in one piece. It makes arrival
times late by that much, on all hosts alike."""
_STAGE_LINES: Final = (b"B", b"F")


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """One line that the guest printed."""

    sequence: int
    generation: int
    integrity_errors: int
    """Pages that the guest itself did not find as it had left them."""
    dirtied_pages: int
    """Visits so far, modulo 2**32."""
    ticks: int
    """Timer ticks that the guest has acted on."""
    owner: str
    """The tap, and so the QEMU, on which the line ended."""
    arrived_s: float
    """When its last byte arrived, on this machine's monotonic clock."""


class SerialTap:
    """What one QEMU's COM1 printed, with the times of arrival."""

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.chunks: list[tuple[float, bytes]] = []

    def record(self, received: bytes) -> None:
        self.chunks.append((time.monotonic(), received))

    def text(self) -> bytes:
        return b"".join(received for _, received in self.chunks)

    async def read_stream(self, reader: asyncio.StreamReader) -> None:
        """Record until the stream ends (a QEMU that dies ends it too)."""
        try:
            while received := await reader.read(65536):
                self.record(received)
                await asyncio.sleep(_LINE_S)
        except ConnectionError:
            pass  # how a killed QEMU may end it; what arrived before stands

    async def follow(self, path: Path) -> None:
        """Record a growing file (`-serial file:`, or a chardev's `logfile`) until cancelled.

        Raises OSError if it does not exist or cannot be watched.
        """
        growing = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            with _watched(path) as grown:
                while True:
                    grown.clear()  # before reading: what comes after this is not missed
                    while received := os.read(growing, 65536):
                        self.record(received)
                    await grown.wait()
                    await asyncio.sleep(_LINE_S)
        finally:
            os.close(growing)


@contextlib.contextmanager
def _watched(path: Path) -> Iterator[asyncio.Event]:
    """An event that is set whenever the file is written to (inotify).

    Polling often enough for times to the millisecond would take processor time from the very
    guest whose blackout is measured.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    inotify = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    if inotify < 0:
        raise OSError(ctypes.get_errno(), "inotify_init1 failed")
    written = asyncio.Event()

    def read_events() -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(inotify, 65536)
        written.set()

    loop = asyncio.get_running_loop()
    try:
        if libc.inotify_add_watch(inotify, os.fsencode(path), _IN_MODIFY) < 0:
            raise OSError(ctypes.get_errno(), f"cannot watch {path}")
        loop.add_reader(inotify, read_events)
        yield written
    finally:
        loop.remove_reader(inotify)
        os.close(inotify)


@dataclass(frozen=True, slots=True)
class Continuity:
    """The heartbeat of a guest over all QEMUs that held it."""

    first_sequence: int
    last_sequence: int
    interval_s: float
    """Median gap between heartbeats that ended on the same QEMU."""
    jitter_s: float
    """Nineteen of twenty gaps deviate less from it: what a blackout can be wrong by."""
    largest_gap_s: float
    """Longest silence between heartbeats on the same QEMU: a guest that stalled shows here."""
    blackouts_s: tuple[float, ...]
    """One per change of owner, in order; below zero is noise."""
    last: Heartbeat

    @property
    def heartbeats(self) -> int:
        return self.last_sequence - self.first_sequence + 1


def heartbeats(taps: Sequence[SerialTap]) -> list[Heartbeat]:
    """Join the taps, in the order in which their QEMUs held the guest, and parse the lines.

    A first line that is cut off (a tap that came late) is left out, and so is a last one that
    is not over yet. Raises ProofFailed if anything else is not a line of the guest.
    """
    found: list[Heartbeat] = []
    pending = b""
    is_first = True
    for tap in taps:
        for arrived_s, received in tap.chunks:
            *lines, pending = (pending + received).split(b"\n")
            for line in lines:
                parsed = _parse(line, tap.owner, arrived_s)
                if parsed is not None:
                    found.append(parsed)
                elif line not in _STAGE_LINES and not is_first:
                    raise ProofFailed(
                        f"not a line of the guest, on {tap.owner}: {line[:80]!r}; "
                        "bytes were lost, or two copies ran"
                    )
                is_first = False
    return found


def prove_continuity(taps: Sequence[SerialTap], *, switches: int) -> Continuity:
    """Show that the guest counted on without a gap or a repeat over `switches` moves.

    Raises ProofFailed, also if the guest reports a page that it did not find as it left it.
    """
    beats = heartbeats(taps)
    if len(beats) < 2:
        raise ProofFailed(f"only {len(beats)} heartbeats were seen")
    gaps_s: list[float] = []
    seams_s: list[float] = []
    for before, after in pairwise(beats):
        _check_step(before, after)
        gap_s = after.arrived_s - before.arrived_s
        (gaps_s if after.owner == before.owner else seams_s).append(gap_s)
    if len(seams_s) != switches:
        raise ProofFailed(
            f"the guest moved {len(seams_s)} times, not {switches}: it was heard on "
            f"{', '.join(dict.fromkeys(beat.owner for beat in beats))}"
        )
    interval_s = statistics.median(gaps_s) if gaps_s else 0.0
    return Continuity(
        first_sequence=beats[0].sequence,
        last_sequence=beats[-1].sequence,
        interval_s=interval_s,
        jitter_s=_nineteen_of_twenty([abs(gap_s - interval_s) for gap_s in gaps_s]),
        largest_gap_s=max(gaps_s, default=0.0),
        blackouts_s=tuple(gap_s - interval_s for gap_s in seams_s),
        last=beats[-1],
    )


def _nineteen_of_twenty(deviations_s: list[float]) -> float:
    ordered = sorted(deviations_s)
    return ordered[(len(ordered) - 1) * 19 // 20] if ordered else 0.0


def _parse(line: bytes, owner: str, arrived_s: float) -> Heartbeat | None:
    match = _HEARTBEAT.fullmatch(line)
    if match is None:
        return None
    sequence, generation, errors, dirtied, ticks = (int(group, 16) for group in match.groups())
    return Heartbeat(sequence, generation, errors, dirtied, ticks, owner, arrived_s)


def _check_step(before: Heartbeat, after: Heartbeat) -> None:
    where = f"heartbeat {after.sequence} on {after.owner}"
    if after.sequence > before.sequence + 1:
        raise ProofFailed(f"gap: {where} follows {before.sequence} on {before.owner}")
    if after.sequence <= before.sequence:
        raise ProofFailed(
            f"repeat: {where} follows {before.sequence} on {before.owner}; the guest ran twice"
        )
    if after.ticks < before.ticks:
        raise ProofFailed(f"{where}: the guest's clock went back")
    if after.integrity_errors:
        raise ProofFailed(f"{where}: the guest found {after.integrity_errors} pages changed")
