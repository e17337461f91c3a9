"""A guest that leaves, struck at awkward moments: it runs on here, or stands still for good."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

from migrd.core.facts import QemuStatus
from migrd.direct.messages import ClientState, Resume
from tests.direct.departure_rig import leaving
from tests.direct.vmms import until

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
