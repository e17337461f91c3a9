"""Harvest rounds over simulated sources: what is written is pending or moved, whatever happens."""

from __future__ import annotations

import asyncio
import threading

import pytest

from migrd.core.harvest_round import ReadOutcome, Tracker
from migrd.engine.dirty_ports import OnLoss
from migrd.engine.harvest import Harvest
from migrd.errors import Invalid, LogLost
from tests.contract.dirty_source import DirtySourceContract, dirty_pages
from tests.engine.harvesting import (
    HIGH,
    HUGE,
    MEMORY,
    RAM,
    moved,
    started,
    two,
)
from tests.fakes.dirty_source import SimSource, Strike


class SimRig:
    memory = MEMORY
    can_peek = True

    def __init__(self, page_size_bytes: int) -> None:
        self.tracker = Tracker.DEVICE
        self.source = SimSource("nic", RAM, tracker=Tracker.DEVICE, page_size_bytes=page_size_bytes)
        self.write = self.source.write
        self.lose = self.source.lose


class TestSimulator(DirtySourceContract):
    @pytest.fixture(params=[4096, 16384, HUGE])
    def rig(self, request: pytest.FixtureRequest) -> SimRig:
        return SimRig(request.param)


# ---- rounds


async def test_all_pages_are_pending_at_the_start_and_tracking_is_on_before() -> None:
    sources = two()
    harvest, _ = await started(sources)
    assert all(source.is_tracking for source in sources)
    assert moved(harvest) == [*range(500), *range(512, 812)]


async def test_a_round_makes_pending_what_any_source_tells_of() -> None:
    iommu, nic = two()
    harvest, rounds = await started([iommu, nic])
    moved(harvest)
    iommu.write(3, 600)
    nic.write(600, 700)
    round_ = await harvest.round()
    assert dirty_pages(harvest.pending) == [3, 600, 601, 700, 701]
    assert rounds == [round_]
    assert (round_.number, round_.dirty_pages, round_.pending_pages) == (1, 5, 5)
    assert round_.bytes_to_move == 5 * 4096
    by_name = {read.source: read for read in round_.sources}
    assert by_name["iommu"].dirty_pages == 2
    assert by_name["nic"].dirty_pages == 4
    assert by_name["nic"].amplification == 2.0
    assert by_name["iommu"].amplification == 1.0


async def test_what_was_not_moved_stays_pending_and_is_not_counted_as_new() -> None:
    iommu, nic = two()
    harvest, _ = await started([iommu, nic])
    moved(harvest)
    iommu.write(3)
    await harvest.round()
    iommu.write(3, 4)
    round_ = await harvest.round()
    assert (round_.number, round_.dirty_pages, round_.pending_pages) == (2, 1, 2)
    assert round_.sources[0].dirty_pages == 2


async def test_rates_are_over_the_time_since_the_previous_read() -> None:
    source = SimSource("iommu", RAM)
    harvest, _ = await started([source])
    source.write(*range(40))
    first = await harvest.round()
    source.write(*range(60))
    second = await harvest.round()
    assert first.dirty_pages_per_s is not None
    assert second.dirty_pages_per_s is not None
    assert first.sources[0].dirty_pages_per_s is not None
    assert second.dirty_pages_per_s == pytest.approx(60 / (second.started_s - first.started_s))
    assert second.sources[0].dirty_pages_per_s == pytest.approx(second.dirty_pages_per_s)


async def test_without_sources_nothing_becomes_pending_and_that_can_be_known() -> None:
    harvest, _ = await started([])
    assert harvest.unwatched_pages() == 800
    moved(harvest)
    assert (await harvest.round()).pending_pages == 0
    part, _ = await started([SimSource("nic", HIGH)])
    assert part.unwatched_pages() == 500


async def test_sources_are_read_at_the_same_time() -> None:
    sources = two()
    harvest, _ = await started(sources)
    for source in sources:
        source.hold = threading.Event()
    going_on = asyncio.create_task(harvest.round())
    for source in sources:
        assert await asyncio.to_thread(source.entered.wait, 30)
    for source in sources:
        assert source.hold is not None
        source.hold.set()
    await going_on


