"""A record that is not understood stops the start, and says where it is and what to do."""

import json
import zlib
from pathlib import Path
from typing import Any

import pytest

from migrd.errors import JournalError
from migrd.journal.sqlite import open_journal
from tests.journal.files import NAME, altered
from tests.journal.samples import destination_event, event, incoming, request, rich_event, vm


@pytest.fixture
async def path(tmp_path: Path) -> Path:
    async with open_journal(tmp_path / NAME) as journal:
        await journal.put_vm(vm())
        await journal.create_outgoing(request())
        await journal.append_outgoing("m1", [event(), rich_event(), event()])
        await journal.create_incoming(incoming())
        await journal.append_incoming("i1", [destination_event()])
    return tmp_path / NAME


async def _refusal(path: Path) -> str:
    async with open_journal(path) as journal:
        with pytest.raises(JournalError) as refused:
            await journal.replay()
    assert refused.value.code == "journal_not_understood"
    message = refused.value.message
    assert str(path) in message
    assert "Start the migrd that wrote it" in message
    assert "no older journal" in message
    return message


def _rewrite(path: Path, table: str, where: str, change: dict[str, Any]) -> None:
    """Change fields of one record as another version would write it: with a good checksum."""
    with altered(path) as connection:
        kind, version, body = connection.execute(
            f"SELECT kind, version, body FROM {table} WHERE {where}"
        ).fetchone()
        octets = json.dumps({**json.loads(body), **change}).encode()
        crc = zlib.crc32(octets, zlib.crc32(f"{kind}/{version}".encode()))
        connection.execute(f"UPDATE {table} SET body = ?, crc = ? WHERE {where}", (octets, crc))


SECOND = "role = 'source' AND seq = 1"


async def test_an_unknown_trigger_stops_the_start(path: Path) -> None:
    _rewrite(path, "events", SECOND, {"trigger": "teleported"})
    message = await _refusal(path)
    assert "table events, row source/m1/1" in message
    assert "teleported" in message


async def test_an_unknown_field_stops_the_start(path: Path) -> None:
    _rewrite(path, "events", SECOND, {"fenced_by": "ipmi"})
    assert "field fenced_by is not known" in await _refusal(path)


async def test_an_unknown_field_deep_inside_stops_the_start(path: Path) -> None:
    _rewrite(path, "events", SECOND, {"refusals": [{"code": "a", "message": "b", "bar": 1}] * 2})
    assert "refusals.0.bar" in await _refusal(path)


async def test_a_value_of_another_type_is_not_bent_into_shape(path: Path) -> None:
    _rewrite(path, "events", SECOND, {"wall_s": "1001.5"})
    assert "wall_s" in await _refusal(path)


async def test_a_field_that_an_older_version_did_not_have_takes_its_default(path: Path) -> None:
    with altered(path) as connection:
        (body,) = connection.execute(f"SELECT body FROM events WHERE {SECOND}").fetchone()
        older = {k: v for k, v in json.loads(body).items() if k != "source_died"}
        octets = json.dumps(older).encode()
        crc = zlib.crc32(octets, zlib.crc32(b"migration_event/1"))
        connection.execute(f"UPDATE events SET body = ?, crc = ? WHERE {SECOND}", (octets, crc))
    async with open_journal(path) as journal:
        ((_, events),) = (await journal.replay()).outgoing
    assert events[1].source_died is False
    assert events[1].cause == rich_event().cause


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        (f"DELETE FROM events WHERE {SECOND}", "source/m1/1 before it is missing"),
        ("DELETE FROM events WHERE role = 'source' AND seq = 0", "source/m1/0 before it"),
        (f"UPDATE events SET version = 0 WHERE {SECOND}", "version 0"),
        (f"UPDATE events SET kind = 'vm' WHERE {SECOND}", "kind 'vm'"),
        (f"UPDATE events SET body = replace(body, '7.25', '8.25') WHERE {SECOND}", "row"),
        (f"UPDATE events SET crc = crc + 1 WHERE {SECOND}", "checksum"),
        ("UPDATE events SET crc = crc + 1 WHERE role = 'destination'", "row destination/i1/0"),
        ("UPDATE migrations SET crc = 0 WHERE role = 'source'", "migrations, row source/m1"),
        ("UPDATE migrations SET body = x'00' WHERE role = 'destination'", "destination/i1"),
        ("UPDATE vms SET crc = 0", "vms, row web-1"),
        ("UPDATE vms SET body = 17", "vms, row web-1"),
    ],
)
async def test_an_altered_row_is_named(path: Path, statement: str, said: str) -> None:
    with altered(path) as connection:
        assert connection.execute(statement).rowcount == 1
    assert said in await _refusal(path)
