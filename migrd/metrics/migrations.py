"""Metrics of migrations: how they ended, how long each phase and each blackout took, and where
those that are going on stand.

What only grows lives in prometheus_client's registry. What belongs to one VM is kept here and
rendered by `render`, so that its series end with it.
"""

from collections import Counter as Tally
from collections.abc import Iterable, Mapping
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram

from migrd.core.handover import DestinationPhase
from migrd.core.phases import TERMINAL, Phase
from migrd.engine.service import MigrationView, Role
from migrd.metrics.labels import AtMost, OneOf
from migrd.metrics.render import Family, LabelValues, Rows

DESTINATION_TERMINAL: Final = frozenset({DestinationPhase.RUNNING, DestinationPhase.REFUSED})

ROLES: Final = tuple(role.value for role in Role)
PHASES: Final = tuple(dict.fromkeys(str(p) for p in (*Phase, *DestinationPhase)))
OUTCOMES: Final = tuple(sorted({str(p) for p in (*TERMINAL, *DESTINATION_TERMINAL)}))
CHANNELS: Final = ("ram", "multifd", "device", "postcopy")
CONDITIONS_OF_SOURCE: Final = (
    "ArbiterUnreachable", "CancelRequested", "DestinationUnclear", "DestinationUnreachable",
    "GuestStopped", "JournalFailing", "LinkStalled", "OwnedElsewhere", "OwnershipViolation",
    "PostcopyFailed", "PostcopyPaused", "SourceNotEnding", "SourceUnclear", "StepFailing",
)  # fmt: skip
CONDITIONS_OF_DESTINATION: Final = ("ArbiterUnreachable", "JournalFailing", "NotGoingOn", "Refused")
CONDITIONS: Final = tuple(sorted({*CONDITIONS_OF_SOURCE, *CONDITIONS_OF_DESTINATION}))
"""What a migration can show; the words are the API's (README, Alarms)."""
TRACKERS: Final = ("qemu", "iommu", "device", "pagemap")
"""Who saw the writes: QEMU's own RAM bitmap; later IOMMU, device and PAGEMAP_SCAN."""

MAX_REASONS: Final = 100

PHASE_BUCKETS_S: Final = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800)
BLACKOUT_BUCKETS_S: Final = (
    0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2, 5, 10, 30,
)  # fmt: skip
ROUND_BUCKETS_S: Final = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)

ACTIVE = Family(
    "migrd_migrations_active",
    "gauge",
    "Migrations going on, by this host's side of them and phase.",
    ("role", "phase"),
)
CONDITION = Family(
    "migrd_migration_condition",
    "gauge",
    "Migrations going on that show this condition, by this host's side of them.",
    ("role", "condition"),
)
REMAINING = Family(
    "migrd_migration_remaining_bytes", "gauge", "Bytes still to send of this VM.", ("vm",)
)
PREDICTED_BLACKOUT = Family(
    "migrd_migration_predicted_blackout_seconds",
    "gauge",
    "Predicted blackout if the switchover of this VM began now.",
    ("vm",),
)
TRANSFERRED = Family(
    "migrd_migration_transferred_bytes_total",
    "counter",
    "Bytes sent of this VM, by channel.",
    ("vm", "channel"),
)


