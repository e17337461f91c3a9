"""This host as the destination (and, for `source_view`, as the source) that peers talk to.

Fulfils `peer_service.PeerService`. A message of an old epoch changes nothing; a repeated one is
answered with how things stand.
"""

import asyncio
import contextlib
from dataclasses import dataclass, field
from typing import Any, Final

from migrd.core.facts import TransferAddress, TransferSettings, VmSpec
from migrd.core.handover import DestinationPhase, DestinationState
from migrd.core.migration import Mode
from migrd.core.standing import StandingDecision
from migrd.core.tracking import Migratability, Plan
from migrd.engine.boot import new_instance
from migrd.engine.decisions import Decided, bare
from migrd.engine.incoming import Incoming
from migrd.engine.memory import memory_available_bytes
from migrd.engine.migrations import Migrations
from migrd.engine.peer_service import PEER_PROTOCOL, HelloFacts
from migrd.engine.ports import DestinationView, HostProfile, SourceView, StoredIncoming
from migrd.engine.threads import in_thread
from migrd.errors import (
    ArbiterUnavailable,
    Conflict,
    MigrdError,
    NotFound,
    Unavailable,
    VmmError,
    VmmRefused,
)

DISCARD_S: Final = 5.0
GRANT_ANSWER_S: Final = 2.0
PREFLIGHT_PROBE_S: Final = 3.0
"""So long devices are waited for before a plan is made without their answers."""


@dataclass
class _Seen:
    """What preflight has found out about a VM that may come."""

    qemu_version: str | None = None
    features: frozenset[str] = frozenset()
    digest: str | None = None
    """Of what the guest would see; None when its QEMU would not be started."""
    plan: Plan | None = None
    refusals: list[tuple[str, str]] = field(default_factory=list)


