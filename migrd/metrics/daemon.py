"""Metrics of the daemon itself: event loop, journal, QMP calls, peers, build, process."""

from collections.abc import Iterable
from typing import Final

from prometheus_client import (
    CollectorRegistry,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)

import migrd
from migrd.metrics.labels import OneOf

QMP_COMMANDS: Final = frozenset(
    {
        "announce-self", "block-export-add", "calc-dirty-rate", "cont", "device_add", "device_del",
        "getfd", "human-monitor-command", "migrate", "migrate-continue", "migrate-incoming",
        "migrate-pause", "migrate-recover", "migrate-set-capabilities", "migrate-set-parameters",
        "migrate-start-postcopy", "migrate_cancel", "object-add", "object-del", "qmp_capabilities",
        "qom-get", "qom-list", "query-blockstats", "query-cpus-fast", "query-dirty-rate",
        "query-kvm", "query-machines", "query-memory-size-summary", "query-migrate",
        "query-migrate-capabilities", "query-migrate-parameters", "query-name", "query-pci",
        "query-qmp-schema", "query-status", "query-uuid", "query-version", "query-yank", "quit",
        "stop", "yank",
    }
)  # fmt: skip
QMP_OUTCOMES: Final = ("ok", "refused", "late", "lost", "not_sent")

LOOP_LAG_BUCKETS_S: Final = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 1)
COMMIT_BUCKETS_S: Final = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 2)
QMP_BUCKETS_S: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.25, 1, 5)


class DaemonMetrics:
    """Called from anywhere in the daemon, on any thread; every call is cheap."""

    def __init__(self, registry: CollectorRegistry, peers: Iterable[str] = ()) -> None:
        # `_created` doubles the series of each counter and histogram, for no reader we know of
        disable_created_metrics()  # type: ignore[no-untyped-call]  # the library has no types here
        ProcessCollector(registry=registry)
        Gauge("migrd_build_info", "Version of migrd.", ("version",), registry=registry).labels(
            migrd.__version__
        ).set(1)
        self._command, self._outcome = OneOf(QMP_COMMANDS), OneOf(QMP_OUTCOMES)
        self._peer = OneOf(tuple(peers))
        self._loop_lag = Histogram(
            "migrd_event_loop_lag_seconds",
            "How late the event loop woke up.",
            buckets=LOOP_LAG_BUCKETS_S,
            registry=registry,
        )
        self._journal_commit = Histogram(
            "migrd_journal_commit_seconds",
            "Time to make a journal transaction durable.",
            buckets=COMMIT_BUCKETS_S,
            registry=registry,
        )
        self._qmp_call = Histogram(
            "migrd_qmp_call_seconds",
            "Time from sending a QMP command to its answer.",
            ("command", "outcome"),
            buckets=QMP_BUCKETS_S,
            registry=registry,
        )
        self._peer_up = Gauge(
            "migrd_peer_up",
            "Whether the migrd of this peer answered when last asked.",
            ("peer",),
            registry=registry,
        )
        self._calls: dict[tuple[str, str], Histogram] = {}

    def loop_lag(self, seconds: float) -> None:
        """The event loop woke up so late."""
        self._loop_lag.observe(seconds)

    def journal_committed(self, seconds: float) -> None:
        """A journal transaction became durable in this time."""
        self._journal_commit.observe(seconds)

    def qmp_called(self, command: str, outcome: str, seconds: float) -> None:
        """A QMP command was answered, or not; outcomes are QMP_OUTCOMES."""
        key = (command, outcome)
        series = self._calls.get(key)
        if series is None:
            bounded = (self._command(command), self._outcome(outcome))
            series = self._qmp_call.labels(*bounded)
            if bounded == key:
                self._calls[key] = series
        series.observe(seconds)

    def peer_checked(self, name: str, up: bool) -> None:
        """The migrd of a peer on the roster was asked, and answered or not."""
        self._peer_up.labels(self._peer(name)).set(1 if up else 0)
