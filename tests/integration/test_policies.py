"""What the policy promises about a guest that dirties memory faster than it can be sent."""

from pathlib import Path

import pytest

from migrd.cli.seen import Json
from migrd.demo.image import GuestImage
from tests.integration.fleet import LIVELY, Fleet
from tests.integration.scenarios import PIECE_S, in_precopy, moved, running, stays_and_moves_again

pytestmark = [pytest.mark.real, pytest.mark.timeout(120)]

BROAD = GuestImage(working_set_pages=24 * 256, pages_per_s=1000, noise=True)
BELOW: dict[str, Json] = {"max_bandwidth_bytes_per_s": 6 << 20}
"""LIVELY does not converge with it."""


async def test_the_deadline_rolls_back_a_guest_that_does_not_converge(
    short_tmp_path: Path, newer: Path
) -> None:
    async with running(short_tmp_path, newer, image=LIVELY) as two:
        migration = await two.migrate("alpha", "beta", policy={**BELOW, "deadline_s": 4})
        await stays_and_moves_again(two, migration, "rolled_back", "deadline")


async def test_giving_up_does_not_wait_for_the_deadline(short_tmp_path: Path, newer: Path) -> None:
    async with running(short_tmp_path, newer, image=LIVELY) as two:
        policy: dict[str, Json] = {**BELOW, "when_not_converging": "give_up", "deadline_s": 600}
        migration = await two.migrate("alpha", "beta", policy=policy)
        await stays_and_moves_again(two, migration, "rolled_back", "not_converging")


async def throttles(two: Fleet, migration: str, what: str) -> set[int]:
    reply = await two.call("alpha", "GET", f"/v1/migrations/{migration}/{what}")
    assert isinstance(reply.body, dict)
    return {row["throttle_percent"] for row in reply.body["items"] if row["throttle_percent"]}


async def test_a_throttle_makes_a_guest_converge_that_would_not(
    short_tmp_path: Path, binary: Path
) -> None:
    async with running(short_tmp_path, binary, image=LIVELY) as two:
        policy: dict[str, Json] = {**BELOW, "when_not_converging": "throttle"}
        migration = await two.migrate("alpha", "beta", policy=policy)
        await moved(two, migration)
        decided = await throttles(two, migration, "decisions")
        # A round's is what QEMU says of itself: it goes there in one step, and not by tens.
        in_force = await throttles(two, migration, "rounds")
        assert decided
        assert in_force - {1} <= decided
        assert max(in_force) > 1


async def test_a_forced_switchover_does_not_wait_for_convergence(
    short_tmp_path: Path, binary: Path
) -> None:
    async with running(short_tmp_path, binary) as two:
        migration = await in_precopy(two)
        await two.call("alpha", "POST", f"/v1/migrations/{migration}:switchover")
        await moved(two, migration)


async def test_a_long_switchover_stays_within_its_limit(short_tmp_path: Path, newer: Path) -> None:
    async with running(short_tmp_path, newer, image=BROAD, proxied=True) as two:
        assert two.stream is not None
        two.stream.to_target.delay_s = PIECE_S
        migration = await two.migrate("alpha", "beta", policy={"downtime_limit_ms": 4000})
        seen = await moved(two, migration)
        assert 500 < seen["blackout_ms"] < 4000 + 3000
