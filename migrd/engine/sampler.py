"""How fast the memory of every VM here gets dirty, measured outside of migrations.

    VMs ─► sources of each ─► a task for each (source_sampling) ─► last sample, history
            (rate_source)          │                                  ▲
        one budget of CPU time for all (core.sampling_budget)         │
                                               clients and scrapes ───┘ only read

- Nobody who reads causes a measurement or waits for one; `measure` is a wish, granted soon.
- Each source has a task of its own: a QEMU that answers late or never delays nobody else. What all
  cost together is bounded: with many VMs, or dear ones, the intervals grow.
- CPU writes are measured by the VMM itself, one measurement at a time in each; never while a
  migration of the VM goes on, whose rounds tell more. Devices are peeked at in a migration too:
  then, and only then, QEMU has switched the tracking of their writes on.
- The history (core.rate_history) belongs to the VM, not to its QEMU, and is kept in memory alone:
  it begins anew with the daemon.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Final
from zlib import crc32

from migrd.core.facts import RunState
from migrd.core.rate_history import FINEST_S, RateHistory
from migrd.core.rate_reading import Tracker
from migrd.core.sampling_budget import SamplingBudget
from migrd.engine.device_holding import DeviceHolding
from migrd.engine.dma_sampling import DmaSource
from migrd.engine.migrations import Migrations
from migrd.engine.rate_source import CpuSource, RateSource
from migrd.engine.rate_views import (
    AskedRate,
    DirtyRatesView,
    HistoryView,
    SamplingState,
    TrackerRates,
)
from migrd.engine.source_sampling import SourceSampling
from migrd.engine.vms import STAGGER, Entry
from migrd.errors import Conflict

RECONCILE_S: Final = 1.0
HISTORY_S: Final = 3600.0
"""Shown to who does not say from when on."""

FindSources = Callable[[Entry], Sequence[RateSource]]
"""The sources of a VM's present process; new objects of the same names may come at each call."""


