"""The precopy step: start QEMU's migration, follow each dirty sync as a round, decide, steer.

    migrate -> [sample ... round -> decide -> act] ... -> pre-switchover   => SWITCHOVER_REACHED
                                                       -> failed, stalled,
                                                          deadline, ...   => STEP_FAILED

Who switches over: QEMU is given the downtime limit less the fixed cost and may begin by itself as
soon as its own figures fit; where ours fit and its do not (it takes the last 100 ms for its
bandwidth, which is too low right after a pause or under a throttle), it is told our bandwidth.

While the destination's migrd, or the arbiter, does not answer, QEMU is held in precopy by limits
that leave no room for a single page. (A guest that hardly writes may still reach the switchover; it
is then brought back at once, see `switchover`.)

A restarted daemon begins this step again: it finds QEMU's migration going on and goes on steering.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Final

from migrd.core.convergence import Decision, Situation, Verdict, decide, estimate
from migrd.core.facts import QemuStatus, TransferSample
from migrd.core.handover import DestinationPhase
from migrd.core.migration import Cause, MigrationEvent, Mode
from migrd.core.phases import Trigger
from migrd.engine.arbiter_watch import ArbiterWatch
from migrd.engine.first_look import first_look, keep_numbers
from migrd.engine.last_words import last_word, why_failed
from migrd.engine.limits import Limits
from migrd.engine.outgoing import Outgoing
from migrd.engine.ownership import UNREACHABLE
from migrd.engine.ports import DestinationView
from migrd.engine.rounds import RoundCounter, record_decision, record_round
from migrd.engine.stopped_copy import StoppedCopy
from migrd.errors import MigrdError, PeerError, PeerRefused, VmmDied, VmmRefused
from migrd.failpoints import around

TICK_S: Final = 0.5
"""Without a round or a change of status the situation is looked at this often."""
ASK_S: Final = 5.0
"""Long poll of the destination's side."""
DESTINATION: Final = "DestinationUnreachable"

LEFT_PRECOPY: Final = frozenset(
    {
        QemuStatus.PRE_SWITCHOVER,
        QemuStatus.DEVICE,
        QemuStatus.COMPLETED,
        QemuStatus.POSTCOPY_DEVICE,
        QemuStatus.POSTCOPY_ACTIVE,
        QemuStatus.POSTCOPY_PAUSED,
    }
)


async def run_precopy(m: Outgoing) -> MigrationEvent:
    """Carry out RUN_PRECOPY; raises the VmmError family for the runner to translate."""
    steering = Steering(m)
    try:
        async with steering.watching():
            await steering.stopped.begin()
            await steering.begin()
            steering.begun.set()
            # Opened only now: a look from before `migrate` shows how the last migration ended.
            async with m.vmm.feed() as feed:
                while True:
                    sample = await feed.newer(within_s=TICK_S)
                    event = await steering.look_at(sample)
                    if event is not None:
                        return event
    except VmmDied as exc:
        return await steering.after_death(exc)
    finally:
        steering.stopped.end()