async def test_many_sources_share_few_buffers() -> None:
    sources = [SimSource(f"nic{n}", RAM) for n in range(20)]
    harvest, _ = await started(sources)
    moved(harvest)
    for page, source in enumerate(sources):
        source.write(page)
    await harvest.round()
    assert moved(harvest) == list(range(20))
    assert len(harvest._buffers) <= 4


def test_what_cannot_be_recorded_or_is_no_memory_is_refused() -> None:
    wrong = [SimSource("a", RAM), SimSource("a", HIGH), SimSource("b", ((500, 5),))]
    with pytest.raises(Invalid) as refused:
        Harvest(MEMORY, wrong, on_loss=OnLoss.GIVE_UP)
    assert [one.code for one in refused.value.violations] == ["repeated_name", "not_memory"]


async def test_a_round_before_the_start_is_a_mistake() -> None:
    harvest = Harvest(MEMORY, two(), on_loss=OnLoss.GIVE_UP)
    with pytest.raises(RuntimeError):
        await harvest.round()


# ---- a log that is lost


async def test_a_lost_log_makes_all_its_pages_dirty_and_stands_in_the_record() -> None:
    iommu, nic = two()
    harvest, _ = await started([iommu, nic], OnLoss.MARK_ALL)
    moved(harvest)
    iommu.write(7)
    nic.lose()
    round_ = await harvest.round()
    assert moved(harvest) == [7, *range(512, 812)]
    [lost] = round_.lost
    assert (lost.source, lost.outcome) == ("nic", ReadOutcome.MARKED_ALL)
    assert lost.reason is not None
    assert "lost" in lost.reason
    assert lost.dirty_pages == 300
    assert lost.dirty_pages_per_s is None
    assert round_.dirty_pages_per_s is None


async def test_a_lost_log_is_started_again() -> None:
    iommu, nic = two()
    harvest, _ = await started([iommu, nic], OnLoss.RESTART)
    moved(harvest)
    nic.lose()
    round_ = await harvest.round()
    assert [one.outcome for one in round_.lost] == [ReadOutcome.RESTARTED]
    assert moved(harvest) == list(range(512, 812))
    nic.write(600)
    assert not (await harvest.round()).lost
    assert moved(harvest) == [600, 601]


async def test_a_source_that_cannot_be_restarted_ends_the_round() -> None:
    iommu, nic = two()
    harvest, rounds = await started([iommu, nic], OnLoss.RESTART)
    moved(harvest)
    nic.lose()
    nic.plan = lambda call, _: Strike(False) if call == "start_tracking" else None
    iommu.write(1)
    with pytest.raises(LogLost, match="nic"):
        await harvest.round()
    assert [one.outcome for one in rounds[-1].lost] == [ReadOutcome.FAILED]
    assert moved(harvest) == [1, *range(512, 812)]


async def test_giving_up_ends_the_round_with_all_pages_pending() -> None:
    iommu, nic = two()
    harvest, rounds = await started([iommu, nic], OnLoss.GIVE_UP)
    moved(harvest)
    iommu.write(1)
    nic.lose()
    with pytest.raises(LogLost, match="nic"):
        await harvest.round()
    assert moved(harvest) == [1, *range(512, 812)]
    assert [one.outcome for one in rounds[-1].lost] == [ReadOutcome.FAILED]


async def test_each_source_has_its_own_policy() -> None:
    iommu, nic = two()
    policies = {"nic": OnLoss.MARK_ALL}
    harvest = Harvest(MEMORY, [iommu, nic], on_loss=policies)
    await harvest.start()
    nic.lose()
    assert (await harvest.round()).lost[0].outcome is ReadOutcome.MARKED_ALL
    iommu.lose()
    with pytest.raises(LogLost, match="iommu"):
        await harvest.round()


async def test_the_rest_is_counted_and_pending_once_there_are_no_rounds_any_more() -> None:
    sources = two()
    harvest, _ = await started(sources)
    await harvest.round()
    moved(harvest)
    assert await harvest.rest() == 0
    sources[0].write(3)
    sources[1].write(512)
    assert await harvest.rest() == 3
    assert moved(harvest) == [3, 512, 513]
    await harvest.close()
