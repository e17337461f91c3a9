"""The VMs of this host: what each is, whether its QEMU lives, and what it does.

One task per VM asks its QEMU for the run state at the watch interval (nothing is asked while a
migration's own feed does it). What has not been heard of lately is `unreachable`, never `dead`:
dead needs proof.
"""

import asyncio
import contextlib
from dataclasses import dataclass, field
from typing import Final
from weakref import WeakValueDictionary
from zlib import crc32

import structlog

from migrd.core.facts import RunState, VmFacts, VmSpec
from migrd.core.standing import StandingDecision
from migrd.engine.ports import StoredVm, Vmm
from migrd.engine.world import World
from migrd.errors import MigrdError, NotFound, VmmDied

log = structlog.get_logger(__name__)

REFRESH_FACTS_S: Final = 60.0
STAGGER: Final = 97
"""A prime: VMs are asked spread over the interval, not all at once."""
ARRIVED_S: Final = 0.005
"""A VM whose run state is known has just come: the source hears of it before it is looked at."""


@dataclass
class Entry:
    """One VM known here."""

    spec: VmSpec
    epoch: int = 0
    here: bool = True
    vmm: Vmm | None = None
    managed: bool = True
    run_state: RunState = RunState.UNKNOWN
    facts: VmFacts | None = None
    facts_at_s: float | None = None
    trouble: str | None = None
    resource_version: int = 0
    decision: StandingDecision | None = None
    """About its passthrough devices; replaced only by what has been made durable."""
    migration_id: str | None = None
    """The migration going on with it, on either side."""
    incoming: bool = False
    starting: bool = False
    watcher: asyncio.Task[None] | None = field(default=None, repr=False)

    @property
    def state(self) -> str:
        """One word for people and programs (service.VmView.state)."""
        if self.incoming:
            return "incoming"
        if self.vmm is None:
            if self.starting:
                return "starting"
            return "stopped" if self.here else "departed"
        if self.vmm.is_dead:
            return "dead"
        if self.trouble is not None or not self.vmm.is_reachable:
            return "unreachable"
        return self.run_state.value

    def stored(self) -> StoredVm:
        """As the journal keeps it."""
        instance = None if self.vmm is None else self.vmm.instance
        return StoredVm(self.spec, self.epoch, self.here, instance, self.decision)


class VmTable:
    """All entries by name; owns their watchers."""

    def __init__(self, world: World, group: asyncio.TaskGroup) -> None:
        self._world = world
        self._group = group
        self._entries: dict[str, Entry] = {}
        self._epochs: dict[str, int] = {}
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def all(self) -> list[Entry]:
        """By name."""
        return [self._entries[name] for name in sorted(self._entries)]

    def get(self, name: str) -> Entry | None:
        return self._entries.get(name)

    def lock(self, name: str) -> asyncio.Lock:
        """Held by whoever changes what a VM is: one at a time. Kept while somebody has it."""
        lock = self._locks.get(name)
        if lock is None:
            lock = self._locks[name] = asyncio.Lock()
        return lock

    def last_epoch(self, name: str) -> int:
        """The highest epoch at which this host has had to do with a VM of that name."""
        entry = self._entries.get(name)
        return max(self._epochs.get(name, 0), 0 if entry is None else entry.epoch)

    def note_epoch(self, name: str, epoch: int) -> None:
        """Remember an epoch, whether the VM is known or not. Epochs only grow."""
        self._epochs[name] = max(self._epochs.get(name, 0), epoch)

    def require(self, name: str) -> Entry:
        """Raises NotFound (`unknown_vm`)."""
        entry = self._entries.get(name)
        if entry is None:
            raise NotFound(f"no VM named {name} is known here", code="unknown_vm")
        return entry

    def put(self, entry: Entry, *, watched: bool = True) -> Entry:
        """Add or replace; its QEMU is watched from here on, or from `watch` on."""
        old = self._entries.get(entry.spec.name)
        if old is not None and old is not entry:
            self._unwatch(old)
        self._entries[entry.spec.name] = entry
        if watched:
            self.watch(entry)
        self.changed(entry)
        return entry

    def remove(self, name: str) -> None:
        entry = self._entries.pop(name, None)
        if entry is not None:
            self.note_epoch(name, entry.epoch)
            self._unwatch(entry)
            self.changed(entry, removed=True)

    def detach(self, entry: Entry) -> None:
        """Its QEMU is gone, or no longer ours to watch."""
        self._unwatch(entry)
        entry.vmm, entry.facts, entry.facts_at_s = None, None, None
        entry.run_state, entry.trouble = RunState.UNKNOWN, None

    def watch(self, entry: Entry) -> None:
        """Begin to ask its QEMU for signs of life."""
        if entry.vmm is None or (entry.watcher is not None and not entry.watcher.done()):
            return
        entry.watcher = self._group.create_task(
            self._watch(entry, entry.vmm), name=f"watch-{entry.spec.name}"
        )

    def _unwatch(self, entry: Entry) -> None:
        if entry.watcher is not None:
            entry.watcher.cancel()
            entry.watcher = None

    def changed(self, entry: Entry, *, removed: bool = False) -> None:
        """Tell the stream."""
        body = {"state": "forgotten" if removed else entry.state, "epoch": entry.epoch}
        entry.resource_version = self._world.stream.publish("vm.changed", body, vm=entry.spec.name)

    # Watching -------------------------------------------------------------------------------

    async def _watch(self, entry: Entry, vmm: Vmm) -> None:
        interval_s = self._world.options.watch_interval_s
        if entry.run_state is not RunState.UNKNOWN:
            await asyncio.sleep(ARRIVED_S)
        await self.look(entry)
        await asyncio.sleep(interval_s * (crc32(entry.spec.name.encode()) % STAGGER) / STAGGER)
        while not vmm.is_dead:
            if entry.migration_id is None:
                await self.look(entry)
            await asyncio.sleep(interval_s)
        if entry.vmm is vmm and entry.migration_id is None:
            self.changed(entry)
            log.warning("the VM's QEMU has exited", vm=entry.spec.name, pid=vmm.pid)

    async def look(self, entry: Entry, *, refresh: bool = False) -> None:
        """Ask once (with `refresh`: for everything); what changed is published. Never raises for
        what QEMU says or does not say."""
        vmm, before = entry.vmm, entry.state
        if vmm is None:
            return
        now_s = self._world.clock.monotonic_s()
        try:
            old = entry.facts_at_s
            is_old = old is None or now_s - old > REFRESH_FACTS_S
            if entry.facts is None or is_old or refresh:
                entry.facts = await vmm.facts()
                entry.facts_at_s = now_s
                entry.run_state = entry.facts.run_state
            else:
                entry.run_state = await vmm.run_state()
            entry.trouble = None
        except VmmDied:
            pass  # `state` says so
        except MigrdError as exc:
            entry.trouble = exc.message
        except Exception as exc:  # what one QEMU says must not end the daemon
            entry.trouble = f"{type(exc).__name__}: {exc}"
            log.error("looking at a VM failed", vm=entry.spec.name, exc_info=exc)
        if entry.vmm is vmm and entry.state != before:
            self.changed(entry)

    async def close(self) -> None:
        """Stop watching all."""
        for entry in self._entries.values():
            watcher = entry.watcher
            self._unwatch(entry)
            if watcher is not None:
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([watcher])
