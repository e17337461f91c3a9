"""Metrics of dirty rates that are measured outside of migrations.

A rate is only as good as it is young, so each has the time it was measured at beside it: whoever
draws rates can leave old ones out (`time() - migrd_vm_dirty_rate_sampled_timestamp_seconds`). The
rates themselves stand in one family with those of migrations (`vms.DIRTY_RATE`).
"""

from dataclasses import dataclass
from typing import Final

from prometheus_client import CollectorRegistry, Counter

from migrd.engine.rate_views import RateSeen
from migrd.metrics.labels import OneOf
from migrd.metrics.migrations import TRACKERS
from migrd.metrics.render import Family, LabelValues, Rows

OUTCOMES: Final = ("ok", "unknown", "failed", "interrupted")

SAMPLED_AT = Family(
    "migrd_vm_dirty_rate_sampled_timestamp_seconds",
    "gauge",
    "When the dirty rate of this VM was measured last, outside of a migration.",
    ("vm", "tracker"),
)


@dataclass(frozen=True)
class Sampled:
    """The last measured rates, and when."""

    rates: Rows
    at: Rows


class SamplingMetrics:
    """For the event loop's thread."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._tracker, self._outcome = OneOf(TRACKERS), OneOf(OUTCOMES)
        self._rates: dict[LabelValues, float] = {}
        self._at: dict[LabelValues, float] = {}
        self._samples = Counter(
            "migrd_dirty_rate_samples",
            "Measurements of VMs' dirty rates, by who tracked the writes and what came of it.",
            ("tracker", "outcome"),
            registry=registry,
        )
        self._cost = Counter(
            "migrd_dirty_rate_sampling_cpu_seconds",
            "CPU time that measuring dirty rates has taken from this host, at most.",
            ("tracker",),
            registry=registry,
        )

    def rate_sampled(self, seen: RateSeen) -> None:
        """A VM was measured, or should have been."""
        tracker = self._tracker(seen.tracker)
        self._samples.labels(tracker, self._outcome(seen.outcome)).inc()
        self._cost.labels(tracker).inc(max(0.0, seen.cost_s))
        if seen.bytes_per_s is not None:
            self._rates[seen.vm, tracker] = seen.bytes_per_s
            self._at[seen.vm, tracker] = seen.wall_s

    def rates_ended(self, vm: str) -> None:
        """Its series end."""
        for rows in (self._rates, self._at):
            for key in [key for key in rows if key[0] == vm]:
                del rows[key]

    def freeze(self, tracked_vms: frozenset[str]) -> Sampled:
        """Copies, after dropping VMs that are no longer tracked."""
        for vm in {key[0] for key in self._rates} - tracked_vms:
            self.rates_ended(vm)
        return Sampled(dict(self._rates), dict(self._at))


def sampling_families(sampled: Sampled) -> tuple[tuple[Family, Rows], ...]:
    return ((SAMPLED_AT, sampled.at),)
