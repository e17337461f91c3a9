"""A disk that fails: all or nothing per call, a clear answer, and it works again when it can."""

import asyncio
import contextlib
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrd.core.migration import Cause, MigrationEvent
from migrd.core.phases import Trigger
from migrd.errors import JournalError
from migrd.journal.sqlite import SqliteJournal, open_journal
from migrd.journal.store import Store
from tests.journal.files import NAME, as_after_a_crash
from tests.journal.samples import event, request, vm


def _mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, f"needs root: mount {' '.join(arguments)}: {done.stderr}"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    _mount("-t", "tmpfs", "-o", "size=3m", "migrd-test", str(place))
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True, timeout=20)


def _fill(place: Path) -> Path:
    ballast = place / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    return ballast


def _large_event() -> MigrationEvent:
    return MigrationEvent(Trigger.STARTED, 1.0, 1.0, cause=Cause("large", "x" * 100_000))


async def _append_until_refused(journal: SqliteJournal, one: MigrationEvent) -> JournalError:
    for _ in range(1000):
        try:
            await journal.append_outgoing("m1", [one], vm(epoch=7))
        except JournalError as refused:
            return refused
    raise AssertionError("the disk never filled up")


async def _count(journal: SqliteJournal) -> int:
    return len((await journal.replay()).outgoing[0][1])


async def test_a_full_disk_refuses_writes_whole_and_works_again_with_room(small_disk: Path) -> None:
    async with open_journal(small_disk / NAME) as journal:
        await journal.create_outgoing(request())
        ballast = await asyncio.to_thread(_fill, small_disk)
        refused = await _append_until_refused(journal, _large_event())
        assert refused.code == "journal_disk_full"
        assert "make room" in refused.message
        acknowledged = await _count(journal)
        with pytest.raises(JournalError):
            await journal.append_outgoing("m1", [_large_event()], vm(epoch=9))
        assert await _count(journal) == acknowledged
        await asyncio.to_thread(ballast.unlink)
        await journal.append_outgoing("m1", [event()], vm(epoch=9))
    async with open_journal(small_disk / NAME) as journal:
        assert await _count(journal) == acknowledged + 1
        assert (await journal.replay()).vms == [vm(epoch=9)]


async def test_a_crash_on_a_full_disk_brings_back_nothing_that_was_refused(
    small_disk: Path, tmp_path: Path
) -> None:
    async with open_journal(small_disk / NAME) as journal:
        await journal.create_outgoing(request())
        ballast = await asyncio.to_thread(_fill, small_disk)
        await _append_until_refused(journal, _large_event())
        acknowledged = await _count(journal)
        await asyncio.to_thread(ballast.unlink)
        left = await asyncio.to_thread(as_after_a_crash, small_disk, tmp_path / "left")
    async with open_journal(left) as journal:
        assert await _count(journal) == acknowledged


async def test_the_common_grant_still_fits_on_a_disk_that_has_just_filled_up(
    small_disk: Path,
) -> None:
    async with open_journal(small_disk / NAME) as journal:
        await journal.create_outgoing(request())
        await asyncio.to_thread(_fill, small_disk)
        for _ in range(20):  # into room that was taken when the journal was opened
            await journal.append_outgoing("m1", [event(Trigger.TRANSFER_COMPLETED)])
        assert await _count(journal) == 20


async def test_a_disk_that_turns_read_only_is_named_as_such(small_disk: Path) -> None:
    async with open_journal(small_disk / NAME) as journal:
        await journal.create_outgoing(request())
    await asyncio.to_thread(_mount, "-o", "remount,ro", str(small_disk))
    with pytest.raises(JournalError) as refused:
        async with open_journal(small_disk / NAME):
            pass
    assert refused.value.code in ("journal_read_only", "journal_no_directory")
    assert "ead-only" in refused.value.message
    await asyncio.to_thread(_mount, "-o", "remount,rw", str(small_disk))
    async with open_journal(small_disk / NAME) as journal:
        assert await _count(journal) == 0


