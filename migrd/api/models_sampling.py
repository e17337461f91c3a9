"""Wire models of dirty rates measured outside of migrations."""

from typing import Self

from migrd.api.wire import At, Count, WireModel, at, at_or_none, exact_ms, finite, ms
from migrd.core import working_set
from migrd.core.rate_history import HistoryPoint
from migrd.core.rate_reading import Figure, RateReading, Tracker, headline
from migrd.core.working_set import FitQuality
from migrd.engine import rate_views
from migrd.engine.rate_views import AskedRate, DirtyRatesView, HistoryView, SamplingState


class RateWindow(WireModel):
    """What one window found: distinct memory that was written within it, as a rate."""

    window_ms: float
    dirty_bytes_per_s: float | None
    """null: not known; `reason` says why."""
    low_bytes_per_s: float | None
    """Lower end of the 95 % interval."""
    high_bytes_per_s: float | None
    page_size_bytes: int
    reason: str | None
    """unproven (nothing was dirty, and outside a migration QEMU does not track devices), saturated,
    cleared, nothing_mapped, memory_size_unknown; null: it is known."""

    @classmethod
    def of(cls, reading: RateReading) -> Self:
        rate = reading.rate
        return cls(
            window_ms=exact_ms(reading.window_s),
            dirty_bytes_per_s=None if rate is None else finite(rate.value),
            low_bytes_per_s=None if rate is None else finite(rate.low),
            high_bytes_per_s=None if rate is None else finite(rate.high),
            page_size_bytes=reading.page_size_bytes,
            reason=reading.why or None,
        )


class WorkingSet(WireModel):
    """How the VM writes: distinct bytes within t seconds are W * (1 - exp(-D * t / W)). Each figure
    with its 95 % interval; the best guess is null where only the interval is known, its upper end
    where there is none."""

    quality: FitQuality
    """fitted; else why neither is known: too_few_windows (of different length), nothing_written."""
    first_bytes_per_s: float | None
    """D: how fast clean memory gets dirty at first."""
    first_low_bytes_per_s: float | None
    first_high_bytes_per_s: float | None
    set_bytes: float | None
    """W: how much is written at all."""
    set_low_bytes: float | None
    set_high_bytes: float | None
    misfit: float | None
    """By so much the errors had to be widened; about 1 or less: it fits. null: too few windows."""

    @classmethod
    def of(cls, found: working_set.WorkingSet) -> Self:
        first, whole = found.first_bytes_per_s, found.set_bytes
        return cls(
            quality=found.quality,
            first_bytes_per_s=_value(first),
            first_low_bytes_per_s=None if first is None else finite(first.low),
            first_high_bytes_per_s=None if first is None else finite(first.high),
            set_bytes=_value(whole),
            set_low_bytes=None if whole is None else finite(whole.low),
            set_high_bytes=None if whole is None else finite(whole.high),
            misfit=finite(found.misfit),
        )


def _value(figure: Figure | None) -> float | None:
    return None if figure is None else finite(figure.value)


class SamplingTrouble(WireModel):
    """Why the newest measurement has brought nothing."""

    code: str
    message: str
    at: At


class TrackerRate(WireModel):
    """What was found last by one of those who see the VM's writes."""

    tracker: Tracker
    """qemu: the guest's CPUs. iommu, device: passthrough devices. pagemap: a process."""
    source: str
    """How it is measured, for people."""
    sampled_at: At | None
    """null: not yet."""
    age_ms: float | None
    dirty_bytes_per_s: float | None
    """Of the window nearest to a second."""
    low_bytes_per_s: float | None
    high_bytes_per_s: float | None
    windows: tuple[RateWindow, ...]
    """Measured one after the other."""
    working_set: WorkingSet | None
    cost_ms: float | None
    """CPU time that the last measurement took from this host, at most."""
    interval_ms: float | None
    """Between the last two; longer than `sampling.interval_s` where the budget says so."""
    measurements: Count
    failures: Count
    trouble: SamplingTrouble | None

    @classmethod
    def of(cls, seen: rate_views.TrackerRates) -> Self:
        best = headline(seen.readings)
        rate = None if best is None else best.rate
        trouble = seen.trouble
        return cls(
            tracker=seen.tracker,
            source=seen.source,
            sampled_at=at_or_none(seen.sampled_wall_s),
            age_ms=ms(seen.age_s),
            dirty_bytes_per_s=_value(rate),
            low_bytes_per_s=None if rate is None else finite(rate.low),
            high_bytes_per_s=None if rate is None else finite(rate.high),
            windows=tuple(RateWindow.of(reading) for reading in seen.readings),
            working_set=None if seen.working_set is None else WorkingSet.of(seen.working_set),
            cost_ms=ms(seen.cost_s),
            interval_ms=ms(seen.interval_s),
            measurements=seen.sets,
            failures=seen.failures,
            trouble=None
            if trouble is None
            else SamplingTrouble(code=trouble.code, message=trouble.message, at=at(trouble.wall_s)),
        )


class DirtyRate(WireModel):
    """How fast a VM's memory gets dirty, as it was measured last."""

    vm: str
    state: SamplingState
    """on: measured now and then. off: nothing can be, or is to be, measured. migrating: not now;
    its rounds tell more. not_running, unreachable."""
    trackers: tuple[TrackerRate, ...]

    @classmethod
    def of(cls, view: DirtyRatesView) -> Self:
        return cls(
            vm=view.vm,
            state=view.state,
            trackers=tuple(TrackerRate.of(each) for each in view.trackers),
        )


class RatePoint(WireModel):
    """One step of the past."""

    at: At
    """When it begins."""
    tracker: Tracker
    dirty_bytes_per_s: float
    """The mean of what was measured within the step."""
    lowest_bytes_per_s: float
    highest_bytes_per_s: float
    set_bytes: float | None
    """The working set, where it was known."""
    measurements: Count

    @classmethod
    def of(cls, tracker: Tracker, point: HistoryPoint) -> Self:
        return cls(
            at=at(point.start_s),
            tracker=tracker,
            dirty_bytes_per_s=point.mean,
            lowest_bytes_per_s=point.least,
            highest_bytes_per_s=point.most,
            set_bytes=finite(point.set_bytes),
            measurements=point.samples,
        )


class RateHistory(WireModel):
    """The past of a VM's dirty rates, oldest first. Kept in memory: it begins with the daemon."""

    vm: str
    since: At
    step_s: int
    """Of the steps below: as asked for, or as fine as is kept."""
    items: tuple[RatePoint, ...]

    @classmethod
    def of(cls, view: HistoryView) -> Self:
        points = [
            RatePoint.of(tracker, point) for tracker, each in view.points.items() for point in each
        ]
        return cls(
            vm=view.vm,
            since=at(view.since_wall_s),
            step_s=view.step_s,
            items=tuple(sorted(points, key=lambda point: (point.at, point.tracker))),
        )


class MeasurementAsked(WireModel):
    """What became of the wish to measure."""

    vm: str
    is_new: bool
    """false: somebody has asked before, or it is being measured; it is done once."""
    within_ms: float
    """It should be over by then."""

    @classmethod
    def of(cls, asked: AskedRate) -> Self:
        return cls(vm=asked.vm, is_new=asked.is_new, within_ms=exact_ms(asked.within_s))