class Reception:
    """What other hosts' migrd may ask of this one."""

    def __init__(self, migrations: Migrations) -> None:
        self._migrations = migrations
        self._world = migrations.world
        self._preparing = asyncio.Lock()

    def hello(self) -> HelloFacts:
        """Who answers."""
        options = self._world.options
        return HelloFacts(options.host, options.migrd_version)

    def incoming_source(self, migration_id: str) -> str | None:
        i = self._migrations.incoming.get(migration_id)
        return None if i is None else i.stored.source

    def outgoing_destination(self, migration_id: str) -> str | None:
        m = self._migrations.outgoing.get(migration_id)
        return None if m is None else m.stored.request.destination

    # Before ---------------------------------------------------------------------------------

    async def preflight(self, source: str, vm: VmSpec) -> HostProfile:
        """What the source needs to know; changes nothing."""
        world, migrations = self._world, self._migrations
        options = world.options
        await self._settle_dead(source, vm.name)
        looking = asyncio.create_task(self._look_at(vm))
        try:
            memory_bytes = await memory_available_bytes()
            last_epoch = await world.journal.last_epoch(vm.name)
            seen = await looking
        finally:
            await _ended(looking)
        migrations.vms.note_epoch(vm.name, last_epoch)
        return HostProfile(
            host=options.host,
            migrd_version=options.migrd_version,
            protocol=PEER_PROTOCOL,
            qemu_version=seen.qemu_version,
            features=seen.features,
            launch_digest=seen.digest,
            incoming_slots_free=max(0, options.incoming_slots - migrations.incoming_active),
            memory_available_bytes=memory_bytes,
            vm_present=self._is_present(vm.name),
            last_epoch=migrations.vms.last_epoch(vm.name),
            tls=options.tls is not None,
            refusals=tuple(seen.refusals),
            plan=seen.plan,
            arbiter=world.arbiter.state.kind,
        )

    async def _settle_dead(self, source: str, vm: str) -> None:
        """Its source may be about to ask for a VM to be taken again that died here when it was
        started."""
        for i in list(self._migrations.incoming.values()):
            is_his = i.stored.source == source and i.stored.spec.name == vm
            if is_his and i.state.phase is DestinationPhase.STARTING and i.is_over:
                await self._migrations.settle_dead(i)

    async def _look_at(self, vm: VmSpec) -> _Seen:
        """Raises nothing: what is wrong becomes a refusal."""
        launcher, seen = self._world.launcher, _Seen()
        if vm.profile is None:  # the source says so: there is nothing to look at
            return seen
        try:
            probing = asyncio.create_task(launcher.probe(bare(vm)))
            try:
                digest = await in_thread(launcher.check, bare(vm))
                seen.qemu_version, found = await probing
            finally:
                await _ended(probing)
            seen.features = frozenset(feature.value for feature in found)
            if not vm.devices:
                seen.digest = digest
                return seen
            decided = await self._decided(vm)
            seen.plan = decided.plan
            seen.refusals += [(violation.code, violation.message) for violation in decided.own]
            if not decided.own and decided.plan.launch is not None:
                seen.digest = await in_thread(launcher.check, vm, decided.plan.launch)
        except MigrdError as exc:
            seen.refusals.append((exc.code, exc.message))
        return seen

    async def _decided(self, vm: VmSpec) -> Decided:
        """About its passthrough devices, from this host's facts. Devices that nobody has asked yet
        are asked, for a moment: else little could be said of them."""
        decisions = self._migrations.decisions
        try:
            async with asyncio.timeout(PREFLIGHT_PROBE_S):
                await self._migrations.starts.probe(vm)
        except (TimeoutError, Unavailable):
            pass  # what was not answered is unknown, and the plan says so
        return await decisions.decide(vm, await decisions.circumstances(vm))

    def _is_present(self, name: str) -> bool:
        """A VM of this name is here, or its QEMU is, whatever it does."""
        entry = self._migrations.vms.get(name)
        if entry is None or entry.incoming:
            return False
        return entry.here or (entry.vmm is not None and not entry.vmm.is_dead)

    async def prepare(
        self,
        source: str,
        migration_id: str,
        epoch: int,
        vm: VmSpec,
        settings: TransferSettings,
        *,
        least: Migratability | None = None,
    ) -> DestinationView:
        """Store, launch, and answer with the address to send the guest to."""
        lock = self._migrations.vms.lock(vm.name)
        async with lock, self._preparing:  # two at once must not both pass the checks
            i = self._migrations.incoming.get(migration_id)
            if i is None:
                self._check_arbiter(source, settings)
                await self._make_room(source, migration_id, vm.name, epoch)
                decision = await self._decide(vm, least)
                i = await self._store(source, migration_id, epoch, vm, settings, decision)
        deadline_s = self._world.options.prepare_deadline_s
        async with asyncio.timeout(deadline_s + 1.0):
            while i.state.phase is DestinationPhase.PREPARING:
                await i.wait_newer(i.generation, 1.0)
        return i.view()

    def _check_arbiter(self, source: str, settings: TransferSettings) -> None:
        if settings.arbitrated is not self._world.arbiter.is_present:
            which = "no arbiter" if settings.arbitrated else f"an arbiter, and {source} none"
            raise Conflict(
                f"{self._world.options.host} has {which}: configure the same on both hosts",
                code="arbiter_differs",
            )

    async def _make_room(self, source: str, migration_id: str, vm: str, epoch: int) -> None:
        """Raises Conflict or Unavailable. An older attempt of the same source is discarded."""
        if migration_id in self._migrations.outgoing:
            raise Conflict(f"{migration_id} is a migration of this host", code="id_taken")
        self._migrations.vms.note_epoch(vm, await self._world.journal.last_epoch(vm))
        last_epoch = self._migrations.vms.last_epoch(vm)
        if epoch <= last_epoch:
            raise Conflict(
                f"{vm} was seen here at epoch {last_epoch}; epoch {epoch} is an old one",
                code="stale_epoch",
            )
        older = self._migrations.active_of(vm)
        if (
            isinstance(older, Incoming)
            and older.stored.source == source  # who asks anew has given the older one up
            and older.state.mode is Mode.PRECOPY
        ):
            await _refused(older, f"superseded by a migration of epoch {epoch}")
        if self._is_present(vm) or self._migrations.active_of(vm) is not None:
            raise Conflict(f"a VM named {vm} is here already", code="vm_exists_at_destination")
        if self._migrations.incoming_active >= self._world.options.incoming_slots:
            raise Unavailable("no incoming slot is free", code="destination_full")

    async def _decide(self, vm: VmSpec, least: Migratability | None) -> StandingDecision | None:
        """As at a start, from what the kernel answers now. Raises Refused, Conflict."""
        await in_thread(self._world.launcher.check, bare(vm))
        if not vm.devices:
            return None
        starts, decisions = self._migrations.starts, self._migrations.decisions
        await decisions.check_free(vm)
        decided, decision = await starts.decide(vm, await decisions.circumstances(vm))
        found = decided.plan.migratability
        if least is not None and found.rank > least.rank:
            why = "; ".join(reason.message for reason in decided.plan.limits)
            raise Conflict(
                f"{vm.name} would be {found.value} here, and nobody has agreed to less than "
                f"{least.value}: {why}",
                code="less_migratable_there",
            )
        return decision

    async def _store(
        self,
        source: str,
        migration_id: str,
        epoch: int,
        vm: VmSpec,
        settings: TransferSettings,
        decision: StandingDecision | None,
    ) -> Incoming:
        world = self._world
        stored = StoredIncoming(
            id=migration_id,
            source=source,
            spec=vm,
            epoch=epoch,
            instance=new_instance(),
            settings=settings,
            created_wall_s=world.clock.wall_s(),
            decision=decision,
        )
        await world.journal.create_incoming(stored)
        i = self._migrations.add_incoming(
            stored, DestinationState(migration_id, epoch), world.peers.get(source)
        )
        self._migrations.begin_incoming(i)
        return i

    # During ---------------------------------------------------------------------------------

    async def view(
        self, source: str, migration_id: str, *, newer_than: int, wait_s: float
    ) -> DestinationView:
        """This side now, or as soon as it is newer."""
        i = self._known(migration_id)
        i.heard()
        try:
            return await i.wait_newer(newer_than, wait_s)
        finally:
            i.heard()

    async def grant(
        self, source: str, migration_id: str, epoch: int, *, run_guest: bool
    ) -> DestinationView:
        """GRANT: answered when the guest runs, or when it is plain that it will not."""
        i = self._known(migration_id)
        self._check_epoch(i, epoch)
        i.heard()
        i.grant(run_guest)
        try:
            async with asyncio.timeout(GRANT_ANSWER_S):
                while not i.is_settled:
                    await i.wait_newer(i.generation, GRANT_ANSWER_S)
        except TimeoutError:
            pass  # the view says how far it is; the source asks again
        return i.view()

    async def discard(
        self, source: str, migration_id: str, epoch: int, reason: str
    ) -> DestinationView:
        """Never to be granted: refuse."""
        i = self._known(migration_id)
        self._check_epoch(i, epoch)
        if i.is_over:
            try:
                await i.take_back(f"{source}: {reason}")
            except ArbiterUnavailable as exc:
                raise Unavailable(exc.message, code=exc.code) from exc
            self._migrations.taken_back(i)
        else:
            await _refused(i, f"{source}: {reason}")
        return i.view()

    async def listen_for_recovery(self, source: str, migration_id: str) -> TransferAddress:
        """Postcopy is broken: pause (it may be already), and listen again."""
        i = self._known(migration_id)
        if i.vmm is None:
            raise Conflict("its QEMU is gone", code="vmm_died")
        with contextlib.suppress(VmmRefused):  # paused already
            await i.vmm.pause_postcopy()
        options = self._world.options
        try:
            return await i.vmm.listen_for_recovery(options.listen_host, options.ports)
        except VmmError as exc:
            raise Unavailable(exc.message, code=exc.code) from exc

    async def source_view(self, destination: str, migration_id: str) -> SourceView:
        """This host's side of a migration away."""
        m = self._migrations.outgoing.get(migration_id)
        if m is None:
            raise NotFound(f"migration {migration_id} is not known here")
        return SourceView(m.id, m.state.epoch, m.state.phase.value, copy_gone=m.vmm.is_dead)

    def _known(self, migration_id: str) -> Incoming:
        try:
            return self._migrations.incoming[migration_id]
        except KeyError:
            raise NotFound(f"migration {migration_id} is not known here") from None

    def _check_epoch(self, i: Incoming, epoch: int) -> None:
        if epoch != i.state.epoch:
            raise Conflict(
                f"migration {i.id} has epoch {i.state.epoch}, the message {epoch}",
                code="stale_epoch",
            )


async def _refused(i: Incoming, reason: str) -> None:
    """Ask for its refusal and wait until it is settled one way or the other."""
    i.want_refusal(reason)
    try:
        async with asyncio.timeout(DISCARD_S):
            while i.state.may_refuse:
                await i.wait_newer(i.generation, DISCARD_S)
    except TimeoutError:
        pass  # the view says how far it is


async def _ended(task: asyncio.Task[Any]) -> None:
    """Whatever became of what went on beside it: nothing is left that nobody waits for."""
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
