"""Messages lost, late, repeated and out of order: who asks again and again learns the truth, and
what has been decided stays so."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from migrd.core.handover import DestinationPhase
from migrd.engine.ports import DestinationView
from migrd.errors import PeerRefused, PeerTimedOut, PeerUnreachable
from tests.fakes.peer import FakePeerService, seeded_faults
from tests.fakes.road import LATE_S, Door, Road, RoadPeer
from tests.fakes.virtual_time import VirtualTimeLoop
from tests.peer.fleet import SETTINGS, VM

SEEDS = range(60)


class Pair:
    """host-a asking host-b over a road that loses half of what is sent."""

    def __init__(self, seed: int) -> None:
        self.service = FakePeerService()
        self.road = Road()
        self.road.doors["host-b"] = Door(self.service)
        self.road.faults = seeded_faults(seed)
        self.peer = RoadPeer(self.road, "host-a", "host-b")
        self.failures = 0

    async def until_answered(
        self, ask: Callable[[], Awaitable[DestinationView]]
    ) -> DestinationView:
        while True:
            try:
                return await ask()
            except (PeerTimedOut, PeerUnreachable):
                self.failures += 1
                await asyncio.sleep(0.1)

    async def after_the_last_late_message(self) -> DestinationView:
        await asyncio.sleep(2 * LATE_S)
        self.road.heal()
        return await self.peer.view("m1")

    async def close(self) -> None:
        await self.road.close()
        await self.road.doors["host-b"].close()


def _run(work: Callable[[Pair], Awaitable[None]], seed: int) -> int:
    """In virtual time; returns how many messages failed."""

    async def main() -> int:
        pair = Pair(seed)
        try:
            await work(pair)
        except BaseException as failure:
            failure.add_note(f"seed {seed}")
            raise
        finally:
            await pair.close()
        return pair.failures

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main())


async def _hand_over(pair: Pair) -> None:
    await pair.until_answered(lambda: pair.peer.prepare("m1", 1, VM, SETTINGS))
    view = await pair.until_answered(lambda: pair.peer.grant("m1", 1, run_guest=True))
    assert view.phase is DestinationPhase.RUNNING
    with pytest.raises((PeerRefused, PeerTimedOut, PeerUnreachable)):
        await pair.peer.discard("m1", 0, "of an older epoch")
    assert (await pair.after_the_last_late_message()).phase is DestinationPhase.RUNNING
    assert pair.service.starts == ["m1"]


async def _take_back(pair: Pair) -> None:
    await pair.until_answered(lambda: pair.peer.prepare("m1", 1, VM, SETTINGS))
    view = await pair.until_answered(lambda: pair.peer.discard("m1", 1, "cancelled"))
    assert view.phase is DestinationPhase.REFUSED
    try:
        late = await pair.peer.grant("m1", 1, run_guest=True)
    except (PeerTimedOut, PeerUnreachable):
        pass
    else:
        assert late.phase is DestinationPhase.REFUSED
    assert (await pair.after_the_last_late_message()).phase is DestinationPhase.REFUSED
    assert pair.service.starts == []


@pytest.mark.parametrize("work", [_hand_over, _take_back])
def test_over_a_road_that_loses_half_of_everything_one_truth_comes_out(
    work: Callable[[Pair], Awaitable[None]],
) -> None:
    failures = [_run(work, seed) for seed in SEEDS]
    assert sum(failures) > len(SEEDS) / 2  # the road really was lossy


def test_one_seed_is_one_run() -> None:
    assert _run(_hand_over, 7) == _run(_hand_over, 7)