class Steering:
    """What one run of the precopy step knows."""

    def __init__(self, m: Outgoing) -> None:
        self._m = m
        self._counter = RoundCounter(m.rounds[-1].number if m.rounds else 0)
        self._destination: DestinationView | None = None
        self._limits = Limits(m)
        self._last: Decision | None = m.decisions[-1] if m.resumed and m.decisions else None
        self._taken_over = m.resumed
        self._began_at_s = float("-inf")
        self.begun = asyncio.Event()
        self.stopped = StoppedCopy(m)
        self._arbiter = ArbiterWatch(m)

    async def begin(self) -> None:
        """Issue `migrate`, unless QEMU's migration is already under way (we were restarted)."""
        m = self._m
        if m.resumed:
            if await self._found_going_on():
                return  # else it may know nothing of what an earlier daemon told it
            await m.vmm.prepare_outgoing(m.settings(), m.world.options.tls)
        if m.state.address is None:
            raise MigrdError("the destination's address is not known", code="no_address")
        m.resumed = True  # from here on a second run of this step must not issue it again
        with around("source.migrate"):
            await m.vmm.start_outgoing(m.state.address)
        self._began_at_s = m.world.clock.monotonic_s()

    async def _found_going_on(self) -> bool:
        """Whether QEMU migrates already, and if so: steered from here on."""
        m = self._m
        sample = await first_look(m.vmm)
        asked = [d.throttle_percent or 0 for d in m.decisions if d.verdict is Verdict.THROTTLE]
        m.throttle_percent = max([sample.throttle_percent or 0, *asked])
        if sample.qemu_status is QemuStatus.NONE or sample.is_of_arrival:
            return False
        m.log.info("found the migration going on", qemu_status=sample.qemu_status.value)
        await self._limits.ask()  # an earlier daemon may have held it
        if m.throttle_percent > (sample.throttle_percent or 0):
            with contextlib.suppress(VmmRefused):  # decided, and perhaps never said
                await m.vmm.set_throttle(m.throttle_percent)
        if m.state.mode is Mode.POSTCOPY and sample.qemu_status is QemuStatus.ACTIVE:
            await m.vmm.start_postcopy()  # chosen, and perhaps never said
        return True

    # Looking --------------------------------------------------------------------------------

    async def look_at(self, sample: TransferSample | None) -> MigrationEvent | None:
        """One sample (or the passing of time): the event that ends the step, if it is one."""
        m = self._m
        now_s = m.world.clock.monotonic_s()
        if sample is not None and sample.at_s >= self._began_at_s:  # else of an earlier migration
            self._note(sample, now_s)
            ended = await self._ended(sample)
            if ended is not None:
                return ended
            for round_ in self._counter.observe(sample):
                m.estimate = estimate([*m.rounds, round_], m.state.policy)
                record_round(m, round_)
        refused = self._refused() or self._lost()
        if refused is not None:
            return refused
        if self._limits.are_owed:
            await self._limits.say()
        if m.policy_changed.is_set():
            m.policy_changed.clear()
            await self._limits.ask()
        return self.stopped.overdue(now_s) or await self._steer(now_s) or self._stalled(now_s)

    def _note(self, sample: TransferSample, now_s: float) -> None:
        m, before = self._m, self._m.sample
        moved = sample.transferred_bytes or 0
        sent = moved - ((before.transferred_bytes or 0) if before else 0)
        if before is None or sent > 0 or _is_nearer(before, sample) or m.moved_at_s is None:
            m.moved_at_s = now_s
        if sent > 0:
            channel = "multifd" if m.stored.request.multifd_channels else "ram"
            m.world.observer.transferred(m.stored.request.vm, channel, sent)
        m.sample = sample if sample.total_bytes is not None else keep_numbers(before, sample)

    async def _ended(self, sample: TransferSample) -> MigrationEvent | None:
        """QEMU has left precopy, one way or the other."""
        m = self._m
        if sample.qemu_status in LEFT_PRECOPY and not sample.is_of_arrival:
            if sample.qemu_status is QemuStatus.PRE_SWITCHOVER and not is_pointless(m):
                m.ahead.begin_switchover(m.vmm.continue_switchover())
            self._record_qemus_decision(sample)
            m.may_have_run = sample.qemu_status is not QemuStatus.PRE_SWITCHOVER
            return m.event(Trigger.SWITCHOVER_REACHED, stopped_at_s=self.stopped.since_s(sample))
        if sample.qemu_status is QemuStatus.FAILED:
            return m.failed("transfer_failed", await why_failed(m, sample))
        if sample.qemu_status is QemuStatus.CANCELLED:
            return m.failed(
                "cancelled_outside", "somebody else cancelled the migration on QEMU's monitor"
            )
        return None

    def _record_qemus_decision(self, sample: TransferSample) -> None:
        """QEMU began the switchover before we said so: its decision is kept like ours."""
        m, last = self._m, self._last
        if last is not None and last.verdict in (Verdict.SWITCH_OVER, Verdict.START_POSTCOPY):
            return
        limit_ms = m.state.policy.downtime_limit_s * 1000
        message = f"the VMM found that what is left fits the limit of {limit_ms:.0f} ms"
        number = m.rounds[-1].number if m.rounds else 0
        guess = estimate(tuple(m.rounds), m.state.policy)
        decision = Decision(
            Verdict.SWITCH_OVER, "fits_by_qemu", message, number, sample.at_s, guess
        )
        record_decision(m, decision)

    def _refused(self) -> MigrationEvent | None:
        view = self._destination
        if view is None or view.phase is not DestinationPhase.REFUSED:
            return None
        why = view.reason or "it gave no reason"
        return self._m.failed("destination_refused", f"{self._m.peer.name} gave up: {why}")

    def _lost(self) -> MigrationEvent | None:
        lost = self._arbiter.lost
        return None if lost is None else self._m.failed(lost.code, lost.message)

    def _stalled(self, now_s: float) -> MigrationEvent | None:
        m = self._m
        if m.moved_at_s is None or m.sample is None:
            return None
        still_s = now_s - m.moved_at_s
        if still_s < 1.0:
            m.settle("LinkStalled")
            return None
        m.trouble("LinkStalled", f"no byte has moved to {m.peer.name} for a second")
        if still_s < m.world.options.stall_s:
            return None
        return m.failed(
            "link_stalled",
            f"no byte moved to {m.peer.name} for {still_s:.0f} s (migration.stall_s)",
        )

    # Steering -------------------------------------------------------------------------------

    async def _steer(self, now_s: float) -> MigrationEvent | None:
        m = self._m
        situation = Situation(
            rounds=tuple(m.rounds),
            policy=m.state.policy,
            at_s=now_s,
            deadline_at_s=m.deadline_at_s,
            forced=m.state.switchover_forced,
            postcopy_possible=m.stored.request.may_postcopy,
            postcopy_started=m.state.mode == "postcopy",
            throttle_percent=m.throttle_percent,
        )
        decision = decide(situation)
        m.estimate = decision.estimate
        before, self._last = self._last, decision
        if before is None or _gist(before) != _gist(decision):
            record_decision(m, decision)
        again = before is not None and before.verdict is Verdict.SWITCH_OVER
        return await self._act(decision, again=again)

    async def _act(self, decision: Decision, *, again: bool) -> MigrationEvent | None:
        m = self._m
        match decision.verdict:
            case Verdict.GIVE_UP:
                code = "deadline" if decision.reason == "deadline" else "not_converging"
                return m.failed(code, decision.message)
            case Verdict.THROTTLE if decision.throttle_percent is not None:
                await m.vmm.set_throttle(decision.throttle_percent)
                m.throttle_percent = decision.throttle_percent
            case Verdict.START_POSTCOPY:
                await self._start_postcopy()
            case Verdict.SWITCH_OVER if not self._limits.is_holding:
                await self._limits.hasten(decision, again=again)
            case _:
                pass
        return None

    async def _start_postcopy(self) -> None:
        m = self._m
        if self._limits.is_holding:
            return
        await m.apply(m.event(Trigger.POSTCOPY_CHOSEN))
        await m.vmm.start_postcopy()

    # The other side -------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Keep the newest view of the destination at hand, and its connection warm; see whether
        the arbiter answers."""
        tasks = [
            asyncio.create_task(self._ask_destination()),
            asyncio.create_task(self._arbiter.run(self._limits.hold_for, self._limits.let_go)),
        ]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def _ask_destination(self) -> None:
        m, generation = self._m, -1
        await self.begun.wait()  # `migrate` goes first: everybody waits for that
        while True:
            try:
                view = await self._asked(generation)
            except PeerRefused as exc:
                m.trouble("DestinationUnclear", exc.message)
                await asyncio.sleep(TICK_S)
            except PeerError as exc:
                generation = -1  # a daemon that was restarted counts anew
                await self._limits.hold_for(DESTINATION, exc.message)
                await asyncio.sleep(TICK_S)
            else:
                generation, self._destination = view.generation, view
                self._m.settle("DestinationUnclear")
                await self._limits.let_go(DESTINATION)

    async def _asked(self, generation: int) -> DestinationView:
        """The next view. When this step ends meanwhile, the switchover goes on waiting for it."""
        m = self._m
        asking = asyncio.create_task(m.peer.view(m.id, newer_than=generation, wait_s=ASK_S))
        try:
            return await asyncio.shield(asking)
        except asyncio.CancelledError:
            m.ahead.keep_view(asking)
            raise

    async def after_death(self, exc: VmmDied) -> MigrationEvent:
        """The source process is gone. It has not completed without our migrate-continue; if an
        earlier daemon may have said that, only the destination knows whether it has everything."""
        m, text = self._m, f"{exc.message} while the guest was being copied"
        if not self._taken_over:
            return m.event(Trigger.GUEST_DIED, cause=Cause(exc.code, text))
        view = await last_word(m)
        if view is not None and view.phase is DestinationPhase.REFUSED:
            from_ = f"{exc.message} while the guest was being copied; the copy was not complete"
            return m.event(Trigger.GUEST_DIED, cause=Cause(exc.code, from_))
        now_s = m.world.clock.monotonic_s()
        return m.event(Trigger.SWITCHOVER_REACHED, stopped_at_s=now_s)


def _is_nearer(before: TransferSample, sample: TransferSample) -> bool:
    """Less is left, though nothing was sent: zero pages are skipped."""
    left, was_left = sample.remaining_bytes, before.remaining_bytes
    return left is not None and was_left is not None and left < was_left


def is_pointless(m: Outgoing) -> bool:
    """The guest stands still, nobody could start it over there, and nothing has left yet."""
    waiting = m.sample is not None and m.sample.qemu_status is QemuStatus.PRE_SWITCHOVER
    return waiting and not m.troubles.keys().isdisjoint((DESTINATION, UNREACHABLE))


def _gist(decision: Decision) -> tuple[object, ...]:
    """What makes a decision worth recording again."""
    return decision.verdict, decision.reason, decision.round_number, decision.throttle_percent
