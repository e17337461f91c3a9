"""Metrics of the VMs on this host. Every series here ends when its VM is no longer tracked."""

from collections.abc import Iterable
from types import MappingProxyType
from typing import Final

from migrd.core.facts import REQUIRED_FEATURES
from migrd.core.standing import StandingDecision
from migrd.core.tracking import Migratability
from migrd.engine.service import MigrationView, VmView
from migrd.metrics.labels import OneOf
from migrd.metrics.migrations import TRACKERS
from migrd.metrics.render import Family, LabelValues, Rows

UNKNOWN: Final = "unknown"
VERDICTS: Final = (*(one.value for one in Migratability), UNKNOWN)

DIRTY_RATE = Family(
    "migrd_vm_dirty_bytes_per_second",
    "gauge",
    "Memory newly dirtied by this VM, by who tracked the writes: in a migration by its rounds, "
    "outside as it was measured last.",
    ("vm", "tracker"),
)
DIRTY_PAGES = Family(
    "migrd_vm_dirty_pages_total",
    "counter",
    "Pages of this VM seen dirty in rounds and in measured windows, by who tracked the writes.",
    ("vm", "tracker"),
)
MIGRATABLE = Family(
    "migrd_vm_migratable",
    "gauge",
    "How this VM can be migrated as it is: 1 on the verdict that holds.",
    ("vm", "verdict"),
)


class VmMetrics:
    """Counters that belong to one VM; for the event loop's thread."""

    def __init__(self) -> None:
        self._tracker = OneOf(TRACKERS)
        self._dirty_pages: dict[LabelValues, float] = {}

    def dirtied(self, vm: str, tracker: str, pages: float) -> None:
        """So many pages of `vm` were seen dirty in one more round."""
        if pages > 0:
            key = (vm, self._tracker(tracker))
            self._dirty_pages[key] = self._dirty_pages.get(key, 0) + round(pages)

    def freeze(self, tracked_vms: frozenset[str]) -> Rows:
        """Copy of the counters, after dropping those of VMs no longer tracked."""
        self._dirty_pages = {
            key: count for key, count in self._dirty_pages.items() if key[0] in tracked_vms
        }
        return dict(self._dirty_pages)


def vm_families(
    vms: Iterable[VmView],
    migrations: Iterable[MigrationView],
    dirty_pages: Rows,
    sampled: Rows = MappingProxyType({}),
) -> tuple[tuple[Family, Rows], ...]:
    """The series of the VMs that are tracked; `sampled`: the rates that were measured last."""
    rates = dict(sampled)
    for migration in migrations:
        rate = migration.progress.dirty_bytes_per_s
        if not migration.is_terminal and rate is not None:
            rates[(migration.vm, "qemu")] = rate
    migratable: dict[LabelValues, float] = {}
    for vm in vms:
        of_devices = [one.rate.dirty_bytes_per_s for one in vm.dma_rates]
        if known := [rate for rate in of_devices if rate is not None]:
            rates[(vm.name, "iommu")] = sum(known)
        verdict = verdict_of(vm)
        for word in VERDICTS:
            migratable[(vm.name, word)] = 1.0 if word == verdict else 0.0
    return ((DIRTY_RATE, rates), (DIRTY_PAGES, dirty_pages), (MIGRATABLE, migratable))


def verdict_of(vm: VmView) -> str:
    """The decision about its devices, unless QEMU itself says no; preflight says more, and why."""
    facts, decision = vm.facts, vm.decision
    if facts is not None:
        is_blocked = facts.blocked_reasons or not facts.features >= REQUIRED_FEATURES
        if vm.spec.profile is None or (is_blocked and _is_possible(decision)):
            return Migratability.BLOCKED.value
    if decision is not None:
        return decision.plan.migratability.value
    if facts is None or facts.passthrough_devices:  # nothing was decided about these
        return UNKNOWN
    return Migratability.LIVE.value


def _is_possible(decision: StandingDecision | None) -> bool:
    return decision is None or decision.plan.migratability.is_possible


def tracked_vms(vms: Iterable[VmView], migrations: Iterable[MigrationView]) -> frozenset[str]:
    """The VMs that may have series: those known here, and those in a migration."""
    going_on = (view.vm for view in migrations if not view.is_terminal)
    return frozenset((*(vm.name for vm in vms), *going_on))
