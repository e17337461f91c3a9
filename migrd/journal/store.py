"""The statements of the journal; blocking, all in the journal's one thread.

A `Write` is one call of the port: a list of statements that happen together or not at all. `commit`
takes all writes that have queued up and makes one transaction of them, each inside a savepoint of
its own: one fsync, and one caller's Conflict is not the others'.

After a COMMIT that failed nobody knows what reached the disk: after a crash SQLite might find the
transaction whole, though its caller was told that nothing was written. So the log is emptied at
once (`wal_checkpoint(TRUNCATE)`), or, where the disk refuses that too, before the next write. Until
it succeeds every write fails, so that no step can have been taken on top of the one in doubt.
"""

import contextlib
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Final

from migrd.errors import Conflict, JournalError, MigrdError
from migrd.journal.codec import Sealed
from migrd.journal.faults import as_journal_error, journal_error
from migrd.journal.opening import close_cleanly, empty_log
from migrd.journal.owner import Ownership

OBSERVATION_BATCHES_KEPT: Final = 20_000
"""Per migration and kind: a migration that never converges must not fill the disk."""


class Role(StrEnum):
    SOURCE = "source"
    DESTINATION = "destination"


@dataclass(frozen=True)
class MigrationRow:
    """A migration's row, beside its sealed record."""

    role: Role
    id: str
    vm: str
    epoch: int
    created_wall_s: float
    idempotency_key: str | None = None
    body_digest: str | None = None


@dataclass(frozen=True)
class VmRow:
    name: str
    epoch: int
    sealed: Sealed


Statements = Callable[[sqlite3.Connection], None]


@dataclass
class Write:
    """One call of the port, and what became of it."""

    statements: Statements
    is_settled: bool = False
    error: MigrdError | None = field(default=None)

    def result(self) -> None:
        if self.error is not None:
            raise self.error
        if not self.is_settled:  # the transaction it was in ended on a defect, with nothing written
            raise JournalError("not written: see the log", code="journal_failed")


class Store:
    """The open journal file."""

    def __init__(self, path: Path, connection: sqlite3.Connection, owner: Ownership) -> None:
        self._path = path
        self._connection = connection
        self._owner = owner
        self._log_is_suspect = False
        self.commits_in_log = 0

    def commit(self, writes: Sequence[Write]) -> None:
        """Settle all writes: durable, or with an error of their own and no trace."""
        try:
            self._transact(writes)
        except sqlite3.Error as failure:
            if len(writes) > 1:  # one of them may be too large for what room is left
                for write in writes:
                    self.commit([write])
                return
            writes[0].error = as_journal_error(self._path, failure)
            with contextlib.suppress(sqlite3.Error):
                self._clear_suspicion()
        for write in writes:
            write.is_settled = True

    def _transact(self, writes: Sequence[Write]) -> None:
        connection = self._connection
        for write in writes:
            write.error = None
        try:
            self._clear_suspicion()
            connection.execute("BEGIN IMMEDIATE")
            for write in writes:
                self._apply(write)
            self._log_is_suspect = True
            connection.execute("COMMIT")
            self._log_is_suspect = False
            self.commits_in_log += 1
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise

    def _apply(self, write: Write) -> None:
        self._connection.execute("SAVEPOINT one")
        try:
            write.statements(self._connection)
        except MigrdError as error:
            write.error = error
        except (sqlite3.IntegrityError, sqlite3.DataError, OverflowError, ValueError) as failure:
            # about this write alone: a number beyond 64 bits, half a surrogate pair, ...
            write.error = JournalError(f"{self._path}: {failure}", code="record_unwritable")
        if write.error is not None:
            self._connection.execute("ROLLBACK TO one")
        self._connection.execute("RELEASE one")

    def _clear_suspicion(self) -> None:
        if not self._log_is_suspect:
            return
        empty_log(self._connection)
        self._log_is_suspect = False
        self.commits_in_log = 0

    def checkpoint(self) -> None:
        """Copy the log into the file, so that the next commit begins the log anew (same length)."""
        with journal_error(self._path):
            self._clear_suspicion()
            self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            self.commits_in_log = 0

    def rows(self, statement: str, parameters: Sequence[object] = ()) -> list[tuple[object, ...]]:
        with journal_error(self._path):
            return self._connection.execute(statement, parameters).fetchall()

    def close(self) -> None:
        """Let go of the file. Raises JournalError when the log could not be emptied: it stays,
        and nothing is lost."""
        try:
            close_cleanly(self._path, self._connection, self._owner)
        finally:
            self._owner.release()


