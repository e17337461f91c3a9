"""Two daemons with an arbiter: its record decides, whatever is slow, lost, cut off or killed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from migrd.core.phases import Phase
from migrd.engine.arbiter_port import Ownership
from tests.fakes.arbiter import FakeArbiter, FakeArbiterStore
from tests.fakes.world import VM, Pair


@asynccontextmanager
async def arbitrated(**options: Any) -> AsyncIterator[tuple[Pair, FakeArbiterStore]]:
    """A Pair with an arbiter, its guest running on alpha."""
    store = FakeArbiterStore()
    async with Pair(arbiter=store, **options) as pair:
        await pair.boot()
        yield pair, store


async def record_of(store: FakeArbiterStore, vm: str = VM) -> Ownership | None:
    """As a third host reads it."""
    reader = FakeArbiter(store, "a-third-host")
    store.hosts.discard("a-third-host")
    return await reader.read(vm)


async def says(store: FakeArbiterStore, owner: str, *, started: bool = True) -> bool:
    record = await record_of(store)
    return record is not None and (record.owner, record.started) == (owner, started)


async def test_a_migration_ends_with_the_record_saying_so_in_few_writes() -> None:
    async with arbitrated() as (pair, store):
        assert await says(store, "alpha"), "a started VM is claimed"
        before = len(store.writes)
        view = await pair.migrate()
        assert view.phase == Phase.SUCCEEDED, view.cause
        assert await says(store, "beta")
        assert len(store.writes) - before == 3, "claimed, granted, started"
        await asyncio.sleep(60.0)
        assert len(store.writes) - before == 3
        await pair.migrates_again()
