"""Opens a journal, or says why not. A file that is refused is left byte for byte as it was found.

    own it (flock) > read the files ourselves (WAL, version) > SQLite's quick_check, read-only
        > versions of the records > open for writing > upgrade > make room in the log > note "open"

An older journal is brought up in one transaction, so that the death of this process at any of its
statements leaves the old one or the new one. No copy of the old one is kept: a journal that is put
back later does not know what has been granted since, and would run a guest twice.

"Not there" means "make a new one" only where none has ever been: an empty journal says that this
host has no guest and owes nobody an answer, which is the most dangerous thing it could say by
mistake. A new one is made aside and renamed, so that half a journal never has the journal's name.

Why these settings:
- synchronous=FULL: a commit returns after its fsync. NORMAL may lose the record that keeps a guest
  single.
- locking_mode=EXCLUSIVE: nobody else writes here, and without the shared-memory index a commit is
  a tenth faster. To look into a live journal, copy it together with its -wal file.
- wal_autocheckpoint=0: a checkpoint costs several fsyncs and would hit whichever commit comes
  along, perhaps the GRANT of a stopped guest. `Store.checkpoint` runs in idle moments instead, and
  the log keeps its length, so that a commit overwrites blocks and changes no file's size.
- cache_spill off: nothing of a transaction reaches the log before its COMMIT.
"""

import contextlib
import os
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import structlog

from migrd.errors import JournalError
from migrd.journal import schema
from migrd.journal.codec import NEWEST
from migrd.journal.faults import journal_error
from migrd.journal.owner import LastOwner, Ownership
from migrd.journal.wal import WalCorrupt, WalFacts, read_wal

_LOG_ROOM_BYTES: Final = 1 << 20
_LOG_ROOM_FRAME_BYTES: Final = 4096 + 24
_MAY_BE_TORN: Final = 1
"""Commits: what the end of the writer, in whatever way, can leave half written (journal.wal)."""
_CURE: Final = (
    "never put an older copy back, for it does not know what was granted since, and a guest could"
    " run twice; put these very files back if they were only moved; else find out where each guest"
    " of this host runs, move journal, -wal and .lock away, and start anew"
)
_START_LATER: Final = "start the migrd that wrote it, or a later one; nothing was changed"

log = structlog.get_logger(__name__)


def open_connection(
    path: Path,
    owner: Ownership,
    *,
    steps: Mapping[int, schema.Step] = schema.STEPS,
    target: int = schema.SCHEMA_VERSION,
) -> sqlite3.Connection:
    """Blocking. Raises JournalError (`journal_missing`, `journal_corrupt`, `journal_too_new`, ...)
    naming file and cure."""
    wal = path.with_name(path.name + "-wal")
    if not path.exists():
        _create(path, wal, owner.last)
    version = _look(path, wal, owner.last, target)
    schema.require_steps(path, version, steps=steps, target=target)
    _check_pages(path)
    with journal_error(path):
        connection = _connect(path)
    try:
        with journal_error(path):
            schema.upgrade(connection, path, steps=steps, target=target)
        if version != target:
            log.info("journal.upgraded", journal=str(path), before=version, now=target)
        _make_room(connection, wal)
        with journal_error(path):
            _sync_directory(path)
            owner.note("open")
    except BaseException:
        close_cleanly(path, connection, owner)
        raise
    return connection


def close_cleanly(path: Path, connection: sqlite3.Connection, owner: Ownership) -> None:
    """Empty the log, say so, close: in this order, since closing removes an empty log."""
    try:
        with journal_error(path):
            empty_log(connection)
            owner.note("closed")
    finally:
        connection.close()


def empty_log(connection: sqlite3.Connection) -> None:
    """Raises sqlite3.Error when it could not be done; the log is as it was then."""
    (busy, *_) = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    if busy:
        raise sqlite3.OperationalError("the log could not be emptied")


