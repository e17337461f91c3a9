"""Cancelling, in each phase; and asking twice for the same."""

from pathlib import Path

import pytest

from migrd.cli.client import Problem
from migrd.cli.seen import Json
from tests.integration.fleet import SMALL, Fleet
from tests.integration.scenarios import (
    SLOW,
    in_precopy,
    in_switchover,
    moved,
    running,
    stayed,
    stays_and_moves_again,
)

pytestmark = [pytest.mark.real, pytest.mark.timeout(120)]


async def cancel(two: Fleet, migration: str) -> int:
    reply = await two.call("alpha", "POST", f"/v1/migrations/{migration}:cancel")
    return reply.status


@pytest.mark.parametrize(("version", "multifd"), [("7.2", 0), ("10", 2)])
async def test_a_cancel_in_precopy_leaves_the_guest_where_it_is(
    short_tmp_path: Path, qemu_binaries: dict[str, Path], version: str, multifd: int
) -> None:
    async with running(short_tmp_path, qemu_binaries[version]) as two:
        migration = await in_precopy(two, multifd_channels=multifd)
        assert await cancel(two, migration) == 202
        await stays_and_moves_again(two, migration, "cancelled", "cancelled")
        assert await cancel(two, migration) == 200  # already so


@pytest.mark.parametrize("multifd", [0, 2])
async def test_a_cancel_in_the_switchover_brings_the_guest_back(
    short_tmp_path: Path, binary: Path, multifd: int
) -> None:
    async with running(short_tmp_path, binary, proxied=True) as two:
        migration = await in_switchover(two, multifd_channels=multifd)
        await cancel(two, migration)
        await stays_and_moves_again(two, migration, "cancelled", "cancelled")


async def denied(two: Fleet, migration: str) -> None:
    """The guest may run over there: no cancel."""
    with pytest.raises(Problem) as problem:
        await cancel(two, migration)
    assert (problem.value.status, problem.value.code) == (409, "past_point_of_no_return")


@pytest.mark.parametrize("phase", ["preflight", "preparing"])
async def test_a_cancel_before_anything_moves_leaves_nothing_behind(
    short_tmp_path: Path, newer: Path, phase: str
) -> None:
    trigger = {"preflight": "started", "preparing": "preflight_passed"}[phase]
    async with running(short_tmp_path, newer, image=SMALL) as two:
        two.hold("alpha", "after", trigger)
        migration = await two.migrate("alpha", "beta")
        await two.held("alpha", "after", trigger)
        assert await cancel(two, migration) == 202
        two.let_go("alpha", "after", trigger)
        await stays_and_moves_again(two, migration, "cancelled", "cancelled")


async def test_a_cancel_of_one_that_waits_for_a_slot(short_tmp_path: Path, newer: Path) -> None:
    none = {"alpha": {"migration": "outgoing_slots = 0\n"}}
    async with running(short_tmp_path, newer, image=SMALL, settings=none) as two:
        migration = await two.migrate("alpha", "beta")
        seen = await two.phase("alpha", migration, "pending")
        assert seen["queue_position"] == 1
        await cancel(two, migration)
        await stayed(two, migration, "cancelled", "cancelled")


async def test_a_cancel_after_the_grant_is_denied_with_the_reason(
    short_tmp_path: Path, newer: Path
) -> None:
    async with running(short_tmp_path, newer, image=SMALL) as two:
        two.hold("beta", "before", "start_ordered")
        migration = await two.migrate("alpha", "beta")
        await two.phase("alpha", migration, "granted")
        await denied(two, migration)
        two.let_go("beta", "before", "start_ordered")
        await moved(two, migration)
        await denied(two, migration)


async def test_one_vm_migrates_once_at_a_time_and_a_key_names_one_migration(
    short_tmp_path: Path, newer: Path
) -> None:
    async with running(short_tmp_path, newer) as two:
        body: Json = {"vm": "guest", "destination": "beta", "policy": SLOW}
        key = {"Idempotency-Key": "one-and-only"}
        first = await two.call("alpha", "POST", "/v1/migrations", body=body, headers=key)
        again = await two.call("alpha", "POST", "/v1/migrations", body=body, headers=key)
        assert isinstance(first.body, dict)
        assert isinstance(again.body, dict)
        assert first.body["id"] == again.body["id"]
        other: Json = {"vm": "guest", "destination": "beta"}
        with pytest.raises(Problem) as reused:
            await two.call("alpha", "POST", "/v1/migrations", body=other, headers=key)
        assert reused.value.status == 422
        with pytest.raises(Problem) as busy:
            await two.migrate("alpha", "beta")
        assert (busy.value.status, busy.value.code) == (409, "already_migrating")
        for vm, host, code in [
            ("nobody", "beta", "unknown_vm"),
            ("guest", "nowhere", "unknown_destination"),
        ]:
            with pytest.raises(Problem) as unknown:
                await two.call(
                    "alpha", "POST", "/v1/migrations", body={"vm": vm, "destination": host}
                )
            assert unknown.value.code == code
        migration = str(first.body["id"])
        await cancel(two, migration)
        await stays_and_moves_again(two, migration, "cancelled", "cancelled")
