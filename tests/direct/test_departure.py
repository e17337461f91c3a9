"""A guest that leaves, struck at awkward moments: it runs on here, or stands still for good."""

from __future__ import annotations

import asyncio
import random
import threading
from pathlib import Path

import pytest

from migrd.core.bitmap import DirtyBitmap
from migrd.core.facts import QemuStatus
from migrd.core.harvest_round import SourceRead
from migrd.direct.messages import ClientState, Resume, SaveState, Throttle
from migrd.direct.receiver import ReceiverStatus
from migrd.errors import KernelUnsupported
from tests.direct.departure_rig import leaving
from tests.direct.stream_rig import Owner, receiver
from tests.direct.vmms import until
from tests.fakes.dirty_source import SimSource

ENDED = (QemuStatus.FAILED, QemuStatus.CANCELLED, QemuStatus.COMPLETED)


async def test_a_guest_leaves(tmp_path: Path) -> None:
    async with leaving(tmp_path) as guest:
        await guest.set_out()
        await guest.status(QemuStatus.PRE_SWITCHOVER)
        await guest.vmm.continue_switchover()
        await guest.status(QemuStatus.COMPLETED)
        assert guest.process.state is ClientState.DEPARTED


async def test_a_cancel_does_not_break_off_the_way_back(tmp_path: Path) -> None:
    """The transfer has failed, and the process is slow to resume its guest, when the engine or the
    operator ends the transfer: the guest runs in the end, and another transfer may begin."""
    asked, go_on = threading.Event(), threading.Event()

    def slow() -> None:
        asked.set()
        assert go_on.wait(30)

    async with leaving(tmp_path) as guest:
        await guest.set_out()
        await guest.status(QemuStatus.PRE_SWITCHOVER)
        guest.process.before_answer[Resume] = slow
        await guest.there.close()
        await guest.vmm.continue_switchover()
        await until(asked.is_set)
        ending = asyncio.create_task(guest.vmm.cancel_transfer())
        await asyncio.sleep(0.05)
        go_on.set()
        await ending
        await guest.status(*ENDED)
        assert guest.process.state is ClientState.RUNNING


async def test_who_watches_is_told_before_the_guest_may_run_again(tmp_path: Path) -> None:
    """The destination may have all of the guest by then: should the process die a moment after it
    was resumed, nobody may take that copy for the guest."""
    asked, go_on = threading.Event(), threading.Event()

    def slow() -> None:
        asked.set()
        assert go_on.wait(30)

    async with leaving(tmp_path) as guest:
        await guest.set_out()
        await guest.status(QemuStatus.PRE_SWITCHOVER)
        guest.process.before_answer[Resume] = slow
        async with guest.vmm.feed() as feed:
            await guest.there.close()
            await guest.vmm.continue_switchover()
            await until(asked.is_set)
            seen = set()
            while (sample := await feed.newer(within_s=0.01)) is not None:
                seen.add(sample.qemu_status)
            assert QemuStatus.CANCELLING in seen
            go_on.set()
        await guest.status(QemuStatus.FAILED)


async def test_a_process_that_is_ended_is_not_resumed_before(tmp_path: Path) -> None:
    resumed: list[None] = []
    async with leaving(tmp_path) as guest:
        await guest.set_out()
        await guest.status(QemuStatus.PRE_SWITCHOVER)
        guest.process.before_answer[Resume] = lambda: resumed.append(None)
        await guest.vmm._end_transfers()
        await guest.status(QemuStatus.FAILED)
        assert (resumed, guest.process.state) == ([], ClientState.PAUSED)


async def test_a_transfer_stopped_before_its_first_step_has_ended(tmp_path: Path) -> None:
    async with leaving(tmp_path) as guest:
        await guest.set_out()
        await guest.vmm.cancel_transfer()
        await guest.status(QemuStatus.CANCELLED)
        await guest.set_out()
        await guest.status(QemuStatus.PRE_SWITCHOVER)


