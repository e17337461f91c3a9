"""A process with a guest in it moves between two daemons: nothing is lost, nothing is left."""

import asyncio
import contextlib
import os
import re
import time
from collections import Counter
from pathlib import Path
from typing import Final

import pytest

from tests.integration.direct_fleet import FULL, PATIENCE, running
from tests.integration.scenarios import moved

pytestmark = pytest.mark.timeout(180 * PATIENCE)


KEPT: Final = 6
"""Connections to the peer that are kept for a while, of both ends: they come and go."""


def open_files(pids: list[int]) -> Counter[str]:
    """What processes hold open: kind, or path without its numbers -> how often."""
    found: Counter[str] = Counter()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                found[re.sub(r"\d+", "N", os.readlink(link).partition(":[")[0])] += 1
    return found


async def held_at_rest(daemons: list[int], bound: Counter[str] | None) -> Counter[str]:
    """By both; what is still being closed has some seconds for it."""
    give_up_at = time.monotonic() + 15.0
    while True:
        held = open_files(daemons)
        if bound is None or held <= bound or time.monotonic() > give_up_at:
            return held
        await asyncio.sleep(0.2)


async def test_there_and_back_again_and_again_without_a_leak(short_tmp_path: Path) -> None:
    async with running(short_tmp_path, parameters=FULL) as two:
        source, destination = "alpha", "beta"
        bound: Counter[str] | None = None
        for moves in range(1, 7):
            migration = await two.migrate(source, destination)
            seen = await two.ended(source, migration)
            assert seen["phase"] == "succeeded", seen["cause"]
            await two.only_qemus(1)
            await two.prove(moves, on=destination)
            source, destination = destination, source
            daemons = [host.process.pid for host in two.hosts.values() if host.process is not None]
            if moves % 2 == 0:  # the guest is where it was
                held = await held_at_rest(daemons, bound)
                assert bound is None or held <= bound, held - bound
                bound = bound or held + Counter({"socket": KEPT})


async def test_the_stream_is_encrypted_where_it_is_required(short_tmp_path: Path) -> None:
    async with running(short_tmp_path, parameters=FULL, tls=True) as two:
        migration = await two.migrate("alpha", "beta", multifd_channels=3)
        await moved(two, migration)
