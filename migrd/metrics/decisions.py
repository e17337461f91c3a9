"""Metrics of the decisions about passthrough devices, and of what they come to for each VM."""

from typing import Final

from prometheus_client import CollectorRegistry, Counter

from migrd.core.tracking import Migratability, ReasonCode, TrackingPolicy
from migrd.metrics.labels import OneOf

REFUSED: Final = "refused"
NO_REASON: Final = "none"


class DecisionMetrics:
    """One count for each decision that came to stand: at a start, an arrival, a definition, a plug,
    or because something has changed."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._policy = OneOf(list(TrackingPolicy))
        self._decision = OneOf((*Migratability, REFUSED))
        self._reason = OneOf((*ReasonCode, NO_REASON))
        self._total = Counter(
            "migrd_tracking_decisions",
            "Decisions about dirty tracking, by policy, by how migratable the VM is, and by the "
            "reason that weighs most.",
            ("policy", "decision", "reason"),
            registry=registry,
        )

    def decided(self, policy: str, decision: str, reason: str) -> None:
        self._total.labels(
            self._policy(policy), self._decision(decision), self._reason(reason)
        ).inc()
