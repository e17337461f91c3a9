"""All migrations of this host, both directions: who owns their tasks, and who may begin.

Outgoing migrations wait in `pending` until a slot is free; incoming ones are refused when none is.
A migration's task is started here and nowhere else, and guarded: a defect in one migration is
logged with it and never takes another one down.
"""

import asyncio
import contextlib
from collections.abc import Coroutine, Mapping
from contextvars import Context
from typing import Any, Final

import structlog

from migrd.core.facts import RunState, VmSpec
from migrd.core.handover import DestinationPhase, DestinationState
from migrd.core.migration import MigrationState, Mode
from migrd.core.phases import Instruction, Phase, Trigger
from migrd.core.standing import StandingDecision
from migrd.core.tracking import Plan
from migrd.engine.arbitrated import put_right
from migrd.engine.decisions import placed_spec
from migrd.engine.device_start import DeviceStart
from migrd.engine.incoming import Incoming
from migrd.engine.incoming_record import IncomingRecord
from migrd.engine.outgoing import Outgoing, Step
from migrd.engine.ports import Peer, StoredIncoming, StoredRequest, Vmm
from migrd.engine.precopy import run_precopy
from migrd.engine.prepare import check_preflight, prepare_destination
from migrd.engine.proofs import Proofs
from migrd.engine.resolving import DestinationSide, Side, SourceSide, take_up
from migrd.engine.rollback import roll_back
from migrd.engine.switchover import (
    complete_switchover,
    keep_asking,
    obtain_answer,
    release_source,
)
from migrd.engine.vms import Entry, VmTable
from migrd.engine.world import World
from migrd.errors import Conflict, MigrdError, NotFound

log = structlog.get_logger(__name__)

STEPS: Final[Mapping[Instruction, Step]] = {
    Instruction.CHECK_PREFLIGHT: check_preflight,
    Instruction.PREPARE_DESTINATION: prepare_destination,
    Instruction.RUN_PRECOPY: run_precopy,
    Instruction.COMPLETE_SWITCHOVER: complete_switchover,
    Instruction.OBTAIN_ANSWER: obtain_answer,
    Instruction.KEEP_ASKING: keep_asking,
    Instruction.RELEASE_SOURCE: release_source,
    Instruction.ROLL_BACK: roll_back,
}
ENDED_IN_MEMORY: Final = 2000
"""Ended migrations shown without asking the journal; older ones are forgotten here."""
QUEUE_LIMIT: Final = 256
SETTLE_EACH_S: Final = 30.0


