"""Harvest rounds whose calls fail or are cancelled, and any order of anything: no page is lost."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migrd.core.bitmap import DirtyBitmap
from migrd.engine.dirty_ports import OnLoss
from migrd.engine.harvest import Harvest
from migrd.errors import KernelBusy, KernelError, LogLost
from tests.contract.dirty_source import dirty_pages
from tests.engine.harvesting import (
    MEMORY,
    moved,
    some_turns,
    started,
    two,
)
from tests.fakes.dirty_source import SimSource, Strike

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