class LogSource(SimSource):
    """As a device's own log: it tells once, and cannot be looked at."""

    def peek(self, into: DirtyBitmap) -> SourceRead:
        raise KernelUnsupported("it cannot be read without clearing it", code="no_peek")


async def test_a_guest_leaves_whose_device_logs_its_writes_itself(tmp_path: Path) -> None:
    async with leaving(tmp_path, LogSource) as guest:
        await guest.set_out()
        await guest.status(QemuStatus.PRE_SWITCHOVER)
        await guest.vmm.continue_switchover()
        assert await guest.status(*ENDED) is QemuStatus.COMPLETED


@pytest.mark.parametrize("kind", [SimSource, LogSource])
async def test_a_write_behind_the_last_pages_is_found_out(
    tmp_path: Path, kind: type[SimSource]
) -> None:
    async with leaving(tmp_path, kind) as guest:
        await guest.set_out()
        await guest.status(QemuStatus.PRE_SWITCHOVER)
        guest.process.before_answer[SaveState] = lambda: guest.sources[0].write(9)
        await guest.vmm.continue_switchover()
        assert await guest.status(*ENDED) is QemuStatus.FAILED
        assert "written while paused" in (guest.vmm._look().error or "")
        assert guest.process.state is ClientState.RUNNING
        assert guest.sources[0].is_closed


async def test_a_guest_that_another_daemon_slowed_sets_out_at_full_speed(tmp_path: Path) -> None:
    slowed: list[None] = []
    async with leaving(tmp_path) as guest:
        guest.process.before_answer[Throttle] = lambda: slowed.append(None)
        await guest.set_out()
        await guest.status(QemuStatus.PRE_SWITCHOVER)
        assert slowed == [None]
        await guest.vmm.cancel_transfer()
        await guest.vmm.clean_outgoing()  # nor does it stay slow where no daemon knows of it
        assert slowed == [None, None]


async def test_no_bitmap_of_the_guest_is_made_on_the_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a terabyte of guest memory each of them takes 50 ms to make."""
    made_in: list[threading.Thread] = []
    make = DirtyBitmap.__init__

    def noting(bitmap: DirtyBitmap, pages: int) -> None:
        made_in.append(threading.current_thread())
        make(bitmap, pages)

    monkeypatch.setattr(DirtyBitmap, "__init__", noting)
    async with leaving(tmp_path) as guest:
        await guest.set_out()
        await guest.status(QemuStatus.PRE_SWITCHOVER)
        await guest.vmm.continue_switchover()
        await guest.status(QemuStatus.COMPLETED)
    assert made_in != []
    assert threading.main_thread() not in made_in


async def test_whenever_it_is_ended_the_guest_runs_here_or_has_left_whole(tmp_path: Path) -> None:
    """Struck at moments all over the transfer, over and over, always the same guest."""
    chosen = random.Random(7)
    async with leaving(tmp_path) as guest:
        for _ in range(24):
            async with receiver(Owner()) as guest.there:
                await guest.set_out()
                if chosen.random() < 0.7:
                    await guest.status(QemuStatus.PRE_SWITCHOVER)
                    await guest.vmm.continue_switchover()
                await asyncio.sleep(chosen.uniform(0, 0.02))
                await chosen.choice(
                    [guest.vmm.cancel_transfer, guest.vmm.free_stalled, guest.there.close]
                )()
                if await guest.status(*ENDED, QemuStatus.PRE_SWITCHOVER) not in ENDED:
                    await guest.vmm.continue_switchover()
                status = await guest.status(*ENDED)
                if status is QemuStatus.COMPLETED:
                    assert guest.process.state is ClientState.DEPARTED
                    assert guest.there.status in (ReceiverStatus.LOADED, ReceiverStatus.CLOSED)
                elif guest.process.state is not ClientState.RUNNING:
                    assert guest.there.status is ReceiverStatus.LOADED  # the engine decides
                await guest.vmm.run_guest()
