"""Looking at the peers: a large roster is asked in turn, never all of it at once."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from migrd.engine.host import AT_ONCE, PEERS_PER_S, HostFacts
from migrd.engine.peer_service import HelloFacts
from tests.fakes.virtual_time import now_s
from tests.fakes.world import Pair

PEERS = 400


class Asked:
    """Peers that answer after a moment, and how many are asked at the same time."""

    def __init__(self, name: str, seen: Seen) -> None:
        self.name = name
        self._seen = seen

    async def hello(self) -> HelloFacts:
        seen = self._seen
        seen.now += 1
        seen.most = max(seen.most, seen.now)
        seen.at_s.append(now_s())
        await asyncio.sleep(0.01)
        seen.now -= 1
        return HelloFacts(self.name, "0.1.0")


class Seen:
    now = 0
    most = 0

    def __init__(self) -> None:
        self.at_s: list[float] = []


async def test_a_roster_of_hundreds_is_asked_a_few_at_a_time_and_wholly() -> None:
    async with Pair() as pair:
        world = pair.alpha.engine.migrations.world
        seen = Seen()
        peers: dict[str, Any] = {f"host-{n}": Asked(f"host-{n}", seen) for n in range(PEERS)}
        roster = {name: f"https://{name}:7744" for name in peers}
        options = replace(world.options, peers=roster, peer_interval_s=5.0)
        host = HostFacts(replace(world, peers=peers, options=options))
        watch = asyncio.create_task(host.watch())
        await asyncio.sleep(PEERS / PEERS_PER_S + 1.0)
        assert len(seen.at_s) == PEERS
        assert seen.most == AT_ONCE
        within_a_second = max(sum(s <= t < s + 1.0 for t in seen.at_s) for s in seen.at_s)
        assert within_a_second <= PEERS_PER_S + AT_ONCE
        assert all(view.up for view in host.view(pair.alpha.engine.migrations).peers)
        watch.cancel()
        await asyncio.wait([watch])
