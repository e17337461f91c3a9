"""The steps from the stopped guest to the end: switch over, grant, ask, release.

    complete_switchover   migrate-continue; source seen unable to resume, destination loaded
                                                                    => TRANSFER_COMPLETED
    obtain_answer         (granted is durable) GRANT, until answered => DESTINATION_RAN, _REFUSED
    keep_asking           the same without a deadline, while the operator is called
    release_source        end the source QEMU                        => SOURCE_RELEASED

Between STOP and the destination's RESUME the guest runs nowhere: no sleeping, no polling here
where an event or a long poll will do.

When is the source unable to resume by itself? In precopy once its QEMU is `completed`. In
postcopy: its status turns `postcopy-active` before or after the device state is sent, depending on
the version, so the status alone is no proof. But QEMU's start of postcopy holds the lock that the
in-band monitor needs; so a status asked for after the destination has been seen loaded, and
answered, was taken after that start had ended, one way or the other.
"""

import asyncio
import contextlib
from typing import Final

from migrd.core.facts import QemuStatus, RunState, TransferSample
from migrd.core.handover import DestinationPhase
from migrd.core.migration import Cause, MigrationEvent, Mode
from migrd.core.phases import Phase, Trigger
from migrd.engine.arbitrated import (
    before_the_grant,
    keep_asking_by_record,
    note_that_it_left,
    obtain_by_record,
)
from migrd.engine.granting import FIRST_RETRY_S, LONGEST_RETRY_S, ask_until_answered
from migrd.engine.outgoing import Outgoing
from migrd.engine.ownership import UNREACHABLE
from migrd.engine.ports import DestinationView
from migrd.engine.precopy import is_pointless
from migrd.engine.recover_postcopy import finish_postcopy
from migrd.engine.rollback import bring_back, is_used, unwatched
from migrd.errors import (
    MigrdError,
    PeerError,
    VmmDied,
    VmmError,
    VmmRefused,
    VmmTimedOut,
    VmmUnreachable,
)
from migrd.failpoints import around

LAST_TRY_S: Final = 10.0
NEAR_S: Final = 0.25
ASK_S: Final = 0.3
LOST_S: Final = 0.8
"""A long poll that has not answered by then is asked again: its message, or the answer, was lost,
and the guest may stand still."""
DEATH_S: Final = 5.0
NEVER_LEFT: Final = frozenset(
    {QemuStatus.ACTIVE, QemuStatus.PRE_SWITCHOVER, QemuStatus.FAILED, QemuStatus.CANCELLED}
)


async def complete_switchover(m: Outgoing) -> MigrationEvent:
    """Carry out COMPLETE_SWITCHOVER."""
    if is_pointless(m):
        return m.failed(
            "arbiter_unavailable" if UNREACHABLE in m.troubles else "destination_unreachable",
            f"{_who_is_away(m)} does not answer; the guest was not kept waiting for it",
        )
    deadline_s = m.world.options.switchover_s(m.state.policy.downtime_limit_s)
    try:
        async with asyncio.timeout(deadline_s):
            return await _persist(m)
    except VmmDied as exc:
        return await _after_death(m, exc)
    except TimeoutError:
        return await _late(m, deadline_s)


def _who_is_away(m: Outgoing) -> str:
    return "the arbiter" if UNREACHABLE in m.troubles else f"migrd on {m.peer.name}"


async def _persist(m: Outgoing) -> MigrationEvent:
    """In postcopy there may be no way back, so an error of the monitor is no reason to turn."""
    fresh = False
    while True:
        try:
            return await _both_sides_done(m, fresh=fresh)
        except VmmDied:
            raise
        except VmmError as exc:
            if m.state.mode is not Mode.POSTCOPY:
                raise
            m.log.warning("looking again", cause=exc.message)
            fresh = True
            await asyncio.sleep(FIRST_RETRY_S)


