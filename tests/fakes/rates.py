"""Dirty rates as a service tells them, for those who only show them: a VM that writes 200 MiB/s
over a working set of 300 MiB, and one (its name begins with "idle") that writes nothing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from migrd.core.rate_history import HistoryPoint
from migrd.core.rate_reading import MIB, Figure, RateReading, Tracker
from migrd.core.working_set import distinct_bytes, fit
from migrd.engine.rate_views import (
    AskedRate,
    DirtyRatesView,
    HistoryView,
    SamplingState,
    TrackerRates,
    Trouble,
)
from migrd.errors import Conflict

RATE = 200.0 * MIB
SET_BYTES = 300.0 * MIB
SAMPLED_WALL_S = 1_795_000_000.0
DENIED = {
    SamplingState.MIGRATING: "vm_migrating",
    SamplingState.NOT_RUNNING: "vm_stopped",
    SamplingState.UNREACHABLE: "vm_unreachable",
    SamplingState.OFF: "sampling_off",
}


def reading(window_s: float, rate: float) -> RateReading:
    found = distinct_bytes(rate, SET_BYTES, window_s)
    return RateReading(window_s, 4096, Figure(found, 0.9 * found, 1.1 * found + MIB), 0.002)


class FakeRates(ABC):
    """The part of Service that is about dirty rates."""

    sampling_state: Mapping[str, SamplingState] = {}
    """By VM, where it is not `on`."""
    rate_trouble: Trouble | None = None
    asked_for_rates: tuple[str, ...] = ()

    @abstractmethod
    def vm(self, name: str) -> Any: ...

    def dirty_rates(self, vm: str) -> DirtyRatesView:
        return DirtyRatesView(vm, self._state_of(vm), self._trackers(vm))

    def _state_of(self, vm: str) -> SamplingState:
        view = self.vm(vm)
        if view.migration_id is not None:
            return SamplingState.MIGRATING
        is_running = view.state == "running"
        otherwise = SamplingState.ON if is_running else SamplingState.NOT_RUNNING
        return self.sampling_state.get(vm, otherwise)

    def _trackers(self, vm: str) -> tuple[TrackerRates, ...]:
        if self._state_of(vm) is SamplingState.OFF:
            return ()
        rate = 0.0 if vm.startswith("idle") else RATE
        seen = tuple(reading(window_s, rate) for window_s in (0.25, 1.0, 4.0))
        cpu = TrackerRates(
            Tracker.QEMU,
            "calc-dirty-rate, page-sampling",
            seen,
            fit(seen, total_bytes=4096 * MIB),
            SAMPLED_WALL_S,
            12.5,
            0.006,
            30.0,
            sets=7,
            failures=int(self.rate_trouble is not None),
            trouble=self.rate_trouble,
        )
        silent = (RateReading(1.0, 4096, None, 0.001, "unproven"),)
        dma = TrackerRates(
            Tracker.IOMMU,
            "peeks at page tables",
            silent,
            fit(silent),
            SAMPLED_WALL_S,
            3.0,
            0.001,
            10.0,
            sets=9,
        )
        return (dma, cpu)

    def dirty_rate_history(
        self, vm: str, *, since_wall_s: float | None, step_s: int | None
    ) -> HistoryView:
        self.vm(vm)
        since = SAMPLED_WALL_S - 3600 if since_wall_s is None else since_wall_s
        step = step_s or 60
        points = [
            HistoryPoint(start_s, step, RATE, RATE / 2, 2 * RATE, 2, SET_BYTES)
            for start_s in (SAMPLED_WALL_S - 180, SAMPLED_WALL_S - 60)
            if start_s >= since
        ]
        return HistoryView(vm, since, step, {Tracker.QEMU: points})

    async def measure_dirty_rate(self, vm: str, *, by: str) -> AskedRate:
        del by
        state = self._state_of(vm)
        if state is not SamplingState.ON:
            raise Conflict(f"{vm} is not measured: {state.value}", code=DENIED[state])
        is_new = vm not in self.asked_for_rates
        self.asked_for_rates = (*self.asked_for_rates, vm)
        return AskedRate(vm, is_new, 5.25)
