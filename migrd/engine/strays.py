"""Processes that no journal names: found at the start, or launched by others since.

What each is, `core.recovery` decides. Ended is only the process that a guest has left from, when
the journal says that this host has released it and the process itself says that its guest is gone;
that is asked again right before. Everything else in doubt is left alone and logged.
"""

import asyncio
from collections.abc import Sequence
from typing import Final

import structlog

from migrd.core.facts import RunState
from migrd.core.phases import Phase
from migrd.core.recovery import decide
from migrd.core.recovery_action import Action, Deed
from migrd.core.recovery_facts import Known, Own, Stray
from migrd.engine.absent import AbsentVmm
from migrd.engine.migrations import Migrations
from migrd.engine.ports import Vmm
from migrd.engine.recovery_facts import look_at_stray
from migrd.engine.vms import Entry
from migrd.errors import MigrdError, VmmError

log = structlog.get_logger(__name__)

REAP_S: Final = 10.0


class Strays:
    """Those of this host; one that is left alone is looked at again, for what it was left for may
    be over: the migration of its VM, or the other process."""

    def __init__(self, migrations: Migrations) -> None:
        self._migrations = migrations
        self._left: dict[str, tuple[Vmm, Action]] = {}

    async def look_again(self) -> None:
        """For VMs that others launched since (the launcher returns only what is new)."""
        new = await self._migrations.world.launcher.find()
        await self.see_to([*(vmm for vmm, _ in self._left.values()), *new])

    async def see_to(self, found: Sequence[Vmm]) -> None:
        """Look at all at once; then one after the other, as one may be the second of its VM."""
        migrations = self._migrations
        seen = await asyncio.gather(*(_look(migrations, vmm) for vmm in found))
        for vmm, own in zip(found, seen, strict=True):
            facts = Stray(
                _known(migrations, vmm),
                migrations.world.launcher.is_managed(vmm),
                own,
                _released(migrations, vmm.vm),
            )
            action = decide(facts)
            before = self._left.pop(vmm.instance, None)
            if action.deed is Deed.LEAVE_ALONE:
                self._left[vmm.instance] = (vmm, action)
            if before is None or before[1] != action:
                _say(vmm, facts, action)
            await _carry_out(migrations, vmm, action)


async def _look(migrations: Migrations, vmm: Vmm) -> Own:
    """One that can only be shown, whatever it says, is not asked."""
    is_away = _known(migrations, vmm) is Known.DEPARTED
    return await look_at_stray(vmm, ask=migrations.world.launcher.is_managed(vmm) or is_away)


def _known(migrations: Migrations, vmm: Vmm) -> Known:
    entry = migrations.vms.get(vmm.vm)
    if entry is None:
        return Known.NOT_AT_ALL
    was_lost = isinstance(entry.vmm, AbsentVmm) and entry.vmm.instance == vmm.instance
    if entry.vmm is not None and not entry.vmm.is_dead and not was_lost:
        return Known.RUNS_ELSEHOW
    if migrations.active_of(vmm.vm) is not None:
        return Known.MIGRATING
    return Known.STOPPED if entry.here else Known.DEPARTED


def _released(migrations: Migrations, vm: str) -> bool:
    """The newest migration of the VM that this host knows of took it away, to its end."""
    epoch = migrations.vms.last_epoch(vm)
    return any(
        m.stored.request.vm == vm and m.state.epoch == epoch and m.state.phase is Phase.SUCCEEDED
        for m in migrations.outgoing.values()
    )


async def _carry_out(migrations: Migrations, vmm: Vmm, action: Action) -> None:
    match action.deed:
        case Deed.NOTHING_LEFT:
            await _forget(migrations, vmm)
        case Deed.ADOPT:
            _adopt(migrations, vmm)
        case Deed.REAP:
            await _reap(migrations, vmm)
        case _:
            pass  # left alone


def _adopt(migrations: Migrations, vmm: Vmm) -> None:
    launcher, vms = migrations.world.launcher, migrations.vms
    entry, spec = vms.get(vmm.vm), launcher.spec_of(vmm)
    if entry is not None and entry.spec.profile is not None:
        spec = entry.spec
    decision = None if entry is None else entry.decision
    managed, epoch = launcher.is_managed(vmm), vms.last_epoch(vmm.vm)
    vms.put(Entry(spec, epoch, here=True, vmm=vmm, managed=managed, decision=decision))


async def _reap(migrations: Migrations, vmm: Vmm) -> None:
    """End it, unless it says otherwise by now."""
    try:
        async with asyncio.timeout(REAP_S):
            state = await vmm.run_state()
            if state is not RunState.POSTMIGRATE:
                log.error("left alone after all", vm=vmm.vm, pid=vmm.pid, run_state=state.value)
                return
            await vmm.quit()
    except (VmmError, TimeoutError) as exc:
        if not vmm.is_dead:
            log.error("it does not end: end it by hand", vm=vmm.vm, pid=vmm.pid, cause=str(exc))
            return
    await migrations.starts.holding.release(vmm.instance)
    await _forget(migrations, vmm)


async def _forget(migrations: Migrations, vmm: Vmm) -> None:
    try:
        await migrations.world.launcher.forget(vmm)
    except (MigrdError, OSError) as exc:
        log.warning("files of an ended QEMU are left", vm=vmm.vm, cause=str(exc))


def _say(vmm: Vmm, facts: Stray, action: Action) -> None:
    if action.deed is Deed.NOTHING_LEFT:
        return
    (log.error if action.alarm else log.info)(
        "a process in no journal",
        vm=vmm.vm,
        pid=vmm.pid,
        instance=vmm.instance,
        managed=facts.managed,
        known=facts.known.value,
        own=str(facts.own),
        deed=action.deed.value,
        why=action.why,
        **({} if action.settles is None else {"settles": action.settles}),
    )
