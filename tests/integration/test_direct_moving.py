"""A process with a guest in it moves between two daemons: nothing is lost, nothing is left."""

import asyncio
import os
import time
from pathlib import Path

import pytest

from tests.integration.direct_fleet import FULL, PATIENCE, running
from tests.integration.scenarios import moved

pytestmark = pytest.mark.timeout(180 * PATIENCE)


def open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


async def held_at_rest(daemons: list[int], *, at_most: int | None) -> int:
    """Descriptors of both daemons; what is still being closed has some seconds for it."""
    give_up_at = time.monotonic() + 15.0
    while True:
        held = sum(open_files(pid) for pid in daemons)
        if at_most is None or held <= at_most or time.monotonic() > give_up_at:
            return held
        await asyncio.sleep(0.2)


async def test_there_and_back_again_and_again_without_a_leak(short_tmp_path: Path) -> None:
    async with running(short_tmp_path, parameters=FULL) as two:
        source, destination = "alpha", "beta"
        held: list[int] = []
        for moves in range(1, 7):
            migration = await two.migrate(source, destination)
            seen = await two.ended(source, migration)
            assert seen["phase"] == "succeeded", seen["cause"]
            await two.only_qemus(1)
            await two.prove(moves, on=destination)
            source, destination = destination, source
            daemons = [host.process.pid for host in two.hosts.values() if host.process is not None]
            held.append(await held_at_rest(daemons, at_most=held[1] if moves > 2 else None))
        assert max(held[3], held[5]) <= held[1], held


async def test_the_stream_is_encrypted_where_it_is_required(short_tmp_path: Path) -> None:
    async with running(short_tmp_path, parameters=FULL, tls=True) as two:
        migration = await two.migrate("alpha", "beta", multifd_channels=3)
        await moved(two, migration)
