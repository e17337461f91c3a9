"""A migration brought to where it stands in some phase, with what both journals hold then.

The ids and instance names are always the same, so that a journal that another version of migrd
wrote at the same point fits the QEMUs of a run of today: `tests/journal/version_1.tar.xz` holds
those of schema version 1, `<point>/<host>.db`, as SQLite left them. It was made by that version; a
version to come adds an archive of its own (`python -m tests.journal.standing ARCHIVE`).
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import io
import itertools
import sys
import tarfile
import tempfile
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

from migrd.core.phases import Phase
from migrd.engine import lifecycle, reception
from migrd.failpoints import observing
from migrd.journal import codec
from migrd.journal.sqlite import open_journal
from tests.fakes.journal import FakeDisk
from tests.fakes.virtual_time import VirtualTimeLoop, until
from tests.fakes.world import VM, Pair, running_pair
from tests.journal import samples
from tests.journal.test_decisions import decision, stored

HOSTS = ("alpha", "beta")
ID = str(uuid.UUID(int=1))
Play = Callable[[Pair], Awaitable[None]]


@dataclass(frozen=True)
class Point:
    """Where both daemons end at once, and what becomes of the migration when they are back."""

    name: str
    play: Play
    ends: frozenset[str]
    """Phases in which it may end on its source."""


@contextlib.contextmanager
def same_names() -> Iterator[None]:
    """The migration is ID, and instances are counted."""
    names = (f"instance{n}" for n in itertools.count(1))
    with contextlib.ExitStack() as stack:
        for module in (lifecycle, reception):
            stack.enter_context(mock.patch.object(module, "new_instance", side_effect=names))
        ids = (uuid.UUID(int=n) for n in itertools.count(1))
        stack.enter_context(mock.patch("uuid.uuid4", side_effect=ids))
        yield


def _both_end(pair: Pair) -> None:
    """In this instant: nothing that either daemon still tries has an effect."""
    for daemon in pair.daemons.values():
        daemon.gate.crash()


def _at(failpoint: str, before: Callable[[Pair], None] = lambda _: None) -> Play:
    """Both daemons are killed as one of them comes to a failpoint."""

    async def play(pair: Pair) -> None:
        before(pair)

        def see(point: str) -> None:
            if point == failpoint:
                _both_end(pair)

        with observing(see):
            await pair.ask()
            await until(lambda: pair.alpha.gate.is_dead, what=failpoint)

    return play


def _busy(pair: Pair) -> None:
    pair.ground.load.dirty_bytes_per_s = 10 * pair.ground.wire.bandwidth_bytes_per_s


async def _cancelled(pair: Pair) -> None:
    _busy(pair)
    await pair.ask()
    await pair.until_phase(ID, Phase.PRECOPY)
    await pair.alpha.service.cancel(ID, by="test")


async def _rolling_back(pair: Pair) -> None:
    def see(point: str) -> None:
        if point == "source.cancel_requested.journalled":
            _both_end(pair)

    with observing(see):
        await _cancelled(pair)
        await until(lambda: pair.alpha.gate.is_dead, what="the cancel is journalled")


async def _to_the_end(pair: Pair) -> None:
    await pair.migrate()
    _both_end(pair)


async def _cancelled_for_good(pair: Pair) -> None:
    await _cancelled(pair)
    await pair.until_over(ID)
    _both_end(pair)


async def _refused(pair: Pair) -> None:
    pair.hosts["beta"].profiles.clear()
    await pair.migrate()
    pair.hosts["beta"].profiles["tiny"] = "pc, 256 MiB"
    _both_end(pair)


async def _rolled_back(pair: Pair) -> None:
    pair.hosts["beta"].launch_fails = "no such machine"
    await pair.migrate()
    pair.hosts["beta"].launch_fails = None
    _both_end(pair)


async def _lost(pair: Pair) -> None:
    _busy(pair)
    await pair.ask()
    await pair.until_phase(ID, Phase.PRECOPY)
    pair.hosts["alpha"].qemu(VM).die("killed")
    await pair.until_over(ID)
    _both_end(pair)


async def _needs_operator(pair: Pair) -> None:
    def see(point: str) -> None:
        if point == "source.transfer_completed.deciding":
            pair.road.part("alpha", "beta")

    with observing(see):
        await pair.ask()
        await pair.until_phase(ID, Phase.NEEDS_OPERATOR)
    _both_end(pair)
    pair.road.heal()


_MOVED = frozenset({Phase.SUCCEEDED.value})
_STAYED = frozenset({Phase.ROLLED_BACK.value})
_EITHER = _MOVED | _STAYED

POINTS = (
    Point("pending", _at("source.started.deciding"), _MOVED),
    Point("preflight", _at("source.preflight_passed.deciding"), _MOVED),
    Point("preparing", _at("source.destination_prepared.deciding"), _EITHER),
    Point("precopy", _at("source.switchover_reached.deciding"), _MOVED),
    Point("switchover", _at("source.transfer_completed.deciding"), _MOVED),
    Point("granted", _at("source.transfer_completed.journalled"), _MOVED),
    Point("completing", _at("source.destination_ran.journalled"), _MOVED),
    Point("succeeded", _to_the_end, _MOVED),
    Point("rolling_back", _rolling_back, frozenset({Phase.CANCELLED.value})),
    Point("cancelled", _cancelled_for_good, frozenset({Phase.CANCELLED.value})),
    Point("refused", _refused, frozenset({Phase.REFUSED.value})),
    Point("rolled_back", _rolled_back, _STAYED),
    Point("guest_lost", _lost, frozenset({Phase.GUEST_LOST.value})),
    Point("needs_operator", _needs_operator, _MOVED),
    Point("destination_preparing", _at("destination.incoming_ready.deciding"), _EITHER),
    Point("destination_receiving", _at("destination.incoming_ready.journalled"), _EITHER),
    Point("destination_loaded", _at("destination.grant_received.deciding"), _MOVED),
    Point("destination_starting", _at("destination.start_ordered.journalled"), _MOVED),
    Point("destination_running", _at("destination.guest_ran.journalled"), _MOVED),
)


@contextlib.asynccontextmanager
async def standing(point: Point) -> AsyncIterator[Pair]:
    """A Pair whose daemons have just been killed there."""
    with same_names():
        async with running_pair() as pair:
            await point.play(pair)
            for name in HOSTS:
                await pair.kill(name)
            yield pair


async def write(disk: FakeDisk, path: Path) -> None:
    """What a simulated disk holds, as a journal of this version."""
    async with open_journal(path) as journal:
        for _, sealed in disk.vms.values():
            await journal.put_vm(codec.VM.read(sealed))
        for sealed, events in disk.outgoing.values():
            await journal.create_outgoing(codec.REQUEST.read(sealed))
            told = [codec.MIGRATION_EVENT.read(one) for one in events]
            await journal.append_outgoing(ID, told)
        for sealed, events in disk.incoming.values():
            await journal.create_incoming(codec.INCOMING.read(sealed))
            came = [codec.DESTINATION_EVENT.read(one) for one in events]
            await journal.append_incoming(ID, came)
        for (id_, kind), rows in disk.observations.items():
            await journal.add_observations(id_, kind, rows)


async def write_rich(path: Path) -> None:
    """One record of each kind with all fields set."""
    async with open_journal(path) as journal:
        await journal.put_vm(stored())
        await journal.create_outgoing(samples.request(key="key-1"))
        await journal.append_outgoing("m1", [samples.event(), samples.rich_event()])
        await journal.add_observations("m1", "round", [{"number": 1}])
        await journal.create_incoming(replace(samples.incoming(), decision=decision()))
        await journal.append_incoming("i1", samples.ran())


async def _disks_at(point: Point) -> dict[str, FakeDisk]:
    async with standing(point) as pair:
        disks = copy.deepcopy(pair.disks)
        for name in HOSTS:
            await pair.start(name)
        return disks


def archive(path: Path) -> None:
    """The journals of every point, and `rich.db`, by the code of today. Blocking."""
    with tarfile.open(path, "w:xz") as tar, tempfile.TemporaryDirectory() as work:
        file = Path(work) / "journal.db"

        def add(name: str) -> None:
            entry = tarfile.TarInfo(name)
            entry.size = file.stat().st_size
            tar.addfile(entry, io.BytesIO(file.read_bytes()))
            for left in Path(work).iterdir():
                left.unlink()

        for point in POINTS:
            with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
                disks = runner.run(_disks_at(point))
            for name in HOSTS:
                asyncio.run(write(disks[name], file))
                add(f"{point.name}/{name}.db")
        asyncio.run(write_rich(file))
        add("rich.db")


if __name__ == "__main__":
    archive(Path(sys.argv[1]))
