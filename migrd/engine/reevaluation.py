"""Standing decisions, looked at again when the host's hardware is seen to be another.

    inventory of a new generation ──► each VM with devices: the same question, with the facts of now
        running   core.hot_plug.reconsider: what QEMU has been told stands
        stopped   as its next start would be decided
    another verdict, or other reasons ──► kept durably, counted, `vm.verdict_changed`

Bounded: one pass at a time, at most one every PAUSE_S, however often the hardware changes; a VM
that somebody is changing, or that is being migrated, is left for the next pass.
"""

import asyncio
from dataclasses import replace
from typing import Final

import structlog

from migrd.core.hot_plug import compare
from migrd.core.standing import StandingDecision
from migrd.engine.decisions import Decisions
from migrd.engine.vms import Entry, VmTable
from migrd.engine.world import World
from migrd.errors import MigrdError

log = structlog.get_logger(__name__)

PAUSE_S: Final = 1.0


class Reevaluation:
    """One task of the engine."""

    def __init__(self, world: World, vms: VmTable, decisions: Decisions) -> None:
        self._world = world
        self._vms = vms
        self._decisions = decisions
        self._seen: int | None = None

    async def watch(self) -> None:
        """Runs until cancelled."""
        while True:
            generation = self._world.inventory.current.generation
            if generation != self._seen and await self._look_at_all():
                self._seen = generation
            await asyncio.sleep(PAUSE_S)

    async def _look_at_all(self) -> bool:
        """False: some have to be looked at once more."""
        is_whole = True
        for entry in self._vms.all():
            if not entry.spec.devices or entry.decision is None:
                continue
            lock = self._vms.lock(entry.spec.name)
            if lock.locked() or entry.migration_id is not None or entry.incoming:
                is_whole = False
                continue
            try:
                async with lock:
                    await self._look_at(entry, entry.decision)
            except MigrdError as exc:
                is_whole = False
                log.warning("a decision stays as it is", vm=entry.spec.name, cause=exc.message)
            except Exception as exc:  # one VM must not end the looking at all others
                log.error("looking at a decision failed", vm=entry.spec.name, exc_info=exc)
        return is_whole

    async def _look_at(self, entry: Entry, before: StandingDecision) -> None:
        decided, after = await self._decisions.now_of(entry)
        is_stopped = entry.vmm is None or entry.vmm.is_dead
        if is_stopped and decided.own:
            return  # a device is missing, or somebody else's: its next start says so
        if not compare(before.plan, after.plan).is_any:
            return
        await self._world.journal.put_vm(replace(entry.stored(), decision=after))
        self._decisions.put(entry, after)