def _create(path: Path, wal: Path, last: LastOwner) -> None:
    if last.state is not None or wal.exists():
        trace = wal.name if last.pid is None else f"its .lock, by process {last.pid},"
        raise JournalError(
            f"{path}: the journal that was here is gone ({trace} is still there): {_CURE}",
            code="journal_missing",
        )
    aside = path.with_name(path.name + ".new")
    with journal_error(path):
        aside.unlink(missing_ok=True)
        os.close(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        with contextlib.closing(sqlite3.connect(aside, isolation_level=None)) as connection:
            connection.execute("PRAGMA synchronous = FULL")
            schema.create(connection)
        aside.rename(path)
        _sync_directory(path)


def _look(path: Path, wal: Path, last: LastOwner, target: int) -> int:
    """What can be known without SQLite, which would alter the files; the version of the tables."""
    with journal_error(path):
        if path.stat().st_mode & 0o077:
            path.chmod(0o600)
        with path.open("rb") as file:
            page_one = file.read(100)
    facts_of_wal = _look_at_log(path, wal, last)
    facts = schema.facts_of(facts_of_wal.page_one or page_one)
    if facts is None or schema.facts_of(page_one) is None:
        raise JournalError(
            f"{path}: not a database (its first bytes are {page_one[:16]!r}): {_CURE}",
            code="journal_corrupt",
        )
    if not facts.is_ours:
        raise JournalError(
            f"{path}: a database, but not a journal of migrd: correct the path",
            code="journal_not_ours",
        )
    if facts.version > target:
        raise JournalError(
            f"{path}: tables of version {facts.version}, this migrd knows {target} at most:"
            f" {_START_LATER}",
            code="journal_too_new",
        )
    return facts.version


def _look_at_log(path: Path, wal: Path, last: LastOwner) -> WalFacts:
    if last.state == "open" and not wal.exists():
        raise JournalError(
            f"{wal}: the log of {path.name} is gone; process {last.pid} did not close the journal,"
            f" so what it wrote last was in there: {_CURE}",
            code="journal_missing",
        )
    try:
        with journal_error(path):
            facts = read_wal(wal)
    except WalCorrupt as failure:
        raise JournalError(f"{wal}: {failure}: {_CURE}", code="journal_corrupt") from None
    if facts.lost_commits > _MAY_BE_TORN:
        raise JournalError(
            f"{wal}: damaged after commit {facts.commits}; {facts.lost_commits} later ones, which"
            f" may say where a guest runs, cannot be read: {_CURE}",
            code="journal_corrupt",
        )
    if facts.lost_commits:
        log.warning("journal.torn_tail", wal=str(wal), commits=facts.commits)
    return facts


def _check_pages(path: Path) -> None:
    """SQLite's own check, on a read-only connection: it takes the log into account and leaves
    both files alone."""
    with journal_error(path), _nothing_added(path):
        uri = f"{path.absolute().as_uri()}?mode=ro"
        with contextlib.closing(sqlite3.connect(uri, uri=True)) as connection:
            found = [str(row[0]) for row in connection.execute("PRAGMA quick_check(3)")]
            found += [
                f"{table} row without its migration"
                for table, *_ in connection.execute("PRAGMA foreign_key_check")
            ][:3]
            newer = [] if found != ["ok"] else _newer_records(connection)
    if found != ["ok"]:
        raise JournalError(
            f"{path}: damaged ({'; '.join(found[:4])}): {_CURE}", code="journal_corrupt"
        )
    if newer:
        raise JournalError(
            f"{path}: {'; '.join(newer[:4])}: {_START_LATER}", code="journal_too_new"
        )


def _newer_records(connection: sqlite3.Connection) -> list[str]:
    """What a later migrd has written, before anything is changed."""
    found: set[tuple[object, object]] = set()
    for (table,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'"):
        columns = {row[1] for row in connection.execute(f'PRAGMA table_info("{table}")')}
        if {"kind", "version", "crc"} <= columns:
            found |= set(connection.execute(f'SELECT DISTINCT kind, version FROM "{table}"'))
    return [
        f"records `{kind}` of version {version}, this migrd knows "
        + (f"{NEWEST[kind]} at most" if kind in NEWEST else "no such kind")
        for kind, version in sorted(found, key=str)
        if isinstance(kind, str)
        and isinstance(version, int)
        and version > NEWEST.get(kind, version - 1)
    ]


@contextlib.contextmanager
def _nothing_added(path: Path) -> Iterator[None]:
    """Even a read-only connection makes an index, and a log where there is none."""
    beside = [path.with_name(path.name + end) for end in ("-shm", "-wal")]
    added = [file for file in beside if not file.exists()]
    try:
        yield
    finally:
        for file in added:
            file.unlink(missing_ok=True)


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, cached_statements=64, timeout=2.0)
    try:
        for pragma, wanted in _PRAGMAS:
            row = connection.execute(f"PRAGMA {pragma}").fetchone()
            if wanted is not None and (row is None or row[0] != wanted):
                raise JournalError(f"{path}: PRAGMA {pragma} gives {row!r}, not {wanted!r}")
    except BaseException:
        connection.close()
        raise
    return connection


_PRAGMAS: Final[tuple[tuple[str, object], ...]] = (
    ("locking_mode = EXCLUSIVE", "exclusive"),
    ("journal_mode = WAL", "wal"),
    ("synchronous = FULL", None),
    ("synchronous", 2),
    ("foreign_keys = ON", None),
    ("foreign_keys", 1),
    ("wal_autocheckpoint = 0", 0),
    ("cache_spill = OFF", None),
    ("trusted_schema = OFF", None),
    ("temp_store = MEMORY", None),
)


def _make_room(connection: sqlite3.Connection, wal: Path) -> None:
    """Give the log its usual length now. A transaction that spills into the log and is rolled back
    leaves blocks to overwrite and no commit. Without room on the disk it is just not done."""
    with _spilling(connection), contextlib.suppress(sqlite3.Error):
        if wal.exists() and wal.stat().st_size >= _LOG_ROOM_BYTES:
            return
        connection.execute("BEGIN IMMEDIATE")
        try:
            connection.execute("CREATE TABLE room (filler BLOB)")
            connection.execute("INSERT INTO room VALUES (zeroblob(?))", (_LOG_ROOM_BYTES,))
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")


@contextlib.contextmanager
def _spilling(connection: sqlite3.Connection) -> Iterator[None]:
    (usual,) = connection.execute("PRAGMA cache_size").fetchone()
    connection.execute("PRAGMA cache_spill = ON")
    connection.execute("PRAGMA cache_size = 8")
    try:
        yield
    finally:
        connection.execute(f"PRAGMA cache_size = {usual}")
        connection.execute("PRAGMA cache_spill = OFF")


def _sync_directory(path: Path) -> None:
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