class Sampler:
    """Finds the VMs' sources, keeps a task for each, and tells what they have found."""

    def __init__(
        self, migrations: Migrations, holding: DeviceHolding, group: asyncio.TaskGroup
    ) -> None:
        self._migrations = migrations
        self._world = migrations.world
        self._vms = migrations.vms
        self._holding = holding
        self._group = group
        self._budget = SamplingBudget(self._world.options.sampling.budget_share)
        self._samplings: dict[tuple[str, str], SourceSampling] = {}
        self._tasks: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._histories: dict[tuple[str, Tracker], RateHistory] = {}
        self.finders: list[FindSources] = [self._cpu_source, self._dma_source]
        """Others may add theirs."""

    async def watch(self) -> None:
        """Runs until cancelled; the tasks it has begun are the group's."""
        while True:
            self._reconcile()
            await asyncio.sleep(RECONCILE_S)

    # Sources ----------------------------------------------------------------------------------

    def _cpu_source(self, entry: Entry) -> Sequence[RateSource]:
        options = self._world.options.sampling
        return () if options.mode is None else (CpuSource(entry, options, options.mode),)

    def _dma_source(self, entry: Entry) -> Sequence[RateSource]:
        if entry.vmm is None or not self._holding.is_held(entry.vmm.instance):
            return ()
        return (DmaSource(self._migrations, self._holding, entry.spec.name, entry.vmm.instance),)

    def _reconcile(self) -> None:
        wanted: dict[tuple[str, str], tuple[Entry, RateSource]] = {}
        for entry in self._vms.all():
            if entry.vmm is not None and not entry.vmm.is_dead:
                for source in (each for find in self.finders for each in find(entry)):
                    wanted[entry.vmm.instance, source.name] = entry, source
        for key in self._samplings.keys() - wanted.keys():
            self._end(key)
        for key in wanted.keys() - self._samplings.keys():
            self._begin(key, *wanted[key])
        for vm, tracker in list(self._histories):
            if self._vms.get(vm) is None:
                del self._histories[vm, tracker]

    def _begin(self, key: tuple[str, str], entry: Entry, source: RateSource) -> None:
        vm, (instance, _) = entry.spec.name, key
        sampling = SourceSampling(
            vm,
            source,
            self._histories.setdefault((vm, source.tracker), RateHistory()),
            self._budget,
            self._world,
            in_the_way=lambda: self._in_the_way(vm, instance, source),
            memory_bytes=lambda: self._memory_bytes(vm),
        )
        first_s = source.interval_s * (crc32(vm.encode()) % STAGGER + 1) / STAGGER
        self._samplings[key] = sampling
        self._tasks[key] = self._group.create_task(
            sampling.run(first_s), name=f"rates-{vm}-{source.name}"
        )

    def _end(self, key: tuple[str, str]) -> None:
        vm = self._samplings.pop(key).vm
        self._tasks.pop(key).cancel()
        if not any(each.vm == vm for each in self._samplings.values()):
            self._world.observer.rates_ended(vm)

    def _memory_bytes(self, vm: str) -> int | None:
        entry = self._vms.get(vm)
        return None if entry is None or entry.facts is None else entry.facts.memory_bytes

    def _in_the_way(self, vm: str, instance: str, source: RateSource) -> SamplingState | None:
        """What keeps the source from being asked now."""
        entry = self._vms.get(vm)
        if entry is None or entry.vmm is None or entry.vmm.instance != instance:
            return SamplingState.NOT_RUNNING
        if entry.vmm.is_dead:
            return SamplingState.NOT_RUNNING
        return None if source.goes_on_in_migration else _stands(entry)

    # For clients ------------------------------------------------------------------------------

    def view(self, vm: str) -> DirtyRatesView:
        """The last samples. Raises NotFound."""
        entry = self._vms.require(vm)
        return DirtyRatesView(vm, self._state(entry), self._trackers(vm))

    def _trackers(self, vm: str) -> tuple[TrackerRates, ...]:
        found = [each.view() for each in self._of(vm)]
        return tuple(sorted(found, key=lambda each: (each.tracker, each.source)))

    def _of(self, vm: str) -> list[SourceSampling]:
        """Those that the VM's process can be asked by."""
        return [each for each in self._samplings.values() if each.vm == vm and each.is_offered]

    def _state(self, entry: Entry) -> SamplingState:
        state = _stands(entry)
        if state is not None:
            return state
        return SamplingState.ON if self._of(entry.spec.name) else SamplingState.OFF

    def history(
        self, vm: str, since_wall_s: float | None = None, step_s: int | None = None
    ) -> HistoryView:
        """What is kept from `since_wall_s` on. Raises NotFound."""
        self._vms.require(vm)
        clock = self._world.clock
        now_s, now_wall_s = clock.monotonic_s(), clock.wall_s()
        since = now_wall_s - HISTORY_S if since_wall_s is None else since_wall_s
        before_s = max(0.0, now_wall_s - since)
        points = {
            tracker: history.points(
                now_s - before_s, now_s, step_s, wall_offset_s=now_wall_s - now_s
            )
            for (name, tracker), history in sorted(self._histories.items())
            if name == vm
        }
        steps = [each[0].step_s for each in points.values() if each]
        return HistoryView(vm, since, max(steps, default=step_s or FINEST_S), points)

    def measure(self, vm: str) -> AskedRate:
        """Measure a VM soon. Raises NotFound, Conflict (`vm_migrating`, `vm_stopped`,
        `vm_unreachable`, `sampling_off`)."""
        entry = self._vms.require(vm)
        state = self._state(entry)
        if state is not SamplingState.ON:
            code, text = _DENIED[state]
            raise Conflict(f"{vm} {text}", code=code)
        asked = [each.ask() for each in self._of(vm)]
        return AskedRate(vm, any(new for new, _ in asked), max(within_s for _, within_s in asked))


_DENIED: Final = {
    SamplingState.MIGRATING: ("vm_migrating", "is being migrated: its rounds tell more"),
    SamplingState.NOT_RUNNING: ("vm_stopped", "does not run: it writes nothing"),
    SamplingState.UNREACHABLE: ("vm_unreachable", "cannot be asked: its QEMU does not answer"),
    SamplingState.OFF: ("sampling_off", "is not measured: see [sampling] of the configuration"),
}


def _stands(entry: Entry) -> SamplingState | None:
    """What keeps a VM from being measured."""
    if entry.migration_id is not None or entry.incoming:
        return SamplingState.MIGRATING
    if entry.vmm is None or entry.vmm.is_dead:
        return SamplingState.NOT_RUNNING
    if entry.trouble is not None or not entry.vmm.is_reachable:
        return SamplingState.UNREACHABLE
    return None if entry.run_state is RunState.RUNNING else SamplingState.NOT_RUNNING
