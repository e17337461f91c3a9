"""What the tests of harvest rounds share: a guest of 800 pages, two sources, the mover."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

from migrd.core.harvest_round import HarvestRound, Tracker
from migrd.core.memory_map import MemoryMap
from migrd.engine.dirty_ports import OnLoss
from migrd.engine.harvest import Harvest
from tests.contract.dirty_source import dirty_pages
from tests.fakes.dirty_source import SimSource

MEMORY = MemoryMap.of([(0, 0, 500 * 4096), (1, 1 << 32, 300 * 4096)])
RAM = ((0, 500), (512, 300))
HIGH = ((512, 300),)
HUGE = 2 << 20


class StepClock:
    """A second passes between any two looks."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.now_s = 0.0

    def monotonic_s(self) -> float:
        with self._lock:
            self.now_s += 1.0
            return self.now_s

    def wall_s(self) -> float:
        return self.monotonic_s()


def two() -> list[SimSource]:
    return [
        SimSource("iommu", RAM),
        SimSource("nic", HIGH, tracker=Tracker.DEVICE, page_size_bytes=8192),
    ]


async def some_turns() -> None:
    """What could go on by itself, has."""
    for _ in range(50):
        await asyncio.sleep(0)


def moved(harvest: Harvest) -> list[int]:
    """What the mover takes: all that is pending."""
    pages = dirty_pages(harvest.pending)
    harvest.pending.clear()
    return pages


async def started(
    sources: Sequence[SimSource], on_loss: OnLoss = OnLoss.GIVE_UP
) -> tuple[Harvest, list[HarvestRound]]:
    rounds: list[HarvestRound] = []
    harvest = Harvest(MEMORY, sources, on_loss=on_loss, clock=StepClock(), publish=rounds.append)
    await harvest.start()
    return harvest, rounds
