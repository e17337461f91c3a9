"""Metrics of the arbiter; there are none where the journals decide alone."""

from collections.abc import Callable
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from migrd.engine.arbiter_port import ArbiterState
from migrd.metrics.labels import OneOf

OPS: Final = (
    "authenticate",
    "lease_grant",
    "lease_keepalive",
    "lease_revoke",
    "put",
    "range",
    "roster",
    "txn",
)
RESULTS: Final = ("ok", "refused", "odd", "late", "lost", "not_sent")
BUCKETS_S: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 1, 5)


class ArbiterMetrics:
    """Called on the event loop; every call is cheap."""

    def __init__(self, registry: CollectorRegistry, changed: Callable[[], None]) -> None:
        self._changed = changed
        self._op, self._result = OneOf(OPS), OneOf(RESULTS)
        self._up = Gauge(
            "migrd_arbiter_up",
            "Whether the arbiter answered when last asked.",
            registry=registry,
        )
        self._hosts = Gauge(
            "migrd_arbiter_hosts",
            "Hosts whose lease lives, as last listed; NaN: not known.",
            registry=registry,
        )
        self._hosts.set(float("nan"))
        self._requests = Counter(
            "migrd_arbiter_requests_total",
            "Requests to members of the arbiter.",
            ("op", "result"),
            registry=registry,
        )
        self._seconds = Histogram(
            "migrd_arbiter_request_seconds",
            "Time from a request to a member of the arbiter to its answer, or to giving it up.",
            ("op",),
            buckets=BUCKETS_S,
            registry=registry,
        )
        self._shown: tuple[bool, int | None] | None = None

    def requested(self, op: str, result: str, seconds: float) -> None:
        """A request was answered, or not. Happens all the time: no change."""
        self._requests.labels(self._op(op), self._result(result)).inc()
        self._seconds.labels(self._op(op)).observe(seconds)

    def looked(self, state: ArbiterState) -> None:
        """The arbiter was asked how it is."""
        hosts = None if state.hosts is None else len(state.hosts)
        if self._shown == (state.is_reachable, hosts):
            return
        self._shown = (state.is_reachable, hosts)
        self._up.set(1 if state.is_reachable else 0)
        self._hosts.set(float("nan") if hosts is None else hosts)
        self._changed()
