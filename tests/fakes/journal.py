"""A journal in memory with the real one's rules, for tests that own time and order.

    FakeDisk    what is durable; outlives any number of journals, as a disk outlives daemons
    FakeJournal `engine.ports.Journal` on such a disk

- A call takes effect at one instant, all of it or nothing, and returns after `commit_s`. What was
  acknowledged is on the disk; what was refused is not.
- A cancelled call takes effect all the same: the write is with the disk already.
- Records pass through the real codec: what the real journal would refuse is refused here.
- `fail_on` = n fails the n-th write, once. Before its effect that is a JournalError, as of a full
  disk. After its effect (`after_effect`) it can only be the death of the process: Crashed, durable,
  and the caller never learns.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from migrd.core.handover import DestinationEvent
from migrd.core.migration import MigrationEvent
from migrd.engine.ports import (
    Replay,
    StoredIncoming,
    StoredRequest,
    StoredResolution,
    StoredVm,
)
from migrd.errors import Conflict, JournalError
from migrd.journal import codec
from migrd.journal.codec import Codec, Sealed, UnreadableRecord

T = TypeVar("T")

SLOW_S = 0.7
KINDS = ("round", "decision")


class Crashed(BaseException):
    """The process ended after the write was durable and before the caller knew."""


@dataclass
class FakeDisk:
    """What is durable.

    `is_sealed=False`: values are kept as they are. Where thousands of journals are written, a few
    of them sealed show as much about the codec.
    """

    is_sealed: bool = True
    wrote: Callable[[str, str, Sequence[object]], None] | None = None
    """Told of each record as it becomes durable: request, incoming, event or vm; whose; values."""

    outgoing: dict[str, tuple[Sealed, list[Sealed]]] = field(default_factory=dict)
    incoming: dict[str, tuple[Sealed, list[Sealed]]] = field(default_factory=dict)
    keys: dict[str, tuple[str, str]] = field(default_factory=dict)
    vms: dict[str, tuple[int, Sealed]] = field(default_factory=dict)
    epochs: dict[str, int] = field(default_factory=dict)
    observations: dict[tuple[str, str], list[dict[str, object]]] = field(default_factory=dict)
    resolutions: list[Sealed] = field(default_factory=list)

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator["FakeJournal"]:
        yield FakeJournal(self)


class FakeJournal:
    """On a disk of its own unless one is given."""

    def __init__(
        self,
        disk: FakeDisk | None = None,
        *,
        commit_s: float = 0.0,
        fail_on: int | None = None,
        after_effect: bool = False,
    ) -> None:
        self.disk = FakeDisk() if disk is None else disk
        self.commit_s = commit_s
        self.fail_on = fail_on
        self.after_effect = after_effect
        self.writing = 0
        """Writes that are not acknowledged yet."""
        self.fsync_fails = False
        """The next record gets to the disk, its write fails, and so do all after it."""
        self._is_broken = False
        self.is_slow = False
        """While True each write takes `SLOW_S` to be acknowledged."""
        self.is_full = False
        """While True every write fails with JournalError(journal_disk_full)."""
        self.writes = 0
        """Writes asked for so far, failed ones too."""

    async def create_outgoing(self, stored: StoredRequest) -> None:
        sealed = self._seal(codec.REQUEST, stored)
        disk, key = self.disk, stored.idempotency_key

        def effect() -> None:
            if stored.id in disk.outgoing:
                raise Conflict(f"migration {stored.id} exists already", code="id_exists")
            if key is not None and key in disk.keys:
                raise Conflict("the idempotency key was used before", code="key_exists")
            disk.outgoing[stored.id] = (sealed, [])
            self._tell("request", stored.id, (stored,))
            if key is not None:
                disk.keys[key] = (stored.id, stored.body_digest or "")
            self._raise_epoch(stored.request.vm, stored.epoch)

        await self._write(effect)

    async def create_incoming(self, stored: StoredIncoming) -> None:
        sealed = self._seal(codec.INCOMING, stored)

        def effect() -> None:
            if stored.id in self.disk.incoming:
                raise Conflict(f"migration {stored.id} exists already", code="id_exists")
            self.disk.incoming[stored.id] = (sealed, [])
            self._tell("incoming", stored.id, (stored,))
            self._raise_epoch(stored.spec.name, stored.epoch)

        await self._write(effect)

    async def append_outgoing(
        self, migration_id: str, events: Sequence[MigrationEvent], vm: StoredVm | None = None
    ) -> None:
        sealed = [self._seal(codec.MIGRATION_EVENT, event) for event in events]
        await self._append(self.disk.outgoing, migration_id, sealed, vm, events)

    async def append_incoming(
        self, migration_id: str, events: Sequence[DestinationEvent], vm: StoredVm | None = None
    ) -> None:
        sealed = [self._seal(codec.DESTINATION_EVENT, event) for event in events]
        await self._append(self.disk.incoming, migration_id, sealed, vm, events)

    async def _append(
        self,
        migrations: dict[str, tuple[Sealed, list[Sealed]]],
        migration_id: str,
        sealed: Sequence[Sealed],
        vm: StoredVm | None,
        events: Sequence[object],
    ) -> None:
        put = None if vm is None else self._putting(vm)

        def effect() -> None:
            if migration_id not in migrations:
                raise JournalError(f"no migration {migration_id}", code="unknown_migration")
            if put is not None:
                put()
            migrations[migration_id][1].extend(sealed)
            self._tell("event", migration_id, events)

        await self._write(effect)

    async def add_resolution(self, word: StoredResolution) -> None:
        sealed = _seal(codec.RESOLUTION, word)
        disk = self.disk

        def effect() -> None:
            known = disk.outgoing if word.role == "source" else disk.incoming
            if word.migration_id not in known:
                raise JournalError(f"no migration {word.migration_id}", code="unknown_migration")
            disk.resolutions.append(sealed)

        await self._write(effect)

    async def put_vm(self, vm: StoredVm) -> None:
        await self._write(self._putting(vm))

    def _putting(self, vm: StoredVm) -> Callable[[], None]:
        sealed, name = self._seal(codec.VM, vm), vm.spec.name

        def effect() -> None:
            epoch = self.disk.vms.get(name, (0, sealed))[0]
            if epoch > vm.epoch:
                raise JournalError(f"VM {name}: {vm.epoch} after {epoch}", code="epoch_went_back")
            self.disk.vms[name] = (vm.epoch, sealed)
            self._tell("vm", name, (vm,))
            self._raise_epoch(name, vm.epoch)

        return effect

    async def delete_vm(self, name: str) -> None:
        def effect() -> None:
            self.disk.vms.pop(name, None)

        await self._write(effect)

    async def last_epoch(self, vm: str) -> int:
        return self.disk.epochs.get(vm, 0)

    async def find_key(self, key: str) -> tuple[str, str] | None:
        return self.disk.keys.get(key)

    async def add_observations(
        self, migration_id: str, kind: str, rows: Sequence[Mapping[str, object]]
    ) -> None:
        if kind not in KINDS:
            raise JournalError(f"no observations of kind {kind!r}", code="unknown_kind")

        def effect() -> None:
            if migration_id not in {*self.disk.outgoing, *self.disk.incoming}:
                raise JournalError(f"no migration {migration_id}", code="unknown_migration")
            kept = self.disk.observations.setdefault((migration_id, kind), [])
            kept.extend(dict(row) for row in rows)

        await self._write(effect)

    async def observations(self, migration_id: str, kind: str) -> Sequence[Mapping[str, object]]:
        return list(self.disk.observations.get((migration_id, kind), ()))

    async def replay(self) -> Replay:
        disk = self.disk
        return Replay(
            vms=[_read(codec.VM, sealed) for _, sealed in disk.vms.values()],
            outgoing=[
                (_read(codec.REQUEST, stored), [_read(codec.MIGRATION_EVENT, e) for e in events])
                for stored, events in disk.outgoing.values()
            ],
            incoming=[
                (_read(codec.INCOMING, stored), [_read(codec.DESTINATION_EVENT, e) for e in events])
                for stored, events in disk.incoming.values()
            ],
            resolutions=[codec.RESOLUTION.read(word) for word in disk.resolutions],
        )

    def _seal(self, of: Codec[T], value: T) -> Sealed:
        if not self.disk.is_sealed:
            return Kept(of.kind, of.version, b"", 0, value)
        return _seal(of, value)

    def _tell(self, kind: str, id_: str, values: Sequence[object]) -> None:
        if self.disk.wrote is not None:
            self.disk.wrote(kind, id_, values)

    async def _write(self, effect: Callable[[], None]) -> None:
        self.writing += 1
        try:
            await self._commit(effect)
        finally:
            self.writing -= 1

    async def _commit(self, effect: Callable[[], None]) -> None:
        self.writes += 1
        fails = self.writes == self.fail_on
        if self.is_full or self._is_broken or (fails and not self.after_effect):
            await asyncio.sleep(self.commit_s)
            raise JournalError("the disk is full", code="journal_disk_full")
        effect()
        if fails:
            raise Crashed
        if self.fsync_fails:
            self._is_broken = True  # whatever becomes of the disk: what it holds is in doubt
            raise JournalError("fsync failed", code="journal_io_error")
        await asyncio.sleep(SLOW_S if self.is_slow else self.commit_s)

    def _raise_epoch(self, vm: str, epoch: int) -> None:
        self.disk.epochs[vm] = max(epoch, self.disk.epochs.get(vm, 0))


@dataclass(frozen=True)
class Kept(Sealed):
    """Not sealed: as it was."""

    value: object = None


def _read(of: Codec[T], sealed: Sealed) -> T:
    if isinstance(sealed, Kept):
        value: Any = sealed.value
        kept: T = value
        return kept
    return of.read(sealed)


def _seal(of: Codec[T], value: T) -> Sealed:
    try:
        return of.write(value)
    except UnreadableRecord as failure:
        raise JournalError(f"not written: {failure}", code="record_unwritable") from failure
