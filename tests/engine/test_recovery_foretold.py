"""A daemon killed at each point of a migration, and started again: what recovery foretells comes.

Each failpoint that a script reaches is struck once, on a fresh pair of hosts. The daemon is back at
once, or after a while in which the other side has gone on alone; in the end the line that recovery
wrote is held against what became of the migration.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, MutableMapping
from typing import Any

import pytest
import structlog

from migrd import failpoints
from migrd.core.phases import Phase
from migrd.engine.recovery_facts import PATIENCE_S
from migrd.errors import MigrdError
from tests.engine.test_steering import never_converges
from tests.fakes.arbiter import FakeArbiterStore
from tests.fakes.virtual_time import now_s, until
from tests.fakes.world import Pair
from tests.sweep import scripts
from tests.sweep.sweeping import Script

SIDES = {"source": "alpha", "destination": "beta"}
READY_S = PATIENCE_S + 0.2
TAKEN_UP = "migration taken up again"


async def refused_by_the_destination(pair: Pair) -> str:
    """Its process dies while memory is copied."""
    never_converges(pair)
    migration_id = await pair.ask()
    await until(lambda: pair.stands(migration_id)[0] == Phase.PRECOPY)
    await asyncio.sleep(0.1)
    for qemu in pair.hosts["beta"].living("vm1"):
        qemu.die("killed by the test")
    return migration_id


SCRIPTS: list[Script] = [
    scripts.plain,
    scripts.paused_guest,
    scripts.cancelled_in_precopy,
    scripts.postcopy,
    refused_by_the_destination,
]


async def played(script: Script, pair: Pair) -> str:
    return await script(pair)


@contextlib.asynccontextmanager
async def struck(
    pair: Pair, observer: Callable[[str], None], script: Script
) -> AsyncIterator[asyncio.Task[str]]:
    """The script under way, with the failpoints observed."""
    await pair.boot()
    with failpoints.observing(observer):
        asked = asyncio.create_task(played(script, pair))
        yield asked
        with contextlib.suppress(MigrdError, asyncio.CancelledError):
            await asked


async def points_of(script: Script, *, arbitrated: bool) -> list[str]:
    """Those that it comes to, in order, each once."""
    seen: dict[str, None] = {}
    store = FakeArbiterStore() if arbitrated else None
    async with Pair(arbiter=store) as pair, struck(pair, lambda p: seen.setdefault(p), script) as a:
        await pair.until_over(await a)
        await pair.settle()
    return list(seen)


async def strike_at(
    point: str, script: Script, *, arbitrated: bool, away_s: float
) -> tuple[list[MutableMapping[str, Any]], str | None, str | None]:
    """(what recovery said, the end at the source, the end at the destination)."""
    host = SIDES[point.partition(".")[0]]
    store = FakeArbiterStore() if arbitrated else None
    async with Pair(arbiter=store) as pair:

        def kill(reached: str) -> None:
            if reached == point and not hit.is_set():
                hit.set()
                pair.daemons[host].gate.crash()

        hit = asyncio.Event()
        async with struck(pair, kill, script):
            await until(hit.is_set, what=point)
            await pair.kill(host)
            await asyncio.sleep(away_s)
            with structlog.testing.capture_logs() as logs:
                began_s = now_s()
                await pair.start(host)
                assert now_s() - began_s < READY_S, "the start was held up"
        said = [entry for entry in logs if entry["event"] == TAKEN_UP]
        ends = await _ends(pair)
        if not pair.is_paused_guest:
            await pair.migrates_again(times=1)
    return said, *ends


async def _ends(pair: Pair) -> tuple[str | None, str | None]:
    migrations = pair.alpha.engine.migrations
    ids = list(migrations.outgoing)
    for id_ in ids:
        await pair.until_over(id_)
    await pair.settle()
    there = pair.stands(ids[0], "beta")[0] if ids else None
    return (pair.stands(ids[0])[0] if ids else None), there


@pytest.mark.parametrize("away_s", [0.0, 7.0], ids=["back_at_once", "back_after_a_while"])
@pytest.mark.parametrize("arbitrated", [False, True], ids=["journals", "arbiter"])
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: str(script.__name__))
async def test_what_is_foretold_after_each_single_kill_comes(
    script: Script, arbitrated: bool, away_s: float
) -> None:
    foretold = lines = 0
    for point in await points_of(script, arbitrated=arbitrated):
        said, ended, ended_there = await strike_at(
            point, script, arbitrated=arbitrated, away_s=away_s
        )
        assert len(said) <= 1, (point, said)
        for entry in said:
            lines += 1
            came = ended if entry["side"] == "source" else ended_there
            expected = entry.get("expects")
            assert expected in (None, came), (point, entry, came)
            foretold += expected is not None
            assert entry["deed"] != "call_operator", (point, entry)
            assert {"vm", "migration_id", "phase", "own", "other_side", "why"} <= entry.keys()
    assert lines > 5, "migrations were taken up"
    assert foretold >= 2, "and something was foretold"


async def test_a_silent_peer_and_a_hung_process_hold_up_the_start_by_less_than_a_second() -> None:
    async with Pair() as pair:
        await pair.boot()
        never_converges(pair)
        migration_id = await pair.ask()
        await pair.until_phase(migration_id, Phase.PRECOPY)
        await pair.kill("alpha")
        qemu = pair.hosts["alpha"].qemu("vm1")
        qemu.is_silent = True
        pair.road.down.add(("alpha", "beta"))
        began_s = now_s()
        with structlog.testing.capture_logs() as logs:
            await pair.start("alpha")
        assert now_s() - began_s < READY_S
        [said] = [entry for entry in logs if entry["event"] == TAKEN_UP]
        assert (said["own"], said["other_side"]) == ("lives_and_is_silent", "silent")
        assert "expects" not in said, "nothing is foretold on silence"
        qemu.is_silent = False
        qemu.unblock()
        pair.road.heal()
        pair.ground.calm()
        assert (await pair.until_over(migration_id)).phase == Phase.SUCCEEDED