async def _both_sides_done(m: Outgoing, *, fresh: bool) -> MigrationEvent:
    loaded = asyncio.create_task(_destination_loaded(m))
    try:
        failed = await _source_done(m, fresh=fresh)
        if failed is not None:
            return failed
        view = await loaded
        if view.phase is DestinationPhase.REFUSED:
            return m.failed("destination_refused", f"{m.peer.name} gave up: {view.reason}")
        if m.state.mode is Mode.POSTCOPY:
            failed = await _source_done(m, fresh=True)  # rule 4 of the handover
            if failed is not None:
                return failed
        if m.state.arbitrated and (failed := await before_the_grant(m)) is not None:
            return failed
        return m.event(Trigger.TRANSFER_COMPLETED, decided_on_revision=m.decided_on_revision)
    finally:
        loaded.cancel()
        await asyncio.wait([loaded])


async def _source_done(m: Outgoing, *, fresh: bool = False) -> MigrationEvent | None:
    """Wait until the source's QEMU can no longer resume by itself; an event when it failed.

    The sample that ended precopy will do to go on with (the guest stands still), unless `fresh`.
    """
    async with m.vmm.feed() as feed:
        sample = None if fresh else m.sample
        if sample is None or sample.qemu_status is not QemuStatus.PRE_SWITCHOVER:
            sample = await _ask_source(m)
        continued = False
        while True:
            _watch(m, sample)
            if sample is not None:
                if sample.downtime_s is not None:
                    m.qemu_downtime_s = sample.downtime_s
                if sample.qemu_status is QemuStatus.PRE_SWITCHOVER and not continued:
                    continued = await _continue(m)
                done, event = _verdict(m, sample)
                if done:
                    return event
            sample = await feed.newer(within_s=NEAR_S)


def _watch(m: Outgoing, sample: TransferSample | None) -> None:
    """Could the source have run meanwhile? A gap in the watching is no proof that it has not."""
    if not m.vmm.is_reachable and not m.vmm.is_dead:
        m.may_have_run = True
    if sample is not None and (
        sample.run_state is RunState.RUNNING
        or sample.qemu_status in (QemuStatus.FAILED, QemuStatus.CANCELLED, QemuStatus.CANCELLING)
    ):
        m.may_have_run = True


async def _ask_source(m: Outgoing) -> TransferSample | None:
    """A fresh look; None when the monitor does not answer.

    A stalled link blocks it, and after a restart it may not be connected yet.
    """
    try:
        return await m.vmm.sample()
    except (VmmTimedOut, VmmUnreachable):
        return None


async def _continue(m: Outgoing) -> bool:
    """migrate-continue; not to know whether it took effect is no reason to stop watching.

    False: say it again should the status still call for it.
    """
    begun = m.ahead.take_switchover()
    try:
        with around("source.continue"):
            await (begun or m.vmm.continue_switchover())
    except VmmTimedOut:
        return True
    except (VmmUnreachable, VmmRefused) as exc:  # refused: it was said before
        m.log.warning("migrate-continue has to be looked after", cause=exc.message)
        return False
    return True


def _verdict(m: Outgoing, sample: TransferSample) -> tuple[bool, MigrationEvent | None]:
    """(is it over, the event if it went wrong)."""
    status = sample.qemu_status
    if status is QemuStatus.COMPLETED and not sample.is_of_arrival:
        return True, None
    if status in (QemuStatus.POSTCOPY_ACTIVE, QemuStatus.POSTCOPY_PAUSED):
        return m.state.mode is Mode.POSTCOPY, None
    if status is QemuStatus.NONE:  # of a VMM whose memory the daemon itself moves
        text = f"on {m.world.options.host}: migrd was restarted, and its transfer is gone"
        return True, m.failed("switchover_failed", text)
    if status in (QemuStatus.FAILED, QemuStatus.CANCELLED):
        why = sample.error or "no reason was given"
        return True, m.failed("switchover_failed", f"on {m.world.options.host}: {why}")
    return False, None


