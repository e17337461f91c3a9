"""Journals of other versions: older ones are taken up, newer ones are refused without harm."""

import asyncio
import copy
import json
import os
import signal
import sqlite3
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from migrd.errors import JournalError
from migrd.journal import codec, schema
from migrd.journal.codec import Codec, Sealed, UnreadableRecord
from migrd.journal.opening import close_cleanly, open_connection
from migrd.journal.owner import Ownership
from migrd.journal.sqlite import open_journal
from tests.fakes.journal import FakeDisk
from tests.fakes.virtual_time import VirtualTimeLoop
from tests.journal import samples
from tests.journal.files import NAME, altered, contents
from tests.journal.standing import HOSTS, ID, POINTS, Point, standing
from tests.journal.test_decisions import decision, stored

HERE = Path(__file__).parent
SHAPES = HERE / "shapes.json"


def of_version_1(member: str, path: Path) -> Path:
    """A journal that schema version 1 wrote, as it was left on disk."""
    with tarfile.open(HERE / "version_1.tar.xz") as tar:
        found = tar.extractfile(member)
        assert found is not None
        path.write_bytes(found.read())
    return path


def version_of(path: Path) -> int:
    with altered(path) as connection:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
    return int(version)


def upgrade(path: Path) -> None:
    with Ownership(path) as owner:
        close_cleanly(path, open_connection(path, owner), owner)


# Older tables -------------------------------------------------------------------------------------


async def test_a_journal_of_version_1_says_all_that_was_written_into_it(tmp_path: Path) -> None:
    path = of_version_1("rich.db", tmp_path / NAME)
    assert version_of(path) == 1
    async with open_journal(path) as journal:
        replay = await journal.replay()
        assert await journal.find_key("key-1") == ("m1", "digest of key-1")
        assert await journal.observations("m1", "round") == [{"number": 1}]
        assert await journal.last_epoch("web-1") == 3
    assert replay.vms == [stored()]
    ((asked, events),) = replay.outgoing
    assert asked == samples.request(key="key-1")
    assert events == [samples.event(), samples.rich_event()]
    ((there, came),) = replay.incoming
    assert there.decision == decision()
    assert came == samples.ran()
    assert replay.resolutions == []
    assert version_of(path) == schema.SCHEMA_VERSION


def test_an_upgraded_journal_has_the_tables_of_a_new_one(tmp_path: Path) -> None:
    old, new = of_version_1("rich.db", tmp_path / "old.db"), tmp_path / "new.db"
    upgrade(old)
    upgrade(new)
    told = []
    for path in (old, new):
        with altered(path) as connection:
            rows = connection.execute("SELECT type, name, sql FROM sqlite_schema ORDER BY name")
            told.append(rows.fetchall())
    assert told[0] == told[1]


def _records(path: Path) -> dict[str, list[tuple[Any, ...]]]:
    with altered(path) as connection:
        return {
            table: connection.execute(f"SELECT * FROM {table}").fetchall()
            for table in ("migrations", "events", "observations", "vms", "epochs")
        }


def test_an_upgrade_leaves_every_record_as_it_was_written(tmp_path: Path) -> None:
    path = of_version_1("granted/alpha.db", tmp_path / NAME)
    before = _records(path)
    upgrade(path)
    assert _records(path) == before


def disk_of(path: Path) -> FakeDisk:
    """What a journal holds, for a simulated daemon."""
    with altered(path) as connection:
        disk = FakeDisk(
            vms={row[0]: (row[1], Sealed(*row[2:])) for row in _all(connection, "vms")},
            epochs=dict(_all(connection, "epochs")),
        )
        for role, id_, *_, kind, version, body, crc in _all(connection, "migrations"):
            known = disk.outgoing if role == "source" else disk.incoming
            known[id_] = (Sealed(kind, version, body, crc), [])
        for role, id_, _, *record in _all(connection, "events"):
            known = disk.outgoing if role == "source" else disk.incoming
            known[id_][1].append(Sealed(*record))
        for id_, kind, _, body in _all(connection, "observations"):
            disk.observations.setdefault((id_, kind), []).extend(json.loads(body))
    return disk


def _all(connection: sqlite3.Connection, table: str) -> Iterator[tuple[Any, ...]]:
    yield from connection.execute(f"SELECT * FROM {table}")


async def _taken_up(point: Point, disks: Mapping[str, FakeDisk]) -> str:
    """The phase in which the migration ends, both daemons started on journals of version 1."""
    async with standing(point) as pair:
        for name in HOSTS:
            assert pair.disks[name].outgoing.keys() == disks[name].outgoing.keys()
            pair.disks[name] = copy.deepcopy(disks[name])
            await pair.start(name)
        view = await pair.until_over(ID)
        await pair.settle()
        if pair.running_on() is not None:
            await pair.migrates_again()
    return view.phase


