"""Start-up: replay the journal, find every QEMU, and go on where each migration stands.

    journal, processes --replay--> tables
    per migration:  facts (engine.recovery_facts) --core.recovery.decide--> action --> its task

There is no second set of rules here: events are folded through the same `advance`, and each
migration's task begins with the step of the phase that comes out, which looks at both sides before
it acts. What `decide` adds is the reason, in one line of the log for each migration, where the
migration must come to, and the cases in which no step would be begun: copies that are proven to be
dead data, and processes that no journal names.

A QEMU that the journal knows and that is not found is treated as dead only when its process is
proven gone (the launcher says so); else it is unreachable, and asked for again. What is found
running and is in no journal is left alone and shown, never ended on doubt.

All migrations are looked at at once, and each goes on as soon as its own facts are there: one
silent peer holds up nobody else, and the start by less than a second. VMs at rest are watched only
after that: two hundred of them have much to say at first.
"""

import asyncio
from collections.abc import Sequence
from typing import Final

import structlog

from migrd.core.convergence import estimate
from migrd.core.handover import DestinationPhase, DestinationState, fold_destination
from migrd.core.migration import begin, fold
from migrd.core.phases import IllegalTransition, Phase
from migrd.core.recovery import decide
from migrd.core.recovery_action import Action, Deed, Proof
from migrd.core.recovery_facts import AtRest, DestinationFound, Fate, SourceFound
from migrd.engine.absent import AbsentVmm
from migrd.engine.absent_peer import AbsentPeer
from migrd.engine.boot import is_of_earlier_boot
from migrd.engine.incoming import Incoming
from migrd.engine.migrations import Migrations
from migrd.engine.observations import as_decision, as_round
from migrd.engine.outgoing import Outgoing
from migrd.engine.ports import Replay, StoredResolution, StoredVm, Vmm
from migrd.engine.recovery_facts import look_at_destination, look_at_source
from migrd.engine.service import Role
from migrd.engine.strays import Strays
from migrd.engine.vms import Entry
from migrd.errors import JournalError

log = structlog.get_logger(__name__)

NOT_MOVING: Final = frozenset({Phase.PENDING, Phase.PREFLIGHT, Phase.PREPARING})
"""What QEMU says of a migration in these phases is about an earlier one."""


async def recover(migrations: Migrations, strays: Strays) -> None:
    """Bring the tables up to what is on disk and on the host; start the tasks.

    Raises JournalError for a journal that makes no sense: nothing was touched then.
    """
    world = migrations.world
    began_s = world.clock.monotonic_s()
    replay = await world.journal.replay()
    found = list(await world.launcher.find())
    replayed_s = world.clock.monotonic_s()
    recovery = _Recovery(migrations, replay, found)
    try:
        await recovery.run()
    except IllegalTransition as exc:
        raise JournalError(f"the journal makes no sense: {exc}", code="journal_corrupt") from exc
    await strays.see_to(recovery.left)
    for entry in migrations.vms.all():
        migrations.vms.watch(entry)
    migrations.start_pending()
    now_s = world.clock.monotonic_s()
    log.info(
        "recovered",
        vms=len(migrations.vms.all()),
        processes=len(found),
        migrations_going_on=recovery.going_on,
        replay_s=round(replayed_s - began_s, 4),
        decisions_s=round(now_s - replayed_s, 4),
    )


