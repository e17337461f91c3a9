"""One migration away from this host, and the one task that owns it.

    wish (API) ----+
                   v
    step task -> event -> advance -> journal (fsync) -> publish -> next step task

- Only `run` changes the state, one event at a time. A step (engine.precopy, .switchover, .rollback)
  carries out the instruction of a phase and ends in exactly one event; a wish that changes the
  phase cancels the step, waits for it, and then is the event.
- Steps may be begun again at any time (after a restart, after an error): each looks before it acts.
- What is not durable has not happened, with these exceptions, each safe to lose:
    SWITCHOVER_REACHED is an observation, saved while QEMU already goes on;
    STARTED gives a slot, saved while preflight looks around: a replay gives one again;
    STEP_FAILED, CANCEL_REQUESTED, DESTINATION_REFUSED lead back to the source. A replay that misses
    them finds QEMU stopped or failed, or asks the destination, whose refusal is durable, and comes
    to the same end. They are saved together with the next event. A person's word for the
    destination's refusal is no such thing: it is durable before the guest runs again.
- GRANT needs its record. When that cannot be written, the guest is taken back only after the
  destination has refused durably: the record might be on the disk after all. In postcopy QEMU takes
  no guest back: there the record is tried again until it is written.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

import structlog

from migrd.core.handover import DestinationPhase
from migrd.core.migration import Cause, MigrationEvent, MigrationState, Mode, Refusal, advance
from migrd.core.phases import (
    INSTRUCTION_OF,
    TRANSITIONS,
    IllegalTransition,
    Instruction,
    Phase,
    Trigger,
)
from migrd.engine.ahead import Ahead
from migrd.engine.outgoing_record import OutgoingRecord
from migrd.engine.ports import Peer, StoredRequest, StoredVm, Vmm
from migrd.engine.world import World
from migrd.errors import JournalError, MigrdError, PeerError, VmmDied
from migrd.failpoints import reached

log = structlog.get_logger(__name__)

ACT_FIRST: Final = frozenset(
    {Trigger.STEP_FAILED, Trigger.CANCEL_REQUESTED, Trigger.DESTINATION_REFUSED}
)
SAVED_MEANWHILE: Final = frozenset({Trigger.SWITCHOVER_REACHED, Trigger.STARTED})
RETRY_S: Final = 0.5

Step = Callable[["Outgoing"], Awaitable[MigrationEvent]]


class Outgoing(OutgoingRecord):
    """The source's side of one migration."""

    def __init__(
        self,
        world: World,
        stored: StoredRequest,
        state: MigrationState,
        vmm: Vmm,
        peer: Peer,
        steps: Mapping[Instruction, Step],
    ) -> None:
        super().__init__(world, stored, state, vmm, peer)
        self._steps = steps
        self.ahead = Ahead()
        self.on_ended: Callable[[Outgoing], None] = lambda _: None
        """Called in the instant of the end, before anybody is told."""
        self._wishes: asyncio.Queue[MigrationEvent] = asyncio.Queue(maxsize=64)
        self._kept_wish: MigrationEvent | None = None
        """Taken from the queue, and to be looked at in the next phase."""
        self._unsaved: list[MigrationEvent] = []
        self._saving: asyncio.Task[None] | None = None
        self._lock = asyncio.Lock()

    # Wishes from outside ----------------------------------------------------------------------

    def wish(self, event: MigrationEvent) -> bool:
        """Hand an event to the owner; False when too many wait already."""
        try:
            self._wishes.put_nowait(event)
        except asyncio.QueueFull:
            return False
        if event.trigger is Trigger.CANCEL_REQUESTED:
            self.cancel_wished = True
        return True

    # The owner task ---------------------------------------------------------------------------

    async def run(self) -> None:
        """Until a terminal phase. Cancelled at shutdown: the journal and QEMU stay as they are."""
        keeper = asyncio.create_task(self._keep_observations(), name=f"keeper-{self.id[:8]}")
        try:
            while not self.state.is_terminal:
                await self._apply_durably(await self._next_event())
                if self.state.phase is not Phase.SWITCHOVER:
                    await self.ahead.drop()
            await self._flush()
        finally:
            keeper.cancel()  # first: what is awaited here may be cancelled itself
            await self.ahead.drop()
            await _end(keeper)
            if self._saving is not None:
                await asyncio.wait([self._saving])
        await self._keep_now()

    async def _next_event(self) -> MigrationEvent:
        """What the phase's step comes to, or a wish that has its place now, first come."""
        step = asyncio.create_task(self._carry_out(), name=f"step-{self.id[:8]}")
        try:
            while True:
                wish = asyncio.create_task(self._next_wish())
                try:
                    await asyncio.wait({step, wish}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    if not wish.done():
                        await _end(wish)
                if step.done():
                    if not wish.cancelled():
                        self._kept_wish = wish.result()
                    return step.result()
                if await self._grant_wish(wish.result(), step):
                    return wish.result()
        finally:
            await _end(step)

    async def _next_wish(self) -> MigrationEvent:
        kept, self._kept_wish = self._kept_wish, None
        return await self._wishes.get() if kept is None else kept

    async def _grant_wish(self, event: MigrationEvent, step: asyncio.Task[MigrationEvent]) -> bool:
        """Apply a wish that leaves the phase alone; True when it changes it: the step has ended."""
        row = TRANSITIONS[self.state.phase]
        out_of_place = event.by_operator and self.state.phase is not Phase.NEEDS_OPERATOR
        if event.trigger not in row or out_of_place:
            return False  # the phase has moved on since the wish was admitted
        if step.done():
            self._kept_wish = event
            return False
        if row[event.trigger] is self.state.phase:
            with contextlib.suppress(JournalError):  # reported as a condition; the wish is not met
                await self.apply(event)
            self.policy_changed.set()
            return False
        await _end(step)
        return True

    async def _carry_out(self) -> MigrationEvent:
        """Run the step of the present phase until it comes to an event."""
        instruction = INSTRUCTION_OF.get(self.state.phase)
        if instruction is None:
            return await self._wait_for_slot()
        while True:
            try:
                return await self._steps[instruction](self)
            except VmmDied as exc:
                return self.event(Trigger.GUEST_DIED, cause=Cause(exc.code, exc.message))
            except Exception as exc:
                event = self._after_error(exc)
                if event is not None:
                    return event
                await asyncio.sleep(RETRY_S)

    async def _wait_for_slot(self) -> MigrationEvent:
        """Pending: a wish (STARTED, CANCEL_REQUESTED) moves it, or its deadline ends it."""
        while True:
            left_s = self.deadline_at_s - self.world.clock.monotonic_s()
            if left_s <= 0:
                break
            await asyncio.sleep(min(left_s, 1.0))
        text = f"no slot was free within deadline_s = {self.state.policy.deadline_s:g}"
        refusal = Refusal("deadline", text, "ask again when less is going on")
        return self.event(Trigger.PREFLIGHT_REFUSED, refusals=(refusal,))

    def _after_error(self, exc: Exception) -> MigrationEvent | None:
        """The event an error in a step amounts to; None: begin the step again."""
        if isinstance(exc, MigrdError):
            cause = Cause(exc.code, exc.message)
            self.log.warning("a step did not work", phase=self.state.phase, cause=exc.message)
        else:
            cause = Cause("internal_error", f"{type(exc).__name__}: {exc}")
            self.log.error("a step broke", phase=self.state.phase, exc_info=exc)
        if Trigger.STEP_FAILED in TRANSITIONS[self.state.phase]:
            return self.event(Trigger.STEP_FAILED, cause=cause)
        self.trouble("StepFailing", cause.message)
        return None

    # Applying events --------------------------------------------------------------------------

    async def _apply_durably(self, event: MigrationEvent) -> None:
        """Apply an event; when it cannot be journalled, do what is safe (module docstring)."""
        while True:
            try:
                await self.apply(event)
            except JournalError as exc:
                event = await self._when_not_durable(event, exc)
            except IllegalTransition as exc:
                self.log.error("an event has no place", exc_info=exc)
                return
            else:
                return

    async def _when_not_durable(self, event: MigrationEvent, exc: JournalError) -> MigrationEvent:
        self.log.error("the journal cannot be written", trigger=event.trigger, cause=exc.message)
        if event.trigger is Trigger.DESTINATION_PREPARED:
            return self.failed(exc.code, exc.message)
        granting = event.trigger is Trigger.TRANSFER_COMPLETED
        is_here = not event.source_died and not self.vmm.is_dead  # else the only copy is there
        may_go_back = granting and is_here and self.state.mode is Mode.PRECOPY
        if may_go_back and await self._refused_for_good(exc.message):
            return self.failed(exc.code, exc.message)
        await asyncio.sleep(RETRY_S)
        return event

    async def _refused_for_good(self, reason: str) -> bool:
        """Has the destination durably refused? Only then may an unsaved grant be taken back."""
        try:
            view = await self.peer.discard(self.id, self.state.epoch, reason)
        except PeerError as exc:
            self.log.error("the destination does not answer either", cause=exc.message)
            return False
        return view.phase is DestinationPhase.REFUSED

    async def apply(self, event: MigrationEvent) -> None:
        """Advance, save, publish. Raises JournalError or IllegalTransition: nothing changed."""
        async with self._lock:
            new, _ = advance(self.state, event)
            reached(f"source.{event.trigger.value}.deciding")
            if event.trigger in SAVED_MEANWHILE:
                await self._saved()
                self._saving = asyncio.create_task(self._save(event, act_first=True))
            else:
                # an end is never told before it is on the disk: after a restart it would go on
                may_act_first = event.trigger in ACT_FIRST and not new.is_terminal
                may_act_first = may_act_first and not event.by_operator
                await self._save(event, act_first=may_act_first)
            self.words.saw(event)
            self._enter(new)

    async def _saved(self) -> None:
        saving, self._saving = self._saving, None
        if saving is not None:
            await saving

    async def _save(self, event: MigrationEvent, *, act_first: bool) -> None:
        if not act_first or self._saving is not asyncio.current_task():
            await self._saved()
        events = [*self._unsaved, event]
        try:
            await self.world.journal.append_outgoing(self.id, events, self._vm_after(event))
        except JournalError as exc:
            self.trouble("JournalFailing", exc.message)
            if not act_first:
                raise
            self._unsaved = events
        else:
            self._unsaved = []
            self.settle("JournalFailing")
            reached(f"source.{event.trigger.value}.journalled")

    async def _flush(self) -> None:
        """Whatever was left unsaved is written before the task ends."""
        await self._saved()
        while self._unsaved:
            try:
                await self.world.journal.append_outgoing(self.id, self._unsaved)
                self._unsaved = []
            except JournalError:
                await asyncio.sleep(RETRY_S)

    def _vm_after(self, event: MigrationEvent) -> StoredVm | None:
        """What the event makes of this host's VM; written in the same transaction."""
        state = self.state
        if event.trigger in (Trigger.PREFLIGHT_PASSED, Trigger.TRANSFER_COMPLETED):
            spec, instance = self.stored.spec, self.vmm.instance
            return StoredVm(spec, state.epoch, True, instance, self.decision())
        lost_there = event.trigger is Trigger.GUEST_DIED and state.phase is Phase.COMPLETING
        if event.trigger is Trigger.SOURCE_RELEASED or lost_there:
            return StoredVm(self.stored.spec, state.epoch, here=False, instance=None)
        if event.trigger is Trigger.GUEST_DIED and self.vmm.is_dead:
            # before its files are forgotten: else a restart looks for it, and must not guess
            return StoredVm(self.stored.spec, state.epoch, True, None, self.decision())
        return None

    def _enter(self, new: MigrationState) -> None:
        old, self.state = self.state, new
        if new.phase is old.phase:
            self.changed("migration.changed")
            return
        self.settle("StepFailing")  # that step is over
        lasted_s = new.timeline[-1].monotonic_s - old.timeline[-1].monotonic_s
        self.world.observer.phase_changed("source", old.phase, new.phase, lasted_s)
        said = {} if new.cause is None else {"cause": new.cause.code, "message": new.cause.message}
        self.log.info("phase", phase=new.phase.value, after_s=round(lasted_s, 4), **said)
        if new.blackout_s is not None and old.blackout_s is None:
            self.world.observer.blackout(new.blackout_s)
        if new.is_terminal:
            reason = new.cause.code if new.cause else "none"
            if new.refusals and new.phase is Phase.REFUSED:
                reason = new.refusals[0].code
            self.world.observer.migration_ended("source", new.phase, reason)
            self.on_ended(self)
        self.changed("migration.phase")


async def _end(task: asyncio.Task[Any]) -> None:
    """Cancel a task and wait for it; what it was cancelled out of shows when QEMU is looked at."""
    if not task.done():
        task.cancel()
    await asyncio.wait([task])
