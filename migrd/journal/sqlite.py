"""The journal in one SQLite file: `engine.ports.Journal`.

    caller --write queued--> [one thread: BEGIN, all queued writes, COMMIT + fsync] --> caller

- Group commit without a clock: whoever comes first takes along all that have queued up meanwhile.
  Nobody waits for company, so a lone GRANT costs one hop to the thread and one fsync.
- A call returns once its fsync is done, cancelled or not (`engine.threads.in_executor`).
- In idle moments `_tend` moves the log into the file and forgets what `retention` allows.

Files, all mode 0600: `<path>`, `<path>-wal` (the log), `<path>.lock` (`owner`).
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, TypeVar

import orjson
import structlog

from migrd.core.handover import DestinationEvent
from migrd.core.migration import MigrationEvent
from migrd.engine.ports import (
    Replay,
    StoredIncoming,
    StoredRequest,
    StoredResolution,
    StoredVm,
)
from migrd.engine.threads import in_executor, in_thread
from migrd.errors import JournalError
from migrd.journal import codec, store
from migrd.journal.codec import Codec, Sealed, UnreadableRecord
from migrd.journal.opening import open_connection
from migrd.journal.owner import Ownership
from migrd.journal.reading import ended_wall_s, fetch_one, read_replay
from migrd.journal.retention import Past, Retention, to_forget
from migrd.journal.store import MigrationRow, Role, Store, VmRow, Write

T = TypeVar("T")

OBSERVATION_KINDS: Final = ("round", "decision")
_IDLE_S: Final = 3.0
_COMMITS_WORTH_A_CHECKPOINT: Final = 32
_COMMITS_AT_MOST: Final = 2000
_PRUNE_EVERY_S: Final = 3600.0
_FORGET_AT_ONCE: Final = 20

log = structlog.get_logger(__name__)


class SqliteJournal:
    """Made by `open_journal`."""

    def __init__(
        self,
        path: Path,
        executor: ThreadPoolExecutor,
        on_commit: Callable[[float], object] | None,
    ) -> None:
        self._path = path
        self._store: Store | None = None
        self._executor = executor
        self._on_commit = on_commit
        self._queue: deque[Write] = deque()
        self._last_write_s = time.monotonic()
        self._ended: dict[tuple[Role, str], float] = {}
        """What has been found to have ended, and when: an end is for ever."""

    async def create_outgoing(self, stored: StoredRequest) -> None:
        row = MigrationRow(
            *(Role.SOURCE, stored.id, stored.request.vm, stored.epoch, stored.created_wall_s),
            *(stored.idempotency_key, stored.body_digest),
        )
        await self._write(store.insert_migration(row, self._seal(codec.REQUEST, stored)))

    async def create_incoming(self, stored: StoredIncoming) -> None:
        row = MigrationRow(
            Role.DESTINATION, stored.id, stored.spec.name, stored.epoch, stored.created_wall_s
        )
        await self._write(store.insert_migration(row, self._seal(codec.INCOMING, stored)))

    async def append_outgoing(
        self, migration_id: str, events: Sequence[MigrationEvent], vm: StoredVm | None = None
    ) -> None:
        sealed = [self._seal(codec.MIGRATION_EVENT, event) for event in events]
        await self._append(Role.SOURCE, migration_id, sealed, vm)

    async def append_incoming(
        self, migration_id: str, events: Sequence[DestinationEvent], vm: StoredVm | None = None
    ) -> None:
        sealed = [self._seal(codec.DESTINATION_EVENT, event) for event in events]
        await self._append(Role.DESTINATION, migration_id, sealed, vm)

    async def _append(
        self, role: Role, migration_id: str, sealed: Sequence[Sealed], vm: StoredVm | None
    ) -> None:
        row = None if vm is None else self._vm_row(vm)
        await self._write(store.insert_events(role, migration_id, sealed, row))

    async def add_resolution(self, word: StoredResolution) -> None:
        sealed = self._seal(codec.RESOLUTION, word)
        await self._write(store.insert_resolution(Role(word.role), word.migration_id, sealed))

    async def put_vm(self, vm: StoredVm) -> None:
        """Raises JournalError (`epoch_went_back`) for an epoch below the one stored."""
        await self._write(store.upsert_vm(self._vm_row(vm)))

    async def delete_vm(self, name: str) -> None:
        """Forget the VM, but not its epoch (`last_epoch`). A name never heard of: nothing."""
        await self._write(store.remove_vm(name))

    async def last_epoch(self, vm: str) -> int:
        """The highest epoch this host ever saw of a VM, deleted or not; 0 for none."""
        rows = await self._rows("SELECT epoch FROM epochs WHERE vm = ?", (vm,))
        return int(str(rows[0][0])) if rows else 0

    async def find_key(self, key: str) -> tuple[str, str] | None:
        rows = await self._rows(
            "SELECT id, coalesce(body_digest, '') FROM migrations WHERE idempotency_key = ?", (key,)
        )
        return (str(rows[0][0]), str(rows[0][1])) if rows else None

    async def add_observations(
        self, migration_id: str, kind: str, rows: Sequence[Mapping[str, object]]
    ) -> None:
        if kind not in OBSERVATION_KINDS:
            raise JournalError(f"no observations of kind {kind!r}", code="unknown_kind")
        try:
            body = orjson.dumps([dict(row) for row in rows])
        except TypeError as failure:
            raise self._unwritable(str(failure)) from failure
        await self._write(store.insert_observations(migration_id, kind, body))

    async def observations(self, migration_id: str, kind: str) -> Sequence[Mapping[str, object]]:
        batches = await self._rows(
            "SELECT body FROM observations WHERE migration_id = ? AND kind = ? ORDER BY batch",
            (migration_id, kind),
        )
        return [row for (body,) in batches if isinstance(body, bytes) for row in orjson.loads(body)]

    async def replay(self) -> Replay:
        """All of it, in order of creation. Raises JournalError (`journal_not_understood`) naming
        file, table and row of the first record that cannot be replayed."""
        return await self._call(lambda opened: read_replay(opened, self._path))

    async def prune(self, retention: Retention, now_wall_s: float) -> int:
        """Forget what retention allows, in small steps; returns how many migrations."""
        rows = await self._rows("SELECT role, id, vm, epoch FROM migrations", ())
        past = []
        for columns in rows:
            role, id_, vm, epoch = (str(column) for column in columns)
            end = await self._end_of(Role(role), id_)
            past.append(Past(Role(role), id_, vm, int(epoch), end))
        doomed = to_forget(past, now_wall_s, retention)
        for at in range(0, len(doomed), _FORGET_AT_ONCE):
            few = doomed[at : at + _FORGET_AT_ONCE]
            await self._write(store.remove_migrations(few))
            for key in few:
                self._ended.pop(key, None)
        return len(doomed)

    async def _end_of(self, role: Role, id_: str) -> float | None:
        """One at a time, so that a GRANT never queues behind all of the past."""
        if (role, id_) not in self._ended:
            rows = await self._call(lambda opened: fetch_one(opened, role, id_))
            end = await in_thread(ended_wall_s, self._path, role, rows)
            if end is None:
                return None
            self._ended[role, id_] = end
        return self._ended[role, id_]

    async def checkpoint(self) -> None:
        """Move the log into the file now. Costs some fsyncs: never while a guest is stopped."""
        await self._call(Store.checkpoint)

    def _seal(self, of: Codec[T], value: T) -> Sealed:
        try:
            return of.write(value)
        except UnreadableRecord as failure:
            raise self._unwritable(f"{of.kind}: {failure}") from failure

    def _unwritable(self, why: str) -> JournalError:
        return JournalError(
            f"{self._path}: not written, for it could not be replayed: {why}",
            code="record_unwritable",
        )

    def _vm_row(self, vm: StoredVm) -> VmRow:
        return VmRow(vm.spec.name, vm.epoch, self._seal(codec.VM, vm))

    async def _write(self, statements: store.Statements) -> None:
        write = Write(statements)
        self._queue.append(write)
        await self._call(lambda opened: self._settle(opened, write))
        self._last_write_s = time.monotonic()
        write.result()

    def _settle(self, opened: Store, write: Write) -> None:
        """In the journal's thread: commit all that is queued, unless an earlier caller did."""
        if write.is_settled:
            return
        writes = []
        with contextlib.suppress(IndexError):
            while True:
                writes.append(self._queue.popleft())
        started_s = time.perf_counter()
        opened.commit(writes)
        if self._on_commit is not None:
            try:
                self._on_commit(time.perf_counter() - started_s)
            except Exception:  # what is durable stays so, whatever a gauge thinks of it
                log.exception("journal.on_commit_failed")

    async def _rows(self, statement: str, parameters: Sequence[object]) -> list[tuple[object, ...]]:
        return await self._call(lambda opened: opened.rows(statement, parameters))

    async def _call(self, work: Callable[[Store], T]) -> T:
        opened = self._store
        if opened is None:
            raise JournalError(f"{self._path}: closed", code="journal_closed")
        return await in_executor(self._executor, work, opened)

    async def _tend(self, retention: Retention, wall_s: Callable[[], float]) -> None:
        """For as long as the journal is open; failures are told and tried again later."""
        next_prune_s = 0.0
        while True:
            try:
                if time.monotonic() >= next_prune_s:
                    next_prune_s = time.monotonic() + _PRUNE_EVERY_S
                    await self.prune(retention, wall_s())
                if self._wants_checkpoint():
                    await self.checkpoint()
            except JournalError as failure:
                log.warning("journal.tending_failed", error=failure.message, code=failure.code)
            except Exception:  # a defect here must not end the tending, nor hide
                log.exception("journal.tending_failed")
            await asyncio.sleep(_IDLE_S)

    def _wants_checkpoint(self) -> bool:
        commits = 0 if self._store is None else self._store.commits_in_log
        is_idle = time.monotonic() - self._last_write_s > _IDLE_S
        return commits > _COMMITS_AT_MOST or (is_idle and commits > _COMMITS_WORTH_A_CHECKPOINT)

    async def _open(self) -> None:
        await in_executor(self._executor, self._open_here)

    def _open_here(self) -> None:
        owner = Ownership(self._path)
        try:
            self._store = Store(self._path, open_connection(self._path, owner), owner)
        except BaseException:
            owner.release()
            raise

    async def _close(self) -> None:
        opened, self._store = self._store, None
        if opened is None:
            return
        try:
            await in_executor(self._executor, opened.close)
        except JournalError as failure:  # all is durable, only not tidied up
            log.warning("journal.not_closed_cleanly", error=failure.message, code=failure.code)


@contextlib.asynccontextmanager
async def open_journal(
    path: Path,
    *,
    retention: Retention | None = None,
    on_commit: Callable[[float], object] | None = None,
    wall_s: Callable[[], float] = time.time,
) -> AsyncIterator[SqliteJournal]:
    """Open, or make, the journal at `path`; its directory must exist.

    `on_commit` is called with the seconds each transaction took, in the journal's thread.
    Raises JournalError, with the files left as they were found: see `opening`.
    """
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="journal")
    journal = SqliteJournal(path, executor, on_commit)
    try:
        await journal._open()
        tending = asyncio.create_task(
            journal._tend(retention or Retention(), wall_s), name="journal.tend"
        )
        try:
            yield journal
        finally:
            tending.cancel()
            await asyncio.wait([tending])
    finally:
        try:
            await journal._close()
        finally:
            await in_thread(executor.shutdown)
