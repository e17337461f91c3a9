"""The feed of a migration against answers and events in every order."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from migrd.core.facts import QemuStatus, RunState, TransferSample
from migrd.errors import VmmDied
from migrd.qemu.feed import QemuFeed
from migrd.qemu.wire import NotSent, QmpEvent, ReplyLate
from tests.qemu.test_qmp import until

RUNNING = TransferSample(at_s=0.0, qemu_status=QemuStatus.ACTIVE, run_state=RunState.RUNNING)


class Asked:
    """Answers the feed's question; each answer can be held back."""

    def __init__(self) -> None:
        self.answer: TransferSample | Exception = RUNNING
        self.questions = 0
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.death = asyncio.Event()

    async def ask(self) -> TransferSample:
        self.questions += 1
        formed = self.answer  # QEMU forms its reply now; when it arrives is another matter
        await self.may_answer.wait()
        if isinstance(formed, Exception):
            raise formed
        return replace(formed, at_s=time.monotonic())

    async def wait_dead(self) -> None:
        await self.death.wait()
        raise VmmDied("seen to exit")


@contextlib.asynccontextmanager
async def running(asked: Asked, bound: int = 512) -> AsyncIterator[QemuFeed]:
    feed = QemuFeed(asked.ask, asked.wait_dead, bound=bound)
    task = asyncio.create_task(feed.run())
    try:
        yield feed
    finally:
        task.cancel()
        await asyncio.wait([task])


def event(name: str, status: str = "") -> QmpEvent:
    return QmpEvent(name, {"status": status} if status else {}, time.monotonic(), None)


async def some(feed: QemuFeed) -> TransferSample:
    sample = await feed.newer(within_s=5)
    assert sample is not None
    return sample


async def asked_again(asked: Asked, before: int) -> None:
    await until(lambda: asked.questions > before)


async def test_a_status_reaches_the_reader_with_its_event() -> None:
    asked = Asked()
    async with running(asked) as feed:
        await some(feed)
        asked.may_answer.clear()  # nothing but the event can tell
        reader = asyncio.create_task(feed.newer(within_s=5))
        await asyncio.sleep(0)
        told_s = time.monotonic()
        feed.take_event(event("MIGRATION", "pre-switchover"))
        sample = await reader
        assert sample is not None
        assert sample.qemu_status is QemuStatus.PRE_SWITCHOVER
        assert time.monotonic() - told_s < 0.05
        assert sample.at_s >= told_s


async def test_a_reply_older_than_an_event_does_not_bring_the_old_status_back() -> None:
    asked = Asked()
    async with running(asked) as feed:
        await some(feed)
        asked.may_answer.clear()
        await asked_again(asked, asked.questions)  # formed as `active`, still on its way
        feed.take_event(event("MIGRATION", "completed"))
        asked.answer = replace(RUNNING, qemu_status=QemuStatus.COMPLETED)
        asked.may_answer.set()
        statuses = [(await some(feed)).qemu_status for _ in range(3)]
        assert statuses == [QemuStatus.COMPLETED] * 3


async def test_stop_and_resume_carry_the_time_they_arrived() -> None:
    asked = Asked()
    async with running(asked) as feed:
        await some(feed)
        asked.may_answer.clear()
        stop, resume = event("STOP"), event("RESUME")
        feed.take_event(stop)
        stopped = await some(feed)
        assert (stopped.run_state, stopped.stopped_at_s) == (RunState.UNKNOWN, stop.received_s)
        feed.take_event(resume)
        resumed = await some(feed)
        assert (resumed.run_state, resumed.resumed_at_s) == (RunState.RUNNING, resume.received_s)


async def test_a_status_of_a_later_qemu_is_unknown_and_stops_nothing() -> None:
    asked = Asked()
    async with running(asked) as feed:
        await some(feed)
        asked.may_answer.clear()
        feed.take_event(event("MIGRATION", "beaming"))
        assert (await some(feed)).qemu_status is QemuStatus.UNKNOWN
        feed.take_event(event("MIGRATION"))
        assert (await some(feed)).qemu_status is QemuStatus.UNKNOWN


async def test_a_dirty_sync_is_looked_at_right_away() -> None:
    asked = Asked()
    asked.answer = replace(RUNNING, qemu_status=QemuStatus.COMPLETED)  # the slowest pace
    async with running(asked) as feed:
        await some(feed)
        before = asked.questions
        started_s = time.monotonic()
        feed.take_event(event("MIGRATION_PASS"))
        await asked_again(asked, before)
        assert time.monotonic() - started_s < 0.3


