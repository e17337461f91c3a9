"""What the engine relies on, of the journal in SQLite and of the one in memory."""

import asyncio
import math
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest

from migrd.core.migration import MigrationEvent
from migrd.core.phases import Trigger
from migrd.errors import Conflict, JournalError
from migrd.journal.sqlite import open_journal
from tests.fakes.journal import FakeDisk
from tests.journal.samples import (
    destination_event,
    event,
    incoming,
    ran,
    request,
    rich_event,
    spec,
    succeeded,
    vm,
)


class SqliteDisk:
    """A directory; each `open` is a daemon's life."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "journal.db"

    def open(self) -> AbstractAsyncContextManager[Any]:
        return open_journal(self._path)


@pytest.fixture(params=["sqlite", "fake"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> SqliteDisk | FakeDisk:
    return SqliteDisk(tmp_path) if request.param == "sqlite" else FakeDisk()


async def test_a_restart_finds_everything_as_it_was_written(disk: Any) -> None:
    async with disk.open() as journal:
        await journal.put_vm(vm("web-1", epoch=3))
        await journal.create_outgoing(request(key="k1"))
        await journal.append_outgoing("m1", [event(), rich_event()])
        await journal.append_outgoing("m1", [event(Trigger.GUEST_DIED)])
        await journal.create_incoming(incoming())
        await journal.append_incoming("i1", ran())
    async with disk.open() as journal:
        replay = await journal.replay()
    assert replay.vms == [vm("web-1", epoch=3)]
    events = [event(), rich_event(), event(Trigger.GUEST_DIED)]
    assert replay.outgoing == [(request(key="k1"), events)]
    assert replay.incoming == [(incoming(), ran())]


async def test_parameters_keep_their_types_over_a_restart(disk: Any) -> None:
    async with disk.open() as journal:
        await journal.put_vm(vm())
        found = (await journal.replay()).vms[0].spec.parameters
    assert {name: type(value) for name, value in found.items()} == {
        "memory_mib": int,
        "net": bool,
        "disk": str,
    }


async def test_a_journal_never_used_is_empty(disk: Any) -> None:
    async with disk.open() as journal:
        replay = await journal.replay()
    assert (replay.vms, replay.outgoing, replay.incoming) == ([], [], [])


async def test_an_id_is_used_once(disk: Any) -> None:
    async with disk.open() as journal:
        await journal.create_outgoing(request())
        await journal.create_incoming(incoming())
        with pytest.raises(Conflict) as refused:
            await journal.create_outgoing(request(key="other"))
        assert refused.value.code == "id_exists"
        with pytest.raises(Conflict):
            await journal.create_incoming(incoming(epoch=2))
        assert await journal.find_key("other") is None
        replay = await journal.replay()
    assert [stored for stored, _ in replay.outgoing] == [request()]
    assert [stored for stored, _ in replay.incoming] == [incoming()]


async def test_an_idempotency_key_is_stored_with_its_migration(disk: Any) -> None:
    async with disk.open() as journal:
        assert await journal.find_key("k1") is None
        await journal.create_outgoing(request("m1", key="k1"))
    async with disk.open() as journal:
        assert await journal.find_key("k1") == ("m1", "digest of k1")
        with pytest.raises(Conflict) as refused:
            await journal.create_outgoing(request("m2", key="k1"))
        assert refused.value.code == "key_exists"
        assert [stored.id for stored, _ in (await journal.replay()).outgoing] == ["m1"]


async def test_of_two_requests_with_one_key_at_once_exactly_one_is_stored(disk: Any) -> None:
    async with disk.open() as journal:
        outcomes = await asyncio.gather(
            *(journal.create_outgoing(request(f"m{n}", key="k1")) for n in range(8)),
            return_exceptions=True,
        )
        assert sum(outcome is None for outcome in outcomes) == 1
        assert sum(isinstance(outcome, Conflict) for outcome in outcomes) == 7
        assert len((await journal.replay()).outgoing) == 1


async def test_events_for_a_migration_never_created_are_refused(disk: Any) -> None:
    async with disk.open() as journal:
        await journal.create_outgoing(request())
        for append, one in (
            (journal.append_outgoing, event()),
            (journal.append_incoming, destination_event()),
        ):
            with pytest.raises(JournalError) as refused:
                await append("m9", [one], vm("web-9"))
            assert refused.value.code == "unknown_migration"
        with pytest.raises(JournalError):
            await journal.append_incoming("m1", [destination_event()])
        assert (await journal.replay()).vms == []  # all or nothing


async def test_what_becomes_of_the_vm_is_written_with_the_event(disk: Any) -> None:
    async with disk.open() as journal:
        await journal.put_vm(vm(epoch=1))
        await journal.create_outgoing(request())
        await journal.append_outgoing("m1", succeeded(), vm(epoch=1, here=False))
        replay = await journal.replay()
    assert replay.vms == [vm(epoch=1, here=False)]
    assert replay.outgoing[0][1] == succeeded()


async def test_an_epoch_never_goes_back_and_takes_its_events_with_it(disk: Any) -> None:
    async with disk.open() as journal:
        await journal.put_vm(vm(epoch=5))
        await journal.create_outgoing(request())
        with pytest.raises(JournalError) as refused:
            await journal.append_outgoing("m1", [event()], vm(epoch=4))
        assert refused.value.code == "epoch_went_back"
        replay = await journal.replay()
    assert replay.vms == [vm(epoch=5)]
    assert replay.outgoing[0][1] == []


async def test_a_deleted_vm_leaves_its_epoch_behind(disk: Any) -> None:
    async with disk.open() as journal:
        assert await journal.last_epoch("web-1") == 0
        await journal.put_vm(vm(epoch=5))
        await journal.delete_vm("web-1")
        await journal.delete_vm("never heard of")
        await journal.create_incoming(incoming(vm="web-2", epoch=9))
    async with disk.open() as journal:
        assert (await journal.replay()).vms == []
        assert await journal.last_epoch("web-1") == 5
        assert await journal.last_epoch("web-2") == 9


async def test_a_value_that_would_not_come_back_is_refused_before_it_is_written(disk: Any) -> None:
    hostile = MigrationEvent(Trigger.STARTED, math.nan, 1.0)
    half_a_pair = MigrationEvent(Trigger.STARTED, 1.0, 1.0, cause=None, stopped_at_s=math.inf)
    async with disk.open() as journal:
        await journal.create_outgoing(request())
        for bad in (hostile, half_a_pair):
            with pytest.raises(JournalError) as refused:
                await journal.append_outgoing("m1", [event(), bad])
            assert refused.value.code == "record_unwritable"
    async with disk.open() as journal:
        assert (await journal.replay()).outgoing[0][1] == []


async def test_observations_come_back_in_order(disk: Any) -> None:
    async with disk.open() as journal:
        await journal.create_outgoing(request())
        await journal.add_observations("m1", "round", [{"number": 1, "rate": 0.5}, {"number": 2}])
        await journal.add_observations("m1", "decision", [{"verdict": "continue"}])
        await journal.add_observations("m1", "round", [{"number": 3, "note": None}])
    async with disk.open() as journal:
        rounds = await journal.observations("m1", "round")
        assert rounds == [{"number": 1, "rate": 0.5}, {"number": 2}, {"number": 3, "note": None}]
        assert await journal.observations("m1", "decision") == [{"verdict": "continue"}]
        assert await journal.observations("m9", "round") == []
        for id_, kind in (("m9", "round"), ("m1", "gossip")):
            with pytest.raises(JournalError):
                await journal.add_observations(id_, kind, [{"number": 4}])


async def test_concurrent_appends_keep_the_order_of_each_migration(disk: Any) -> None:
    async with disk.open() as journal:
        for n in range(5):
            await journal.create_outgoing(request(f"m{n}", spec(f"web-{n}").name))

        async def go_through(id_: str) -> None:
            for count in range(20):
                await journal.append_outgoing(id_, [event(wall_s=float(count))])

        await asyncio.gather(*(go_through(f"m{n}") for n in range(5)))
    async with disk.open() as journal:
        for _, events in (await journal.replay()).outgoing:
            assert [one.wall_s for one in events] == [float(count) for count in range(20)]


async def test_a_cancelled_append_is_done_or_not_and_never_half(disk: Any) -> None:
    async with disk.open() as journal:
        await journal.create_outgoing(request())
        task = asyncio.create_task(journal.append_outgoing("m1", succeeded(), vm(here=False)))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        replay = await journal.replay()
    written = replay.outgoing[0][1]
    assert (written, replay.vms) in [([], []), (succeeded(), [vm(here=False)])]
