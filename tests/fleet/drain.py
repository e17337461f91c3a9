"""A control plane that empties racks: as many migrations at once as slots and a limit allow.

A guest whose migration did not succeed is asked for again, to another target, as a control plane
would; what it took is kept for each.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from migrd.core.phases import Phase
from migrd.engine.service import MigrationView
from migrd.errors import MigrdError
from tests.fakes.virtual_time import now_s, until
from tests.fleet.fleet import SLOTS, Fleet

TRIES = 40
AGAIN_S = 2.0
OVER_WITHIN_S = 3600.0
LOOK_S = 0.25
SPREAD_S = 10.0
"""Within that all hosts have begun: else all would reach their switchover in the same instant."""
SEED = 1


@dataclass
class Drained:
    """What a drain took and what became of each migration."""

    began_s: float
    took_s: float = 0.0
    totals_s: list[float] = field(default_factory=list)
    blackouts_s: list[float] = field(default_factory=list)
    phases: Counter[str] = field(default_factory=Counter)
    causes: Counter[str] = field(default_factory=Counter)
    most_at_once: int = 0
    persons: int = 0
    """Migrations in which a person had to say that a host was gone."""
    left: list[str] = field(default_factory=list)
    """Guests that are still where they were, or that need a person."""


class Drain:
    """Empties some hosts of a fleet."""

    def __init__(self, fleet: Fleet, hosts: Sequence[str], at_once: int) -> None:
        self._fleet = fleet
        self._hosts = hosts
        self._free = asyncio.Semaphore(at_once)
        self._active = 0
        self.drained = Drained(now_s())
        self._chance = random.Random(SEED)

    async def run(self) -> Drained:
        """Until every guest has left, or was tried often enough."""
        async with asyncio.TaskGroup() as group:
            for host in self._hosts:
                waiting = deque(self._fleet.vms[host])
                for _ in range(SLOTS):
                    group.create_task(self._empty(host, waiting))
        self.drained.took_s = now_s() - self.drained.began_s
        return self.drained

    async def _empty(self, host: str, waiting: deque[str]) -> None:
        targets = itertools.cycle(self._fleet.targets_of(host))
        await asyncio.sleep(self._chance.uniform(0.0, SPREAD_S))
        while waiting:
            vm = waiting.popleft()
            for _ in range(TRIES):
                if await self._move(vm, host, targets):
                    break
                await asyncio.sleep(AGAIN_S)
            else:
                self.drained.left.append(vm)

    async def _move(self, vm: str, host: str, targets: itertools.cycle[str]) -> bool:
        async with self._free:
            target = next(targets)
            while not self._fleet.has_room(target):
                target = next(targets)
                await asyncio.sleep(LOOK_S)
            self._active += 1
            self.drained.most_at_once = max(self.drained.most_at_once, self._active)
            try:
                return await self._moved(vm, host, target)
            finally:
                self._active -= 1

    async def _moved(self, vm: str, host: str, target: str) -> bool:
        fleet, drained = self._fleet, self.drained
        try:
            id_ = await fleet.ask_to_move(vm, host, target)
        except MigrdError as exc:
            drained.causes[f"asking: {exc.code}"] += 1
            return False
        await until(lambda: self._is_settled(id_, host), within_s=OVER_WITHIN_S, what=f"{vm} over")
        if not fleet.stands(id_, host)[1]:
            drained.persons += 1
            await fleet.say_fenced(id_, host, target)
            await until(lambda: fleet.stands(id_, host)[1], within_s=OVER_WITHIN_S, what=vm)
        self._note(fleet.view(id_, host))
        return fleet.stands(id_, host)[0] == Phase.SUCCEEDED

    def _is_settled(self, id_: str, host: str) -> bool:
        phase, is_over = self._fleet.stands(id_, host)
        return is_over or phase == Phase.NEEDS_OPERATOR

    def _note(self, view: MigrationView) -> None:
        drained = self.drained
        drained.phases[view.phase] += 1
        if view.cause is not None:
            drained.causes[view.cause.code] += 1
        drained.causes.update(refusal.code for refusal in view.refusals)
        if view.phase == Phase.SUCCEEDED and view.total_s is not None:
            drained.totals_s.append(view.total_s)
        if view.blackout_s is not None:
            drained.blackouts_s.append(view.blackout_s)