def device_event(state: str, id_: str = "hostdev0") -> QmpEvent:
    told = {"device-id": id_, "device-state": state, "qom-path": f"/machine/peripheral/{id_}"}
    return QmpEvent("VFIO_MIGRATION", told, time.monotonic(), None)


async def test_each_state_of_a_device_reaches_the_reader_and_asks_nothing() -> None:
    asked = Asked()
    async with running(asked) as feed:
        await some(feed)
        questions = asked.questions
        words = ["pre-copy", "pre-copy-p2p", "stop-copy", "of-a-later-qemu"]
        for word in words:
            feed.take_event(device_event(word))
        told = [(await some(feed)).device_states for _ in words]
        assert told == [(("hostdev0", word),) for word in words]
        assert asked.questions == questions


async def test_devices_that_never_stop_telling_cost_a_bounded_queue() -> None:
    asked = Asked()
    asked.may_answer.clear()
    async with running(asked, bound=16) as feed:
        for number in range(1000):
            feed.take_event(device_event(f"state-{number}"))
        assert feed.latest is not None
        assert feed.latest.device_states == (("hostdev0", "state-999"),)
        kept = 0
        while await feed.newer(within_s=0.05) is not None:
            kept += 1
        assert kept == 16


async def test_an_event_without_meaning_for_a_migration_asks_nothing() -> None:
    asked = Asked()
    asked.answer = replace(RUNNING, qemu_status=QemuStatus.COMPLETED)
    async with running(asked) as feed:
        await some(feed)
        before = asked.questions
        feed.take_event(event("RTC_CHANGE"))
        await asyncio.sleep(0.05)
        assert asked.questions == before


async def test_a_slow_reader_loses_numbers_but_no_status_and_no_round() -> None:
    asked = Asked()
    async with running(asked) as feed:
        await some(feed)
        asked.may_answer.clear()
        for count in range(1, 6):
            for _ in range(50):
                feed._publish(replace(RUNNING, qemu_dirty_sync_count=count))
        feed._publish(replace(RUNNING, qemu_status=QemuStatus.PRE_SWITCHOVER))
        seen = [await some(feed) for _ in range(len(feed._queue))]
        assert len(seen) <= 13
        assert [s.qemu_dirty_sync_count for s in seen if s.qemu_dirty_sync_count] == sorted(
            [1, 2, 3, 4, 5] * 2
        )
        assert seen[-1].qemu_status is QemuStatus.PRE_SWITCHOVER


async def test_a_reader_that_never_reads_costs_a_bounded_queue() -> None:
    asked = Asked()
    async with running(asked, bound=8) as feed:
        await some(feed)
        for count in range(1000):
            feed._publish(replace(RUNNING, qemu_dirty_sync_count=count))
        assert len(feed._queue) == 8
        assert feed.latest is not None
        assert feed.latest.qemu_dirty_sync_count == 999


@pytest.mark.parametrize(
    "trouble", [NotSent("no connection"), ReplyLate("no reply"), KeyError("a bug of ours")]
)
async def test_a_blocked_monitor_is_silence_and_its_return_is_the_truth(
    trouble: Exception,
) -> None:
    asked = Asked()
    asked.answer = trouble
    async with running(asked) as feed:
        assert await feed.newer(within_s=0.05) is None
        assert feed.latest is None
        asked.answer = replace(RUNNING, qemu_status=QemuStatus.FAILED)
        assert (await some(feed)).qemu_status is QemuStatus.FAILED


async def test_an_event_before_the_first_answer_is_told_with_what_it_proves() -> None:
    asked = Asked()
    asked.may_answer.clear()
    async with running(asked) as feed:
        await asked_again(asked, 0)  # formed as `active`
        feed.take_event(event("MIGRATION", "completed"))
        asked.answer = replace(RUNNING, qemu_status=QemuStatus.COMPLETED)
        told = await some(feed)
        assert (told.qemu_status, told.run_state) == (QemuStatus.COMPLETED, RunState.UNKNOWN)
        asked.may_answer.set()
        assert [(await some(feed)).qemu_status for _ in range(2)] == [QemuStatus.COMPLETED] * 2


async def test_death_is_told_after_everything_that_came_before_it() -> None:
    asked = Asked()
    async with running(asked) as feed:
        await some(feed)
        feed.take_event(event("MIGRATION", "completed"))
        asked.death.set()
        assert (await some(feed)).qemu_status is QemuStatus.COMPLETED
        async with asyncio.timeout(5):
            while feed._death is None or feed._queue:
                with contextlib.suppress(VmmDied):
                    await feed.newer(within_s=0.01)
        for _ in range(2):  # and it stays so
            with pytest.raises(VmmDied):
                await feed.newer(within_s=1)
