"""Start-up: replay the journal, find every QEMU, and go on where each migration stands.

There is no second set of rules here: events are folded through the same `advance`, and each
migration's task begins with the instruction of the phase that comes out, which looks at both sides
before it acts. A QEMU that the journal knows and that is not found is treated as dead only when
its process is proven gone (the launcher says so); else it is unreachable, and asked for again.

What is found running and is in no journal (it was launched a moment before the daemon was killed)
is left alone and shown, never ended on doubt.
"""

from collections.abc import Sequence
from typing import Final

import structlog

from migrd.core.facts import RunState
from migrd.core.handover import DestinationPhase, DestinationState, fold_destination
from migrd.core.migration import begin, fold
from migrd.core.phases import IllegalTransition, Phase
from migrd.engine.absent import AbsentVmm
from migrd.engine.absent_peer import AbsentPeer
from migrd.engine.boot import is_of_earlier_boot
from migrd.engine.migrations import Migrations
from migrd.engine.observations import as_decision, as_round
from migrd.engine.ports import Replay, StoredResolution, StoredVm, Vmm
from migrd.engine.service import Role
from migrd.engine.vms import Entry
from migrd.errors import JournalError, MigrdError

log = structlog.get_logger(__name__)

NOT_MOVING: Final = frozenset({Phase.PENDING, Phase.PREFLIGHT, Phase.PREPARING})
"""What QEMU says of a migration in these phases is about an earlier one."""
ARRIVED: Final = frozenset({DestinationPhase.RUNNING, DestinationPhase.STARTING})


async def recover(migrations: Migrations) -> None:
    """Bring the tables up to what is on disk and on the host; start the tasks.

    Raises JournalError for a journal that makes no sense: nothing was touched then.
    """
    world = migrations.world
    replay = await world.journal.replay()
    found = list(await world.launcher.find())
    try:
        await _Recovery(migrations, replay, found).run()
    except IllegalTransition as exc:
        raise JournalError(f"the journal makes no sense: {exc}", code="journal_corrupt") from exc


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

    async def run(self) -> None:
        for stored in self._replay.vms:
            self._restore_vm(stored)
        self._restore_incoming()
        await self._restore_outgoing()
        await self._restore_unknown()
        self._migrations.start_pending()

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
            )
        )

    def _restore_incoming(self) -> None:
        for stored, events in self._replay.incoming:
            state = fold_destination(DestinationState(stored.id, stored.epoch), events)
            self._migrations.vms.note_epoch(stored.spec.name, stored.epoch)
            i = self._migrations.add_incoming(stored, state, self._world.peers.get(stored.source))
            i.words.restore(self._words.get((Role.DESTINATION, stored.id), ()))
            i.restore(events)
            if i.is_over and i.state.phase is DestinationPhase.REFUSED:
                i.vmm = self._left.pop(stored.instance, None)
                if i.vmm is None:
                    continue  # refused, and nothing of it is left
            elif i.state.phase is DestinationPhase.RUNNING and i.is_over:
                continue
            else:
                i.vmm = self._vmm_of_incoming(i.state.phase, stored.spec.name, stored.instance)
            self._migrations.begin_incoming(i)

    def _vmm_of_incoming(self, phase: DestinationPhase, vm: str, instance: str) -> Vmm | None:
        found = self._left.pop(instance, None) or self._by_instance.get(instance)
        if found is not None or phase is DestinationPhase.PREPARING:
            return found  # nothing was launched yet: the step launches it
        return _absent(vm, instance)

    async def _restore_outgoing(self) -> None:
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
            if state.is_terminal:
                continue
            await self._restore_observations(stored.id)
            m.resumed = state.phase not in NOT_MOVING
            m.log.info("migration taken up again", phase=state.phase.value)
            self._migrations.begin_outgoing(m)

    async def _restore_observations(self, migration_id: str) -> None:
        m = self._migrations.outgoing[migration_id]
        journal = self._world.journal
        m.rounds.extend(as_round(row) for row in await journal.observations(m.id, "round"))
        m.decisions.extend(as_decision(row) for row in await journal.observations(m.id, "decision"))

    async def _restore_unknown(self) -> None:
        for vmm in self._left.values():
            await _adopt(self._migrations, vmm)


def _absent(vm: str, instance: str) -> AbsentVmm:
    return AbsentVmm(vm, instance, is_dead=is_of_earlier_boot(instance))


async def adopt_found(migrations: Migrations) -> None:
    """Look again for VMs that others launched (the launcher returns only what is new)."""
    for vmm in await migrations.world.launcher.find():
        await _adopt(migrations, vmm)


async def _adopt(migrations: Migrations, vmm: Vmm) -> None:
    """What runs here and is in no journal: an adopted VM, or what a killed daemon left."""
    world, vms = migrations.world, migrations.vms
    entry = vms.get(vmm.vm)
    if vmm.is_dead:
        try:
            await world.launcher.forget(vmm)
        except (MigrdError, OSError) as exc:
            log.warning("files of an ended QEMU are left", vm=vmm.vm, cause=str(exc))
        return
    is_away = entry is not None and not entry.here
    if is_away and (world.launcher.is_managed(vmm) or await _was_given_away(vmm)):
        log.error("an old QEMU of a VM that has moved away; end it by hand", pid=vmm.pid, vm=vmm.vm)
        return
    entry = vms.get(vmm.vm)  # it may have come back while its old process was asked
    if entry is not None and entry.vmm is not None and not entry.vmm.is_dead:
        log.error("a second QEMU of this VM runs here; left alone", vm=vmm.vm, pid=vmm.pid)
        return
    spec = world.launcher.spec_of(vmm)
    if entry is not None and entry.spec.profile is not None:
        spec = entry.spec
    managed = world.launcher.is_managed(vmm)
    decision = None if entry is None else entry.decision
    epoch = vms.last_epoch(vmm.vm)
    vms.put(Entry(spec, epoch, here=True, vmm=vmm, managed=managed, decision=decision))
    log.info("a VM found running", vm=vmm.vm, pid=vmm.pid)


async def _was_given_away(vmm: Vmm) -> bool:
    """Whether it says that its guest went to another host. One that does not say may run it still:
    it is shown as here, and no second copy is let in beside it."""
    try:
        return await vmm.run_state() is RunState.POSTMIGRATE
    except (MigrdError, OSError) as exc:
        log.warning("not known whether a VM's old process gave it away", vm=vmm.vm, cause=str(exc))
        return False
