"""Harvest rounds over simulated sources: what is written is pending or moved, whatever happens."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migrd.core.bitmap import DirtyBitmap
from migrd.core.harvest_round import HarvestRound, ReadOutcome, Tracker
from migrd.core.memory_map import MemoryMap
from migrd.engine.dirty_ports import OnLoss
from migrd.engine.harvest import Harvest
from migrd.errors import Invalid, KernelBusy, KernelError, LogLost
from tests.contract.dirty_source import DirtySourceContract, dirty_pages
from tests.fakes.dirty_source import SimSource, Strike

MEMORY = MemoryMap.of([(0, 0, 500 * 4096), (1, 1 << 32, 300 * 4096)])
RAM = ((0, 500), (512, 300))
HIGH = ((512, 300),)
HUGE = 2 << 20


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


# ---- a failure at every call, a cancellation at every await


WRITES = [[3, 600], [4, 4, 601, 811], [], [0, 499], [700]]


async def transfer(
    sources: Sequence[SimSource], on_loss: OnLoss, written: set[int], got: set[int]
) -> None:
    """A whole transfer that ends at its first error; what was written is in `written`, what is
    pending or moved in the end is in `got`."""
    harvest = Harvest(MEMORY, sources, on_loss=on_loss)
    try:
        await harvest.start()
        got |= set(moved(harvest))
        got.clear()  # moved before any of the writes below
        for pages in WRITES:
            for source in sources:
                source.write(*pages)
            watched = [
                p for p in pages if any(f <= p < f + n for s in sources for f, n in s.covers)
            ]
            written |= set(watched)
            await harvest.round()
            got |= set(moved(harvest))
    finally:
        await harvest.stop()
        got |= set(dirty_pages(harvest.pending))


@pytest.mark.parametrize("on_loss", OnLoss)
@pytest.mark.parametrize("after_effect", [False, True])
@pytest.mark.parametrize("error", [KernelBusy, LogLost, ValueError])
def test_no_failure_of_a_call_loses_a_page_or_leaves_tracking_on(
    on_loss: OnLoss, after_effect: bool, error: type[Exception]
) -> None:
    struck = 0
    for victim in range(2):
        for number in range(1, 12):
            sources = two()
            strike = Strike(after_effect, error)
            sources[victim].plan = lambda call, n, at=number, what=strike: (  # type: ignore[misc]  # typed by its use
                what if n == at else None
            )
            written: set[int] = set()
            got: set[int] = set()
            ended = "well"
            try:
                asyncio.run(transfer(sources, on_loss, written, got))
            except (KernelError, ValueError):
                ended = "badly"
            calls = sources[victim].calls
            struck += len(calls) >= number
            assert got >= written, (victim, number, calls)
            tracking = [source.is_tracking for source in sources]
            was_the_stop = len(calls) >= number and calls[number - 1] == "stop_tracking"
            if was_the_stop and not after_effect:
                assert ended == "badly"
                tracking[victim] = False  # it was tried
            assert tracking == [False, False], (victim, number, calls)
    assert struck >= 12


@pytest.mark.parametrize("on_loss", [OnLoss.GIVE_UP, OnLoss.RESTART])
def test_no_cancellation_loses_a_page_or_leaves_tracking_on(on_loss: OnLoss) -> None:
    """Cancelled after n turns of the loop, for each n until it ends by itself."""

    async def cancelled_after(turns: int) -> bool:
        sources = two()
        written: set[int] = set()
        got: set[int] = set()
        task = asyncio.create_task(transfer(sources, on_loss, written, got))
        for _ in range(turns):
            await asyncio.sleep(0)
        was_done = task.done()
        task.cancel()
        await asyncio.wait([task])
        assert got >= written
        assert not any(source.is_tracking for source in sources)
        return was_done

    turns = 0
    while not asyncio.run(cancelled_after(turns)):
        turns += 1 + turns // 4
    assert turns > 5


async def test_a_cancelled_round_ends_when_the_reads_have_and_all_is_pending() -> None:
    iommu, nic = two()
    harvest, _ = await started([iommu, nic])
    moved(harvest)
    iommu.write(5)
    nic.write(700)
    nic.hold = threading.Event()
    going_on = asyncio.create_task(harvest.round())
    assert await asyncio.to_thread(nic.entered.wait, 30)
    going_on.cancel()
    await asyncio.sleep(0)
    going_on.cancel()
    await some_turns()
    assert not going_on.done()
    nic.hold.set()
    with pytest.raises(asyncio.CancelledError):
        await going_on
    assert moved(harvest) == [5, 700, 701]
    assert (await harvest.round()).pending_pages == 0


async def test_a_stop_waits_for_the_round_that_goes_on() -> None:
    iommu, nic = two()
    harvest, _ = await started([iommu, nic])
    nic.hold = threading.Event()
    going_on = asyncio.create_task(harvest.round())
    assert await asyncio.to_thread(nic.entered.wait, 30)
    stopping = asyncio.create_task(harvest.stop())
    await some_turns()
    assert not stopping.done()
    assert iommu.is_tracking
    nic.hold.set()
    await asyncio.gather(going_on, stopping)
    assert not iommu.is_tracking
    assert not nic.is_tracking


async def test_a_start_that_fails_leaves_no_tracking_on() -> None:
    iommu, nic = two()
    nic.plan = lambda call, _: Strike(True) if call == "start_tracking" else None
    harvest = Harvest(MEMORY, [iommu, nic], on_loss=OnLoss.GIVE_UP)
    with pytest.raises(KernelBusy):
        await harvest.start()
    assert not iommu.is_tracking
    assert not nic.is_tracking


async def test_all_are_stopped_although_each_fails() -> None:
    sources = two()
    harvest, _ = await started(sources)
    for source in sources:
        source.plan = lambda call, _: Strike(False) if call == "stop_tracking" else None
    with pytest.raises(KernelBusy, match="iommu") as failed:
        await harvest.stop()
    assert "nic" in failed.value.__notes__[0]
    assert [source.calls[-1] for source in sources] == ["stop_tracking"] * 2


async def test_what_a_failed_attempt_left_is_moved_by_the_next() -> None:
    sources = two()
    harvest, _ = await started(sources)
    moved(harvest)
    sources[0].write(9)
    await harvest.round()
    await harvest.stop()
    assert dirty_pages(harvest.pending) == [9]
    await harvest.start()
    assert harvest.pending.count() == 800
    await harvest.close()
    assert all(source.is_closed for source in sources)


# ---- any order of anything


pages = st.sampled_from([*range(0, 500, 7), *range(512, 812, 3)])
steps: st.SearchStrategy[list[tuple[str, int, list[int]]]] = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, 1), st.lists(pages, max_size=8)),
        st.tuples(st.just("round"), st.integers(0, 1), st.just([])),
        st.tuples(st.just("move"), st.integers(0, 1), st.just([])),
        st.tuples(st.just("lose"), st.integers(0, 1), st.just([])),
    ),
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(script=steps, on_loss=st.sampled_from(OnLoss))
def test_what_was_written_after_it_was_moved_is_pending(
    script: list[tuple[str, int, list[int]]], on_loss: OnLoss
) -> None:
    asyncio.run(_play(script, on_loss))


async def _play(script: list[tuple[str, int, list[int]]], on_loss: OnLoss) -> None:
    sources = two()
    harvest, _ = await started(sources, on_loss)
    stale: set[int] = set(dirty_pages(harvest.pending))
    """Pages whose copy is not the memory's."""
    for step, which, written in [*script, ("round", 0, [])]:
        if step == "write":
            seen = [p for p in written if any(f <= p < f + n for f, n in sources[which].covers)]
            sources[which].write(*seen)
            stale |= set(seen)
        elif step == "lose":
            sources[which].lose()
        elif step == "round":
            try:
                await harvest.round()
            except LogLost:
                assert on_loss is OnLoss.GIVE_UP
            assert set(dirty_pages(harvest.pending)) >= stale
        else:
            await harvest.round() if not any(s.is_lost for s in sources) else None
            if not any(s.is_lost for s in sources):
                stale -= set(moved(harvest))
    await harvest.stop()


def test_dirty_pages_of_the_tests_are_those_of_the_bitmap() -> None:
    bitmap = DirtyBitmap(130)
    bitmap.mark(63, 3)
    bitmap.mark(129, 1)
    assert dirty_pages(bitmap) == [63, 64, 65, 129]
    assert np.count_nonzero(bitmap.words) == 3