class Migrations:
    """Every migration of this host by id."""

    def __init__(
        self, world: World, vms: VmTable, group: asyncio.TaskGroup, starts: DeviceStart
    ) -> None:
        self.world = world
        self.vms = vms
        self.starts = starts
        self.decisions = starts.decisions
        self.decisions.bandwidth_bytes_per_s = self.bandwidth_bytes_per_s
        self._group = group
        self.outgoing: dict[str, Outgoing] = {}
        self.incoming: dict[str, Incoming] = {}
        self.proofs = Proofs(world.options.host, vms, self.outgoing, self.incoming)
        self._before: dict[str, Entry | None] = {}

    # Lookup -----------------------------------------------------------------------------------

    def require_outgoing(self, migration_id: str) -> Outgoing:
        """Raises NotFound (`unknown_migration`)."""
        try:
            return self.outgoing[migration_id]
        except KeyError:
            raise NotFound(
                f"no migration {migration_id} is known here", code="unknown_migration"
            ) from None

    def active_of(self, vm: str) -> Outgoing | Incoming | None:
        """The migration going on with a VM, on either side."""
        for m in self.outgoing.values():
            if m.stored.request.vm == vm and not m.state.is_terminal:
                return m
        for i in self.incoming.values():
            if i.stored.spec.name == vm and not i.is_over:
                return i
        return None

    def check_not_given_up(self, vmm: Vmm) -> None:
        """A living QEMU is no guest, where a person has said that it runs nowhere. Raises Conflict
        (`given_up`)."""
        m = self.proofs.given_up(vmm)
        if m is not None:
            raise Conflict(
                f"{vmm.vm} was given up by migration {m.id} (guest_lost), and its stopped QEMU "
                f"(pid {vmm.pid}) still stands here: end that first (migrd stop {vmm.vm}, or where "
                "it was started)",
                code="given_up",
            )

    @property
    def pending(self) -> list[Outgoing]:
        """Waiting for a slot, first come first."""
        return [m for m in self.outgoing.values() if m.state.phase is Phase.PENDING]

    @property
    def outgoing_active(self) -> int:
        return sum(
            1
            for m in self.outgoing.values()
            # one that waits for a person waits for long: it holds no slot
            if not m.state.is_terminal
            and m.state.phase not in (Phase.PENDING, Phase.NEEDS_OPERATOR)
        )

    @property
    def incoming_active(self) -> int:
        return sum(1 for i in self.incoming.values() if not i.is_over)

    def bandwidth_bytes_per_s(self) -> float | None:
        """What the newest migration away from here got; None: there was none."""
        for m in reversed(self.outgoing.values()):
            if m.rounds and (measured := m.rounds[-1].bandwidth_bytes_per_s):
                return measured
        return None

    # Outgoing -----------------------------------------------------------------------------------

    def add_outgoing(
        self, stored: StoredRequest, state: MigrationState, vmm: Vmm, peer: Peer
    ) -> Outgoing:
        """Know a migration; its task is begun unless it has ended."""
        m = Outgoing(self.world, stored, state, vmm, peer, STEPS)
        m.on_ended = self._ended
        vm = stored.request.vm
        m.decision = lambda: self._standing(vm)
        m.proves = self.proofs.proves
        m.plan_now = lambda: self._plan_now(vm)
        m.spec_now = lambda: self._spec_now(stored)
        self.outgoing[m.id] = m
        return m

    async def _plan_now(self, vm: str) -> Plan | None:
        entry = self.vms.get(vm)
        if entry is None or entry.decision is None:
            return None
        _, decision = await self.decisions.now_of(entry)
        return decision.plan

    def _spec_now(self, stored: StoredRequest) -> VmSpec:
        entry = self.vms.get(stored.request.vm)
        is_as_asked = entry is not None and entry.spec == stored.spec
        return placed_spec(entry) if entry is not None and is_as_asked else stored.spec

    def _standing(self, vm: str) -> StandingDecision | None:
        entry = self.vms.get(vm)
        return None if entry is None else entry.decision

    def begin_outgoing(self, m: Outgoing) -> None:
        """Start its task, and give it a slot when there is one."""
        entry = self.vms.get(m.stored.request.vm)
        if entry is not None:
            entry.migration_id = m.id
            entry.epoch = max(entry.epoch, m.state.epoch)
        m.changed("migration.created")
        self._spawn(self._run_outgoing(m), f"outgoing-{m.id[:8]}")
        self._spawn_word(SourceSide(m))
        self.start_pending()

    async def _run_outgoing(self, m: Outgoing) -> None:
        try:
            await m.run()
        finally:
            if m.state.is_terminal:
                await self._after_outgoing(m)
                self.start_pending()
                self._forget_old()
                vm = m.stored.request.vm
                entry = self.vms.get(vm)
                lock = self.vms.lock(vm)
                await put_right(m, lambda: self.vms.get(vm) is entry, lock)

    def _ended(self, m: Outgoing) -> None:
        """What became of the VM here; true by the time that a client can see the end."""
        entry = self.vms.get(m.stored.request.vm)
        if entry is None or entry.migration_id != m.id:
            return
        entry.migration_id = None
        if m.has_left:
            entry.here, entry.decision = False, None
        if m.vmm.is_dead and entry.vmm is m.vmm:
            self.vms.detach(entry)
        self.vms.changed(entry)

    async def _after_outgoing(self, m: Outgoing) -> None:
        """What may take its time."""
        if m.vmm.is_dead:
            await self.starts.holding.release(m.vmm.instance)
            await self._forget_files(m.vmm)
            return
        entry = self.vms.get(m.stored.request.vm)
        if entry is not None and entry.vmm is m.vmm:
            await self.vms.look(entry)
            self.vms.changed(entry)

    async def _forget_files(self, vmm: Vmm) -> None:
        try:
            await self.world.launcher.forget(vmm)
        except (MigrdError, OSError) as exc:
            log.warning("files of an ended QEMU are left", vm=vmm.vm, cause=str(exc))

    def start_pending(self) -> None:
        """Give free slots to the migrations that wait longest."""
        free = self.world.options.outgoing_slots - self.outgoing_active
        for m in self.pending[: max(0, free)]:
            m.wish(m.event(Trigger.STARTED))

    # Incoming -----------------------------------------------------------------------------------

    def add_incoming(
        self, stored: StoredIncoming, state: DestinationState, source: Peer | None
    ) -> Incoming:
        """Know an incoming migration."""
        i = Incoming(self.world, stored, state, source)
        i.on_running = self._arrived
        i.launch = self._launch_waiting
        self.incoming[i.id] = i
        return i

    def begin_incoming(self, i: Incoming) -> None:
        """Start its task."""
        entry = self.vms.get(i.stored.spec.name)
        if i.state.phase is not DestinationPhase.RUNNING:
            if entry is None or entry.vmm is None:
                self._before[i.id] = entry
                entry = self.vms.put(Entry(i.stored.spec, i.state.epoch, here=False, incoming=True))
            entry.incoming = True
        if entry is not None:
            entry.migration_id = i.id
            entry.epoch = max(entry.epoch, i.state.epoch)
        self._spawn(self._run_incoming(i), f"incoming-{i.id[:8]}")
        self._spawn_word(DestinationSide(i))

    async def _launch_waiting(self, stored: StoredIncoming) -> Vmm:
        """A QEMU that waits for the guest, with the devices that were decided about. No rung lower:
        nobody has agreed to less here."""
        told = None if stored.decision is None else stored.decision.plan.launch
        return await self.starts.launch_once(stored.spec, stored.instance, told, incoming=True)

    def _arrived(self, i: IncomingRecord) -> None:
        """The guest runs here: it is one of this host's VMs now."""
        self._before.pop(i.id, None)
        state = RunState.RUNNING if i.state.run_guest else RunState.PAUSED
        busy = i.id if i.state.mode is Mode.POSTCOPY else None
        if i.stored.decision is not None:
            self.decisions.count(i.stored.decision.plan)
        self.vms.put(
            Entry(
                i.stored.spec,
                i.state.epoch,
                here=True,
                vmm=i.vmm,
                run_state=state,
                migration_id=busy,
                decision=i.stored.decision,
            )
        )

    async def _run_incoming(self, i: Incoming) -> None:
        try:
            await i.run()
        finally:
            if i.is_over:
                self._after_incoming(i)
                self._forget_old()
                if i.vmm is not None and i.vmm.is_dead:
                    await self.starts.holding.release(i.vmm.instance)
                while i.state.phase is DestinationPhase.STARTING:
                    await self.settle_dead(i)
                    await asyncio.sleep(SETTLE_EACH_S)

    async def settle_dead(self, i: Incoming) -> None:
        """A guest that died here as it was started is its source's to settle, and a source that did
        may have told nobody: this daemon was down. Not yet settled, it is asked again."""
        with contextlib.suppress(MigrdError):
            await i.take_back_if_ended()
            self.taken_back(i)

    def _after_incoming(self, i: Incoming) -> None:
        entry = self.vms.get(i.stored.spec.name)
        if entry is None or entry.migration_id not in (i.id, None):
            return
        entry.incoming = False
        if i.state.phase is DestinationPhase.STARTING:
            # nobody knows whether it ran: not to be started until the source says what it is
            entry.here, entry.vmm, entry.migration_id = True, i.vmm, i.id
            self.vms.changed(entry)
            return
        entry.migration_id = None
        if i.state.phase is not DestinationPhase.REFUSED:
            self.vms.changed(entry)
        elif not entry.here or entry.vmm is i.vmm:
            self._never_came(i, entry)

    def taken_back(self, i: Incoming) -> None:
        """What an operator gave back to the source is not this host's any more."""
        self._before.pop(i.id, None)
        entry = self.vms.get(i.stored.spec.name)
        if i.state.phase is DestinationPhase.REFUSED and entry and entry.migration_id == i.id:
            entry.here, entry.migration_id = False, None
            self.vms.detach(entry)
            self.vms.changed(entry)

    def _never_came(self, i: Incoming, entry: Entry) -> None:
        """As it was before: unknown, or departed (which a refused return does not make undone)."""
        before = self._before.pop(i.id, None)
        if before is None:
            self.vms.remove(entry.spec.name)
        else:
            before.epoch = max(before.epoch, entry.epoch)
            self.vms.put(before)

    # Tasks ------------------------------------------------------------------------------------

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        # A context of its own: log lines are the migration's, not those of whoever asked for it.
        self._group.create_task(_guarded(work, name), name=name, context=Context())

    def _spawn_word(self, side: Side) -> None:
        """An operator's word that an earlier daemon had not carried out."""
        if side.words.pending is not None:
            self._spawn(take_up(side), f"word-{side.id[:8]}")

    def _forget_old(self) -> None:
        """The newest of each VM stays: its other side may still ask how it ended."""
        ended = [m for m in self.outgoing.values() if m.state.is_terminal]
        newest = {m.stored.request.vm: m.id for m in ended}
        for m in ended[: max(0, len(ended) - ENDED_IN_MEMORY)]:
            if newest[m.stored.request.vm] != m.id:
                del self.outgoing[m.id]
        over = [i for i in self.incoming.values() if i.is_over]
        latest = {i.stored.spec.name: i.id for i in over}
        for i in over[: max(0, len(over) - ENDED_IN_MEMORY)]:
            if latest[i.stored.spec.name] != i.id:
                del self.incoming[i.id]


async def _guarded(work: Coroutine[Any, Any, None], name: str) -> None:
    try:
        await work
    except Exception as exc:
        log.error(
            "a migration's task broke; restart migrd to take it up again", task=name, exc_info=exc
        )
