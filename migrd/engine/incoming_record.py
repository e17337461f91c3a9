"""What is held of one incoming migration: its state, its journal, what others are shown.

Split from `incoming`, whose owner task alone calls `_apply`. All else here may be read at any time.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import structlog

from migrd.core.facts import TransferAddress, TransferSample
from migrd.core.handover import (
    DestinationEvent,
    DestinationPhase,
    DestinationState,
    DestinationTrigger,
    advance_destination,
)
from migrd.core.migration import Mode
from migrd.engine.operator_words import OperatorWords
from migrd.engine.ports import DestinationView, Peer, StoredIncoming, StoredVm, Vmm
from migrd.engine.world import World
from migrd.errors import JournalError
from migrd.failpoints import reached

log = structlog.get_logger(__name__)

STARTED: Final = frozenset({DestinationPhase.STARTING, DestinationPhase.RUNNING})


class IncomingRecord:
    """The destination's side of one migration, without the task that moves it."""

    def __init__(
        self, world: World, stored: StoredIncoming, state: DestinationState, source: Peer | None
    ) -> None:
        self.world = world
        self.stored = stored
        self.state = state
        self.source = source
        self.vmm: Vmm | None = None
        self.sample: TransferSample | None = None
        self.generation = 1
        self.resource_version = 0
        self.entered: list[tuple[DestinationPhase, float, float]] = [
            (state.phase, stored.created_wall_s, world.clock.monotonic_s())
        ]
        self.vmm_died = False
        self.guest_running = False
        self.transfer_completed = False
        self.postcopy_paused = False
        self.note: str | None = None
        """What keeps it from going on, in words."""
        self.words = OperatorWords()
        self.arbiter_trouble: tuple[str, float] | None = None
        """(what, since wall_s) while the arbiter does not answer, and is asked."""
        self.journal_trouble: tuple[str, float] | None = None
        """(what, since wall_s) while an event cannot be written."""
        self.on_running: Callable[[IncomingRecord], None] = lambda _: None
        self.launch: Callable[[StoredIncoming], Awaitable[Vmm]] = self._launch_plainly
        """Launches the waiting QEMU. Raises MigrdError."""
        self._run_guest = state.run_guest
        self._granted = asyncio.Event()
        self._wanted_refusal: str | None = None
        self._newer = asyncio.Event()
        self._poke = asyncio.Event()
        self._unsaved: list[DestinationEvent] = []
        self._heard_at_s = world.clock.monotonic_s()
        self.log = log.bind(vm=stored.spec.name, migration_id=stored.id)

    async def _launch_plainly(self, stored: StoredIncoming) -> Vmm:
        return await self.world.launcher.launch(stored.spec, stored.instance, incoming=True)

    @property
    def id(self) -> str:
        return self.stored.id

    @property
    def is_over(self) -> bool:
        """Nothing is left to be done for it."""
        if self.state.phase is DestinationPhase.REFUSED:
            return True
        if self.state.phase is DestinationPhase.RUNNING:
            return self.state.mode is Mode.PRECOPY or self.transfer_completed or self.vmm_died
        # dead while starting: an operator's word to the source is what ends the migration
        return self.state.phase is DestinationPhase.STARTING and self.vmm_died

    @property
    def is_settled(self) -> bool:
        """GRANT can be answered for good."""
        settled = (DestinationPhase.RUNNING, DestinationPhase.REFUSED)
        return self.state.phase in settled or self.vmm_died

    def view(self) -> DestinationView:
        """What the source is told."""
        return DestinationView(
            migration_id=self.id,
            epoch=self.state.epoch,
            phase=self.state.phase,
            generation=self.generation,
            address=self.state.address,
            reason=self.state.reason or self.note,
            vmm_died=self.vmm_died,
            transfer_completed=self.transfer_completed,
            guest_running=self.guest_running,
            postcopy_paused=self.postcopy_paused,
            arbitrated=self.stored.settings.arbitrated,
        )

    def note_arbiter(self, trouble: str | None) -> None:
        """Said once, and once when it is over."""
        if (trouble is None) is not (self.arbiter_trouble is None):
            now = self.world.clock.wall_s()
            self.arbiter_trouble = None if trouble is None else (trouble, now)
            self.log.warning("the arbiter", answers=trouble is None, cause=trouble)
            self.changed("migration.changed")

    def _note_journal(self, trouble: str | None) -> None:
        """Said once, and once when it is over."""
        if (trouble is None) is not (self.journal_trouble is None):
            now = self.world.clock.wall_s()
            self.journal_trouble = None if trouble is None else (trouble, now)
            self.changed("migration.changed")

    def say_why_not(self, why: str) -> None:
        """Why it does not go on; said once."""
        if self.note != why:
            self.note = why
            self.log.error("it does not go on", cause=why)
            self.changed("migration.changed")

    async def wait_newer(self, generation: int, within_s: float) -> DestinationView:
        """The view, as soon as its generation exceeds the one given or time is over."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while self.generation <= generation:
                    await self._newer.wait()
        return self.view()

    def restore(self, events: Sequence[DestinationEvent]) -> None:
        """After a restart: the timeline as journalled; what runs is seen by the task."""
        state = DestinationState(self.id, self.stored.epoch)
        self.entered = [(state.phase, self.stored.created_wall_s, self.entered[0][2])]
        for event in events:
            state = advance_destination(state, event)
            self.entered.append((state.phase, event.wall_s, event.monotonic_s))
            self.words.saw_there(event)
        if events:
            self.entered[0] = (self.entered[0][0], self.entered[0][1], events[0].monotonic_s)
        if state.phase is DestinationPhase.RUNNING:
            self.guest_running = True
            self.transfer_completed = state.mode is Mode.PRECOPY
        self.generation += len(events)

    # Applying events --------------------------------------------------------------------------

    async def _apply(
        self,
        *triggers: DestinationTrigger,
        address: TransferAddress | None = None,
        mode: Mode | None = None,
        run_guest: bool | None = None,
        reason: str | None = None,
    ) -> None:
        """Advance, save in one transaction, publish. An observation (loaded) is saved later."""
        clock, state = self.world.clock, self.state
        events, states = [], []
        for trigger in triggers:
            event = DestinationEvent(
                trigger, clock.wall_s(), clock.monotonic_s(), address, mode, run_guest, reason
            )
            state = advance_destination(state, event)
            events.append(event)
            states.append(state)
        if triggers == (DestinationTrigger.GUEST_LOADED,):
            self._unsaved += events
        else:
            await self._save(events, state)
        for event, state in zip(events, states, strict=True):
            self.words.saw_there(event)
            self._enter(state)

    async def _save(self, events: Sequence[DestinationEvent], after: DestinationState) -> None:
        every = [*self._unsaved, *events]
        for event in every:
            reached(f"destination.{event.trigger.value}.deciding")
        try:
            await self.world.journal.append_incoming(self.id, every, self._vm_after(after))
        except JournalError as exc:
            self._note_journal(exc.message)
            raise
        self._note_journal(None)
        self._unsaved = []
        for event in every:
            reached(f"destination.{event.trigger.value}.journalled")

    def _vm_after(self, state: DestinationState) -> StoredVm | None:
        if state.phase is DestinationPhase.REFUSED and self.state.phase in STARTED:
            return StoredVm(self.stored.spec, state.epoch, False, None)
        if state.phase in STARTED:
            stored = self.stored
            return StoredVm(stored.spec, state.epoch, True, stored.instance, stored.decision)
        return None

    def _enter(self, state: DestinationState) -> None:
        old, self.state = self.state, state
        now_s = self.world.clock.monotonic_s()
        lasted_s = now_s - self.entered[-1][2]
        self.entered.append((state.phase, self.world.clock.wall_s(), now_s))
        self.world.observer.phase_changed("destination", old.phase, state.phase, lasted_s)
        self.log.info("phase", phase=state.phase.value, reason=state.reason)
        if state.phase is DestinationPhase.RUNNING:
            self.transfer_completed = state.mode is Mode.PRECOPY
            self.world.observer.migration_ended("destination", "running", "none")
            self.on_running(self)
        self.changed("migration.phase")

    def changed(self, kind: str, **body: object) -> None:
        """A visible change: one more generation."""
        self.generation += 1
        body = {"phase": self.state.phase.value, "generation": self.generation, **body}
        self.resource_version = self.world.stream.publish(
            kind, body, vm=self.stored.spec.name, migration_id=self.id
        )
        self._newer.set()
        self._newer = asyncio.Event()
