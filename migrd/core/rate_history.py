"""Hours of a VM's dirty rate in a fixed number of bytes.

    add(rate) ──► ring of 10 s slots, 10 min  ──► what just happened
             └──► ring of 1 min slots, 6 h    ──► when it is quiet

Each slot keeps the mean, the least, the most and the number of what fell into it, and the last
known working set. Slots are numbered by the time they begin at, so an old one is recognised when
its place comes round again, and a gap stays a gap: nothing is filled in. All numbers are arrays of
machine types, made once: 420 slots take `BYTES` bytes, whatever happens.

Times are the caller's monotonic seconds: the wall clock may jump. Nothing is kept over a restart.
"""

import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

TIERS: Final = ((10, 60), (60, 360))
"""(seconds of a slot, slots)."""
FINEST_S: Final = TIERS[0][0]
KEPT_S: Final = TIERS[-1][0] * TIERS[-1][1]
SLOT_BYTES: Final = 4 + 4 * 4 + 2
BYTES: Final = sum(slots for _, slots in TIERS) * SLOT_BYTES
MOST_SAMPLES: Final = 0xFFFF


@dataclass(frozen=True)
class HistoryPoint:
    """What was seen from `start_s` on, for `step_s`. Bytes/s."""

    start_s: float
    step_s: int
    mean: float
    least: float
    most: float
    samples: int
    set_bytes: float | None
    """The working set, where it was known last."""


class _Ring:
    def __init__(self, step_s: int, slots: int) -> None:
        self.step_s = step_s
        self.slots = slots
        self._number = array("I", bytes(4 * slots))
        self._mean, self._least, self._most, self._set = (
            array("f", bytes(4 * slots)) for _ in range(4)
        )
        self._samples = array("H", bytes(2 * slots))

    @property
    def bytes_held(self) -> int:
        held = (self._number, self._mean, self._least, self._most, self._set, self._samples)
        return sum(len(each) * each.itemsize for each in held)

    def add(self, at_s: float, rate: float, set_bytes: float | None) -> None:
        number = int(at_s // self.step_s)
        at = number % self.slots
        if self._number[at] != number or not self._samples[at]:
            self._number[at], self._samples[at] = number, 0
            self._mean[at] = self._least[at] = self._most[at] = rate
            self._set[at] = math.nan
        samples = self._samples[at] = min(MOST_SAMPLES, self._samples[at] + 1)
        self._mean[at] += (rate - self._mean[at]) / samples
        self._least[at] = min(self._least[at], rate)
        self._most[at] = max(self._most[at], rate)
        if set_bytes is not None:
            self._set[at] = set_bytes

    def points(self, since_s: float, until_s: float) -> Iterator[HistoryPoint]:
        """Oldest first; what has been overwritten since is not there any more."""
        last = int(until_s // self.step_s)
        first = max(int(since_s // self.step_s), last - self.slots + 1, 0)
        for number in range(first, last + 1):
            at = number % self.slots
            if self._number[at] == number and self._samples[at]:
                known = self._set[at]
                yield HistoryPoint(
                    float(number * self.step_s),
                    self.step_s,
                    self._mean[at],
                    self._least[at],
                    self._most[at],
                    self._samples[at],
                    None if math.isnan(known) else known,
                )


class RateHistory:
    """The past of one VM's rate, as one tracker saw it."""

    def __init__(self) -> None:
        self._rings = tuple(_Ring(step_s, slots) for step_s, slots in TIERS)

    @property
    def bytes_held(self) -> int:
        """Of the arrays; it never changes."""
        return sum(ring.bytes_held for ring in self._rings)

    def add(self, at_s: float, rate: float, set_bytes: float | None = None) -> None:
        """A rate (bytes/s) that was found now, at `at_s` >= 0. What is no number is left out."""
        if not (math.isfinite(rate) and rate >= 0 and at_s >= 0):
            return
        for ring in self._rings:
            ring.add(at_s, rate, set_bytes)

    def points(
        self,
        since_s: float,
        now_s: float,
        step_s: int | None = None,
        *,
        wall_offset_s: float = 0.0,
    ) -> list[HistoryPoint]:
        """From `since_s` to now, oldest first, in steps of `step_s` (None: as fine as is kept for
        all of that time). A step finer than what is kept becomes what is kept. `wall_offset_s` is
        added to the times that come back."""
        reaching = (r for r in self._rings if now_s - since_s <= r.step_s * (r.slots - 1))
        ring = next(reaching, self._rings[-1])
        points = ring.points(since_s, now_s)
        wanted = ring.step_s if step_s is None else max(step_s, ring.step_s)
        merged = _merged(points, -(-wanted // ring.step_s) * ring.step_s)
        return [replace(point, start_s=point.start_s + wall_offset_s) for point in merged]


def _merged(points: Iterator[HistoryPoint], step_s: int) -> Iterator[HistoryPoint]:
    """Fewer and longer points; each begins at a multiple of its length."""
    whole: HistoryPoint | None = None
    for point in points:
        start_s = float(point.start_s // step_s * step_s)
        if whole is not None and whole.start_s != start_s:
            yield whole
            whole = None
        if whole is None:
            whole = HistoryPoint(
                start_s, step_s, point.mean, point.least, point.most, point.samples, point.set_bytes
            )
            continue
        samples = whole.samples + point.samples
        whole = HistoryPoint(
            start_s,
            step_s,
            whole.mean + (point.mean - whole.mean) * point.samples / samples,
            min(whole.least, point.least),
            max(whole.most, point.most),
            samples,
            whole.set_bytes if point.set_bytes is None else point.set_bytes,
        )
    if whole is not None:
        yield whole