@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.name)
def test_a_migration_of_a_version_1_journal_is_taken_up_where_it_stood(
    tmp_path: Path, point: Point
) -> None:
    disks = {}
    for name in HOSTS:
        path = of_version_1(f"{point.name}/{name}.db", tmp_path / f"{name}.db")
        upgrade(path)
        disks[name] = disk_of(path)
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        assert runner.run(_taken_up(point, disks)) in point.ends


# Killed in the middle -----------------------------------------------------------------------------

_DIES = """
import os, signal, sqlite3, sys
from pathlib import Path
from migrd.journal import opening
from migrd.journal.owner import Ownership

base, last = sys.argv[1], int(sys.argv[2])

class Dying(sqlite3.Connection):
    left = 0
    def execute(self, *words):
        Dying.left -= 1
        if Dying.left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().execute(*words)

connect = sqlite3.connect
opening.sqlite3.connect = lambda *a, **k: connect(*a, **{**k, "factory": Dying})
for first in range(last + 1):
    if (child := os.fork()) == 0:
        path, Dying.left = Path(f"{base}.{first}"), first
        with Ownership(path) as owner:
            opening.close_cleanly(path, opening.open_connection(path, owner), owner)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    ended = os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status)
    print("ended", ended)
"""
_MOST_STATEMENTS = 60


def test_a_death_at_any_statement_of_an_upgrade_leaves_the_old_journal_or_the_new(
    tmp_path: Path,
) -> None:
    octets = of_version_1("granted/alpha.db", tmp_path / "first.db").read_bytes()
    before = _records(tmp_path / "first.db")
    for count in range(_MOST_STATEMENTS + 1):
        (tmp_path / f"{NAME}.{count}").write_bytes(octets)
    said = subprocess.run(
        [sys.executable, "-c", _DIES, str(tmp_path / NAME), str(_MOST_STATEMENTS)],
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    ).stdout.splitlines()
    ended = [line.split()[1] for line in said if line.startswith("ended")]
    assert len(ended) == _MOST_STATEMENTS + 1
    killed = [n for n, how in enumerate(ended) if how == str(int(signal.SIGKILL))]
    assert killed == list(range(len(killed))), "killed at each statement, until there are no more"
    assert 20 < len(killed) < _MOST_STATEMENTS
    left = set()
    for count in range(_MOST_STATEMENTS + 1):
        path = tmp_path / f"{NAME}.{count}"
        left.add(_version_as_replayed(path))
        upgrade(path)
        assert version_of(path) == schema.SCHEMA_VERSION
        assert _records(path) == before
    assert left == {1, schema.SCHEMA_VERSION}


def _version_as_replayed(path: Path) -> int:
    """From the files alone, the log taken into account."""
    uri = f"{path.as_uri()}?mode=ro"
    connection = sqlite3.connect(uri, uri=True)
    try:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_schema")}
    finally:
        connection.close()
    assert ("resolutions" in tables) is (version == schema.SCHEMA_VERSION)
    return int(version)


# Newer ones ---------------------------------------------------------------------------------------


async def _refused_untouched(path: Path) -> str:
    before = contents(path.parent)
    with pytest.raises(JournalError) as refused:
        async with open_journal(path):
            pass
    assert contents(path.parent) == before, "a refused journal was touched"
    assert refused.value.code == "journal_too_new"
    assert "start the migrd that wrote it, or a later one" in refused.value.message
    return refused.value.message


@pytest.mark.parametrize(
    ("table", "kind"),
    [("events", "migration_event"), ("vms", "vm"), ("migrations", "request")],
)
async def test_records_of_a_later_migrd_are_refused_before_anything_is_touched(
    tmp_path: Path, table: str, kind: str
) -> None:
    path = of_version_1("rich.db", tmp_path / NAME)
    newer = codec.NEWEST[kind] + 1
    with altered(path) as connection:
        changed = connection.execute(
            f"UPDATE {table} SET version = ? WHERE kind = ?", (newer, kind)
        )
        assert changed.rowcount
    message = await _refused_untouched(path)
    assert f"records `{kind}` of version {newer}" in message
    assert f"knows {newer - 1} at most" in message


async def test_a_kind_of_record_of_a_later_migrd_is_refused_untouched(tmp_path: Path) -> None:
    path = of_version_1("rich.db", tmp_path / NAME)
    with altered(path) as connection:
        connection.execute("UPDATE events SET kind = 'rumour' WHERE role = 'source' AND seq = 1")
    assert "records `rumour` of version 1, this migrd knows no such kind" in (
        await _refused_untouched(path)
    )


