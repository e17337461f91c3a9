"""How a guest writes, in two numbers: how fast at first, and how much at all.

Distinct bytes dirtied within t seconds, of a guest that writes D bytes/s evenly spread over a
working set of W bytes (the saturating model; `U` as in prior work on writable working sets: Clark
et al., "Live Migration of Virtual Machines", NSDI 2005; own derivation):

    U(t) = W * (1 - exp(-D * t / W))          ~ D * t  for short t,   -> W  for long t

    bytes  |            ________ W            each byte written is a page of the set at random, so
           |       __---                      the share still clean falls by exp(-D t / W)
           |    _-
           |  _/   slope D
           +--------------------- t

One window cannot tell D from W; windows of different lengths can. With f = 1 - exp(-k t), k = D/W,
the best W for a given k is linear least squares, so only k is searched:

    W(k) = sum(f u / s^2) / sum(f^2 / s^2)    chi2(k) = sum(((u - W(k) f) / s)^2)

u is what a window found, s its standard error (a 95 % interval is 3.92 s wide). The 95 % interval
of D and of W is all that (k, W) can be while chi2 stays below its minimum + 3.84 (profile
likelihood of one parameter). Where the model does not fit, errors are widened by
sqrt(chi2 / degrees of freedom) (Birge), and `misfit` says so.

What the windows do not show is not made up: shorter windows than W / D see a straight line, and W
is only known to be at least so much; longer ones see W alone, and D is only known to be at least so
much. A figure without an upper end of its own has no best guess (value None), though W is never
more than the memory there is. Fewer than two lengths tell neither.

Trap: the windows of one set follow each other. A guest that changes meanwhile is no guest of this
model; it shows as a misfit, with three windows or more.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, NamedTuple

from migrd.core.rate_reading import Z_95, Figure, RateReading

CHI2_95: Final = Z_95**2
LEAST_RATIO: Final = 1.5
"""Windows whose lengths differ by less say nothing about the bend."""
STRAIGHT: Final = 1e-6
"""k * longest window: below it no bend could ever be seen."""
FLAT: Final = 30.0
"""k * shortest window: above it every window has seen all of W."""
GRID: Final = 20
ZOOMS: Final = 4
LEAST_ERROR: Final = 1e-6
"""Of what was found: no window is exact."""


class FitQuality(StrEnum):
    """What the two numbers are worth."""

    FITTED = "fitted"
    TOO_FEW_WINDOWS = "too_few_windows"
    NOTHING_WRITTEN = "nothing_written"
    """No window found anything: the rate is nearly zero, of the set nothing is known."""


@dataclass(frozen=True)
class WorkingSet:
    """The two parameters, with their errors. None: not known."""

    quality: FitQuality
    first_bytes_per_s: Figure | None = None
    """D: how fast clean memory gets dirty at first."""
    set_bytes: Figure | None = None
    """W: how much is written at all."""
    misfit: float | None = None
    """Errors had to be widened by so much; about 1: it fits. None: too few windows to tell."""

    def distinct_bytes(self, seconds: float) -> float | None:
        """U(t) for the best guess; with W not known, the straight line."""
        rate = None if self.first_bytes_per_s is None else self.first_bytes_per_s.value
        if rate is None:
            return None
        whole = None if self.set_bytes is None else self.set_bytes.value
        return distinct_bytes(rate, whole, seconds)


def distinct_bytes(rate: float, set_bytes: float | None, seconds: float) -> float:
    """U(t). `set_bytes` None: without end."""
    if set_bytes is None:
        return rate * seconds
    return set_bytes * -math.expm1(-rate * seconds / set_bytes) if set_bytes > 0 else 0.0


class _Window(NamedTuple):
    seconds: float
    found: float
    error: float


class _Try(NamedTuple):
    """The best W for one k."""

    k: float
    set_bytes: float
    set_error: float
    chi2: float


def fit(readings: Sequence[RateReading], *, total_bytes: int | None = None) -> WorkingSet:
    """The model that fits best. `total_bytes`: the memory there is; W is no larger."""
    windows = list(_windows(readings))
    lengths = [window.seconds for window in windows]
    if len(windows) < 2 or max(lengths) < LEAST_RATIO * min(lengths):
        return WorkingSet(FitQuality.TOO_FEW_WINDOWS)
    if not any(window.found for window in windows):
        most = min(2 * Z_95 * window.error / window.seconds for window in windows)
        return WorkingSet(FitQuality.NOTHING_WRITTEN, Figure(0.0, 0.0, most))
    tries = _search(windows, total_bytes)
    best = min(tries, key=lambda each: each.chi2)
    freedom = len(windows) - 2
    misfit = math.sqrt(best.chi2 / freedom) if freedom else None
    within = CHI2_95 * max(1.0, misfit or 0.0) ** 2
    region = _region(tries, best.chi2 + within)
    return WorkingSet(
        FitQuality.FITTED,
        _figure(
            best.k * best.set_bytes,
            [(t.k * low, t.k * high) for t, low, high in _slacks(region, best.chi2, within)],
            is_bounded=region[-1] is not tries[-1],
        ),
        _figure(
            best.set_bytes,
            [(low, high) for _, low, high in _slacks(region, best.chi2, within)],
            is_bounded=region[0] is not tries[0],
            most=total_bytes,
        ),
        misfit,
    )


def _windows(readings: Sequence[RateReading]) -> Iterator[_Window]:
    for reading in readings:
        found = reading.dirty_bytes
        if found is None or found.value is None or found.high is None or reading.window_s <= 0:
            continue
        error = (found.high - found.low) / (2 * Z_95)
        least = max(LEAST_ERROR * found.value, float(reading.page_size_bytes))
        yield _Window(reading.window_s, found.value, max(error, least))


def _search(windows: Sequence[_Window], total_bytes: int | None) -> list[_Try]:
    """Tries by growing k: ever denser around those that could be."""
    low = STRAIGHT / max(window.seconds for window in windows)
    high = FLAT / min(window.seconds for window in windows)
    tries: dict[float, _Try] = {}
    for _ in range(ZOOMS):
        step = (high / low) ** (1 / GRID)
        for index in range(GRID + 1):
            k = low * step**index
            tries[k] = _at(k, windows, total_bytes)
        in_order = sorted(tries.values(), key=lambda each: each.k)
        least = min(each.chi2 for each in in_order)
        region = _region(in_order, least + CHI2_95)
        low, high = region[0].k, region[-1].k
        if high <= low:
            break
    return sorted(tries.values(), key=lambda each: each.k)


def _at(k: float, windows: Sequence[_Window], total_bytes: int | None) -> _Try:
    weight = hit = square = 0.0
    for seconds, found, error in windows:  # tried a hundred times for each set: no generators
        share, seen = -math.expm1(-k * seconds) / error, found / error
        weight += share * share
        hit += share * seen
        square += seen * seen
    whole = max(0.0, hit / weight)
    if total_bytes is not None:
        whole = min(whole, float(total_bytes))
    chi2 = max(0.0, square - whole * (2 * hit - whole * weight))
    return _Try(k, whole, 1 / math.sqrt(weight), chi2)


def _region(tries: Sequence[_Try], limit: float) -> Sequence[_Try]:
    """Those that could be, and their neighbors: what lies between two tries is covered too."""
    inside = [at for at, each in enumerate(tries) if each.chi2 <= limit]
    return tries[max(0, inside[0] - 1) : inside[-1] + 2]


def _slacks(
    region: Sequence[_Try], least: float, within: float
) -> Iterator[tuple[_Try, float, float]]:
    """Each try with the least and the most that W can be there; the outer two with full slack."""
    for each in region:
        room = least + within - each.chi2
        slack = math.sqrt(room if room > 0 else within) * each.set_error
        yield each, max(0.0, each.set_bytes - slack), each.set_bytes + slack


def _figure(
    value: float,
    spans: Sequence[tuple[float, float]],
    *,
    is_bounded: bool,
    most: int | None = None,
) -> Figure:
    low, high = min(span[0] for span in spans), max(span[1] for span in spans)
    if most is not None and (not is_bounded or high >= most):
        return Figure(None, min(low, value), float(most))
    return (
        Figure(value, min(low, value), high) if is_bounded else Figure(None, min(low, value), None)
    )
