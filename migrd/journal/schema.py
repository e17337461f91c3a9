"""The tables of the journal, and how older ones become these.

    migrations   one row per migration and role: the request as sealed record, its idempotency key
      ├ events   what happened to it, seq 0, 1, 2, ... without a gap
      └ resolutions   what operators said of it, seq 0, 1, 2, ... (since version 2)
    observations rounds and decisions, in batches; nobody's fate hangs on them
    vms          the VMs this host knows
    epochs       highest epoch ever seen of each VM; outlives the VM's row: epochs only grow

PRAGMA application_id says that a file is a migrd journal, user_version which version of the tables
it has. A file from a later migrd is refused unopened; an older one is brought up to date step by
step in one transaction (`upgrade`).
"""

import sqlite3
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from struct import Struct
from typing import Final

from migrd.errors import JournalError

APPLICATION_ID: Final = 0x6D677264  # "mgrd"
SCHEMA_VERSION: Final = 2

RESOLUTIONS: Final = """
CREATE TABLE resolutions (
    role TEXT NOT NULL,
    migration_id TEXT NOT NULL,
    seq INTEGER NOT NULL,
    kind TEXT NOT NULL,
    version INTEGER NOT NULL,
    body BLOB NOT NULL,
    crc INTEGER NOT NULL,
    PRIMARY KEY (role, migration_id, seq),
    FOREIGN KEY (role, migration_id) REFERENCES migrations (role, id) ON DELETE CASCADE
) WITHOUT ROWID
"""

TABLES: Final = f"""
CREATE TABLE migrations (
    role TEXT NOT NULL CHECK (role IN ('source', 'destination')),
    id TEXT NOT NULL,
    vm TEXT NOT NULL,
    epoch INTEGER NOT NULL,
    created_wall_s REAL NOT NULL,
    idempotency_key TEXT UNIQUE,
    body_digest TEXT,
    kind TEXT NOT NULL,
    version INTEGER NOT NULL,
    body BLOB NOT NULL,
    crc INTEGER NOT NULL,
    PRIMARY KEY (role, id)
) WITHOUT ROWID;

CREATE TABLE events (
    role TEXT NOT NULL,
    migration_id TEXT NOT NULL,
    seq INTEGER NOT NULL,
    kind TEXT NOT NULL,
    version INTEGER NOT NULL,
    body BLOB NOT NULL,
    crc INTEGER NOT NULL,
    PRIMARY KEY (role, migration_id, seq),
    FOREIGN KEY (role, migration_id) REFERENCES migrations (role, id) ON DELETE CASCADE
) WITHOUT ROWID;

CREATE TABLE observations (
    migration_id TEXT NOT NULL,
    kind TEXT NOT NULL,
    batch INTEGER NOT NULL,
    body BLOB NOT NULL,
    PRIMARY KEY (migration_id, kind, batch)
) WITHOUT ROWID;

CREATE TABLE vms (
    name TEXT PRIMARY KEY,
    epoch INTEGER NOT NULL,
    kind TEXT NOT NULL,
    version INTEGER NOT NULL,
    body BLOB NOT NULL,
    crc INTEGER NOT NULL
) WITHOUT ROWID;

CREATE TABLE epochs (vm TEXT PRIMARY KEY, epoch INTEGER NOT NULL) WITHOUT ROWID;
{RESOLUTIONS};
"""

Step = Callable[[sqlite3.Connection], None]


def _resolutions(connection: sqlite3.Connection) -> None:
    connection.execute(RESOLUTIONS)


STEPS: Final[Mapping[int, Step]] = {1: _resolutions}
"""version n -> what makes a file of version n one of n + 1. Runs inside upgrade's transaction,
which `executescript` would end: single statements only."""

_SQLITE_MAGIC: Final = b"SQLite format 3\0"
_AT_60: Final = Struct(">I4xI")  # user_version, (incremental vacuum), application_id


@dataclass(frozen=True)
class FileFacts:
    """What the first page of a database file says of it."""

    version: int
    is_ours: bool


def facts_of(page_one: bytes) -> FileFacts | None:
    """None when it is no SQLite database (an empty file is none either)."""
    if not page_one.startswith(_SQLITE_MAGIC) or len(page_one) < 100:
        return None
    version, application_id = _AT_60.unpack_from(page_one, 60)
    return FileFacts(version, application_id == APPLICATION_ID)


def create(connection: sqlite3.Connection) -> None:
    """Make the tables in an empty database, in one transaction."""
    connection.executescript(
        f"BEGIN IMMEDIATE; {TABLES}"
        f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;"
    )


def upgrade(
    connection: sqlite3.Connection,
    path: Path,
    *,
    steps: Mapping[int, Step] = STEPS,
    target: int = SCHEMA_VERSION,
) -> None:
    """Bring the tables to version `target`: all steps in one transaction, or none."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    require_steps(path, version, steps=steps, target=target)
    if version == target:
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        for number in range(version, target):
            steps[number](connection)
        connection.execute(f"PRAGMA user_version = {target}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def require_steps(path: Path, version: int, *, steps: Mapping[int, Step], target: int) -> None:
    """Raises JournalError (`journal_too_old`) when a step from `version` to `target` is missing."""
    missing = [n for n in range(version, target) if n not in steps]
    if missing:
        raise JournalError(
            f"{path}: tables of version {version}, this migrd writes {target} and does not know"
            f" how to leave version {missing[0]}: start an older migrd first, and let its"
            " migrations end",
            code="journal_too_old",
        )
