"""VMs whose dirty rates are measured, for the tests of the sampler."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Any

from migrd.core.rate_reading import (
    MIB,
    RateMode,
    Tracker,
)
from migrd.engine.options import SamplingOptions
from migrd.engine.rate_views import DirtyRatesView, RateSeen, TrackerRates, Trouble
from tests.fakes.qemu_process import FakeQemu, Load
from tests.fakes.virtual_time import until
from tests.fakes.world import VM, Pair

INTERVAL_S = 30.0
ON = SamplingOptions(RateMode.PAGE_SAMPLING, interval_s=INTERVAL_S)
RATE, SET_BYTES = 64 * MIB, 96 * MIB


@dataclass
class Seen:
    """Notes what the metrics would be told."""

    rates: list[RateSeen] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)


@contextlib.asynccontextmanager
async def pair_of(*vms: str, **changes: Any) -> AsyncIterator[Pair]:
    """VMs that run on alpha, each writing 64 MiB/s over 96 MiB."""
    async with Pair(sampling=replace(ON, **changes)) as pair:
        pair.ground.load = Load(512 * MIB, RATE, SET_BYTES)
        for name in vms or (VM,):
            await pair.boot(name)
        yield pair


def rates(pair: Pair, vm: str = VM) -> DirtyRatesView:
    return pair.alpha.service.dirty_rates(vm)


def cpu(pair: Pair, vm: str = VM) -> TrackerRates:
    (found,) = [each for each in rates(pair, vm).trackers if each.tracker is Tracker.QEMU]
    return found


def qemu_of(pair: Pair, vm: str = VM) -> FakeQemu:
    return pair.hosts["alpha"].qemu(vm)


async def sampled(pair: Pair, vm: str = VM, *, sets: int = 1) -> TrackerRates:
    """Until so many sets of windows were measured."""

    def is_there() -> bool:
        return any(each.sets >= sets for each in rates(pair, vm).trackers)

    await until(is_there, within_s=600.0, what=f"{sets} sets of {vm}")
    return cpu(pair, vm)


async def troubled(pair: Pair) -> Trouble:
    """Until a measurement has failed."""

    def found() -> list[Trouble]:
        return [each.trouble for each in rates(pair).trackers if each.trouble is not None]

    await until(found, within_s=100)
    return found()[0]


def observe(pair: Pair) -> Seen:
    seen = Seen()
    observer: Any = pair.alpha.observer
    observer.rate_sampled, observer.rates_ended = seen.rates.append, seen.ended.append
    return seen
