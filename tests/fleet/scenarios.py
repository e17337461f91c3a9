"""What is tried on a fleet, and what must be true after it."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from tests.fleet.drain import Drain, Drained
from tests.fleet.fleet import GIB, HOSTS_PER_RACK, Fleet
from tests.fleet.latencies import EtcdLoad

MIB = 1 << 20
ETCD_AWAY_S = 20.0


@dataclass(frozen=True)
class Scenario:
    """One fleet, one drain, and perhaps a trouble in the middle of it."""

    name: str
    racks: int
    emptied: int
    per_host: int
    at_once: int
    memory_bytes: int = 16 * GIB
    dirty_bytes_per_s: int = 100 * MIB
    trouble: Callable[[Fleet], Coroutine[Any, Any, None]] | None = None
    trouble_at_s: float = 16.0
    """After the first host has begun."""


@dataclass(frozen=True)
class Report:
    """What a scenario came to."""

    scenario: Scenario
    drained: Drained
    load: EtcdLoad
    writes: int
    requests: int
    running: int
    """Guests that run, by ground truth."""
    lost: int
    """Guests that run nowhere."""
    died: int
    """Of those: the ones whose holder lost its power."""

    @property
    def migrations(self) -> int:
        return sum(self.drained.phases.values())

    def lines(self) -> list[str]:
        """For people."""
        return [*self._of_drain(), *self._of_arbiter()]

    def _of_drain(self) -> list[str]:
        s, d = self.scenario, self.drained
        hosts = s.emptied * HOSTS_PER_RACK
        phases = ", ".join(f"{n} {phase}" for phase, n in sorted(d.phases.items()))
        causes = ", ".join(f"{n} {cause}" for cause, n in sorted(d.causes.items())) or "none"
        blackouts = sorted(d.blackouts_s) or [0.0]
        p50, p99 = (1e3 * _at(blackouts, share) for share in (0.5, 0.99))
        return [
            f"{s.name}: {s.racks * HOSTS_PER_RACK} hosts, {hosts} of them emptied of "
            f"{hosts * s.per_host} guests of {s.memory_bytes // GIB} GiB",
            f"  took {d.took_s:.0f} s, {d.most_at_once} at once; {phases}; causes: {causes}",
            f"  guests: {self.running} run, {self.lost} run nowhere ({self.died} lost power); "
            f"a person was needed for {d.persons}",
            f"  a migration: median {statistics.median(d.totals_s or [0.0]):.1f} s; blackout p50 "
            f"{p50:.0f} ms, p99 {p99:.0f} ms, longest {1e3 * blackouts[-1]:.0f} ms",
        ]

    def _of_arbiter(self) -> list[str]:
        load, took_s = self.load, max(self.drained.took_s, 1e-9)
        waited = sorted(load.waited_s) or [0.0]
        p50, p99 = (1e3 * _at(waited, share) for share in (0.5, 0.99))
        return [
            f"  arbiter: {self.requests / took_s:.0f} requests/s, {load.most_per_s()} in "
            f"the busiest second; {load.asked_per_s:.0f} renewals and looks/s; "
            f"{self.writes / max(1, self.migrations):.2f} writes a migration",
            f"  its answers: p50 {p50:.1f} ms, p99 {p99:.1f} ms; longest queue "
            f"{1e3 * load.longest_queue_s:.1f} ms",
        ]


def _at(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


async def etcd_away(fleet: Fleet) -> None:
    """It has no quorum for a while, with many guests on the way."""
    fleet.etcd.is_stalled = True
    await asyncio.sleep(ETCD_AWAY_S)
    fleet.etcd.heal()


async def rack_loses_power(fleet: Fleet) -> None:
    """A rack of targets is gone at once: daemons, QEMUs, and the guests that had arrived there."""
    for name in fleet.targets[:HOSTS_PER_RACK]:
        await fleet.lose_power(name)


async def _later(work: Coroutine[Any, Any, None], after_s: float) -> None:
    await asyncio.sleep(after_s)
    await work


async def play(scenario: Scenario, load: EtcdLoad) -> Report:
    """Raises AssertionError when a guest ran twice, an old copy ran, or a copy was thrown away."""
    async with Fleet(scenario.racks, scenario.emptied, load) as fleet:
        await fleet.fill(scenario.per_host, scenario.memory_bytes, scenario.dirty_bytes_per_s)
        load.begin(leases=len(fleet.hosts))
        before, began = len(fleet.etcd.writes), len(fleet.etcd.log)
        trouble = None
        if scenario.trouble is not None:
            trouble = asyncio.create_task(_later(scenario.trouble(fleet), scenario.trouble_at_s))
        drained = await Drain(fleet, fleet.sources, scenario.at_once).run()
        if trouble is not None:
            await trouble
        fleet.check_truth()
        guests = fleet.ground.guests.values()
        lost = [guest for guest in guests if guest.running_on is None]
        return Report(
            scenario,
            drained,
            load,
            writes=len(fleet.etcd.writes) - before,
            requests=len(fleet.etcd.log) - began,
            running=len(guests) - len(lost),
            lost=len(lost),
            died=sum(guest.name in fleet.died for guest in lost),
        )