class _Recovery:
    def __init__(self, migrations: Migrations, replay: Replay, found: Sequence[Vmm]) -> None:
        self._migrations = migrations
        self._world = migrations.world
        self._replay = replay
        self._by_instance = {vmm.instance: vmm for vmm in found}
        self._left = {vmm.instance: vmm for vmm in found}
        self._words: dict[tuple[str, str], list[StoredResolution]] = {}
        for word in replay.resolutions:
            self._words.setdefault((word.role, word.migration_id), []).append(word)
        self.going_on = 0

    async def run(self) -> None:
        """The journal is made sense of as a whole before the first task is begun."""
        for stored in self._replay.vms:
            self._restore_vm(stored)
        incoming = self._restore_incoming()
        outgoing = await self._restore_outgoing()
        self.going_on = len(outgoing) + sum(1 for i in incoming if not i.is_over)
        async with asyncio.TaskGroup() as group:
            for i in incoming:
                group.create_task(self._take_up_incoming(i))
            for m in outgoing:
                group.create_task(self._take_up_outgoing(m))

    @property
    def left(self) -> list[Vmm]:
        """Processes that the journal has no word of."""
        return list(self._left.values())

    # VMs --------------------------------------------------------------------------------------

    def _take(self, vm: str, instance: str | None) -> Vmm | None:
        """The QEMU of an instance; an AbsentVmm when its fate is not known, or when all that is
        known of it is that its host was booted anew."""
        if instance is None:
            return None
        self._left.pop(instance, None)
        return self._by_instance.get(instance) or _absent(vm, instance)

    def _restore_vm(self, stored: StoredVm) -> None:
        vmm = self._take(stored.spec.name, stored.instance) if stored.here else None
        managed = vmm is None or self._world.launcher.is_managed(vmm)
        self._migrations.vms.put(
            Entry(
                stored.spec,
                stored.epoch,
                here=stored.here,
                vmm=vmm,
                managed=managed,
                decision=stored.decision,
            ),
            watched=False,
        )
        action = decide(AtRest(stored.here, _fate(vmm)))
        say = log.error if action.alarm else log.debug
        say("a VM", vm=stored.spec.name, deed=action.deed.value, why=action.why)

    # Migrations to this host --------------------------------------------------------------------

    def _restore_incoming(self) -> list[Incoming]:
        """Those that have something to do, or that have left a process here."""
        taken = []
        for stored, events in self._replay.incoming:
            state = fold_destination(DestinationState(stored.id, stored.epoch), events)
            self._migrations.vms.note_epoch(stored.spec.name, stored.epoch)
            i = self._migrations.add_incoming(stored, state, self._world.peers.get(stored.source))
            i.words.restore(self._words.get((Role.DESTINATION, stored.id), ()))
            i.restore(events)
            self._see_whether_it_went_on(i)
            if i.state.phase is DestinationPhase.REFUSED:
                i.vmm = self._left.pop(stored.instance, None)
                if i.vmm is not None:
                    taken.append(i)
            elif not i.is_over:
                i.vmm = self._vmm_of_incoming(i.state.phase, stored.spec.name, stored.instance)
                taken.append(i)
        return taken

    def _see_whether_it_went_on(self, i: Incoming) -> None:
        """The end of a postcopy has no record of its own. That the VM has begun a later migration,
        which none does before all of it is there, or was started anew since, tells the same."""
        if i.state.phase is not DestinationPhase.RUNNING or i.is_over:
            return
        entry = self._migrations.vms.get(i.stored.spec.name)
        if entry is None or entry.epoch > i.stored.epoch:
            i.transfer_completed = True
        elif entry.vmm is not None and entry.vmm.instance != i.stored.instance:
            i.vmm_died = True

    def _vmm_of_incoming(self, phase: DestinationPhase, vm: str, instance: str) -> Vmm | None:
        found = self._left.pop(instance, None) or self._by_instance.get(instance)
        if found is not None or phase is DestinationPhase.PREPARING:
            return found  # nothing was launched yet: the step launches it
        return _absent(vm, instance)

    async def _take_up_incoming(self, i: Incoming) -> None:
        try:
            facts = await look_at_destination(i)
            action = decide(facts)
            _say(i, "destination", facts, action)
            if action.deed is Deed.REAP and action.proof is Proof.SOURCE_ENDED:
                i.want_refusal(action.why)  # durable before the process is ended
            if action.deed is Deed.LEAVE_ALONE:
                i.note = action.why
                return
        except Exception as exc:  # what others say must not keep this daemon from starting
            i.log.error("looking at a migration failed", exc_info=exc)
        self._migrations.begin_incoming(i)

    # Migrations away ----------------------------------------------------------------------------

    async def _restore_outgoing(self) -> list[Outgoing]:
        """Those that have not ended."""
        taken = []
        for stored, events in self._replay.outgoing:
            first = begin(
                stored.id,
                stored.request,
                stored.epoch,
                stored.created_wall_s,
                stored.created_monotonic_s,
            )
            state = fold(first, events)
            vm = stored.request.vm
            self._migrations.vms.note_epoch(vm, stored.epoch)
            entry = self._migrations.vms.get(vm)
            vmm = entry.vmm if entry is not None else None
            destination = stored.request.destination.lower()
            peer = self._world.peers.get(destination) or AbsentPeer(destination)
            m = self._migrations.add_outgoing(stored, state, vmm or AbsentVmm(vm, ""), peer)
            m.words.restore(self._words.get((Role.SOURCE, stored.id), ()))
            for event in events:
                m.words.saw(event)
            if not state.is_terminal:
                await self._restore_steering(m)
                taken.append(m)
        return taken

    async def _restore_steering(self, m: Outgoing) -> None:
        """What precopy has measured and decided so far, and its clocks."""
        journal = self._world.journal
        m.rounds.extend(as_round(row) for row in await journal.observations(m.id, "round"))
        m.decisions.extend(as_decision(row) for row in await journal.observations(m.id, "decision"))
        if m.rounds:
            m.estimate = estimate(tuple(m.rounds), m.state.policy)
        m.take_up_clocks()
        m.resumed = m.state.phase not in NOT_MOVING

    async def _take_up_outgoing(self, m: Outgoing) -> None:
        try:
            facts = await look_at_source(m)
            _say(m, "source", facts, decide(facts))
        except Exception as exc:  # what others say must not keep this daemon from starting
            m.log.error("looking at a migration failed", exc_info=exc)
        self._migrations.begin_outgoing(m)


def _absent(vm: str, instance: str) -> AbsentVmm:
    return AbsentVmm(vm, instance, is_dead=is_of_earlier_boot(instance))


def _fate(vmm: Vmm | None) -> Fate:
    """Without asking it: whoever watches the VM does that."""
    if vmm is None:
        return Fate.NEVER
    if vmm.is_dead:
        return Fate.EARLIER_BOOT if isinstance(vmm, AbsentVmm) else Fate.DEAD
    return Fate.NOT_FOUND if isinstance(vmm, AbsentVmm) else Fate.SILENT


def _say(
    of: Incoming | Outgoing, side: str, facts: SourceFound | DestinationFound, action: Action
) -> None:
    """The one line of a migration: what was found, and what is done about it."""
    told = {
        "step": action.step,
        "expects": action.expects,
        "proof": action.proof,
        "settles": action.settles,
    }
    needs_a_person = action.alarm or action.deed is Deed.CALL_OPERATOR
    other = facts.there if isinstance(facts, SourceFound) else facts.source
    (of.log.error if needs_a_person else of.log.info)(
        "migration taken up again",
        side=side,
        phase=facts.phase.value,
        own=str(facts.own),
        pid=None if of.vmm is None else of.vmm.pid,
        other_side=other.value,
        arbiter=facts.record.value,
        deed=action.deed.value,
        why=action.why,
        **{name: str(value) for name, value in told.items() if value is not None},
    )
