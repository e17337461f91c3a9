"""The destination's side of one migration, and the one task that owns it.

    prepare -> launch -> receiving -> loaded -> (GRANT) owned, starting -> cont -> running
                   any time before starting:   -> refused, and the copy is discarded

The guest here runs by GRANT alone; with an arbiter by its record alone, see incoming_ownership:
owned is journalled, `started` written there, starting journalled. Without, GRANT_RECEIVED and
START_ORDERED are journalled in one transaction before `cont`. GUEST_RAN is journalled before the
source is told. GUEST_LOADED is an observation, and saved together with what follows.

After START_ORDERED this side may not refuse: if QEMU dies then, nobody can know whether the guest
ran, and the view says so (`vmm_died`). In postcopy it does not refuse by time-out either.

Longer than other modules because these are the steps of one task.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any, Final

import structlog

from migrd.core.facts import QemuStatus, RunState, TransferSample
from migrd.core.handover import (
    DestinationPhase,
    DestinationState,
    DestinationTrigger,
)
from migrd.core.migration import Mode
from migrd.core.phases import TERMINAL, IllegalTransition, Phase
from migrd.engine.incoming_ownership import RecordGone, RecordKeeping
from migrd.engine.incoming_record import IncomingRecord
from migrd.engine.orphan import Orphan, is_copy_gone
from migrd.engine.ports import Peer, StoredIncoming, Vmm
from migrd.engine.world import World
from migrd.errors import (
    ArbiterUnavailable,
    Conflict,
    JournalError,
    MigrdError,
    PeerError,
    PeerRefused,
    VmmDied,
    VmmError,
    VmmRefused,
    VmmTimedOut,
    VmmUnreachable,
)
from migrd.failpoints import around

log = structlog.get_logger(__name__)

TICK_S: Final = 0.5
SOON_S: Final = 0.25
RETRY_S: Final = 0.25
DISCARD_TRIES: Final = 40
RAN_AND_STOPPED: Final = frozenset(
    {
        RunState.SHUTDOWN,
        RunState.GUEST_PANICKED,
        RunState.IO_ERROR,
        RunState.SUSPENDED,
        RunState.WATCHDOG,
        RunState.INTERNAL_ERROR,
    }
)
"""Past `starting`, only a guest that has run gets there: by this daemon's `cont`, or by that of one
that was killed after it."""
ENDED_THERE: Final = frozenset(phase.value for phase in TERMINAL - {Phase.SUCCEEDED})
TAKES_BACK: Final = ENDED_THERE | {Phase.ROLLING_BACK.value}
"""Phases of a source that was given the guest back, as long as this side has not refused it."""
SAYS_S: Final = 1.5
"""So long the source may take to say it: it waits for the answer to its message meanwhile."""


class Incoming(IncomingRecord):
    """The destination's side of one migration."""

    def __init__(
        self, world: World, stored: StoredIncoming, state: DestinationState, source: Peer | None
    ) -> None:
        super().__init__(world, stored, state, source)
        self._record = RecordKeeping(self)
        self._taking_back = asyncio.Lock()
        self._orphan = Orphan(self)

    # Messages from the source -------------------------------------------------------------

    def heard(self) -> None:
        """The source has spoken: it is there, and has not given this migration up. Where nothing
        has come yet, all is well then; a whole copy has waited for too long."""
        self._heard_at_s = self.world.clock.monotonic_s()
        if self.note is not None and self.state.phase is DestinationPhase.RECEIVING:
            self.note = None
            self.changed("migration.changed")

    def grant(self, run_guest: bool) -> None:
        """GRANT has come. Raises Conflict before the guest is loaded."""
        if self.state.phase in (DestinationPhase.PREPARING, DestinationPhase.RECEIVING):
            raise Conflict(
                f"migration {self.id} is {self.state.phase.value} here: nothing to run yet",
                code="not_loaded",
            )
        self._run_guest = run_guest
        self._granted.set()
        self._poke.set()

    async def take_back(self, reason: str) -> None:
        """The source has the guest back by an operator's word, and our QEMU, which died while it
        was started, never will run it. The message alone does not say so, for it may be one from
        before the grant that comes late: with an arbiter its record must, while there is one, else
        the source itself.
        For a task that is over; raises JournalError, ArbiterUnavailable."""
        async with self._taking_back:  # a message that is repeated must not be journalled twice
            may = self.state.phase is DestinationPhase.STARTING and self.vmm_died
            if may and await self._is_given_back():
                await self._apply(DestinationTrigger.TAKEN_BACK, reason=reason)

    async def _is_given_back(self) -> bool:
        if self.stored.settings.arbitrated:
            is_the_sources = await self._record.is_the_sources()
            if is_the_sources is not None:
                return is_the_sources
        with contextlib.suppress(PeerError, TimeoutError):
            async with asyncio.timeout(SAYS_S):
                if self.source is not None:
                    return (await self.source.source_view(self.id)).phase in TAKES_BACK
        return False

    async def take_back_if_ended(self) -> None:
        """The same, where the source says by itself that it has ended. Raises as `take_back`."""
        ended = await self._source_ended()
        if ended is not None:
            await self.take_back(ended)

    def grant_on_word(self) -> None:
        """A person has proven that the source never runs the guest again: this copy may."""
        if self._record.decides:
            self._record.is_proven = True  # the record is changed first
        else:
            self.grant(run_guest=True)

    def want_refusal(self, reason: str) -> None:
        """Refuse as soon as possible, if it still may be."""
        self._wanted_refusal = reason
        self._poke.set()

    # The owner task ---------------------------------------------------------------------------

    async def run(self) -> None:
        """Until it is over. Cancelled at shutdown: the journal and QEMU stay as they are."""
        while not self.is_over:
            try:
                await self._step()
            except JournalError as exc:
                self.log.error("the journal cannot be written", cause=exc.message)
                await asyncio.sleep(RETRY_S)
            except VmmDied as exc:
                await self._on_death(exc)
            except MigrdError as exc:
                self.log.warning("a step did not work", cause=exc.message)
                await self._on_failure(exc.message)
            except TimeoutError:
                await self._on_failure(f"{self.state.phase.value} took too long")
            except IllegalTransition as exc:
                self.log.error("an event has no place", exc_info=exc)
                await asyncio.sleep(RETRY_S)
            except Exception as exc:
                self.log.error("a step broke", exc_info=exc)
                await self._on_failure(f"{type(exc).__name__}: {exc}")
        if self.state.phase is DestinationPhase.REFUSED:
            await self._discard_copy()

    async def _step(self) -> None:
        if self._wanted_refusal is not None and self.state.may_refuse:
            await self._refuse(self._wanted_refusal)
            return
        match self.state.phase:
            case DestinationPhase.PREPARING:
                await self._prepare()
            case DestinationPhase.RECEIVING:
                await self._receive()
            case DestinationPhase.LOADED:
                await self._await_grant()
            case DestinationPhase.OWNED:
                await self._order_start()
            case DestinationPhase.STARTING:
                await self._start_guest()
            case DestinationPhase.RUNNING:
                await self._await_rest()
            case DestinationPhase.REFUSED:
                pass

    async def _prepare(self) -> None:
        world, stored = self.world, self.stored
        async with asyncio.timeout(world.options.prepare_deadline_s):
            if self.vmm is None:
                with around("destination.launch"):
                    self.vmm = await self.launch(stored)
            settings = replace(
                stored.settings,
                peer_name=stored.source,
                migration_id=stored.id,
                epoch=stored.epoch,
            )
            address = await self.vmm.prepare_incoming(
                settings, world.options.tls, world.options.listen_host, world.options.ports
            )
        await self._apply(DestinationTrigger.INCOMING_READY, address=address)

    async def _receive(self) -> None:
        vmm = self._living()
        async with vmm.feed() as feed:
            while True:
                sample = await self._next_sample(feed.newer(within_s=TICK_S))
                if sample is not None and await self._received(sample):
                    return
                if self._wanted_refusal is not None or await self._given_up("receiving"):
                    return

    async def _received(self, sample: TransferSample) -> bool:
        moved = self.sample is None or sample.transferred_bytes != self.sample.transferred_bytes
        if moved:
            self.heard()
        self.sample = sample
        status = sample.qemu_status
        if status is QemuStatus.COMPLETED and sample.run_state is not RunState.INMIGRATE:
            await self._apply(DestinationTrigger.GUEST_LOADED, mode=Mode.PRECOPY)
            return True
        if status.is_postcopy and status is not QemuStatus.POSTCOPY_DEVICE:
            await self._apply(DestinationTrigger.GUEST_LOADED, mode=Mode.POSTCOPY)
            return True
        if status in (QemuStatus.FAILED, QemuStatus.CANCELLED):
            error = sample.error or (await self._living().sample()).error
            await self._refuse(error or "the stream broke, and no reason was given")
            return True
        return False

    async def _next_sample(self, newer: Any) -> TransferSample | None:
        """The next sample, or None early when somebody pokes."""
        look = asyncio.ensure_future(newer)
        poke = asyncio.ensure_future(self._poke.wait())
        try:
            await asyncio.wait({look, poke}, return_when=asyncio.FIRST_COMPLETED)
            self._poke.clear()
            return look.result() if look.done() else None
        finally:
            for task in (look, poke):
                task.cancel()
            await asyncio.wait({look, poke})

    async def _await_grant(self) -> None:
        vmm = self._living()
        await self._poked(within_s=SOON_S)
        async with vmm.feed() as feed, self._watching_record():
            while not self._granted.is_set():
                if self._wanted_refusal is not None or await self._given_up("loaded"):
                    return
                sample = await self._next_sample(feed.newer(within_s=TICK_S))
                self.sample = sample or self.sample
        if vmm.is_dead:
            raise VmmDied(f"process {vmm.pid} exited before the guest was started")
        triggers = [DestinationTrigger.GRANT_RECEIVED]
        if not self._record.decides:
            triggers.append(DestinationTrigger.START_ORDERED)
        self.note = None  # of a source that was silent
        await self._apply(*triggers, run_guest=self._run_guest)

    @contextlib.asynccontextmanager
    async def _watching_record(self) -> AsyncIterator[None]:
        """With an arbiter the grant is seen in its record, too, when the source is silent."""
        if not self._record.decides:
            yield
            return
        task = asyncio.create_task(self._see_grant(), name=f"record-{self.id[:8]}")
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])

    async def _see_grant(self) -> None:
        self._run_guest = await self._record.until_given()
        self._granted.set()
        self._poke.set()

    async def _order_start(self) -> None:
        """Owned: with an arbiter its record says so first, and then the guest is started."""
        if self._record.decides:
            vmm = self._living()
            if vmm.is_dead:
                raise VmmDied(f"process {vmm.pid} exited before the guest was started")
            if not vmm.is_reachable:  # what cannot be started is better taken back
                raise VmmUnreachable(f"the monitor of process {vmm.pid} is not connected")
            try:
                refusal = await self._record.mark_started()
            except ArbiterUnavailable as exc:
                if isinstance(exc, RecordGone) and await self._is_back_at_source():
                    await self._refuse(f"the guest is back on {self.stored.source}")
                    return
                self._note_owed(exc)
                await asyncio.sleep(RETRY_S)
                return
            if refusal is not None:
                await self._refuse(refusal)
                return
        await self._apply(DestinationTrigger.START_ORDERED)

    def _note_owed(self, exc: ArbiterUnavailable) -> None:
        """Owned, and not yet allowed to start."""
        if isinstance(exc, RecordGone):
            self.note_arbiter(None)
            source = self.stored.source
            self.say_why_not(f"{exc.message}, and {source} does not say who has the guest")
        else:
            self.note_arbiter(exc.message)

    async def _is_back_at_source(self) -> bool:
        """By the source's own word, for there is no record: it has run since, so this copy is old.
        A source whose guest is lost, or that has lost its journal, does not say so."""
        with contextlib.suppress(PeerError, TimeoutError):
            async with asyncio.timeout(SAYS_S):
                if self.source is not None:
                    view = await self.source.source_view(self.id)
                    return view.phase == Phase.ROLLED_BACK.value
        return False

    async def _poked(self, *, within_s: float) -> None:
        """GRANT nearly always comes at once: QEMU is not asked meanwhile, as the guest waits."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._poke.wait()

    async def _start_guest(self) -> None:
        """`cont`, again if need be, until the guest is seen to run; only death ends it."""
        vmm = self._living()
        if vmm.is_dead:
            raise VmmDied(f"process {vmm.pid} is dead")
        if self.state.run_guest:
            # whatever comes of it is looked at below
            with contextlib.suppress(VmmTimedOut, VmmRefused), around("destination.cont"):
                await vmm.run_guest()
            state = await vmm.run_state()
            if state in RAN_AND_STOPPED:
                self.note = f"the guest ran and is {state.value} now"
            elif state is not RunState.RUNNING:
                self.note = f"the VMM does not run the guest: its run state is {state.value}"
                await asyncio.sleep(RETRY_S)
                return  # begun again by the owner: past starting there is no way back
            else:
                self.note = None
        self.guest_running = True
        await self._apply(DestinationTrigger.GUEST_RAN)

    async def _await_rest(self) -> None:
        """Postcopy: the guest runs, memory is still coming."""
        vmm = self._living()
        async with vmm.feed() as feed:
            sample: TransferSample | None = await vmm.sample()
            while sample is None or sample.qemu_status is not QemuStatus.COMPLETED:
                self.sample = sample or self.sample
                if sample is not None:
                    self._note_pause(sample.qemu_status is QemuStatus.POSTCOPY_PAUSED)
                if self.postcopy_paused and await self._is_beyond_help(vmm):
                    await vmm.quit()
                    raise VmmDied(f"QEMU {vmm.pid} was ended: the memory it waited for is gone")
                if not self.postcopy_paused and await self._orphan.is_left_alone():
                    with contextlib.suppress(VmmRefused):  # it paused by itself just now
                        await vmm.pause_postcopy()
                sample = await feed.newer(within_s=TICK_S)
        self.transfer_completed = True
        self.changed("migration.changed")

    async def _is_beyond_help(self, vmm: Vmm) -> bool:
        """The source's QEMU is proven dead, and this one waits for what only that one had.

        Parts of the guest may run on for a while: before anybody says that it runs nowhere, so
        that it may be started anew, it has to be ended here.
        """
        if not await is_copy_gone(self):
            return False
        return (await vmm.sample()).qemu_status is QemuStatus.POSTCOPY_PAUSED  # asked after that

    def _note_pause(self, is_paused: bool) -> None:
        if is_paused is not self.postcopy_paused:
            self.postcopy_paused = is_paused
            self.changed("migration.changed")

    def _living(self) -> Vmm:
        if self.vmm is None:
            raise VmmDied(f"the QEMU of {self.stored.spec.name} for this migration is gone")
        return self.vmm

    # Giving up ------------------------------------------------------------------------------

    async def _given_up(self, what: str) -> bool:
        """Idle for too long, and the source does not say that it goes on: refuse."""
        options = self.world.options
        idle_s = self.world.clock.monotonic_s() - self._heard_at_s
        limit_s = options.receive_idle_s if what == "receiving" else options.loaded_idle_s
        if idle_s < min(limit_s, 5.0):
            return False
        ended = await self._source_ended()
        if ended is not None:
            if self.state.may_refuse:
                await self._refuse(ended)
            return True
        if idle_s <= limit_s or (self.sample is not None and self.sample.qemu_status.is_postcopy):
            return False
        if self.state.may_refuse_by_time_out and await self._is_closed():
            await self._refuse(f"nothing came from {self.stored.source} for {idle_s:.0f} s")
            return True
        self._call_operator(idle_s)
        return False

    async def _is_closed(self) -> bool:
        """Can no guest come any more? Where it may leave by postcopy, it may do so while a refusal
        is being written, and then only this QEMU has all of it: so the connection is cut first.
        Of one that nobody has connected to, it cannot be told: somebody still may."""
        if self.vmm is None or not self.stored.settings.postcopy:
            return True
        try:
            with contextlib.suppress(VmmRefused):  # nobody is connected
                await self.vmm.free_stalled()
            await asyncio.sleep(SOON_S)
            status = (await self.vmm.sample()).qemu_status
        except VmmError:
            return self.vmm.is_dead
        return status in (QemuStatus.FAILED, QemuStatus.CANCELLED)

    def _call_operator(self, idle_s: float) -> None:
        """The source is silent, and this copy is whole or may become so: it may be the last one."""
        if self.note is None:
            is_here = self.state.phase is DestinationPhase.LOADED
            why = "the copy is kept" if is_here else "its guest may still come"
            self.note = f"{self.stored.source} has been silent for {idle_s:.0f} s; {why}"
            self.log.error("the source is silent; an operator is needed", note=self.note)
            self.changed("migration.changed")

    async def _source_ended(self) -> str | None:
        """Why the source will never grant this migration; None when it may, or does not say."""
        if self.source is None:
            return None
        try:
            async with asyncio.timeout(2.0):
                view = await self.source.source_view(self.id)
        except PeerRefused as exc:
            # a loaded copy is kept all the same: the source may have lost its journal
            if exc.code == "not_found" and self.state.may_refuse_by_time_out:
                return f"{self.stored.source} knows nothing of this migration"
            return None
        except (PeerError, TimeoutError):
            return None
        if view.phase in ENDED_THERE:
            return f"it ended as {view.phase} on {self.stored.source}"
        self.heard()
        return None

    async def _on_death(self, exc: VmmDied) -> None:
        words = self.world.launcher.last_words(self.vmm) if self.vmm else ""
        why = f"{exc.message}{': ' + words if words and words not in exc.message else ''}"
        if self.state.may_refuse:
            await self._refuse_durably(why)
            return
        if self.state.phase is DestinationPhase.STARTING and exc.code == "guest_shut_down":
            self.guest_running = True  # only a guest that runs can shut itself down
            await self._apply(DestinationTrigger.GUEST_RAN)
        self.vmm_died = True
        self.guest_running = False
        self.note = why
        self.log.error("the VMM died", phase=self.state.phase.value, cause=why)
        self.changed("migration.changed")

    async def _on_failure(self, why: str) -> None:
        if self.state.phase is DestinationPhase.PREPARING:
            await self._refuse_durably(why)
        elif self.state.phase is not DestinationPhase.RECEIVING or not await self._given_up(
            "receiving"
        ):
            await asyncio.sleep(RETRY_S)

    async def _refuse_durably(self, why: str) -> None:
        while self.state.may_refuse:
            try:
                await self._refuse(why)
            except JournalError as exc:
                self.log.error("a refusal cannot be journalled", cause=exc.message)
                await asyncio.sleep(RETRY_S)

    async def _refuse(self, why: str) -> None:
        await self._apply(DestinationTrigger.REFUSAL_DECIDED, reason=why)
        self.world.observer.migration_ended("destination", "refused", "refused")

    async def _discard_copy(self) -> None:
        """The refusal is durable: the copy is dead data."""
        vmm = self.vmm
        if vmm is None:
            return
        for _ in range(DISCARD_TRIES):
            if vmm.is_dead:
                break
            try:
                with around("destination.quit"):
                    await vmm.quit()
            except VmmError as exc:
                self.log.warning("the discarded QEMU does not end", cause=exc.message)
                await asyncio.sleep(RETRY_S)
        if not vmm.is_dead:
            self.log.error("the discarded QEMU is left behind; end it by hand", pid=vmm.pid)
            return
        await self.world.launcher.forget(vmm)
