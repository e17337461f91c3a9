"""What only the journal in SQLite does: shares commits, checkpoints when idle, forgets the old."""

import asyncio
import time
from pathlib import Path

import pytest

from migrd.core.handover import DestinationTrigger
from migrd.core.phases import Trigger
from migrd.errors import JournalError
from migrd.journal import sqlite, store
from migrd.journal.retention import Past, Retention, to_forget
from migrd.journal.sqlite import open_journal
from migrd.journal.store import Role
from tests.fakes.virtual_time import until
from tests.journal.files import NAME
from tests.journal.samples import destination_event, event, incoming, ran, request, succeeded, vm

_DAY_S = 86_400.0


async def test_writes_that_meet_share_a_commit(tmp_path: Path) -> None:
    commits: list[float] = []
    async with open_journal(tmp_path / NAME, on_commit=commits.append) as journal:
        await journal.create_outgoing(request())
        before = len(commits)
        await asyncio.gather(*(journal.append_outgoing("m1", [event()]) for _ in range(100)))
        assert len(commits) - before <= 10
        assert len((await journal.replay()).outgoing[0][1]) == 100
    assert all(0 < took_s < 60 for took_s in commits)


async def test_a_gauge_that_fails_does_not_fail_the_write(tmp_path: Path) -> None:
    def fail(_: float) -> None:
        raise RuntimeError("planted")

    async with open_journal(tmp_path / NAME, on_commit=fail) as journal:
        await journal.put_vm(vm())
        assert (await journal.replay()).vms == [vm()]


async def test_a_closed_journal_says_so(tmp_path: Path) -> None:
    async with open_journal(tmp_path / NAME) as journal:
        pass
    with pytest.raises(JournalError) as refused:
        await journal.put_vm(vm())
    assert refused.value.code == "journal_closed"


async def test_an_append_overwrites_the_log_and_does_not_lengthen_it(tmp_path: Path) -> None:
    wal = tmp_path / f"{NAME}-wal"
    async with open_journal(tmp_path / NAME) as journal:
        await journal.create_outgoing(request())
        before = await asyncio.to_thread(wal.stat)
        for _ in range(50):
            await journal.append_outgoing("m1", [event()])
        after = await asyncio.to_thread(wal.stat)
    assert before.st_size == after.st_size >= 1 << 19


async def test_the_log_is_moved_into_the_file_in_idle_moments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "_IDLE_S", 0.02)
    async with open_journal(tmp_path / NAME) as journal:
        await journal.create_outgoing(request())
        for _ in range(40):
            await journal.append_outgoing("m1", [event()])
        opened = journal._store
        assert opened is not None
        await until(lambda: opened.commits_in_log == 0, within_s=10.0)
        assert len((await journal.replay()).outgoing[0][1]) == 40


async def test_observations_of_an_endless_migration_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "OBSERVATION_BATCHES_KEPT", 5)
    async with open_journal(tmp_path / NAME) as journal:
        await journal.create_outgoing(request())
        for number in range(12):
            await journal.add_observations("m1", "round", [{"number": number}])
        kept = [row["number"] for row in await journal.observations("m1", "round")]
    assert kept == [7, 8, 9, 10, 11]


async def test_only_ended_migrations_are_forgotten_and_never_the_newest_of_a_vm(
    tmp_path: Path,
) -> None:
    now_s = 100 * _DAY_S
    async with open_journal(tmp_path / NAME, wall_s=lambda: now_s) as journal:
        await journal.create_outgoing(request("old", epoch=1, key="k-old"))
        await journal.append_outgoing("old", succeeded(1 * _DAY_S), vm(epoch=1))
        await journal.add_observations("old", "round", [{"number": 1}])
        await journal.create_outgoing(request("newest", epoch=2))
        await journal.append_outgoing("newest", succeeded(2 * _DAY_S), vm(epoch=2))
        await journal.create_outgoing(request("unended", vm="web-3", epoch=1))
        await journal.append_outgoing("unended", succeeded(1 * _DAY_S)[:-1])
        await journal.create_outgoing(request("later", vm="web-3", epoch=2))
        await journal.create_incoming(incoming("ran-old", epoch=1))
        await journal.append_incoming("ran-old", ran(1 * _DAY_S))
        await journal.create_incoming(incoming("starting", epoch=2))
        await journal.append_incoming("starting", ran(1 * _DAY_S)[:-1])
        await journal.create_incoming(incoming("ran-new", epoch=3))
        await journal.append_incoming("ran-new", ran(99 * _DAY_S))
        assert await journal.prune(Retention(max_age_s=30 * _DAY_S), now_s) == 2
        replay = await journal.replay()
        assert {stored.id for stored, _ in replay.outgoing} == {"newest", "unended", "later"}
        assert {stored.id for stored, _ in replay.incoming} == {"starting", "ran-new"}
        assert await journal.find_key("k-old") is None
        assert await journal.observations("old", "round") == []
        assert await journal.last_epoch("web-1") == 2
        assert await journal.prune(Retention(max_age_s=30 * _DAY_S), now_s) == 0


async def test_forgetting_goes_on_by_itself_while_the_journal_is_open(tmp_path: Path) -> None:
    async with open_journal(tmp_path / NAME) as journal:
        for epoch in range(1, 6):
            await journal.create_outgoing(request(f"m{epoch}", epoch=epoch))
            await journal.append_outgoing(f"m{epoch}", succeeded(time.time()))
    loop, written = asyncio.get_running_loop(), asyncio.Event()
    async with open_journal(
        tmp_path / NAME,
        retention=Retention(max_ended=2),
        on_commit=lambda _: loop.call_soon_threadsafe(written.set),
    ) as journal:
        async with asyncio.timeout(10):
            await written.wait()
        replay = await journal.replay()
    assert [stored.id for stored, _ in replay.outgoing] == ["m4", "m5"]


async def test_a_refused_incoming_migration_counts_as_ended(tmp_path: Path) -> None:
    refused = destination_event(DestinationTrigger.REFUSAL_DECIDED, 1.0)
    async with open_journal(tmp_path / NAME) as journal:
        await journal.create_incoming(incoming("refused", epoch=1))
        await journal.append_incoming("refused", [refused])
        await journal.create_incoming(incoming("newer", epoch=2))
        assert await journal.prune(Retention(max_age_s=10.0), 1000.0) == 1


async def test_a_migration_whose_events_make_no_sense_is_kept(tmp_path: Path) -> None:
    async with open_journal(tmp_path / NAME) as journal:
        await journal.create_outgoing(request("odd", epoch=1))
        await journal.append_outgoing("odd", [event(Trigger.SOURCE_RELEASED, 1.0)])
        await journal.create_outgoing(request("newer", epoch=2))
        assert await journal.prune(Retention(max_age_s=10.0, max_ended=0), 1000.0) == 0


def test_of_the_ended_the_newest_are_kept() -> None:
    past = [
        Past(Role.SOURCE, f"m{n}", f"web-{n % 2}", epoch=n, ended_wall_s=float(n))
        for n in range(10)
    ]
    doomed = to_forget(past, 10.0, Retention(max_age_s=100.0, max_ended=4))
    assert [id_ for _, id_ in doomed] == ["m5", "m4", "m3", "m2", "m1", "m0"]
    assert {id_ for _, id_ in to_forget(past, 1e9, Retention(max_ended=0))} == {
        f"m{n}" for n in range(8)
    }
