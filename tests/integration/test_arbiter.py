"""Real QEMUs, real daemons and a real etcd that says who may run the guest.

a record that follows the guest · an etcd that dies in precopy · a destination that is lost
before it has said that it starts · a source that is lost after the grant
"""

import asyncio
import contextlib
import json
import os
import signal
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from migrd.demo.image import GuestImage
from tests.arbiter.etcd_server import Cluster
from tests.integration.fleet import BUSY, SMALL, VM, Fleet
from tests.integration.scenarios import (
    has_condition,
    hurry,
    in_precopy,
    moved,
    moves_again,
    running,
    stayed,
)

pytestmark = [pytest.mark.real, pytest.mark.timeout(240)]

WRITES_EACH = 3
AWAY_S = 3.0


@contextlib.asynccontextmanager
async def arbitrated(
    directory: Path, binary: Path, etcd: Cluster, image: GuestImage = SMALL
) -> AsyncIterator[Fleet]:
    """A fleet whose guest counts on alpha, with etcd."""
    lines = f'\n[arbiter]\nkind = "etcd"\nendpoints = {json.dumps(etcd.urls)}\n'
    of_each = {"end": lines, "migration": "grant_deadline_s = 3\n"}
    settings = {"alpha": of_each, "beta": of_each}
    async with running(directory, binary, image=image, settings=settings) as two:
        yield two


@pytest.fixture
def etcd(etcd_binary: Path, tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(etcd_binary, tmp_path).serving() as cluster:
        yield cluster


async def record(etcd: Cluster) -> tuple[dict[str, Any], int]:
    """What etcd has of the guest, and how often it was written."""
    key = b64encode(f"/migrd/vms/{VM}".encode()).decode()
    found = await asyncio.to_thread(etcd.members[0].ask, "/v3/kv/range", {"key": key})
    (entry,) = found["kvs"]
    return json.loads(b64decode(entry["value"])), int(entry["version"])


async def lose_power(two: Fleet, host: str) -> None:
    """Its daemon is dead already; now its QEMUs are."""
    for pid in await two.qemus(host):
        os.kill(pid, signal.SIGKILL)


async def killed_itself(two: Fleet, host: str) -> None:
    process = two.hosts[host].process
    assert process is not None
    async with asyncio.timeout(45.0):
        assert await process.wait() == -signal.SIGKILL


async def test_the_record_follows_the_guest_with_three_writes_each_time(
    short_tmp_path: Path, newer: Path, etcd: Cluster
) -> None:
    async with arbitrated(short_tmp_path, newer, etcd) as two:
        at_first, writes = await record(etcd)
        assert (at_first["owner"], at_first["started"]) == ("alpha", True)
        await moved(two, await two.migrate("alpha", "beta"))
        found, now = await record(etcd)
        assert (found["owner"], found["started"]) == ("beta", True)
        assert found["epoch"] > at_first["epoch"]
        assert now - writes <= WRITES_EACH
        back = await two.ended("beta", await two.migrate("beta", "alpha"))
        assert back["phase"] == "succeeded", back["cause"]
        await two.prove(2, on="alpha")
        assert (await record(etcd))[0]["owner"] == "alpha"


async def test_an_etcd_that_dies_in_precopy_stops_no_guest(
    short_tmp_path: Path, newer: Path, etcd: Cluster
) -> None:
    async with arbitrated(short_tmp_path, newer, etcd, BUSY) as two:
        migration = await in_precopy(two)
        etcd.members[0].kill()
        await two.until("alpha", migration, has_condition("ArbiterUnreachable"))
        await hurry(two, migration)
        before = two.beats("alpha")
        await asyncio.sleep(AWAY_S)
        seen = await two.migration("alpha", migration)
        assert seen["phase"] == "precopy", seen
        assert two.beats("alpha") > before
        await asyncio.to_thread(etcd.start)
        await moved(two, migration)
        assert (await record(etcd))[0]["owner"] == "beta"


async def test_a_destination_lost_before_it_said_that_it_starts_needs_no_person(
    short_tmp_path: Path, newer: Path, etcd: Cluster
) -> None:
    async with arbitrated(short_tmp_path, newer, etcd) as two:
        two.armed["beta"] = "destination.mark_started.deciding=kill"
        await two.kill_daemon("beta")
        await two.start_daemon("beta")
        migration = await two.migrate("alpha", "beta")
        await killed_itself(two, "beta")
        await lose_power(two, "beta")
        await stayed(two, migration, "rolled_back", "taken_back")
        found, _ = await record(etcd)
        assert (found["owner"], found["started"]) == ("alpha", True)
        await two.start_daemon("beta")
        await moves_again(two)


async def test_a_source_lost_after_the_grant_leaves_a_guest_that_starts_by_the_record(
    short_tmp_path: Path, newer: Path, etcd: Cluster
) -> None:
    async with arbitrated(short_tmp_path, newer, etcd) as two:
        two.armed["alpha"] = "source.assign.done=kill"
        await two.kill_daemon("alpha")
        await two.start_daemon("alpha")
        await two.migrate("alpha", "beta")
        await killed_itself(two, "alpha")
        await lose_power(two, "alpha")
        await two.prove(1, on="beta")
        found, _ = await record(etcd)
        assert (found["owner"], found["started"]) == ("beta", True)
