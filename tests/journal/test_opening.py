"""A journal is opened whole or not at all, and never replaced by an empty one."""

import asyncio
import os
import sqlite3
import stat
from pathlib import Path

import pytest

from migrd.errors import JournalError
from migrd.journal import schema
from migrd.journal.opening import close_cleanly, open_connection
from migrd.journal.owner import Ownership
from migrd.journal.sqlite import open_journal
from tests.journal.files import (
    NAME,
    altered,
    as_after_a_crash,
    contents,
    flip,
)
from tests.journal.samples import event, request, vm

_WAL_HEADER_BYTES = 32
_PAGE_BYTES = 4096
_FRAME_BYTES = _PAGE_BYTES + 24


async def _fill(path: Path, events: int = 3) -> None:
    async with open_journal(path) as journal:
        await journal.create_outgoing(request())
        for _ in range(events):
            await journal.append_outgoing("m1", [event()])


async def _refusal(path: Path) -> JournalError:
    before = contents(path.parent)
    with pytest.raises(JournalError) as refused:
        async with open_journal(path):
            pass
    assert contents(path.parent) == before, "a refused journal was touched"
    assert str(path) in refused.value.message
    return refused.value


async def _crashed(tmp_path: Path, events: int = 6) -> Path:
    """A journal with `events` commits in its log and no owner."""
    (tmp_path / "live").mkdir()
    async with open_journal(tmp_path / "live" / NAME) as journal:
        await journal.create_outgoing(request())
        for count in range(events):
            await journal.append_outgoing("m1", [event(wall_s=float(count))])
        return await asyncio.to_thread(as_after_a_crash, tmp_path / "live", tmp_path / "dead")


async def _events_in(path: Path) -> int:
    async with open_journal(path) as journal:
        ((_, events),) = (await journal.replay()).outgoing
        return len(events)


def _modes_in(directory: Path) -> dict[str, int]:
    return {file.name: stat.S_IMODE(file.stat().st_mode) for file in directory.iterdir()}


async def test_only_the_owner_may_read_its_files(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        async with open_journal(tmp_path / NAME) as journal:
            await journal.put_vm(vm())
            modes = await asyncio.to_thread(_modes_in, tmp_path)
    finally:
        os.umask(old)
    assert modes == {NAME: 0o600, f"{NAME}-wal": 0o600, f"{NAME}.lock": 0o600}


async def test_a_clean_end_leaves_one_file_beside_the_lock(tmp_path: Path) -> None:
    await _fill(tmp_path / NAME)
    assert set(contents(tmp_path)) == {NAME}


async def test_a_second_daemon_is_told_which_process_owns_the_journal(tmp_path: Path) -> None:
    async with open_journal(tmp_path / NAME) as journal:
        with pytest.raises(JournalError) as refused:
            async with open_journal(tmp_path / NAME):
                pass
        assert refused.value.code == "journal_in_use"
        assert f"process {os.getpid()}" in refused.value.message
        await journal.put_vm(vm())  # and the first goes on
    await _fill(tmp_path / NAME)


async def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(JournalError) as refused:
        async with open_journal(tmp_path / "nowhere" / NAME):
            pass
    assert refused.value.code == "journal_no_directory"
    assert "nowhere" in refused.value.message


async def test_a_crash_loses_nothing(tmp_path: Path) -> None:
    path = await _crashed(tmp_path, events=6)
    assert await _events_in(path) == 6


async def test_half_a_creation_is_begun_again(tmp_path: Path) -> None:
    (tmp_path / f"{NAME}.new").write_bytes(b"half")
    await _fill(tmp_path / NAME)
    assert await _events_in(tmp_path / NAME) == 3


async def test_a_deleted_journal_is_not_replaced_by_an_empty_one(tmp_path: Path) -> None:
    path = tmp_path / NAME
    await _fill(path)
    path.unlink()
    refused = await _refusal(path)
    assert refused.code == "journal_missing"
    assert ".lock" in refused.message


async def test_a_log_without_its_journal_is_not_taken_for_a_new_host(tmp_path: Path) -> None:
    path = await _crashed(tmp_path)
    path.unlink()
    path.with_name(f"{NAME}.lock").unlink()
    assert (await _refusal(path)).code == "journal_missing"


async def test_a_journal_restored_without_its_log_is_refused(tmp_path: Path) -> None:
    path = await _crashed(tmp_path)
    path.with_name(f"{NAME}-wal").unlink()
    refused = await _refusal(path)
    assert refused.code == "journal_missing"
    assert "-wal" in refused.message
    assert "never put an older copy back" in refused.message


@pytest.mark.parametrize("content", [b"", b"not a database at all", b"SQLite format 3\0"])
async def test_a_file_that_is_no_database_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / NAME).write_bytes(content)
    assert (await _refusal(tmp_path / NAME)).code == "journal_corrupt"