def test_the_daemon_refuses_a_newer_journal_with_both_versions_and_the_cure(
    short_tmp_path: Path,
) -> None:
    tmp_path, state = short_tmp_path, short_tmp_path / "state"
    state.mkdir(mode=0o700)
    path = of_version_1("rich.db", state / NAME)
    newer = schema.SCHEMA_VERSION + 1
    with altered(path) as connection:
        connection.execute(f"PRAGMA user_version = {newer}")
    octets = path.read_bytes()
    config = tmp_path / "migrd.toml"
    config.write_text(
        f'[host]\nname = "alpha"\nstate_dir = "{state}"\nruntime_dir = "{tmp_path}/run"\n'
        f'profiles_dir = "{tmp_path}/profiles"\nadopt_dir = "{tmp_path}"\n'
    )
    (tmp_path / "profiles").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "migrd", "serve", "--config", str(config)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "NO_COLOR": "1"},
    )
    said = done.stdout + done.stderr
    assert done.returncode == 1, said
    assert f"tables of version {newer}, this migrd knows {schema.SCHEMA_VERSION} at most" in said
    assert "start the migrd that wrote it, or a later one" in said
    assert path.read_bytes() == octets
    assert {p.name for p in state.iterdir()} <= {NAME, f"{NAME}.lock"}


# Older records ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lamp:
    """A record in its third version: it was `on`, then `lit`, and now it has a `colour`."""

    name: str
    lit: bool
    colour: str


def _renamed(fields: dict[str, Any]) -> dict[str, Any]:
    return {"name": fields["name"], "lit": fields["on"]}


def _coloured(fields: dict[str, Any]) -> dict[str, Any]:
    return {**fields, "colour": "white"}


LAMP = Codec("lamp", 3, Lamp, {1: _renamed, 2: _coloured})


def _lamp(version: int, fields: dict[str, Any]) -> Sealed:
    body = json.dumps(fields).encode()
    return Sealed("lamp", version, body, zlib.crc32(body, zlib.crc32(f"lamp/{version}".encode())))


def test_a_record_is_brought_up_through_every_version_between() -> None:
    assert LAMP.read(_lamp(1, {"name": "a", "on": True})) == Lamp("a", True, "white")
    assert LAMP.read(_lamp(2, {"name": "a", "lit": True})) == Lamp("a", True, "white")
    assert LAMP.read(LAMP.write(Lamp("a", False, "red"))) == Lamp("a", False, "red")
    assert LAMP.write(Lamp("a", False, "red")).version == 3


@pytest.mark.parametrize(
    ("version", "fields", "said"),
    [
        (4, {"name": "a", "lit": True, "colour": "red"}, "version 4; this migrd knows 1 to 3"),
        (0, {"name": "a"}, "version 0"),
        (1, {"name": "a"}, "cannot be brought to 3"),
        (2, {"name": "a", "lit": True, "wick": 1}, "field wick is not known"),
        (1, {"name": "a", "on": "yes"}, "lit"),
    ],
)
def test_an_older_record_is_read_as_strictly_as_one_of_today(
    version: int, fields: dict[str, Any], said: str
) -> None:
    with pytest.raises(UnreadableRecord, match=said):
        LAMP.read(_lamp(version, fields))


def test_the_checksum_of_an_older_record_is_looked_at_before_it_is_brought_up() -> None:
    sealed = _lamp(1, {"name": "a", "on": True})
    with pytest.raises(UnreadableRecord, match="altered"):
        LAMP.read(Sealed(sealed.kind, 1, sealed.body.replace(b"true", b"false"), sealed.crc))


def test_a_version_that_nothing_leads_to_is_a_defect_found_at_import() -> None:
    with pytest.raises(ValueError, match="lamp: version 3 needs an upgrade from each"):
        Codec("lamp", 3, Lamp, {1: _renamed})


def _shape(of: Codec[Any]) -> dict[str, list[str]]:
    """Each class in a record with its fields."""
    found = TypeAdapter(of.type).json_schema()
    parts = {of.type.__name__: found, **found.pop("$defs", {})}
    return {
        name: sorted(part.get("properties", part.get("enum", ())))
        for name, part in sorted(parts.items())
    }


def shapes() -> dict[str, Any]:
    return {of.kind: {"version": of.version, "fields": _shape(of)} for of in codec.ALL}


def test_a_record_holds_what_its_version_says() -> None:
    """An older migrd must refuse what it does not know before it touches the journal."""
    noted = json.loads(SHAPES.read_text())
    for kind, found in shapes().items():
        assert found == noted.get(kind), (
            f"records of kind {kind} hold other fields or words than {SHAPES.name} notes for their"
            " version. Once a release has written them: raise the kind's version in"
            " migrd/journal/codec.py, with an upgrade from the one before. Then note it: python -m"
            " tests.journal.test_versions"
        )


if __name__ == "__main__":
    SHAPES.write_text(json.dumps(shapes(), indent=1, sort_keys=True) + "\n")
