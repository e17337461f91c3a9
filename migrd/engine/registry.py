"""The engine, as its clients see it: admission, lookup, and nothing that a migration's task does.

Fulfils `service.Service`. A wish about a migration is judged by the core
(`core.migration.admit_*`) and handed to the migration's owner task; the answer says what became of
it: queued, already so, or denied with a named reason.

Longer than other modules because the port that it fulfils is.
"""

import asyncio
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from typing import Any

import structlog

from migrd.core.admission import Admission, admit_cancel, admit_policy, admit_switchover
from migrd.core.convergence import Decision
from migrd.core.facts import Round, SpecDevice, VmSpec
from migrd.core.migration import Cause, Policy, Refusal, Request, begin
from migrd.core.phases import Phase, Trigger
from migrd.engine import views
from migrd.engine.foresight import foresee
from migrd.engine.host import HostFacts
from migrd.engine.lifecycle import Lifecycle
from migrd.engine.migrations import QUEUE_LIMIT, Migrations
from migrd.engine.observations import as_decision, as_round
from migrd.engine.outgoing import Outgoing
from migrd.engine.ports import Peer, StoredRequest, Vmm
from migrd.engine.rate_views import AskedRate, DirtyRatesView, HistoryView
from migrd.engine.resolving import DestinationSide, Side, SourceSide, resolve
from migrd.engine.sampler import Sampler
from migrd.engine.service import (
    Answer,
    Check,
    DeviceView,
    HostView,
    MigrationView,
    PlanView,
    PlugRequest,
    Published,
    Resolution,
    VmView,
    WhatIf,
)
from migrd.engine.vms import Entry, VmTable
from migrd.engine.what_if import WhatIfs
from migrd.errors import Conflict, Invalid, NotFound, Unavailable, Violation

log = structlog.get_logger(__name__)


