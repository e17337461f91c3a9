"""Daemons that are killed and started again in the middle of a migration.

The guest's fate must not depend on it: the migration is taken up from the journal, steered on, and
ends as if nothing had been.
"""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from migrd.cli.seen import Json
from tests.integration.fleet import BUSY, Fleet, fleet

pytestmark = [pytest.mark.real, pytest.mark.timeout(240)]

SLOW: dict[str, Json] = {"max_bandwidth_bytes_per_s": 15 << 20}
FAST: dict[str, Json] = {"max_bandwidth_bytes_per_s": 0}


def is_unreachable(seen: dict[str, Any]) -> bool:
    return "DestinationUnreachable" in [condition["type"] for condition in seen["conditions"]]


async def in_precopy(two: Fleet, migration: str, rounds: int = 1) -> dict[str, Any]:
    """Memory is moving, and so many rounds are over."""
    return await two.until(
        "alpha",
        migration,
        lambda seen: seen["phase"] == "precopy" and seen["progress"]["rounds"] >= rounds,
    )


@pytest.mark.parametrize("killed", ["alpha", "beta", "both"])
async def test_a_daemon_killed_in_precopy_goes_on_steering_after_its_restart(
    short_tmp_path: Path, qemu_binaries: dict[str, Path], killed: str
) -> None:
    binary = qemu_binaries["10"]
    async with fleet(short_tmp_path, (binary, binary), image=BUSY) as two:
        await two.start_guest("alpha")
        migration = await two.migrate("alpha", "beta", policy=SLOW)
        await in_precopy(two, migration)
        names = ["alpha", "beta"] if killed == "both" else [killed]
        for name in names:
            await two.kill_daemon(name)
        await two.counts_on("alpha")  # no daemon is needed for the guest to run
        for name in names:
            await two.start_daemon(name)
        seen = await two.migration("alpha", migration)
        assert seen["phase"] == "precopy", seen
        # It does not converge as it is; only a daemon that steers can bring it to an end.
        await two.call("alpha", "PATCH", f"/v1/migrations/{migration}/policy", body=FAST)
        seen = await two.ended("alpha", migration)
        assert seen["phase"] == "succeeded", seen["cause"]
        await two.prove(1, on="beta")


async def test_the_destinations_daemon_being_away_keeps_the_guest_running_at_the_source(
    short_tmp_path: Path, qemu_binaries: dict[str, Path]
) -> None:
    binary = qemu_binaries["7.2"]
    async with fleet(short_tmp_path, (binary, binary), image=BUSY) as two:
        await two.start_guest("alpha")
        migration = await two.migrate("alpha", "beta", policy=SLOW)
        await in_precopy(two, migration)
        await two.kill_daemon("beta")
        await two.until("alpha", migration, is_unreachable)
        await two.call("alpha", "PATCH", f"/v1/migrations/{migration}/policy", body=FAST)
        await asyncio.sleep(2.0)  # it would fit by now, and must not be switched over
        seen = await two.migration("alpha", migration)
        assert seen["phase"] == "precopy", seen
        await two.counts_on("alpha")
        await two.start_daemon("beta")
        seen = await two.ended("alpha", migration)
        assert seen["phase"] == "succeeded", seen["cause"]
        await two.prove(1, on="beta")
