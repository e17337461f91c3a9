"""Metrics: what the rest of the daemon calls when something happened.

One object for all subjects, so that the engine is handed one thing. The calls are the subjects' own
(`migrations`, `vms`, `daemon`); each counts as a change, except those that happen all the time.
"""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry

from migrd.core.devices import Inventory
from migrd.core.facts import Round
from migrd.core.harvest_round import ReadOutcome
from migrd.engine.rate_views import RateSeen
from migrd.metrics.arbiter import ArbiterMetrics
from migrd.metrics.daemon import DaemonMetrics
from migrd.metrics.decisions import DecisionMetrics
from migrd.metrics.devices import DeviceMetrics
from migrd.metrics.migrations import MigrationMetrics
from migrd.metrics.sampling import SamplingMetrics
from migrd.metrics.vms import VmMetrics


class Metrics:
    """All hooks. Those that name a VM belong to the event loop's thread, the rest to any."""

    def __init__(self, peers: Iterable[str] = ()) -> None:
        """`peers` are the roster's names: the only ones that get a series."""
        self.registry = CollectorRegistry()
        self.migrations = MigrationMetrics(self.registry)
        self.vms = VmMetrics()
        self.devices = DeviceMetrics(self.registry)
        self.decisions = DecisionMetrics(self.registry)
        self.sampling = SamplingMetrics(self.registry)
        self.daemon = DaemonMetrics(self.registry, peers)
        self.changes = 0
        """Grows with everything worth a new rendering. Two threads may count one change as one."""

        self.loop_lag = self.daemon.loop_lag
        self.qmp_called = self.daemon.qmp_called

    def watch_arbiter(self) -> ArbiterMetrics:
        """There is an arbiter: it has series from now on. Once."""
        return ArbiterMetrics(self.registry, self._changed)

    def _changed(self) -> None:
        self.changes += 1

    def phase_changed(
        self, role: str, phase_from: str, phase_to: str, duration_s: float | None
    ) -> None:
        """A migration left `phase_from` after `duration_s` (None: not known)."""
        self.changes += 1
        self.migrations.phase_changed(role, phase_from, phase_to, duration_s)

    def migration_ended(self, role: str, outcome: str, reason: str | None = None) -> None:
        """`outcome` is the terminal phase; `reason` the code of its cause, None for none."""
        self.changes += 1
        self.migrations.migration_ended(role, outcome, reason)

    def blackout(self, blackout_s: float) -> None:
        """The guest was stopped for so long."""
        self.changes += 1
        self.migrations.blackout(blackout_s)

    def round_recorded(
        self, vm: str, round_: Round, *, tracker: str = "qemu", outcome: str = "ok"
    ) -> None:
        """One more round of this VM's migration; of each source, where migrd harvests."""
        self.changes += 1
        for read in round_.sources:
            told = "ok" if read.outcome is ReadOutcome.READ else "failed"
            self.migrations.round_counted(read.tracker.value, read.took_s, told)
            self.vms.dirtied(vm, read.tracker.value, read.dirty_pages)
        if round_.sources:
            return
        self.migrations.round_counted(tracker, round_.duration_s, outcome)
        if round_.dirty_pages_per_s is not None:
            self.vms.dirtied(vm, tracker, round_.dirty_pages_per_s * round_.duration_s)

    def transferred(self, vm: str, channel: str, bytes_delta: int) -> None:
        """So many more bytes of `vm` have left, by channel (migrations.CHANNELS)."""
        self.changes += 1
        self.migrations.transferred(vm, channel, bytes_delta)

    def ownership_violation(self) -> None:
        """A guest was seen to run where it may not."""
        self.changes += 1
        self.migrations.ownership_violation()

    def inventory_seen(self, inventory: Inventory) -> None:
        """The hardware is like this from now on."""
        self.changes += 1
        self.devices.inventory = inventory

    def estimate_was_wrong(self) -> None:
        """What registers promised of dirty tracking is not what the kernel answered."""
        self.changes += 1
        self.devices.estimate_was_wrong()

    def decided(self, policy: str, decision: str, reason: str) -> None:
        """A decision about a VM's passthrough devices stands from now on."""
        self.changes += 1
        self.decisions.decided(policy, decision, reason)

    def rate_sampled(self, seen: RateSeen) -> None:
        """A VM's dirty rate was measured, or should have been. Happens all the time: no change."""
        self.sampling.rate_sampled(seen)
        self.vms.dirtied(seen.vm, seen.tracker, seen.pages)

    def rates_ended(self, vm: str) -> None:
        """Nothing of this VM is measured any more."""
        self.changes += 1
        self.sampling.rates_ended(vm)

    def journal_committed(self, seconds: float) -> None:
        """A journal transaction became durable in this time."""
        self.changes += 1
        self.daemon.journal_committed(seconds)

    def peer_checked(self, name: str, up: bool) -> None:
        """The migrd of a peer was asked, and answered or not."""
        self.changes += 1
        self.daemon.peer_checked(name, up)
