"""From rows back to what the engine wrote; the first row that makes no sense stops it."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TypeVar

from migrd.engine.ports import Replay, StoredResolution
from migrd.errors import JournalError
from migrd.journal import codec
from migrd.journal.codec import Codec, Sealed, UnreadableRecord
from migrd.journal.retention import end_of_incoming, end_of_outgoing
from migrd.journal.store import Role, Store

S = TypeVar("S")
E = TypeVar("E")
T = TypeVar("T")

Row = tuple[object, ...]

_MIGRATIONS = "SELECT id, kind, version, body, crc FROM migrations WHERE role = ?"
_WORDS = (
    "SELECT migration_id, seq, kind, version, body, crc FROM resolutions"
    " WHERE role = ? ORDER BY migration_id, seq"
)
_EVENTS = "SELECT migration_id, seq, kind, version, body, crc FROM events WHERE role = ?"


def read_replay(opened: Store, path: Path) -> Replay:
    """Blocking. Raises JournalError (`journal_not_understood`)."""
    vms = [
        _read(codec.VM, path, f"vms, row {name}", rest)
        for name, *rest in opened.rows("SELECT name, kind, version, body, crc FROM vms")
    ]
    outgoing = _read_role(opened, path, Role.SOURCE, codec.REQUEST, codec.MIGRATION_EVENT)
    incoming = _read_role(opened, path, Role.DESTINATION, codec.INCOMING, codec.DESTINATION_EVENT)
    words = [word for role in Role for word in _read_words(opened, path, role)]
    return Replay(vms, list(outgoing), list(incoming), words)


def _read_words(opened: Store, path: Path, role: Role) -> Iterator[StoredResolution]:
    rows = opened.rows(_WORDS, (role,))
    for id_, of_one in groupby(rows, key=lambda row: row[0]):
        place = f"{role}/{id_}"
        yield from _read_numbered(codec.RESOLUTION, path, "resolutions", place, list(of_one))


def fetch_one(opened: Store, role: Role, id_: str) -> tuple[list[Row], list[Row]]:
    """The raw rows of one migration and of its events: quick, for the journal's thread."""
    return (
        opened.rows(f"{_MIGRATIONS} AND id = ?", (role, id_)),
        opened.rows(f"{_EVENTS} AND migration_id = ? ORDER BY seq", (role, id_)),
    )


def ended_wall_s(path: Path, role: Role, rows: tuple[list[Row], list[Row]]) -> float | None:
    """When the migration of `fetch_one` ended; None while it has not. For any thread."""
    migrations, events = rows
    if role is Role.SOURCE:
        request = _pair(path, role, codec.REQUEST, codec.MIGRATION_EVENT, migrations, events)
        return next((end_of_outgoing(*one) for one in request), None)
    incoming = _pair(path, role, codec.INCOMING, codec.DESTINATION_EVENT, migrations, events)
    return next((end_of_incoming(*one) for one in incoming), None)


def _read_role(
    opened: Store, path: Path, role: Role, stored: Codec[S], event: Codec[E]
) -> Iterator[tuple[S, Sequence[E]]]:
    migrations = opened.rows(f"{_MIGRATIONS} ORDER BY created_wall_s, epoch, id", (role,))
    events = opened.rows(f"{_EVENTS} ORDER BY migration_id, seq", (role,))
    return _pair(path, role, stored, event, migrations, events)


def _pair(
    path: Path,
    role: Role,
    stored: Codec[S],
    event: Codec[E],
    migrations: Sequence[Row],
    events: Sequence[Row],
) -> Iterator[tuple[S, Sequence[E]]]:
    events_of = {id_: list(rows) for id_, rows in groupby(events, key=lambda row: row[0])}
    for id_, *rest in migrations:
        value = _read(stored, path, f"migrations, row {role}/{id_}", rest)
        place, numbered = f"{role}/{id_}", events_of.get(id_, [])
        yield value, _read_numbered(event, path, "events", place, numbered)


def _read_numbered(
    of: Codec[E], path: Path, table: str, place: str, rows: Sequence[Row]
) -> list[E]:
    values = []
    for expected, (_, seq, *rest) in enumerate(rows):
        where = f"{table}, row {place}/{seq}"
        if seq != expected:
            raise _not_understood(path, where, f"row {place}/{expected} before it is missing")
        values.append(_read(of, path, where, rest))
    return values


def _read(of: Codec[T], path: Path, where: str, columns: Sequence[object]) -> T:
    kind, version, body, crc = columns
    if not (
        isinstance(kind, str)
        and isinstance(version, int)
        and isinstance(body, bytes)
        and isinstance(crc, int)
    ):
        raise _not_understood(path, where, "a column holds another type than migrd writes")
    try:
        return of.read(Sealed(kind, version, body, crc))
    except UnreadableRecord as failure:
        raise _not_understood(path, where, str(failure)) from failure


def _not_understood(path: Path, where: str, why: str) -> JournalError:
    return JournalError(
        f"{path}: table {where}: {why}. Start the migrd that wrote it. Where that one refuses it,"
        " too: do not delete the row, which may say where a guest runs, and put no older journal"
        " back, which does not know what was granted since; find out where each guest of this host"
        " runs, move journal, -wal and .lock away, and start anew",
        code="journal_not_understood",
    )
