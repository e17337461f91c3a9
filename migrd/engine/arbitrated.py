"""The source's part of a handover whose hosts have an arbiter (engine.arbiter_port).

    granted is durable
    give        assign the record to the destination, then GRANT, which only hastens things
    settled     the destination runs it, or has durably refused
    withdraw    nothing came of it in time: take the record back, which fails once the destination
                has said that it starts; where the arbiter is the one that does not answer, ask the
                destination to refuse instead

Whoever answers first settles it. A destination that is gone before it had said `started` needs no
person: the record at a newer revision proves that it never will start. One that is gone after that
needs proof, as without an arbiter.

A guest that cannot come back here is never withdrawn. One that left by postcopy does not wait for
the arbiter: its record is written beside GRANT, or afterwards. One whose process here is dead does,
for as long as it takes: its copy over there is safe meanwhile. A durable refusal is obeyed at once;
the record is put right afterwards, by a task that keeps trying.
"""

import asyncio
from collections.abc import Callable
from typing import Final

from migrd.core.handover import DestinationPhase
from migrd.core.migration import Cause, MigrationEvent, Mode
from migrd.core.phases import Phase, Trigger
from migrd.engine.arbiter_port import NO_RECORD, Ownership
from migrd.engine.granting import (
    FIRST_RETRY_S,
    LONGEST_RETRY_S,
    grant_once,
    note_silence,
    settled,
    view_once,
)
from migrd.engine.outgoing import Outgoing
from migrd.engine.ownership import UNREACHABLE, Standing, as_source, claim, elsewhere, present
from migrd.errors import ArbiterConflict, ArbiterUnavailable, Conflict, MigrdError, PeerError
from migrd.failpoints import around

TAKEN_BACK: Final = "taken_back"
ELSEWHERE: Final = "OwnedElsewhere"
LATER_S: Final = 30.0
"""Between tries to put a record right that nobody waits for, at the most."""
LEFT_S: Final = 5.0
"""So long the release of the source waits for the record of a guest that left by postcopy."""


async def own_record(m: Outgoing) -> None:
    """The record says that the guest is this host's, and at which revision: before anything moves,
    and again by a restarted daemon. Raises Conflict, ArbiterUnavailable."""
    if m.record is None:
        arbiter, vm = present(m.world), m.stored.request.vm
        m.record = await claim(
            arbiter, vm, m.world.options.host, m.state.epoch, m.id, lambda found: m.proves(found)
        )


async def before_the_grant(m: Outgoing) -> MigrationEvent | None:
    """The event that ends the switchover here, while nothing is written and the guest can go on;
    None: the grant may be decided."""
    if m.state.mode is Mode.POSTCOPY:  # there is no way back, and the record is not waited for
        return None
    try:
        await own_record(m)
        if not m.world.arbiter.state.is_reachable:
            await present(m.world).read(m.stored.request.vm)
    except (ArbiterUnavailable, Conflict) as exc:
        return m.failed(exc.code, exc.message)
    return None


async def obtain_by_record(m: Outgoing) -> MigrationEvent:
    """OBTAIN_ANSWER: until it is settled, or the operator is called."""
    options = m.world.options
    limit_s = options.grant_deadline_s
    patience_s = min(limit_s / 2, options.switchover_s(m.state.policy.downtime_limit_s))
    try:
        async with asyncio.timeout(limit_s):
            return await _Settling(m, died_is_unknown=True).run(patience_s)
    except TimeoutError:
        return m.event(Trigger.OUTCOME_UNKNOWN, cause=_unanswered(m, limit_s))


async def keep_asking_by_record(m: Outgoing) -> MigrationEvent:
    """KEEP_ASKING after a grant: the same without an end, and taken back as soon as may be."""
    return await _Settling(m, died_is_unknown=False).run(0.0)


def _unanswered(m: Outgoing, limit_s: float) -> Cause:
    said = [m.troubles[type_][0] for type_ in sorted(m.troubles)]
    why = f" ({'; '.join(said)})" if said else ""
    return Cause(
        "grant_unanswered",
        f"for {limit_s:.0f} s neither {m.peer.name} nor the arbiter has said who has the guest"
        f"{why}; it may run on {m.peer.name}, so it stays stopped here",
    )