@contextlib.contextmanager
def _files_at_most(size_bytes: int) -> Iterator[None]:
    """The kernel refuses writes beyond (EFBIG): an I/O error in the middle of a transaction."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def test_a_write_that_fails_halfway_leaves_no_trace(tmp_path: Path) -> None:
    async with open_journal(tmp_path / NAME) as journal:
        await journal.create_outgoing(request())
        wal_bytes = await asyncio.to_thread(os.path.getsize, tmp_path / f"{NAME}-wal")
        with _files_at_most(wal_bytes + 9000):
            refused = await _append_until_refused(journal, _large_event())
            assert refused.code in ("journal_io_error", "journal_disk_full")
            acknowledged = await _count(journal)
        await journal.append_outgoing("m1", [event(wall_s=42.0)])
        left = await asyncio.to_thread(as_after_a_crash, tmp_path, tmp_path / "left")
        assert await _count(journal) == acknowledged + 1
    async with open_journal(left) as journal:
        ((_, events),) = (await journal.replay()).outgoing
    assert (len(events), events[-1].wall_s) == (acknowledged + 1, 42.0)


async def test_a_page_limit_refuses_writes_whole(tmp_path: Path) -> None:
    async with open_journal(tmp_path / NAME) as journal:
        await journal.create_outgoing(request())
        await journal._call(lambda opened: opened.rows("PRAGMA max_page_count = 20"))
        refused = await _append_until_refused(journal, _large_event())
        assert refused.code == "journal_disk_full"
        acknowledged = await _count(journal)
        await journal._call(lambda opened: opened.rows("PRAGMA max_page_count = 100000"))
        await journal.append_outgoing("m1", [event()])
        assert await _count(journal) == acknowledged + 1


async def test_one_write_too_large_does_not_take_the_others_with_it(tmp_path: Path) -> None:
    async with open_journal(tmp_path / NAME) as journal:
        await journal.create_outgoing(request())
        await journal._call(lambda opened: opened.rows("PRAGMA max_page_count = 20"))
        outcomes = await asyncio.gather(
            journal.append_outgoing("m1", [event()]),
            journal.append_outgoing("m1", [_large_event()]),
            journal.append_outgoing("m1", [event()]),
            return_exceptions=True,
        )
        assert [isinstance(outcome, JournalError) for outcome in outcomes] == [False, True, False]
        assert await _count(journal) == 2


async def test_a_number_that_no_column_holds_is_that_callers_error_alone(tmp_path: Path) -> None:
    async with open_journal(tmp_path / NAME) as journal:
        await journal.create_outgoing(request())
        outcomes = await asyncio.gather(
            journal.append_outgoing("m1", [event()]),
            journal.put_vm(vm(epoch=1 << 70)),
            journal.append_outgoing("m1", [event()]),
            return_exceptions=True,
        )
        assert [isinstance(outcome, JournalError) for outcome in outcomes] == [False, True, False]
        assert await _count(journal) == 2


async def test_a_failed_commit_empties_the_log_before_anything_else_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An fsync that failed may have written all the same: a crash must not bring that back."""
    async with open_journal(tmp_path / NAME) as journal:
        await journal.create_outgoing(request())
        with monkeypatch.context() as planted:
            planted.setattr(Store, "_apply", _commit_in_secret)
            with pytest.raises(JournalError) as refused:
                await journal.append_outgoing("m1", [event()])
            assert refused.value.code == "journal_failed"
        await journal.put_vm(vm())
        # emptied, and not just begun anew at its full length, over what the disk may have kept
        assert (await asyncio.to_thread(os.path.getsize, tmp_path / f"{NAME}-wal")) < 100_000
        assert (await journal.replay()).vms == [vm()]


def _commit_in_secret(store: Store, write: object) -> None:
    store._connection.execute("COMMIT")  # so that the COMMIT that follows fails
