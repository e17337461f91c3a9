"""The rest of a postcopy: the guest runs on the destination, part of its memory is still here.

Neither process may be killed until both say `completed`. A broken connection pauses the guest
wherever it needs a page; it is recovered again and again, with an alarm, for as long as both
processes live:

    pause both (out of band) -> destination listens again -> source resumes -> postcopy-active

A break at the very end makes the source's QEMU `failed`, or leaves it waiting for ever (7.2), and
it cannot be resumed. The destination may have everything all the same, and is asked. When it has
not, its guest stands still at the first page that is missing; only the operator may end it, for it
might as well never touch that page.
"""

import asyncio
import contextlib
from typing import Final

from migrd.core.facts import QemuStatus, TransferSample
from migrd.core.migration import Cause, MigrationEvent
from migrd.core.phases import Trigger
from migrd.engine.outgoing import Outgoing
from migrd.errors import MigrdError, PeerError, VmmDied, VmmError

TICK_S: Final = 0.5
STALL_S: Final = 10.0
RETRY_S: Final = 2.0
RESUME_S: Final = 2.0
"""So long a resumed connection may take to show that it works."""
LOOK_S: Final = 0.05
SURE_S: Final = 10.0
"""So long the destination may take to find out that it has everything, before an alarm."""


async def finish_postcopy(m: Outgoing) -> MigrationEvent | None:
    """Until both sides are complete (None), or the guest is lost (the event)."""
    try:
        await _until_completed(m)
    except _DestinationDied as exc:
        await m.vmm.quit()  # a copy of before it ran over there: nobody may take it for the guest
        text = f"the QEMU on {m.peer.name} died, and the guest with it ({exc}); the rest of its "
        return m.event(
            Trigger.GUEST_DIED, cause=Cause("vmm_died", f"{text}memory here is of no use")
        )
    except VmmDied as exc:
        if await _destination_complete(m):
            return None
        message = f"{exc.message} while the guest on {m.peer.name} still needed memory from here"
        return m.event(Trigger.GUEST_DIED, cause=Cause(exc.code, message))
    return None


class _DestinationDied(Exception):
    """The process that ran the guest is proven dead."""


async def _until_completed(m: Outgoing) -> None:
    moved_at_s, moved_bytes = m.world.clock.monotonic_s(), -1
    async with m.vmm.feed() as feed:
        sample: TransferSample | None = await m.vmm.sample()
        while True:
            now_s = m.world.clock.monotonic_s()
            if sample is not None:
                _note(m, sample)
                if (sample.transferred_bytes or 0) != moved_bytes:
                    moved_at_s, moved_bytes = now_s, sample.transferred_bytes or 0
                if sample.qemu_status is QemuStatus.COMPLETED:
                    m.settle("PostcopyPaused")
                    return
                if sample.qemu_status in (QemuStatus.FAILED, QemuStatus.CANCELLED):
                    await _until_destination_settled(m, sample)
                    return
                paused = sample.qemu_status is QemuStatus.POSTCOPY_PAUSED
                stalled = now_s - moved_at_s > STALL_S
                if paused or stalled:
                    if await _recover(m, stalled=stalled):
                        return
                    moved_at_s = m.world.clock.monotonic_s()
            sample = await feed.newer(within_s=TICK_S)
            if sample is None:
                with contextlib.suppress(VmmError):
                    sample = await m.vmm.sample()


def _note(m: Outgoing, sample: TransferSample) -> None:
    if sample.total_bytes is not None:
        m.sample = sample
    if sample.qemu_status is QemuStatus.POSTCOPY_ACTIVE:
        m.settle("PostcopyPaused")


async def _until_destination_settled(m: Outgoing, sample: TransferSample) -> None:
    """The source's QEMU has given up: all that is left to learn is what the destination has."""
    give_up_at_s = m.world.clock.monotonic_s() + SURE_S
    while not await _has_everything(m):
        if m.world.clock.monotonic_s() > give_up_at_s:
            m.settle("PostcopyPaused")
            why = sample.error or "it gave no reason"
            m.trouble(
                "PostcopyFailed",
                f"QEMU on {m.world.options.host} ended the postcopy as {sample.qemu_status.value} "
                f"({why}) and cannot take it up again; the guest on {m.peer.name} stands still "
                "where it needs memory that did not arrive",
            )
        await asyncio.sleep(TICK_S)
    m.settle("PostcopyFailed")


async def _recover(m: Outgoing, *, stalled: bool) -> bool:
    """One attempt to mend the connection; what did not work is tried again by the caller.

    True: the destination needs nothing more.
    """
    status = (await m.vmm.sample()).qemu_status
    works = status is QemuStatus.POSTCOPY_ACTIVE and not stalled  # the feed may be behind
    if works or status is QemuStatus.COMPLETED:
        return False
    if await _has_everything(m):
        return True
    m.trouble(
        "PostcopyPaused",
        f"the connection to {m.peer.name} broke in postcopy: the guest waits for memory that is "
        "still here; kill nothing on either side",
    )
    try:
        if status is not QemuStatus.POSTCOPY_PAUSED:
            await m.vmm.pause_postcopy()
        address = await m.peer.listen_for_recovery(m.id)
        await m.vmm.resume_postcopy(m.reachable(address))
        await _until_resumed(m)
    except VmmDied:
        raise
    except (MigrdError, TimeoutError) as exc:
        m.log.warning("postcopy is not recovered yet", cause=str(exc) or "it paused again")
        await asyncio.sleep(RETRY_S)
    return False


async def _until_resumed(m: Outgoing) -> None:
    """Pages flow again. Raises TimeoutError."""
    async with asyncio.timeout(RESUME_S):
        while True:
            status = (await m.vmm.sample()).qemu_status
            if status in (QemuStatus.POSTCOPY_ACTIVE, QemuStatus.COMPLETED):
                return
            await asyncio.sleep(LOOK_S)


async def _has_everything(m: Outgoing) -> bool:
    """Is all memory at the destination? No answer is no. Raises _DestinationDied on proof."""
    with contextlib.suppress(PeerError):
        view = await m.peer.view(m.id)
        if view.vmm_died and not view.transfer_completed:
            raise _DestinationDied(view.reason or "it gave no reason")
        return view.transfer_completed
    return False


async def _destination_complete(m: Outgoing) -> bool:
    """The source is dead: does the destination have all memory after all?

    Asked until answered, and no is only what was seen: its QEMU dead. (It ends that itself when
    it waits for memory that cannot come any more.)
    """
    while True:
        try:
            view = await m.peer.view(m.id)
        except PeerError as exc:
            m.trouble("DestinationUnreachable", exc.message)
        else:
            m.settle("DestinationUnreachable")
            if view.transfer_completed:
                return True
            if view.vmm_died:
                return False
        await asyncio.sleep(TICK_S)