async def _destination_loaded(m: Outgoing) -> DestinationView:
    """Long poll until the destination has the guest, or has refused it."""
    generation, pause_s = -1, FIRST_RETRY_S
    while True:
        asking = m.ahead.take_view()
        try:
            async with asyncio.timeout(LOST_S):
                view = await (asking or m.peer.view(m.id, newer_than=generation, wait_s=ASK_S))
        except (PeerError, TimeoutError) as exc:
            generation = -1  # a daemon that was restarted counts anew
            m.trouble("DestinationUnreachable", str(exc) or f"no answer within {LOST_S:g} s")
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_RETRY_S)
        else:
            generation = view.generation
            m.settle("DestinationUnreachable")
            if view.phase not in (DestinationPhase.PREPARING, DestinationPhase.RECEIVING):
                return view


async def _late(m: Outgoing, deadline_s: float) -> MigrationEvent:
    """The deadline of the switchover is over with the guest stopped: get it running again."""
    message = f"the switchover was not over within {deadline_s:.1f} s"
    if m.state.mode is Mode.POSTCOPY and await _is_in_postcopy(m):
        cause = Cause(
            "destination_silent",
            f"{message}: the guest has left for {m.peer.name} by postcopy and {m.peer.name} "
            "does not say that it arrived; nothing may be killed on either side",
        )
        return m.event(Trigger.OUTCOME_UNKNOWN, cause=cause)
    m.may_have_run = True  # from here QEMU resumes the guest by itself
    with contextlib.suppress(VmmError):  # whatever it did shows when we look
        await m.vmm.free_stalled()
    return m.failed("switchover_timed_out", f"{message}; the connection was cut to free the guest")


async def _is_in_postcopy(m: Outgoing) -> bool:
    """True also when it cannot be told: then nothing may be undone."""
    try:
        return (await m.vmm.sample()).qemu_status.is_postcopy
    except VmmDied:
        raise
    except VmmError:
        return True


async def _after_death(m: Outgoing, exc: VmmDied) -> MigrationEvent:
    """The source process is proven dead; the destination may hold all of the guest."""
    try:
        async with asyncio.timeout(DEATH_S):
            view = await _destination_loaded(m)
    except TimeoutError:
        text = f"{exc.message} in switchover, and {m.peer.name} does not say whether it has it all"
        return m.event(Trigger.OUTCOME_UNKNOWN, cause=Cause(exc.code, f"{text}; it is asked on"))
    if view.phase is DestinationPhase.REFUSED:
        return m.event(Trigger.GUEST_DIED, cause=Cause(exc.code, f"{exc.message} in switchover"))
    if m.may_have_run and not is_used(view):
        return m.event(Trigger.OUTCOME_UNKNOWN, cause=unwatched(m, exc))
    m.log.warning("the source died, the destination has all of the guest", cause=exc.message)
    return m.event(Trigger.TRANSFER_COMPLETED, source_died=True)


# Granted ------------------------------------------------------------------------------------------


async def obtain_answer(m: Outgoing) -> MigrationEvent:
    """Carry out OBTAIN_ANSWER: GRANT until answered, or call the operator."""
    if m.state.arbitrated:
        return await obtain_by_record(m)
    deadline_s = m.world.options.grant_deadline_s
    try:
        async with asyncio.timeout(deadline_s):
            return await ask_until_answered(m)
    except TimeoutError:
        trouble = m.troubles.get("DestinationUnreachable")
        why = f": {trouble[0]}" if trouble else ""
        cause = Cause(
            "grant_unanswered",
            f"{m.peer.name} has not answered GRANT for {deadline_s:.0f} s{why}; the guest may run "
            "there, so it stays stopped here",
        )
        return m.event(Trigger.OUTCOME_UNKNOWN, cause=cause)


async def keep_asking(m: Outgoing) -> MigrationEvent:
    """Carry out KEEP_ASKING: what would settle it is asked for without end."""
    if m.state.granted and m.state.arbitrated:
        return await keep_asking_by_record(m)
    if m.state.granted:
        return await ask_until_answered(m, died_is_unknown=False)
    if m.vmm.is_dead and m.may_have_run:
        return await _until_there_is_nothing(m)
    if m.state.undoing:
        return await bring_back(m, death_s=None)
    try:
        return await _settle_what_has_left(m)
    except VmmDied:
        if not m.vmm.is_dead:
            raise
        return await keep_asking(m)