class _Settling:
    """One run of a step after the grant."""

    def __init__(self, m: Outgoing, *, died_is_unknown: bool) -> None:
        self._m = m
        self._died_is_unknown = died_is_unknown
        self._standing = Standing.UNKNOWN
        self._is_silent = False
        """The arbiter did not answer when it was last asked."""
        known = m.record
        is_decided_on = known is not None and known.revision == m.state.decided_on_revision
        self._known = known if is_decided_on else None
        """The record as it was when the grant was decided: saves one look while the guest waits."""

    @property
    def _may_come_back(self) -> bool:
        state = self._m.state
        may = state.mode is Mode.PRECOPY and state.decided_on_revision is not None
        return may and not state.source_died and not self._m.vmm.is_dead

    async def run(self, patience_s: float) -> MigrationEvent:
        """Until an event. After `patience_s` the guest is taken back, if that is still possible."""
        clock, pause_s = self._m.world.clock, FIRST_RETRY_S
        late_at_s = clock.monotonic_s() + patience_s
        while self._may_come_back:
            left_s = late_at_s - clock.monotonic_s()
            event = await (self._give(left_s) if left_s > 0 else self._withdraw())
            if event is not None:
                return event
            left_s = late_at_s - clock.monotonic_s()
            await asyncio.sleep(min(pause_s, left_s) if left_s > 0 else pause_s)
            pause_s = min(2 * pause_s, LONGEST_RETRY_S)
        return await self._give_for_good()

    async def _give(self, within_s: float) -> MigrationEvent | None:
        try:
            async with asyncio.timeout(within_s):
                if self._standing not in (Standing.GIVEN, Standing.STARTED):
                    await self._look(gives=True)
                match self._standing:
                    case Standing.GIVEN | Standing.STARTED:
                        return await grant_once(self._m, self._died_is_unknown)
                    case Standing.BACK:
                        return self._taken_back()
                    case Standing.LOST:
                        return await self._ask_to_refuse(
                            "the arbiter's record is not ours any more"
                        )
                    case _:
                        return None
        except TimeoutError:
            if self._standing is Standing.UNKNOWN:
                self._silent(f"no answer from the arbiter within {within_s:.1f} s")
            else:
                self._m.trouble("DestinationUnreachable", "no answer to GRANT yet")
            return None

    async def _withdraw(self) -> MigrationEvent | None:
        if self._is_silent:  # the other one may be quicker
            event = await self._ask_to_refuse("the arbiter does not answer")
            if event is not None:
                return event
        await self._look(gives=False)
        match self._standing:
            case Standing.BACK:
                return self._taken_back()
            case Standing.STARTED:
                return await grant_once(self._m, self._died_is_unknown)
            case Standing.LOST:
                return await self._ask_to_refuse("the arbiter's record is not ours any more")
            case _:
                return None

    async def _look(self, *, gives: bool) -> None:
        """Read the record, and write what is wanted of it; `_standing` afterwards."""
        m, known = self._m, self._known
        self._known, self._standing = None, Standing.UNKNOWN
        try:
            arbiter = present(m.world)
            record = known or await arbiter.read(m.stored.request.vm)
            standing = self._of(record)
            if record is not None and gives and standing is Standing.OURS:
                with around("source.assign"):
                    record = await _assign(m, record, m.peer.name, started=False)
            elif record is not None and not gives and standing in (Standing.OURS, Standing.GIVEN):
                with around("source.take_back"):
                    record = await _assign(m, record, m.world.options.host, started=True)
            self._standing = self._of(record)
        except ArbiterConflict:
            return  # it was changed meanwhile: looked at again
        except ArbiterUnavailable as exc:
            self._silent(exc.message)
            return
        self._is_silent = False
        m.settle(UNREACHABLE)

    def _of(self, record: Ownership | None) -> Standing:
        m = self._m
        decided_on = m.state.decided_on_revision
        return as_source(record, m.world.options.host, m.peer.name, m.state.epoch, decided_on)

    def _silent(self, why: str) -> None:
        self._is_silent = True
        self._m.trouble(UNREACHABLE, why)

    def _taken_back(self) -> MigrationEvent:
        m = self._m
        cause = Cause(
            TAKEN_BACK,
            f"{m.peer.name} had not said in time that it starts the guest: the arbiter has given "
            f"it back to {m.world.options.host}",
        )
        return m.event(Trigger.DESTINATION_REFUSED, cause=cause)

    async def _ask_to_refuse(self, why: str) -> MigrationEvent | None:
        """A durable refusal brings the guest back, whatever the record says."""
        m = self._m
        try:
            with around("source.discard"):
                view = await m.peer.discard(m.id, m.state.epoch, why)
        except PeerError as exc:
            note_silence(m, exc)
            return None
        if view.phase is DestinationPhase.REFUSED and self._is_silent:
            cause = Cause("arbiter_unavailable", f"{why}; {m.peer.name} has refused: {view.reason}")
            return m.event(Trigger.DESTINATION_REFUSED, cause=cause)
        return settled(m, view, self._died_is_unknown)

    async def _give_for_good(self) -> MigrationEvent:
        """The guest cannot come back: the record is written for as long as it takes. In precopy
        GRANT waits for that: a destination that finds the record not its own throws away what may
        be the only copy. So may one where postcopy was chosen and all had arrived before it began:
        no loss while the source lives. One that an earlier daemon took back is not given again: the
        guest may have run here since."""
        m, pause_s = self._m, FIRST_RETRY_S
        is_precopy = m.state.mode is Mode.PRECOPY
        giving = asyncio.create_task(_keep_giving(m), name=f"giving-{m.id[:8]}")
        try:
            while True:
                if giving.done() and not giving.result():
                    return self._taken_back()
                may_grant = giving.done() or not (is_precopy or m.vmm.is_dead)
                asking = grant_once if may_grant else view_once
                event = await asking(m, self._died_is_unknown)
                if event is not None:
                    return event
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_RETRY_S)
        finally:
            giving.cancel()
            await asyncio.wait([giving])


