"""What tests of two daemons with an arbiter share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from migrd import failpoints
from migrd.arbiter.records import decoded, key_of
from migrd.core.phases import Phase
from migrd.engine.arbiter_port import Ownership
from migrd.engine.service import MigrationView
from tests.fakes.arbiter import PREFIX, FakeArbiterStore
from tests.fakes.virtual_time import now_s, until
from tests.fakes.world import VM, Pair

AROUND = (
    "source.transfer_completed.journalled",
    "source.assign.deciding",
    "source.assign.done",
    "source.grant.deciding",
    "destination.grant_received.deciding",
    "destination.grant_received.journalled",
    "destination.mark_started.deciding",
    "destination.mark_started.done",
    "destination.start_ordered.deciding",
    "destination.start_ordered.journalled",
    "destination.cont.deciding",
    "destination.cont.done",
)
"""Every step from the grant to the start."""
BLACKOUT_S = 12.0
"""With the arbiter, or a host, away at the worst moment: two deadlines of a switchover."""


@asynccontextmanager
async def arbitrated(**options: Any) -> AsyncIterator[tuple[Pair, FakeArbiterStore]]:
    """A Pair with an arbiter, its guest running on alpha."""
    store = FakeArbiterStore()
    async with Pair(arbiter=store, **options) as pair:
        await pair.boot()
        yield pair, store


def record(store: FakeArbiterStore, vm: str = VM) -> Ownership | None:
    """As it is, whoever can reach it."""
    key = key_of(PREFIX, vm)
    entry = store.entries.get(key)
    return None if entry is None else decoded(key, vm, entry)


def says(store: FakeArbiterStore, owner: str, *, started: bool = True) -> bool:
    found = record(store)
    return found is not None and (found.owner, found.started) == (owner, started)


@asynccontextmanager
async def once_at(point: str, strike: Callable[[], None]) -> AsyncIterator[list[float]]:
    """Strike when that failpoint is first reached; when it was."""
    struck: list[float] = []

    def reached(name: str) -> None:
        if name == point and not struck:
            struck.append(now_s())
            strike()

    with failpoints.observing(reached):
        yield struck


def power_off(pair: Pair, name: str) -> None:
    """The whole host, in an instant; `pair.kill` takes its daemon away."""
    pair.daemons[name].gate.crash()
    for qemu in pair.hosts[name].living(VM):
        qemu.die("power off")


async def restarted_when_killed(pair: Pair, name: str, *, after_s: float = 0.0) -> None:
    """A keeper, as systemd is one."""
    await pair.daemons[name].gate.crashed.wait()
    await pair.kill(name)
    await asyncio.sleep(after_s)
    await pair.start(name)


async def ends_well(pair: Pair, store: FakeArbiterStore, migration_id: str) -> MigrationView:
    """Without a person: succeeded there or rolled back here, and the VM moves again."""
    view = await pair.until_over(migration_id)
    where = {Phase.SUCCEEDED: "beta", Phase.ROLLED_BACK: "alpha"}
    assert view.phase in where, (view.phase, view.cause)
    assert pair.running_on() == where[Phase(view.phase)], (view.phase, view.cause)
    store.heal()
    pair.road.heal()
    for name in pair.hosts:
        if name not in pair.daemons or pair.daemons[name].gate.is_dead:
            await pair.restart(name) if name in pair.daemons else await pair.start(name)
    await pair.migrates_again()
    await until(lambda: says(store, pair.running_on() or ""), what="the record is the truth")
    return view
