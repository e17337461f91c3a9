"""Rolling back: the guest goes on at the source, and is seen to.

Only reached while the destination cannot run the guest: it was never granted, or it has durably
refused. So whatever QEMU shows, `cont` here is safe; QEMU alone would not protect us.

    look -> (in a migration) cancel, or yank when cancel does not free it -> (paused) cont ->
    running

With an arbiter, what a person's word gave back is first written into its record (`fence`); a
durable refusal is obeyed at once, and the record put right afterwards.

The destination is told to discard its copy afterwards, for until the source is seen to run the
destination's may be the only complete one.
"""

import asyncio
import contextlib
from typing import Final

from migrd.core.facts import QemuStatus, RunState, TransferSample
from migrd.core.handover import DestinationPhase
from migrd.core.migration import Cause, MigrationEvent, Mode
from migrd.core.phases import Trigger
from migrd.engine.arbitrated import fence
from migrd.engine.outgoing import Outgoing
from migrd.engine.ports import DestinationView
from migrd.errors import PeerError, VmmDied, VmmError, VmmRefused, VmmTimedOut
from migrd.failpoints import around

CANCEL_S: Final = 2.0
"""So long a cancel may take to show before the connection is yanked."""
YANK_S: Final = 3.0
DISCARD_S: Final = 2.0
DEATH_S: Final = 5.0
LOOK_S: Final = 0.1
RETRY_S: Final = 0.25

IDLE: Final = frozenset(
    {QemuStatus.NONE, QemuStatus.CANCELLED, QemuStatus.FAILED, QemuStatus.COMPLETED}
)
BY_ITSELF: Final = frozenset(
    {
        RunState.SHUTDOWN,
        RunState.GUEST_PANICKED,
        RunState.INTERNAL_ERROR,
        RunState.IO_ERROR,
        RunState.SUSPENDED,
        RunState.WATCHDOG,
    }
)
"""What a guest, or its disk, brings about; it is not ours to undo."""
STOPPED: Final = frozenset(
    {
        RunState.PAUSED,
        RunState.POSTMIGRATE,
        RunState.FINISH_MIGRATE,
        RunState.PRELAUNCH,
    }
)


async def roll_back(m: Outgoing) -> MigrationEvent:
    """Carry out ROLL_BACK."""
    deadline_s = m.world.options.rollback_deadline_s
    try:
        async with asyncio.timeout(deadline_s):
            return await bring_back(m)
    except TimeoutError:
        cause = Cause(
            "source_unclear",
            f"the guest could not be seen to run on {m.world.options.host} within "
            f"{deadline_s:.0f} s of rolling back ({_why(m)})",
        )
        return m.event(Trigger.OUTCOME_UNKNOWN, cause=cause)


async def bring_back(m: Outgoing, *, death_s: float | None = DEATH_S) -> MigrationEvent:
    """Until the guest is as it was before the migration, seen; keeps trying.

    `death_s`: for so long the destination is asked when the source has died. None: without end.
    """
    if m.state.arbitrated and m.state.fenced:
        await fence(m)
    while True:
        try:
            left = await _if_left_by_postcopy(m)
            if left is not None:
                return left
            await _stop_transfer(m)
            await _see_it_run(m)
            break
        except VmmDied as exc:
            return await _after_death(m, exc, death_s)
        except (VmmError, PeerError) as exc:
            m.trouble("SourceUnclear", exc.message)
            await asyncio.sleep(RETRY_S)
    m.settle("SourceUnclear")
    with contextlib.suppress(VmmError):  # leftovers in QEMU do no harm to the guest
        await m.vmm.clean_outgoing()
    await _discard(m)
    trigger = Trigger.CANCEL_COMPLETED if m.state.cancelled else Trigger.SOURCE_KEPT
    return m.event(trigger, cause=m.state.cause)


async def _if_left_by_postcopy(m: Outgoing) -> MigrationEvent | None:
    """QEMU brings no guest back once postcopy has begun: then the destination has it, or nobody.

    The source is asked last (rule 4 of the handover): its answer is that the start has ended.
    """
    if m.state.mode is not Mode.POSTCOPY:
        return None
    if not (await m.vmm.sample()).qemu_status.is_postcopy:
        return None
    view = await m.peer.view(m.id)
    if not (await m.vmm.sample()).qemu_status.is_postcopy:
        return None
    if view.phase is DestinationPhase.REFUSED:
        text = f"the guest had left by postcopy, and {m.peer.name} lost it: {view.reason}"
        return m.event(Trigger.GUEST_DIED, cause=Cause("lost_in_postcopy", text))
    if view.phase in (DestinationPhase.PREPARING, DestinationPhase.RECEIVING):
        raise VmmTimedOut(f"the guest leaves by postcopy, and is not on {m.peer.name} yet")
    return m.event(Trigger.TRANSFER_COMPLETED)