async def _settle_what_has_left(m: Outgoing) -> MigrationEvent:
    """Of a postcopy that nobody saw arrive."""
    view = await _loaded_unless_here(m)
    if view is None:
        return await bring_back(m, death_s=None)
    is_refused = view.phase is DestinationPhase.REFUSED
    if m.vmm.is_dead:
        if is_refused:
            return m.event(Trigger.GUEST_DIED, cause=m.state.cause)
        return m.event(Trigger.TRANSFER_COMPLETED, source_died=True)
    if is_refused or await _source_done(m, fresh=True) is not None:  # rule 4 of the handover
        return await bring_back(m, death_s=None)
    return m.event(Trigger.TRANSFER_COMPLETED)


async def _loaded_unless_here(m: Outgoing) -> DestinationView | None:
    """The destination's answer; None as soon as the source's QEMU says that the guest never left:
    its monitor may have been away when that was asked, and the destination waits for ever."""
    loaded = asyncio.create_task(_destination_loaded(m))
    try:
        while not loaded.done():
            sample = None if m.vmm.is_dead else await _ask_source(m)
            if sample is not None and sample.qemu_status in NEVER_LEFT:
                return None
            await asyncio.wait({loaded}, timeout=LONGEST_RETRY_S)
        return loaded.result()
    finally:
        loaded.cancel()
        await asyncio.wait([loaded])


async def _until_there_is_nothing(m: Outgoing) -> MigrationEvent:
    """The source is dead and may have run on: whether the destination's copy is the guest, a
    person has to say. Only when there is no copy either, it is lost."""
    while True:
        view = await _destination_loaded(m)
        if view.phase is DestinationPhase.REFUSED:
            return m.event(Trigger.GUEST_DIED, cause=m.state.cause)
        if is_used(view):
            return m.event(Trigger.TRANSFER_COMPLETED, source_died=True)
        await asyncio.sleep(LONGEST_RETRY_S)


# Completing ---------------------------------------------------------------------------------------


async def release_source(m: Outgoing) -> MigrationEvent:
    """Carry out RELEASE_SOURCE: the guest runs on the destination, this copy is dead data."""
    if m.state.mode is Mode.POSTCOPY:
        event = await finish_postcopy(m)
        if event is not None:
            return event
        if m.state.arbitrated:
            await note_that_it_left(m)
    if not m.vmm.is_dead:
        await _check_not_running(m)
        limit_s = m.world.options.release_deadline_s
        try:
            async with asyncio.timeout(limit_s):
                await _until_ended(m)
        except TimeoutError:
            # the time may have passed while this daemon stood still (SIGSTOP): once more
            with contextlib.suppress(MigrdError, TimeoutError):
                async with asyncio.timeout(LAST_TRY_S):
                    await m.vmm.quit()
            if m.vmm.is_dead:
                return m.event(Trigger.SOURCE_RELEASED)
            text = (
                f"the guest runs on {m.peer.name}; its old QEMU here (pid {m.vmm.pid}) was not "
                f"ended within {limit_s:.0f} s: end it by hand, it must never run again"
            )
            return m.event(Trigger.SOURCE_RELEASED, cause=Cause("source_left_behind", text))
    return m.event(Trigger.SOURCE_RELEASED)


async def _until_ended(m: Outgoing) -> None:
    """Until the source's process is proven dead."""
    while not m.vmm.is_dead:
        try:
            with around("source.quit"):
                await m.vmm.quit()
        except VmmDied:
            return
        except VmmError as exc:
            m.trouble("SourceNotEnding", exc.message)
            await asyncio.sleep(LONGEST_RETRY_S)


async def _check_not_running(m: Outgoing) -> None:
    """Two running copies would be the failure migrd exists to prevent: never pass over it."""
    sample = m.sample
    with contextlib.suppress(MigrdError):
        sample = await m.vmm.sample()
    running = sample is not None and sample.run_state is RunState.RUNNING
    if running and m.state.run_guest and m.state.phase is Phase.COMPLETING:
        m.world.observer.ownership_violation()
        m.trouble("OwnershipViolation", "the source's guest was running after the grant")
        m.log.error("the source ran after the grant", run_state=RunState.RUNNING.value)