class MigrationMetrics:
    """Called by the engine as things happen; every call is cheap and never raises on odd values.

    `transferred` belongs to the event loop's thread, all else to any thread.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._role, self._phase = OneOf(ROLES), OneOf(PHASES)
        self._outcome, self._reason = OneOf(OUTCOMES), AtMost(MAX_REASONS)
        self._channel = OneOf(CHANNELS)
        self._ended = Counter(
            "migrd_migrations",
            "Migrations ended, by this host's side of them, outcome (the last phase) and reason.",
            ("role", "outcome", "reason"),
            registry=registry,
        )
        self._phase_duration = Histogram(
            "migrd_migration_phase_duration_seconds",
            "How long phases lasted.",
            ("role", "phase"),
            buckets=PHASE_BUCKETS_S,
            registry=registry,
        )
        self._blackout = Histogram(
            "migrd_migration_blackout_seconds",
            "How long guests were stopped, from the source's stop to the destination known to run.",
            buckets=BLACKOUT_BUCKETS_S,
            registry=registry,
        )
        self._violations = Counter(
            "migrd_ownership_violations",
            "Times a guest was seen to run where it may not. Anything above 0 is an emergency.",
            registry=registry,
        )
        self._transferred: dict[LabelValues, float] = {}
        self._count_rounds(registry)

    def _count_rounds(self, registry: CollectorRegistry) -> None:
        self._tracker = OneOf(TRACKERS)
        self._rounds = Counter(
            "migrd_harvest_rounds",
            "Rounds recorded, by who tracked the writes.",
            ("tracker", "outcome"),
            registry=registry,
        )
        self._round_duration = Histogram(
            "migrd_harvest_duration_seconds",
            "How long rounds lasted, by who tracked the writes.",
            ("tracker",),
            buckets=ROUND_BUCKETS_S,
            registry=registry,
        )

    def phase_changed(
        self, role: str, phase_from: str, phase_to: str, duration_s: float | None
    ) -> None:
        """A migration left `phase_from` after `duration_s` (None: not known, after a restart)."""
        del phase_to  # counted when it is left; a last phase is counted by migration_ended
        if duration_s is not None and duration_s >= 0:
            self._phase_duration.labels(self._role(role), self._phase(phase_from)).observe(
                duration_s
            )

    def migration_ended(self, role: str, outcome: str, reason: str | None = None) -> None:
        """`outcome` is the terminal phase; `reason` the code of its cause, None for none."""
        label = self._reason(reason) if reason else "none"
        self._ended.labels(self._role(role), self._outcome(outcome), label).inc()

    def blackout(self, blackout_s: float) -> None:
        """The guest was stopped for so long."""
        self._blackout.observe(max(0.0, blackout_s))

    def round_counted(self, tracker: str, duration_s: float, outcome: str) -> None:
        """One round ended; `outcome` is "ok" or "failed"."""
        name = self._tracker(tracker)
        self._rounds.labels(name, "ok" if outcome == "ok" else "failed").inc()
        self._round_duration.labels(name).observe(max(0.0, duration_s))

    def ownership_violation(self) -> None:
        """A guest was seen to run where it may not."""
        self._violations.inc()

    def transferred(self, vm: str, channel: str, bytes_delta: int) -> None:
        """So many more bytes of `vm` have left."""
        if bytes_delta > 0:
            key = (vm, self._channel(channel))
            self._transferred[key] = self._transferred.get(key, 0) + bytes_delta

    def freeze(self, tracked_vms: frozenset[str]) -> Rows:
        """Copy of the per-VM counters, after dropping those of VMs no longer tracked."""
        self._transferred = {
            key: count for key, count in self._transferred.items() if key[0] in tracked_vms
        }
        return dict(self._transferred)


def migration_families(
    views: Iterable[MigrationView], transferred: Rows
) -> tuple[tuple[Family, Rows], ...]:
    """The series of the migrations that are going on."""
    active = [view for view in views if not view.is_terminal]
    remaining: dict[LabelValues, float] = {}
    predicted: dict[LabelValues, float] = {}
    for view in active:
        if view.progress.remaining_bytes is not None:
            remaining[(view.vm,)] = view.progress.remaining_bytes
        if view.estimate is not None and view.estimate.predicted_blackout_s is not None:
            predicted[(view.vm,)] = view.estimate.predicted_blackout_s
    return (
        (ACTIVE, _active_by_phase(active)),
        (CONDITION, _active_by_condition(active)),
        (REMAINING, remaining),
        (PREDICTED_BLACKOUT, predicted),
        (TRANSFERRED, transferred),
    )


def _active_by_phase(active: Iterable[MigrationView]) -> Mapping[LabelValues, float]:
    """All phases that a migration can be in, with 0 where there is none: alerts need the series."""
    tally = Tally((view.role.value, view.phase) for view in active)
    on_source = [(Role.SOURCE.value, str(p)) for p in Phase if p not in TERMINAL]
    on_destination = [
        (Role.DESTINATION.value, str(p)) for p in DestinationPhase if p not in DESTINATION_TERMINAL
    ]
    return {key: tally.get(key, 0) for key in (*on_source, *on_destination)}


def _active_by_condition(active: Iterable[MigrationView]) -> Mapping[LabelValues, float]:
    """As with phases. A migration counts once for each condition, and once for all `other` ones."""
    bounded = OneOf(CONDITIONS)
    tally: Tally[LabelValues] = Tally()
    for view in active:
        shown = {bounded(one.type) for one in view.conditions if one.status == "True"}
        tally.update((view.role.value, condition) for condition in shown)
    expected = [
        *((Role.SOURCE.value, condition) for condition in CONDITIONS_OF_SOURCE),
        *((Role.DESTINATION.value, condition) for condition in CONDITIONS_OF_DESTINATION),
    ]
    return {key: tally[key] for key in (*expected, *sorted(tally.keys() - set(expected)))}