def insert_migration(row: MigrationRow, sealed: Sealed) -> Statements:
    def run(connection: sqlite3.Connection) -> None:
        if _exists(connection, row.role, row.id):
            raise Conflict(f"migration {row.id} exists already", code="id_exists")
        if (
            row.idempotency_key is not None
            and connection.execute(
                "SELECT 1 FROM migrations WHERE idempotency_key = ?", (row.idempotency_key,)
            ).fetchone()
        ):
            raise Conflict("the idempotency key was used before", code="key_exists")
        connection.execute(
            "INSERT INTO migrations VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                *(row.role, row.id, row.vm, row.epoch, row.created_wall_s),
                *(row.idempotency_key, row.body_digest),
                *_columns(sealed),
            ),
        )
        _raise_epoch(connection, row.vm, row.epoch)

    return run


def insert_events(
    role: Role, migration_id: str, events: Sequence[Sealed], vm: VmRow | None
) -> Statements:
    def run(connection: sqlite3.Connection) -> None:
        if not _exists(connection, role, migration_id):
            raise JournalError(
                f"no migration {migration_id} with this host as {role}: create it first",
                code="unknown_migration",
            )
        (last,) = connection.execute(
            "SELECT max(seq) FROM events WHERE role = ? AND migration_id = ?", (role, migration_id)
        ).fetchone()
        first = 0 if last is None else last + 1
        connection.executemany(
            "INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?)",
            [(role, migration_id, seq, *_columns(e)) for seq, e in enumerate(events, first)],
        )
        if vm is not None:
            upsert_vm(vm)(connection)

    return run


def insert_resolution(role: Role, migration_id: str, sealed: Sealed) -> Statements:
    def run(connection: sqlite3.Connection) -> None:
        if not _exists(connection, role, migration_id):
            raise JournalError(
                f"no migration {migration_id} with this host as {role}", code="unknown_migration"
            )
        (count,) = connection.execute(
            "SELECT count(*) FROM resolutions WHERE role = ? AND migration_id = ?",
            (role, migration_id),
        ).fetchone()
        connection.execute(
            "INSERT INTO resolutions VALUES (?, ?, ?, ?, ?, ?, ?)",
            (role, migration_id, count, *_columns(sealed)),
        )

    return run


def upsert_vm(vm: VmRow) -> Statements:
    def run(connection: sqlite3.Connection) -> None:
        row = connection.execute("SELECT epoch FROM vms WHERE name = ?", (vm.name,)).fetchone()
        if row is not None and row[0] > vm.epoch:
            raise JournalError(
                f"VM {vm.name}: epoch {vm.epoch} after {row[0]}: an epoch only grows",
                code="epoch_went_back",
            )
        connection.execute(
            "INSERT INTO vms VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (name) DO UPDATE SET"
            " epoch = excluded.epoch, kind = excluded.kind, version = excluded.version,"
            " body = excluded.body, crc = excluded.crc",
            (vm.name, vm.epoch, *_columns(vm.sealed)),
        )
        _raise_epoch(connection, vm.name, vm.epoch)

    return run


def remove_vm(name: str) -> Statements:
    """Its epoch stays in `epochs`."""

    def run(connection: sqlite3.Connection) -> None:
        connection.execute("DELETE FROM vms WHERE name = ?", (name,))

    return run


def insert_observations(migration_id: str, kind: str, body: bytes) -> Statements:
    def run(connection: sqlite3.Connection) -> None:
        if not any(_exists(connection, role, migration_id) for role in Role):
            raise JournalError(f"no migration {migration_id}", code="unknown_migration")
        (last,) = connection.execute(
            "SELECT max(batch) FROM observations WHERE migration_id = ? AND kind = ?",
            (migration_id, kind),
        ).fetchone()
        batch = 0 if last is None else last + 1
        connection.execute(
            "INSERT INTO observations VALUES (?, ?, ?, ?)", (migration_id, kind, batch, body)
        )
        connection.execute(
            "DELETE FROM observations WHERE migration_id = ? AND kind = ? AND batch <= ?",
            (migration_id, kind, batch - OBSERVATION_BATCHES_KEPT),
        )

    return run


def remove_migrations(ids: Sequence[tuple[Role, str]]) -> Statements:
    """Ended migrations, with their events and observations."""

    def run(connection: sqlite3.Connection) -> None:
        for role, id_ in ids:
            connection.execute("DELETE FROM migrations WHERE role = ? AND id = ?", (role, id_))
            if not any(_exists(connection, other, id_) for other in Role):
                connection.execute("DELETE FROM observations WHERE migration_id = ?", (id_,))

    return run


def _exists(connection: sqlite3.Connection, role: Role, id_: str) -> bool:
    row = connection.execute("SELECT 1 FROM migrations WHERE role = ? AND id = ?", (role, id_))
    return row.fetchone() is not None


def _raise_epoch(connection: sqlite3.Connection, vm: str, epoch: int) -> None:
    connection.execute(
        "INSERT INTO epochs VALUES (?, ?)"
        " ON CONFLICT (vm) DO UPDATE SET epoch = max(epoch, excluded.epoch)",
        (vm, epoch),
    )


def _columns(sealed: Sealed) -> tuple[str, int, bytes, int]:
    return sealed.kind, sealed.version, sealed.body, sealed.crc