class Registry:
    """Service over the VM table and the migrations."""

    def __init__(self, migrations: Migrations, host: HostFacts, sampler: Sampler) -> None:
        self._migrations = migrations
        self._sampler = sampler
        self._world = migrations.world
        self._vms: VmTable = migrations.vms
        self._host = host
        self._lifecycle = Lifecycle(migrations, migrations.starts)
        self._what_ifs = WhatIfs(migrations.world, migrations.decisions, migrations.proofs.proves)
        self._creating = asyncio.Lock()

    # Host -------------------------------------------------------------------------------------

    def host(self) -> HostView:
        return self._host.view(self._migrations)

    def readiness(self) -> Sequence[Check]:
        return self._host.readiness(self._migrations)

    def devices(self) -> tuple[int, Sequence[DeviceView]]:
        version, views = self._host.devices.views()
        users = self._migrations.decisions.users()
        return version, [_with_user(view, users) for view in views] if users else views

    def device(self, address: str) -> DeviceView:
        return _with_user(self._host.devices.view(address), self._migrations.decisions.users())

    async def probe_device(self, address: str, *, by: str) -> DeviceView:
        user = self._migrations.decisions.users().get(address)
        if user is not None:
            raise Conflict(
                f"{address} is in use by the VM {user}, and answers nobody else; what it answered "
                f"before is in the decision of {user}",
                code="device_in_use",
            )
        return await self._host.devices.probe(address, by=by)

    # VMs --------------------------------------------------------------------------------------

    def vms(self) -> tuple[int, Sequence[VmView]]:
        version = self._world.stream.resource_version
        return version, [self._lifecycle.view(entry) for entry in self._vms.all()]

    def vm(self, name: str) -> VmView:
        return self._lifecycle.view(self._vms.require(name))

    async def define_vm(self, spec: VmSpec, *, dry_run: bool) -> tuple[VmView, bool]:
        async with self._vms.lock(spec.name):
            return await self._lifecycle.define(spec, dry_run=dry_run)

    async def forget_vm(self, name: str) -> None:
        async with self._vms.lock(name):
            await self._lifecycle.forget(name)

    async def start_vm(self, name: str) -> VmView:
        async with self._vms.lock(name):
            return await self._lifecycle.start(name)

    async def stop_vm(self, name: str) -> VmView:
        async with self._vms.lock(name):
            return await self._lifecycle.stop(name)

    async def plug_device(self, vm: str, request: PlugRequest, *, by: str) -> VmView:
        async with self._vms.lock(vm):
            return await self._lifecycle.plug(vm, request, by=by)

    async def unplug_device(self, vm: str, id_: str, *, by: str) -> VmView:
        async with self._vms.lock(vm):
            return await self._lifecycle.unplug(vm, id_, by=by)

    def dirty_rates(self, vm: str) -> DirtyRatesView:
        return self._sampler.view(vm)

    def dirty_rate_history(
        self, vm: str, *, since_wall_s: float | None, step_s: int | None
    ) -> HistoryView:
        return self._sampler.history(vm, since_wall_s, step_s)

    async def measure_dirty_rate(self, vm: str, *, by: str) -> AskedRate:
        log.debug("dirty rate asked for", vm=vm, by=by)
        return self._sampler.measure(vm)

    # Migrations: asking for one -------------------------------------------------------------

    async def plan(self, request: Request) -> PlanView:
        """What a migration would meet; touches nothing."""
        limit_s = request.policy.downtime_limit_s
        return await self.what_if(WhatIf(request.vm, move=request, downtime_limit_s=limit_s))

    async def what_if(self, question: WhatIf) -> PlanView:
        """The same, were things otherwise; without a destination: what a start would meet."""
        if question.move is None:
            entry = self._vms.require(question.vm)
            return await self._what_ifs.here(entry, question)
        entry, vmm, peer = self._parties(question.move, question.devices)
        view = await self._what_ifs.there(entry, question, vmm, peer)
        view = foresee(
            view,
            self._sampler.view(question.vm).trackers,
            question.move.policy,
            self._migrations.bandwidth_bytes_per_s(),
        )
        active = self._migrations.active_of(question.vm)
        if active is None:
            return view
        busy = Refusal("already_migrating", f"migration {active.id} is going on", "wait for it")
        return replace(view, possible=False, refusals=(busy, *view.refusals))

    def _parties(
        self, request: Request, devices: tuple[SpecDevice, ...] | None = None
    ) -> tuple[Entry, Vmm, Peer]:
        """Raises NotFound, Invalid or Conflict with a named reason. `devices`: those of a what-if,
        instead of the VM's own."""
        entry = self._vms.require(request.vm)
        _check_ids(request, entry.spec.devices if devices is None else devices)
        if request.destination.lower() == self._world.options.host:
            raise Invalid(
                "the destination is this host",
                [Violation("destination", "destination_is_source", "name another host")],
            )
        peer = self._world.peers.get(request.destination.lower())
        if peer is None:
            roster = ", ".join(sorted(self._world.peers)) or "it is empty"
            raise NotFound(
                f"no host named {request.destination} is in the roster ({roster})",
                code="unknown_destination",
            )
        if entry.incoming:
            raise Conflict(f"{request.vm} is on its way to this host", code="vm_incoming")
        if not entry.here:
            raise Conflict(f"{request.vm} is not on this host any more", code="vm_departed")
        if entry.vmm is None or entry.vmm.is_dead:
            raise Conflict(
                f"{request.vm} does not run: there is nothing to move", code="vm_stopped"
            )
        self._migrations.check_not_given_up(entry.vmm)
        return entry, entry.vmm, peer

    async def create_migration(
        self, request: Request, *, idempotency_key: str | None, body_digest: str
    ) -> tuple[MigrationView, bool]:
        async with self._vms.lock(request.vm), self._creating:
            before = await self._same_key(idempotency_key, body_digest)
            if before is not None:
                return before, False
            entry, vmm, peer = self._parties(request)
            active = self._migrations.active_of(request.vm)
            if active is not None:
                raise Conflict(
                    f"{request.vm} is being migrated already (migration {active.id})",
                    code="already_migrating",
                )
            if len(self._migrations.pending) >= QUEUE_LIMIT:
                raise Unavailable(f"{QUEUE_LIMIT} migrations wait already", code="queue_full")
            m = await self._create(request, entry, vmm, peer, idempotency_key, body_digest)
        return views.of_outgoing(m, self._queue_position(m)), True

    async def _same_key(self, key: str | None, digest: str) -> MigrationView | None:
        found = None if key is None else await self._world.journal.find_key(key)
        if found is None:
            return None
        migration_id, stored_digest = found
        if stored_digest != digest:
            raise Invalid(
                f"Idempotency-Key {key} was used for another request (migration {migration_id})",
                code="idempotency_key_reused",
            )
        return self.migration(migration_id)

    async def _create(
        self,
        request: Request,
        entry: Entry,
        vmm: Vmm,
        peer: Peer,
        key: str | None,
        digest: str,
    ) -> Outgoing:
        clock = self._world.clock
        request = replace(request, destination=peer.name)
        stored = StoredRequest(
            id=str(uuid.uuid4()),
            request=request,
            spec=entry.spec,
            epoch=self._vms.last_epoch(request.vm) + 1,
            created_wall_s=clock.wall_s(),
            created_monotonic_s=clock.monotonic_s(),
            idempotency_key=key,
            body_digest=digest,
        )
        await self._world.journal.create_outgoing(stored)
        state = begin(
            stored.id, request, stored.epoch, stored.created_wall_s, stored.created_monotonic_s
        )
        m = self._migrations.add_outgoing(stored, state, vmm, peer)
        self._migrations.begin_outgoing(m)
        m.log.info("migration requested", destination=request.destination, by=request.requested_by)
        return m

    def _queue_position(self, m: Outgoing) -> int | None:
        if m.state.phase is not Phase.PENDING:
            return None
        return self._migrations.pending.index(m) + 1

    # Migrations: looking ----------------------------------------------------------------------

    def migrations(self) -> tuple[int, Sequence[MigrationView]]:
        all_ = [views.of_outgoing(m, None) for m in self._migrations.outgoing.values()]
        all_ += [views.of_incoming(i) for i in self._migrations.incoming.values()]
        all_.sort(key=lambda view: view.created_wall_s, reverse=True)
        return self._world.stream.resource_version, all_

    def migration(self, migration_id: str) -> MigrationView:
        i = self._migrations.incoming.get(migration_id)
        if i is not None:
            return views.of_incoming(i)
        m = self._migrations.require_outgoing(migration_id)
        return views.of_outgoing(m, self._queue_position(m))

    async def wait_newer(self, resource_version: int, *, within_s: float) -> int:
        return await self._world.stream.wait_newer(resource_version, within_s=within_s)

    async def rounds(self, migration_id: str) -> Sequence[Round]:
        m = self._migrations.outgoing.get(migration_id)
        if m is None:
            self.migration(migration_id)  # NotFound, or an incoming one: it has no rounds
            return ()
        first = m.rounds[0].number if m.rounds else None
        rows = await self._world.journal.observations(migration_id, "round")
        kept = [as_round(row) for row in rows]
        return [r for r in kept if first is None or r.number < first] + list(m.rounds)

    async def decisions(self, migration_id: str) -> Sequence[Decision]:
        m = self._migrations.outgoing.get(migration_id)
        if m is None:
            self.migration(migration_id)
            return ()
        first = m.decisions[0].at_s if m.decisions else None
        rows = await self._world.journal.observations(migration_id, "decision")
        kept = [as_decision(row) for row in rows]
        return [d for d in kept if first is None or d.at_s < first] + list(m.decisions)

    def events(
        self, *, after_id: int | None
    ) -> AbstractAsyncContextManager[AsyncIterator[Published]]:
        return self._world.stream.events(after_id=after_id)

    # Migrations: wishes -------------------------------------------------------------------------

    async def cancel(self, migration_id: str, *, by: str) -> Answer:
        m = self._outgoing_only(migration_id)
        admission, reason = admit_cancel(m.state)
        if admission is Admission.QUEUED and m.cancel_wished:
            admission = Admission.ALREADY_SO
        if admission is Admission.QUEUED:
            cause = Cause("cancelled", f"cancelled by {by}")
            self._hand_over(m, m.event(Trigger.CANCEL_REQUESTED, cause=cause))
        return self._answer(m, admission, reason)

    async def switch_over(self, migration_id: str, *, by: str) -> Answer:
        m = self._outgoing_only(migration_id)
        admission, reason = admit_switchover(m.state)
        if admission is Admission.QUEUED:
            m.log.info("switchover forced", by=by)
            self._hand_over(m, m.event(Trigger.SWITCHOVER_FORCED))
        return self._answer(m, admission, reason)

    async def change_policy(self, migration_id: str, policy: Policy, *, by: str) -> Answer:
        m = self._outgoing_only(migration_id)
        admission, reason = admit_policy(m.state)
        if admission is Admission.QUEUED and policy == m.state.policy:
            admission = Admission.ALREADY_SO
        if admission is Admission.QUEUED:
            m.log.info("policy changed", by=by)
            self._hand_over(m, m.event(Trigger.POLICY_CHANGED, policy=policy))
        return self._answer(m, admission, reason)

    async def resolve(
        self, migration_id: str, resolution: Resolution, *, evidence: str, by: str
    ) -> Answer:
        i = self._migrations.incoming.get(migration_id)
        side: Side
        if i is not None:
            side = DestinationSide(i)
        else:
            side = SourceSide(self._migrations.require_outgoing(migration_id))
        judged = await resolve(side, resolution, evidence=evidence, by=by)
        view = self.migration(migration_id)
        return Answer(judged.admission, judged.reason, judged.message, view)

    def _outgoing_only(self, migration_id: str) -> Outgoing:
        i = self._migrations.incoming.get(migration_id)
        if i is not None:
            raise Conflict(
                f"this host is the destination of {migration_id}: ask {i.stored.source}",
                code="not_the_source",
            )
        return self._migrations.require_outgoing(migration_id)

    def _hand_over(self, m: Outgoing, event: Any) -> None:
        if not m.wish(event):
            raise Unavailable(f"migration {m.id} has too many wishes waiting", code="busy")

    def _answer(self, m: Outgoing, admission: Admission, reason: str) -> Answer:
        message = f"migration {m.id} is {m.state.phase.value}"
        return Answer(admission, reason, message, views.of_outgoing(m, self._queue_position(m)))


def _with_user(view: DeviceView, users: Mapping[str, str]) -> DeviceView:
    user = users.get(view.device.address)
    return view if user is None else replace(view, in_use_by=user)


def _check_ids(request: Request, devices: tuple[SpecDevice, ...]) -> None:
    """Raises Invalid for devices at the destination that take nobody's place."""
    ids = {device.id for device in devices}
    odd = sorted(set(request.destination_devices) - ids)
    if not odd:
        return
    has = ", ".join(sorted(ids)) or "none"
    raise Invalid(
        f"{request.vm} has no passthrough device {odd[0]}; it has: {has}",
        [
            Violation(f"destination_devices.{id_}", "unknown_device", f"the VM has: {has}")
            for id_ in odd
        ],
    )