async def test_somebody_elses_database_is_refused(tmp_path: Path) -> None:
    with altered(tmp_path / NAME) as connection:
        connection.execute("CREATE TABLE theirs (x)")
    assert (await _refusal(tmp_path / NAME)).code == "journal_not_ours"


async def test_a_journal_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / NAME
    await _fill(path)
    octets = path.read_bytes()
    path.write_bytes(octets[: len(octets) // 2])
    assert (await _refusal(path)).code == "journal_corrupt"


async def test_no_single_flipped_bit_in_the_file_goes_unnoticed_in_what_was_decided(
    tmp_path: Path,
) -> None:
    path = tmp_path / NAME
    await _fill(path)
    sound = path.read_bytes()
    places = [at for at in range(100, len(sound)) if sound[at]][::23]
    assert len(places) > 100
    noticed = 0
    for at in places:
        flip(path, at)
        try:
            assert await _events_in(path) == 3  # a place that says nothing of ours
        except JournalError:
            noticed += 1
        path.write_bytes(sound)
        path.with_name(f"{NAME}-wal").unlink(missing_ok=True)
        path.with_name(f"{NAME}.lock").unlink()
    assert noticed > len(places) // 4


async def test_a_flipped_bit_in_the_middle_of_the_log_is_not_taken_for_its_end(
    tmp_path: Path,
) -> None:
    path = await _crashed(tmp_path)
    flip(path.with_name(f"{NAME}-wal"), _WAL_HEADER_BYTES + _FRAME_BYTES + 600)
    refused = await _refusal(path)
    assert refused.code == "journal_corrupt"
    assert "later" in refused.message


async def test_a_damaged_header_of_the_log_does_not_make_it_vanish(tmp_path: Path) -> None:
    path = await _crashed(tmp_path)
    flip(path.with_name(f"{NAME}-wal"), 17)
    assert (await _refusal(path)).code == "journal_corrupt"


def _last_commit_frame_at(wal: Path) -> int:
    octets = wal.read_bytes()
    salts = octets[16:24]
    frames = range(_WAL_HEADER_BYTES, len(octets) - _FRAME_BYTES + 1, _FRAME_BYTES)
    commits = [
        at for at in frames if octets[at + 8 : at + 16] == salts and any(octets[at + 4 : at + 8])
    ]
    return commits[-1]


async def test_a_tail_torn_by_a_power_cut_is_dropped_and_the_rest_is_there(tmp_path: Path) -> None:
    path = await _crashed(tmp_path, events=6)
    wal = path.with_name(f"{NAME}-wal")
    flip(wal, _last_commit_frame_at(wal) + 600)
    assert await _events_in(path) == 5


async def test_a_kill_between_the_two_writes_of_a_frame_costs_what_was_never_acknowledged(
    tmp_path: Path,
) -> None:
    """The frame's header is the new commit's, its page what the log had there before."""
    path = await _crashed(tmp_path, events=6)
    wal = path.with_name(f"{NAME}-wal")
    octets = bytearray(wal.read_bytes())
    page_at = _last_commit_frame_at(wal) + _FRAME_BYTES - _PAGE_BYTES
    octets[page_at : page_at + _PAGE_BYTES] = b"\x5a" * _PAGE_BYTES
    wal.write_bytes(octets)
    assert await _events_in(path) == 5
    assert await _events_in(path) == 5, "and it opens again as usual"


async def test_a_journal_of_a_later_migrd_is_refused_untouched(tmp_path: Path) -> None:
    path = tmp_path / NAME
    await _fill(path)
    with altered(path) as connection:
        connection.execute(f"PRAGMA user_version = {schema.SCHEMA_VERSION + 1}")
    refused = await _refusal(path)
    assert refused.code == "journal_too_new"
    assert f"version {schema.SCHEMA_VERSION + 1}" in refused.message


async def test_a_later_version_that_is_only_in_the_log_is_seen(tmp_path: Path) -> None:
    (tmp_path / "live").mkdir()
    await _fill(tmp_path / "live" / NAME)
    with altered(tmp_path / "live" / NAME) as connection:
        connection.execute("PRAGMA wal_autocheckpoint = 0")
        connection.execute(f"PRAGMA user_version = {schema.SCHEMA_VERSION + 1}")
        path = await asyncio.to_thread(as_after_a_crash, tmp_path / "live", tmp_path / "dead")
    path.with_name(f"{NAME}-shm").unlink(missing_ok=True)
    assert (await _refusal(path)).code == "journal_too_new"


def _make_version_0(path: Path) -> None:
    with altered(path) as connection:
        connection.execute("CREATE TABLE old_vms (name TEXT)")
        connection.execute("INSERT INTO old_vms VALUES ('web-1')")
        connection.execute(f"PRAGMA application_id = {schema.APPLICATION_ID}")


def _open_with(path: Path, steps: dict[int, schema.Step]) -> list[str]:
    with Ownership(path) as owner:
        connection = open_connection(path, owner, steps=steps, target=2)
        names = [row[0] for row in connection.execute("SELECT name FROM renamed_vms")]
        close_cleanly(path, connection, owner)
    return names


def _rename(connection: sqlite3.Connection) -> None:
    connection.execute("ALTER TABLE old_vms RENAME TO renamed_vms")


def _fail(connection: sqlite3.Connection) -> None:
    connection.execute("DROP TABLE renamed_vms")
    raise RuntimeError("planted")


def test_an_older_journal_is_brought_up_step_by_step(tmp_path: Path) -> None:
    path = tmp_path / NAME
    _make_version_0(path)
    seen = []
    steps = {0: _rename, 1: lambda connection: seen.append(connection)}
    assert _open_with(path, steps) == ["web-1"]
    assert len(seen) == 1
    assert _open_with(path, {}) == ["web-1"]  # and stays there


def test_an_upgrade_that_fails_leaves_the_old_journal(tmp_path: Path) -> None:
    path = tmp_path / NAME
    _make_version_0(path)
    with pytest.raises(RuntimeError, match="planted"):
        _open_with(path, {0: _rename, 1: _fail})
    with altered(path) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (0,)
        assert connection.execute("SELECT name FROM old_vms").fetchall() == [("web-1",)]
    assert _open_with(path, {0: _rename, 1: lambda _: None}) == ["web-1"]


async def test_a_journal_too_old_to_upgrade_is_refused_untouched(tmp_path: Path) -> None:
    _make_version_0(tmp_path / NAME)
    refused = await _refusal(tmp_path / NAME)
    assert refused.code == "journal_too_old"
    assert "version 0" in refused.message


async def test_cancelled_while_opening_it_lets_go_of_the_journal(tmp_path: Path) -> None:
    async def stay_open() -> None:
        async with open_journal(tmp_path / NAME):
            await asyncio.Event().wait()

    for turns in range(6):
        task = asyncio.create_task(stay_open())
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
    await _fill(tmp_path / NAME)