async def _assign(m: Outgoing, record: Ownership, owner: str, *, started: bool) -> Ownership:
    return await present(m.world).assign(
        record,
        owner,
        epoch=m.state.epoch,
        started=started,
        run_guest=m.state.run_guest,
        migration_id=m.id,
    )


async def _keep_giving(m: Outgoing, *, started: bool = False) -> bool:
    """False: it had been taken back."""
    pause_s = FIRST_RETRY_S
    while (is_given := await _gave_for_good(m, started=started)) is None:
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, LONGEST_RETRY_S)
    return is_given


async def _gave_for_good(m: Outgoing, *, started: bool) -> bool | None:
    """The record says that the guest is the destination's; None: not yet. False: it was taken back.
    Never raises for what is not so yet."""
    vm, here, there = m.stored.request.vm, m.world.options.host, m.peer.name
    epoch, decided_on = m.state.epoch, m.state.decided_on_revision
    try:
        record = await present(m.world).read(vm)
        is_back = as_source(record, here, there, epoch, decided_on) is Standing.BACK
        if is_back and m.state.mode is Mode.PRECOPY:
            return False
        if record is None:
            absent = Ownership(vm, there, epoch, started=False, revision=NO_RECORD)
            await _assign(m, absent, there, started=started)  # a claim would not say `run_guest`
        elif record.owner == here and record.epoch <= epoch:
            with around("source.assign"):
                await _assign(m, record, there, started=started)
        elif record.owner == there and started and not record.started:
            await _assign(m, record, there, started=True)
        elif record.owner != there:
            m.trouble(ELSEWHERE, elsewhere(vm, record).message)
    except ArbiterConflict:
        return None
    except ArbiterUnavailable as exc:
        m.trouble(UNREACHABLE, exc.message)
        return None
    m.settle(UNREACHABLE)
    return True


async def note_that_it_left(m: Outgoing) -> None:
    """The guest runs there, and the record may not say so yet (postcopy). When the arbiter does
    not answer, the destination's next claim mends it: its journal proves it."""
    try:
        async with asyncio.timeout(LEFT_S):
            await _keep_giving(m, started=True)
    except TimeoutError:
        m.log.warning("the arbiter was not told that the guest has left", vm=m.stored.request.vm)


# After a roll-back --------------------------------------------------------------------------------


async def fence(m: Outgoing) -> None:
    """A person has proven that the destination never runs the guest: the record says so before it
    runs here. Waits for as long as it takes."""
    pause_s = FIRST_RETRY_S
    while not await _is_back(m):
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, LONGEST_RETRY_S)
    m.settle(ELSEWHERE)


async def put_right(m: Outgoing, is_known: Callable[[], bool], lock: asyncio.Lock) -> None:
    """The guest is here for good, or has ended, and the record may still name the destination.
    Until it is written, or the VM is forgotten; a claim meanwhile does the same. `lock` is the
    VM's."""
    was_granted = Phase.GRANTED in {entry.phase for entry in m.state.timeline}
    if not (m.state.arbitrated and was_granted and m.state.is_terminal) or m.has_left:
        return
    pause_s = FIRST_RETRY_S
    while True:
        async with lock:  # a VM that is being forgotten would get a record again
            if not is_known():
                m.settle(UNREACHABLE)
                return
            if await _is_back(m) or ELSEWHERE in m.troubles:
                return
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, LATER_S)


async def _is_back(m: Outgoing) -> bool:
    """The record is this host's, and no late grant can change it. Written over the destination's
    on what the caller knows: a durable refusal, or a person's proof. Once the migration has ended,
    a newer record is left as it is."""
    vm, here, there = m.stored.request.vm, m.world.options.host, m.peer.name
    epoch, decided_on = m.state.epoch, m.state.decided_on_revision
    try:
        record = await present(m.world).read(vm)
        standing = as_source(record, here, there, epoch, decided_on)
        if record is None:
            await present(m.world).claim(vm, here, epoch, m.id)
        elif record.epoch > epoch and (record.owner == here or m.state.is_terminal):
            pass  # a newer migration has settled it
        elif record.owner not in (here, there) or record.epoch > epoch:
            m.settle(UNREACHABLE)
            m.trouble(ELSEWHERE, elsewhere(vm, record).message)
            return False
        elif standing is not Standing.BACK:
            with around("source.take_back"):
                await _assign(m, record, here, started=True)
    except ArbiterConflict:
        return False
    except MigrdError as exc:
        m.trouble(UNREACHABLE, exc.message)
        return False
    m.settle(UNREACHABLE)
    return True
