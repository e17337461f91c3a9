"""What QEMU is told while it copies: what it did not take is said again."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from migrd.core.phases import Phase
from migrd.engine.ports import Vmm
from migrd.errors import VmmTimedOut
from tests.engine.arbitrating import arbitrated
from tests.engine.test_steering import never_converges
from tests.fakes.virtual_time import until
from tests.fakes.world import VM, Pair


class _SlowMonitor:
    """Answers the first request late, and not the two after it."""

    def __init__(self, inner: Vmm) -> None:
        self._inner = inner
        self.asked: list[dict[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def set_limits(self, **limits: Any) -> None:
        self.asked.append(limits)
        if len(self.asked) == 1:
            await asyncio.sleep(1.0)
        elif len(self.asked) <= 3:
            await asyncio.sleep(5.0)
            raise VmmTimedOut("the monitor did not answer")
        await self._inner.set_limits(**limits)


async def _held_for_both(pair: Pair, migration_id: str) -> None:
    m = pair.alpha.engine.migrations.outgoing[migration_id]
    both = {"ArbiterUnreachable", "DestinationUnreachable"}
    await until(lambda: both <= m.troubles.keys(), what="held for both")
    await asyncio.sleep(1.0)


async def test_a_limit_that_timed_out_is_said_again_though_an_older_one_was_taken_since() -> None:
    """Let go of for both reasons at once: two requests are under way at the same time."""
    async with arbitrated() as (pair, store):
        never_converges(pair)
        migration_id = await pair.ask()
        await pair.until_phase(migration_id, Phase.PRECOPY)
        await asyncio.sleep(1.0)
        pair.road.part("alpha", "beta")
        store.is_stalled = True
        await _held_for_both(pair, migration_id)
        m = pair.alpha.engine.migrations.outgoing[migration_id]
        slow = _SlowMonitor(m.vmm)
        m.vmm = cast(Vmm, slow)
        pair.road.heal()
        store.heal()
        await asyncio.sleep(60.0)
        assert not m.troubles, "nothing holds it any more"
        limits = pair.hosts["alpha"].qemu(VM).limits
        assert len(slow.asked) > 3, "what QEMU did not take is said again"
        assert limits.max_bandwidth_bytes_per_s == slow.asked[-1]["max_bandwidth_bytes_per_s"]
