"""Schedules whose hosts share an arbiter, and what happens to it.

    seed < FIRST_ARBITRATED     the journals decide alone, as they always did for that seed
    seed >= FIRST_ARBITRATED    an arbiter, and blows at its requests and at moments of time

Checked in addition: the record is the truth once the VM has been moved again, and nobody is called
for a destination that is gone before it had said `started`.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from migrd.arbiter.records import decoded, key_of
from migrd.core.migration import Mode
from migrd.engine.arbiter_port import Ownership
from tests.fakes import arbiter as fake
from tests.fakes.arbiter import LATENCY_S, PREFIX, FakeArbiterStore
from tests.fakes.arbiter import Trouble as ArbiterTrouble
from tests.fakes.virtual_time import until
from tests.fakes.world import VM, Pair

FIRST_ARBITRATED = 10**12
MOST = 5
"""Blows at the arbiter, beside those at everything else."""
WHATS = ("stall", "cut_off", "slow", "all_cut_off")
LATE_S = 12.0
LATE_SHARE = 0.7
BEGUN_S = 10.0


@dataclass(frozen=True)
class RequestBlow:
    """What becomes of the n-th request."""

    number: int
    trouble: ArbiterTrouble


@dataclass(frozen=True)
class ArbiterBlow:
    """Something that lasts for a while."""

    at_s: float
    what: str
    host: str
    for_s: float


@dataclass(frozen=True)
class ArbiterBlows:
    """Of one schedule."""

    requests: tuple[RequestBlow, ...]
    timed: tuple[ArbiterBlow, ...]
    is_late: bool = False
    """All of it after the first write: else most of it only keeps a migration from beginning."""


def arbiter_blows(random_: random.Random, lasts_s: Sequence[float]) -> ArbiterBlows:
    """By what is left of a seed's randomness."""
    is_late = random_.random() < LATE_SHARE
    requests = [
        RequestBlow(random_.randint(1, 8 if is_late else 12), random_.choice(list(ArbiterTrouble)))
        for _ in range(random_.randint(0, MOST))
    ]
    timed = [
        ArbiterBlow(
            10 ** random_.uniform(-3.0, 0.7),
            random_.choice(WHATS),
            random_.choice(("alpha", "beta")),
            random_.choice(lasts_s),
        )
        for _ in range(random_.choice((0, 0, 1, 1, 2)))
    ]
    return ArbiterBlows(tuple(requests), tuple(timed), is_late)


@dataclass
class Arbiter:
    """Of one run."""

    blows: ArbiterBlows
    store: FakeArbiterStore
    struck: list[str] = field(default_factory=list)
    _slow_s: float = LATENCY_S
    _begun: asyncio.Event = field(default_factory=asyncio.Event)

    @classmethod
    def of(cls, blows: ArbiterBlows | None) -> Arbiter | None:
        if blows is None:
            return None
        made = cls(blows, FakeArbiterStore())
        made.store = FakeArbiterStore(latency_s=lambda: made._slow_s)
        return made

    def arm(self, pair: Pair) -> None:
        """From the request for the migration on."""
        pair.replace(fake, "LATE_S", LATE_S)
        losses = {blow.number: blow.trouble for blow in self.blows.requests}
        seen, written = [0], len(self.store.writes)

        def faults(host: str, call: str) -> ArbiterTrouble | None:
            if self.blows.is_late and len(self.store.writes) == written:
                return None
            self._begun.set()
            seen[0] += 1
            trouble = losses.get(seen[0])
            if trouble is not None:
                self.struck.append(f"{host} > arbiter {call}: {trouble.value}")
            return trouble

        self.store.faults = faults

    def strikes(self) -> list[Coroutine[Any, Any, None]]:
        return [self._strike(blow) for blow in self.blows.timed]

    def heal(self) -> None:
        self._slow_s = LATENCY_S
        self.store.heal()

    async def _strike(self, blow: ArbiterBlow) -> None:
        if self.blows.is_late and not await self._has_begun():
            return
        await asyncio.sleep(blow.at_s)
        self.struck.append(f"{blow.at_s:.4f} s: {blow.what} {blow.host} for {blow.for_s:g} s")
        begin, end = self._ways(blow)
        begin()
        await asyncio.sleep(blow.for_s)
        end()

    async def _has_begun(self) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(BEGUN_S):
                return await self._begun.wait()
        return False

    def _ways(self, blow: ArbiterBlow) -> tuple[Callable[[], None], Callable[[], None]]:
        store, both = self.store, {"alpha", "beta"}

        def slow(latency_s: float) -> None:
            self._slow_s = latency_s

        def stall() -> None:
            store.is_stalled = True

        match blow.what:
            case "cut_off":
                return lambda: store.down.add(blow.host), lambda: store.down.discard(blow.host)
            case "all_cut_off":
                return lambda: store.down.update(both), store.down.clear
            case "slow":
                return lambda: slow(0.7), lambda: slow(LATENCY_S)
            case _:
                return stall, self._unstall

    def _unstall(self) -> None:
        faults, down = self.store.faults, set(self.store.down)
        self.store.heal()
        self.store.faults = faults
        self.store.down |= down

    def record(self) -> Ownership | None:
        """As it is."""
        key = key_of(PREFIX, VM)
        entry = self.store.entries.get(key)
        return None if entry is None else decoded(key, VM, entry)

    def check_person(self, pair: Pair, id_: str, host: str) -> None:
        """A destination that is gone before it said that it starts the guest needs no person."""
        m = pair.daemons[host].engine.migrations.outgoing.get(id_)
        if m is None or not m.state.granted or m.state.mode is not Mode.PRECOPY or m.vmm.is_dead:
            return
        record = self.record()
        assert record is not None, "no record of a VM that was granted"
        assert m.state.decided_on_revision is None or record.started, (record, m.state.cause)

    async def check(self, pair: Pair) -> None:
        """Once the VM was moved again the record is the truth, whatever was missed before."""
        await until(lambda: self._is_true(pair), within_s=100.0, what="the record is the truth")

    def _is_true(self, pair: Pair) -> bool:
        record, runs_on = self.record(), pair.running_on()
        return record is not None and (record.owner, record.started) == (runs_on, True)