async def _stop_transfer(m: Outgoing) -> None:
    """No migration is going on in the source's QEMU afterwards."""
    if await _is_idle(m):
        return
    try:
        m.may_have_run = True  # from here QEMU may resume the guest at any moment
        await m.vmm.cancel_transfer()
        async with asyncio.timeout(CANCEL_S):
            await _until_idle(m)
            return
    except (TimeoutError, VmmTimedOut, VmmRefused) as exc:
        if m.state.mode is Mode.POSTCOPY and isinstance(exc, VmmRefused):
            raise  # it has begun after all: look again
        m.log.warning("cancel does not free the guest; cutting the migration's connection")
    m.may_have_run = True
    await m.vmm.free_stalled()
    try:
        async with asyncio.timeout(YANK_S):
            await _until_idle(m)
    except TimeoutError:
        raise VmmTimedOut("the migration has not ended after its connection was cut") from None


async def _is_idle(m: Outgoing) -> bool:
    try:
        return (await m.vmm.sample()).qemu_status in IDLE
    except VmmTimedOut:
        return False  # not known: a stalled switchover blocks the monitor, and cancel finds out


async def _until_idle(m: Outgoing) -> None:
    async with m.vmm.feed() as feed:
        sample: TransferSample | None = None
        while sample is None or sample.qemu_status not in IDLE:
            sample = await feed.newer(within_s=LOOK_S)
            if sample is None:
                with contextlib.suppress(VmmTimedOut):
                    sample = await m.vmm.sample()


async def _see_it_run(m: Outgoing) -> None:
    """Seen running (or paused, when it was paused before)."""
    while True:
        state = await m.vmm.run_state()
        if state is RunState.RUNNING:
            return
        if not m.state.run_guest and state in STOPPED:
            return
        if state in BY_ITSELF:
            return  # what the guest did to itself is not ours to undo
        if state in STOPPED:
            m.may_have_run = True
            with contextlib.suppress(VmmRefused):  # e.g. a moment too early: look again
                with around("source.resume"):
                    await m.vmm.run_guest()
                continue
        await asyncio.sleep(LOOK_S)


async def _discard(m: Outgoing) -> None:
    """Tell the destination; when it does not hear, it finds out by asking, or by its deadline."""
    try:
        async with asyncio.timeout(DISCARD_S):
            with around("source.discard"):
                await m.peer.discard(m.id, m.state.epoch, _why(m))
    except (TimeoutError, PeerError) as exc:
        m.log.warning("the destination was not told; it will ask", cause=str(exc))


async def _after_death(m: Outgoing, exc: VmmDied, limit_s: float | None) -> MigrationEvent:
    """The source died while it was brought back: does the destination have all of the guest?

    No answer is no answer: the destination's may be the only copy left.
    """
    try:
        async with asyncio.timeout(limit_s):
            view = await _settled_there(m)
    except TimeoutError:
        text = f"{exc.message} while it was rolled back, and {m.peer.name} does not say what it has"
        return m.event(Trigger.OUTCOME_UNKNOWN, cause=Cause(exc.code, text))
    if view is not None and view.phase is not DestinationPhase.REFUSED:
        if m.may_have_run and not is_used(view):
            return m.event(Trigger.OUTCOME_UNKNOWN, cause=unwatched(m, exc))
        return m.event(Trigger.TRANSFER_COMPLETED, source_died=True)
    cause = Cause(exc.code, f"{exc.message} while the migration was being rolled back")
    return m.event(Trigger.GUEST_DIED, cause=cause)


async def _settled_there(m: Outgoing) -> DestinationView | None:
    """The destination's view once it is loaded, or refused; None: it never heard of us."""
    generation = -1
    while m.state.address is not None:  # else nothing was ever sent
        try:
            view = await m.peer.view(m.id, newer_than=generation, wait_s=DISCARD_S)
        except PeerError as exc:
            if exc.code == "not_found":
                return None
            generation = -1  # a daemon that was restarted counts anew
            m.trouble("DestinationUnreachable", exc.message)
            await asyncio.sleep(RETRY_S)
        else:
            m.settle("DestinationUnreachable")
            generation = view.generation
            if view.phase not in (DestinationPhase.PREPARING, DestinationPhase.RECEIVING):
                return view
    return None


def is_used(view: DestinationView) -> bool:
    """A person has said there, with proof, that the copy is the guest: it was never granted."""
    return view.phase in (DestinationPhase.STARTING, DestinationPhase.RUNNING)


def unwatched(m: Outgoing, exc: VmmDied) -> Cause:
    """Why the destination's copy, whole as it is, is not simply started."""
    return Cause(
        "source_died_unwatched",
        f"{exc.message}, and may have run on after {m.peer.name} had its copy: that copy may be "
        "old, and is kept there, stopped",
    )


def _why(m: Outgoing) -> str:
    return m.state.cause.message if m.state.cause else "cancelled" if m.state.cancelled else "?"
