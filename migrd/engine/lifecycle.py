"""VMs on this host: defined, started, stopped, forgotten; never against a migration.

One thing at a time is done with a VM: the caller holds the VM's lock (`VmTable.lock`), which the
creation of a migration, and of an incoming one, takes as well.
"""

import asyncio
from dataclasses import replace
from typing import Final

from migrd.core.facts import VmSpec
from migrd.core.standing import StandingDecision
from migrd.engine import views
from migrd.engine.boot import new_instance
from migrd.engine.decisions import bare, check_devices
from migrd.engine.device_start import DeviceStart
from migrd.engine.hot_plug import HotPlug
from migrd.engine.migrations import Migrations
from migrd.engine.ownership import claim_to_start, put
from migrd.engine.ports import Vmm
from migrd.engine.service import PlugRequest, VmView
from migrd.engine.threads import in_thread
from migrd.engine.vms import Entry, VmTable
from migrd.errors import (
    ArbiterError,
    ArbiterUnavailable,
    Conflict,
    Invalid,
    Unavailable,
    Violation,
    VmmDied,
)

STOP_S: Final = 30.0


class Lifecycle:
    """What clients may do with VMs."""

    def __init__(self, migrations: Migrations, starts: DeviceStart) -> None:
        self._migrations = migrations
        self._starts = starts
        self._decisions = starts.decisions
        self._hot_plug = HotPlug(migrations.vms, starts)
        self._world = migrations.world
        self._vms: VmTable = migrations.vms

    def view(self, entry: Entry) -> VmView:
        """As clients see it."""
        return views.of_vm(entry, self._world, self._starts.holding)

    async def define(self, spec: VmSpec, *, dry_run: bool) -> tuple[VmView, bool]:
        """A new VM from a profile, or the profile of an adopted one."""
        check_devices(spec)
        if spec.profile is not None:
            await in_thread(self._world.launcher.check, bare(spec))
        entry = self._vms.get(spec.name)
        if entry is None and spec.profile is None:
            raise Invalid(
                f"{spec.name} has no profile",
                [Violation("profile", "missing", "name a launch profile of this host")],
            )
        if entry is not None and entry.spec == spec:
            return self.view(entry), False
        self._check_definable(entry, spec)
        decision = await self._decide(entry, spec)
        if dry_run:
            shown = Entry(spec) if entry is None else replace(entry, spec=spec)
            shown.decision = decision
            return self.view(shown), entry is None
        created = entry is None
        if entry is None:
            self._vms.note_epoch(spec.name, await self._world.journal.last_epoch(spec.name))
            entry = Entry(spec, epoch=self._vms.last_epoch(spec.name))
        await self._world.journal.put_vm(replace(entry.stored(), spec=spec, decision=decision))
        entry.spec = spec
        self._decisions.put(entry, decision)
        self._vms.put(entry)
        return self.view(entry), created

    async def _decide(self, entry: Entry | None, spec: VmSpec) -> StandingDecision | None:
        """From what is known now; no device is touched. Raises Refused."""
        self._decisions.check_policy(spec)
        if not spec.devices:
            return None
        now = await self._decisions.circumstances(spec, entry)
        decided = await self._decisions.decide(spec, now)
        decided.require()
        return decided.stands(self._world.clock.wall_s())

    def _check_definable(self, entry: Entry | None, spec: VmSpec) -> None:
        if entry is None:
            return
        if entry.migration_id is not None or entry.incoming:
            raise Conflict(
                f"{spec.name} is being migrated ({entry.migration_id})", code="already_migrating"
            )
        launched = entry.vmm is not None and not entry.vmm.is_dead and entry.managed
        if launched:
            raise Conflict(
                f"{spec.name} runs as profile {entry.spec.profile} with other parameters: stop it "
                "before it is defined anew",
                code="vm_running",
            )

    async def forget(self, name: str) -> None:
        entry = self._vms.require(name)
        self._check_settled(entry)
        if entry.vmm is not None and not entry.vmm.is_dead:
            raise Conflict(f"{name} has a running QEMU: stop it first", code="vm_running")
        vmm = entry.vmm
        await self._forget_record(entry)
        await self._world.journal.delete_vm(name)
        self._vms.remove(name)
        if vmm is not None:
            await self._starts.holding.release(vmm.instance)
            await self._world.launcher.forget(vmm)

    async def _forget_record(self, entry: Entry) -> None:
        """The arbiter's record goes first: one that nobody knows of would keep the VM from being
        started anywhere. Another host's is left alone: it keeps others from starting a guest that
        runs. Whose it is, this host's journal may know better. Raises Unavailable."""
        arbiter, known = self._world.arbiter, self._migrations.proofs
        if not arbiter.is_present or not entry.here:
            return
        try:
            record = await arbiter.read(entry.spec.name)
            if record is None:
                return
            right = known.disproves(record)
            if right is not None:
                await put(arbiter, record, right)
            elif known.proves(record) or record.owner == self._world.options.host:
                await arbiter.forget(record)
        except ArbiterError as exc:
            raise Unavailable(
                f"{entry.spec.name} was not forgotten: {exc.message}", code=exc.code
            ) from exc

    async def start(self, name: str) -> VmView:
        entry = self._vms.require(name)
        if entry.vmm is not None and not entry.vmm.is_dead:
            self._migrations.check_not_given_up(entry.vmm)
            return self.view(entry)
        self._check_startable(entry)
        await self._decisions.check_free(entry.spec)
        entry.starting = True
        old = entry.vmm
        try:
            self._vms.detach(entry)
            if old is not None:
                await self._starts.holding.release(old.instance)  # else it has its devices still
                await self._world.journal.put_vm(entry.stored())  # of what has no files, no word
                await self._world.launcher.forget(old)
            await self._claim(entry)
            vmm = await self._launch(entry)
        except VmmDied as exc:
            raise Conflict(exc.message, code="launch_failed") from exc
        finally:
            entry.starting = False
        entry.vmm, entry.managed, entry.here = vmm, True, True
        self._vms.watch(entry)  # it runs, whether that can be written down or not
        await self._world.journal.put_vm(entry.stored())
        await self._vms.look(entry)
        self._vms.changed(entry)
        return self.view(entry)

    async def _claim(self, entry: Entry) -> None:
        """With an arbiter, its record says that the VM is this host's before it is started.
        Raises Conflict (`owned_elsewhere`), Unavailable (`arbiter_unavailable`)."""
        world, name = self._world, entry.spec.name
        if not world.arbiter.is_present:
            return
        epoch = self._vms.last_epoch(name)
        host, known = world.options.host, self._migrations.proofs
        try:
            record = await claim_to_start(
                world.arbiter, name, host, epoch, known.proves, known.disproves
            )
        except ArbiterUnavailable as exc:
            raise Unavailable(
                f"{name} was not started: {exc.message}; it may run elsewhere", code=exc.code
            ) from exc
        entry.epoch = max(entry.epoch, record.epoch)

    async def _launch(self, entry: Entry) -> Vmm:
        """With devices: what is decided is durable before QEMU is started."""
        spec = entry.spec
        self._decisions.check_policy(spec)
        if not spec.devices:
            return await self._world.launcher.launch(spec, new_instance(), incoming=False)

        async def record(decision: StandingDecision) -> None:
            await self._world.journal.put_vm(replace(entry.stored(), decision=decision))
            self._decisions.put(entry, decision)

        now = await self._decisions.circumstances(spec)
        decided, decision = await self._starts.decide(spec, now)
        await record(decision)
        return await self._starts.launch(spec, decided, now, record)

    async def plug(self, name: str, request: PlugRequest, *, by: str) -> VmView:
        entry = self._vms.require(name)
        self._check_settled(entry)
        self._check_here(entry)
        await self._hot_plug.plug(entry, request, by=by)
        return self.view(entry)

    async def unplug(self, name: str, id_: str, *, by: str) -> VmView:
        entry = self._vms.require(name)
        self._check_settled(entry)
        self._check_here(entry)
        await self._hot_plug.unplug(entry, id_, by=by)
        return self.view(entry)

    def _check_here(self, entry: Entry) -> None:
        if not entry.here:
            raise Conflict(
                f"{entry.spec.name} has moved away from this host: ask the one that it is on",
                code="vm_departed",
            )

    def _check_startable(self, entry: Entry) -> None:
        name = entry.spec.name
        self._check_settled(entry)
        if not entry.here:
            raise Conflict(
                f"{name} has moved away from this host: a second copy is never started. When it is "
                f"proven gone there: migrd vms forget {name}, and define it anew",
                code="vm_departed",
            )
        if entry.spec.profile is None:
            raise Conflict(f"{name} was not launched by migrd", code="vm_adopted")
        if entry.starting:
            raise Conflict(f"{name} is being started", code="already_starting")

    def _check_settled(self, entry: Entry) -> None:
        """No migration, on either side, has a say in what this VM is."""
        active = self._migrations.active_of(entry.spec.name)
        if active is not None or entry.migration_id is not None or entry.incoming:
            id_ = entry.migration_id or (active.id if active else "?")
            raise Conflict(
                f"{entry.spec.name} is being migrated, or it is not settled who runs it "
                f"(migration {id_})",
                code="already_migrating",
            )

    async def stop(self, name: str) -> VmView:
        entry = self._vms.require(name)
        self._check_settled(entry)
        if entry.vmm is not None and not entry.managed:
            raise Conflict(
                f"{name} was not launched by migrd: stop it where it was started",
                code="vm_adopted",
            )
        if entry.vmm is not None and not entry.vmm.is_dead:
            try:
                async with asyncio.timeout(STOP_S):
                    await entry.vmm.quit()
            except TimeoutError:
                raise Unavailable(f"{name} has not ended yet", code="stop_timed_out") from None
        vmm = entry.vmm
        self._vms.detach(entry)
        if vmm is not None:
            await self._starts.holding.release(vmm.instance)
        await self._world.journal.put_vm(entry.stored())
        if vmm is not None:
            await self._world.launcher.forget(vmm)
        self._vms.changed(entry)
        return self.view(entry)
