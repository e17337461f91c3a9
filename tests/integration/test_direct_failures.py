"""Moves of a process that go wrong: the guest goes on where the answer says, and moves again."""

import asyncio
import os
import signal
from pathlib import Path

import pytest

from migrd.cli.seen import Json
from migrd.demo import hosts
from tests.integration.direct_fleet import (
    CALM,
    LEAST_MIB,
    LIVELY,
    MEMORY_MIB,
    PATIENCE,
    DirectFleet,
    direct_fleet,
    running,
    switchover_deadline,
)
from tests.integration.fleet import TERMINAL
from tests.integration.scenarios import (
    FAST,
    PATIENT,
    PIECE_S,
    full_speed,
    hurry,
    moved,
    moves_again,
    stayed,
    stays_and_moves_again,
)

pytestmark = pytest.mark.timeout(180 * PATIENCE)

SLOW: dict[str, Json] = {"max_bandwidth_bytes_per_s": 8 << 20}
"""LIVELY writes more than that."""
NEVER: dict[str, Json] = {
    "downtime_limit_ms": 1,
    "max_bandwidth_bytes_per_s": (8 << 20) * MEMORY_MIB // LEAST_MIB,
}
"""In a millisecond not even a few pages are sent: it copies, and copies on. Faster, what one short
round finds would fit now and then."""
STANDS_BYTES = 16 << 20
"""What is left for the switchover, at the least: some second on a slow road."""


async def in_precopy(two: DirectFleet, **more: Json) -> str:
    """A migration that copies memory and will not end by itself."""
    migration = await two.migrate("alpha", "beta", policy=SLOW, **more)
    await two.until(
        "alpha", migration, lambda seen: (seen["progress"]["transferred_bytes"] or 0) > 1 << 20
    )
    return migration


async def copied(two: DirectFleet, source: str, destination: str) -> str:
    """A migration that has copied all memory once, as fast as it could, and will not end."""
    migration = await two.migrate(source, destination, policy=SLOW)
    await two.phase(source, migration, "precopy")
    await change(two, source, migration, NEVER)  # preflight would refuse to begin with it
    seen = await two.until(
        source,
        migration,
        lambda seen: seen["progress"]["rounds"] >= 2 or seen["phase"] in TERMINAL,
    )
    assert seen["phase"] == "precopy", seen
    return migration


async def in_switchover(two: DirectFleet) -> str:
    """A migration whose guest stands still for some seconds while the rest is sent."""
    assert two.stream is not None, "make the fleet with proxied=True"
    migration = await copied(two, "alpha", "beta")
    await change(two, "alpha", migration, SLOW)
    await two.until(
        "alpha",
        migration,
        lambda seen: (seen["progress"]["remaining_bytes"] or 0) > STANDS_BYTES,
    )
    two.stream.to_target.delay_s = PIECE_S
    await change(two, "alpha", migration, {**PATIENT, **FAST})
    await two.phase("alpha", migration, "switchover")
    return migration


async def change(two: DirectFleet, host: str, migration: str, policy: Json) -> None:
    await two.call(host, "PATCH", f"/v1/migrations/{migration}/policy", body=policy)


async def only_guest(two: DirectFleet, host: str) -> int:
    (pid,) = await two.qemus(host)
    return pid


# Processes that die -------------------------------------------------------------------------------


async def test_a_destination_that_dies_leaves_the_guest_where_it_is(short_tmp_path: Path) -> None:
    async with running(short_tmp_path, parameters=LIVELY, proxied=True) as two:
        migration = await in_precopy(two)
        os.kill(await only_guest(two, "beta"), signal.SIGKILL)
        await stayed(two, migration, "rolled_back")
        migration = await in_switchover(two)
        os.kill(await only_guest(two, "beta"), signal.SIGKILL)
        await stays_and_moves_again(two, migration, "rolled_back")


async def test_a_guest_whose_process_dies_while_it_is_copied_is_lost_and_said_to_be(
    short_tmp_path: Path,
) -> None:
    async with running(short_tmp_path, parameters=LIVELY) as two:
        migration = await in_precopy(two)
        os.kill(await only_guest(two, "alpha"), signal.SIGKILL)
        seen = await two.ended("alpha", migration)
        assert seen["phase"] == "guest_lost", seen["cause"]
        await two.only_qemus(0)
        await two.call("alpha", "POST", "/v1/vms/guest:start")
        await two.only_qemus(1)
        await two.counts_on("alpha")


async def test_a_source_that_dies_when_the_destination_has_all_goes_on_there(
    short_tmp_path: Path,
) -> None:
    async with running(short_tmp_path) as two:
        two.hold("beta", "before", "start_ordered")
        migration = await two.migrate("alpha", "beta")
        await two.held("beta", "before", "start_ordered")
        os.kill(await only_guest(two, "alpha"), signal.SIGKILL)
        two.let_go("beta", "before", "start_ordered")
        await moved(two, migration)


# Daemons that die ---------------------------------------------------------------------------------


async def test_a_daemon_killed_while_the_guest_is_copied(short_tmp_path: Path) -> None:
    """What the destination's had received is given up; the source's begins again, and moves it."""
    async with running(short_tmp_path, parameters=LIVELY) as two:
        migration = await in_precopy(two)
        await two.kill_daemon("beta")
        await two.start_daemon("beta")
        await stayed(two, migration, "rolled_back")
        migration = await in_precopy(two)
        await two.kill_daemon("alpha")
        await two.start_daemon("alpha")
        await two.phase("alpha", migration, "precopy")
        await hurry(two, migration)
        await moved(two, migration)


async def test_a_daemon_killed_in_the_switchover_gives_the_guest_back(short_tmp_path: Path) -> None:
    async with running(short_tmp_path, parameters=LIVELY, proxied=True) as two:
        for names in (["alpha"], ["beta"], ["alpha", "beta"]):
            migration = await in_switchover(two)
            for name in names:
                await two.kill_daemon(name)
            full_speed(two)
            for name in names:
                await two.start_daemon(name)
            await stayed(two, migration, "rolled_back")
        await moves_again(two)


async def test_a_daemon_that_is_stopped_leaves_no_guest_standing(short_tmp_path: Path) -> None:
    """In the switchover the guest is resumed first; in precopy the next daemon begins again."""
    async with running(short_tmp_path, parameters=LIVELY, proxied=True) as two:
        migration = await in_switchover(two)
        await hosts.stop(two.hosts["alpha"])
        await two.counts_on("alpha")
        full_speed(two)
        await two.start_daemon("alpha")
        await stayed(two, migration, "rolled_back")
        migration = await in_precopy(two)
        await hosts.stop(two.hosts["alpha"])
        await two.start_daemon("alpha")
        await hurry(two, migration)
        await moved(two, migration)


RECORDS = {
    "alpha": [("after", "transfer_completed"), ("before", "destination_ran")],
    "beta": [("before", "incoming_ready"), ("before", "start_ordered"), ("after", "start_ordered")],
}


@pytest.mark.parametrize("role", ["alpha", "beta"])
async def test_a_daemon_killed_at_a_record_takes_the_migration_up_again(
    short_tmp_path: Path, role: str
) -> None:
    """There and back with one guest, killed at the next record each time."""
    async with running(short_tmp_path) as two:
        source, destination = "alpha", "beta"
        for moves, (when, trigger) in enumerate(RECORDS[role], 1):
            host = source if role == "alpha" else destination
            two.hold(host, when, trigger)
            migration = await two.migrate(source, destination)
            await two.held(host, when, trigger)
            await two.kill_daemon(host)
            two.let_go(host, when, trigger)
            await two.start_daemon(host)
            seen = await two.ended(source, migration)
            assert seen["phase"] == "succeeded", (when, trigger, seen["cause"])
            await two.only_qemus(1)
            await two.prove(moves, on=destination)
            source, destination = destination, source


# The road -----------------------------------------------------------------------------------------


async def test_a_link_that_is_cut_or_stands_still_gives_the_guest_back(
    short_tmp_path: Path,
) -> None:
    quick = {"alpha": {"migration": "stall_s = 2.0\n" + switchover_deadline(2.0)}}
    async with running(short_tmp_path, parameters=LIVELY, proxied=True, settings=quick) as two:
        assert two.stream is not None
        migration = await in_precopy(two)
        two.stream.cut()
        await stayed(two, migration, "rolled_back", "transfer_failed")
        migration = await in_precopy(two)
        two.stream.freeze()
        await stayed(two, migration, "rolled_back", "link_stalled")
        two.stream.resume()
        migration = await in_switchover(two)
        two.stream.freeze()
        await stayed(two, migration, "rolled_back", "switchover_timed_out")
        two.stream.resume()
        await moves_again(two)


async def test_cancelled_in_precopy_and_in_the_switchover(short_tmp_path: Path) -> None:
    async with running(short_tmp_path, parameters=LIVELY, proxied=True) as two:
        migration = await in_precopy(two)
        await two.call("alpha", "POST", f"/v1/migrations/{migration}:cancel")
        await stayed(two, migration, "cancelled", "cancelled")
        migration = await in_switchover(two)
        await two.call("alpha", "POST", f"/v1/migrations/{migration}:cancel")
        await stays_and_moves_again(two, migration, "cancelled", "cancelled")


# Limits -------------------------------------------------------------------------------------------


async def test_limits_and_throttle_take_effect_while_it_runs(short_tmp_path: Path) -> None:
    async with running(short_tmp_path, parameters=LIVELY) as two:
        migration = await in_precopy(two)
        await asyncio.sleep(1.0)
        assert (await two.migration("alpha", migration))["phase"] == "precopy"
        await hurry(two, migration)
        seen = await moved(two, migration)
        assert seen["blackout_ms"] < 2000 * PATIENCE


async def test_a_guest_that_writes_too_fast_is_slowed_or_moved_by_force(
    short_tmp_path: Path,
) -> None:
    async with running(short_tmp_path, parameters={**CALM, "dirty_mib_per_s": 16}) as two:
        policy: Json = {**SLOW, "when_not_converging": "throttle", "max_throttle_percent": 99}
        migration = await copied(two, "alpha", "beta")
        await change(two, "alpha", migration, policy)
        await two.until("alpha", migration, lambda seen: seen["progress"]["throttle_percent"] > 0)
        await change(two, "alpha", migration, {"downtime_limit_ms": 300})
        await moved(two, migration)
        migration = await copied(two, "beta", "alpha")
        await two.call("beta", "POST", f"/v1/migrations/{migration}:switchover")
        seen = await two.ended("beta", migration)
        assert seen["phase"] == "succeeded", seen["cause"]
        await two.prove(2, on="alpha")


# Processes that misbehave -------------------------------------------------------------------------


MISBEHAVIOURS = [
    ("alpha", "lies", "written while paused"),
    ("alpha", "refuses", "I will not stop"),
    ("alpha", "is_slow", "not answer"),
    ("alpha", "is_greedy", "memory"),
    ("beta", "breaks", "not to my taste"),
]
"""Host, how a process that is launched there behaves, what the answer says of it."""


async def test_a_guest_stays_where_it_is_when_its_process_or_the_other_misbehaves(
    short_tmp_path: Path,
) -> None:
    async with direct_fleet(short_tmp_path) as two:
        for host, behaviour, told in MISBEHAVIOURS:
            two.behave(host, behaviour)
            await two.start_guest("alpha")
            migration = await two.migrate("alpha", "beta")
            seen = await two.ended("alpha", migration)
            assert seen["phase"] == "rolled_back", seen
            assert told in seen["cause"]["message"], seen["cause"]
            await two.only_qemus(1)
            await two.counts_on("alpha")
            two.behave(host, "well")
            if behaviour == "lies":
                await stays_and_moves_again(two, migration, "rolled_back")
                await two.stop_guest("beta")
            else:
                await two.stop_guest("alpha")


async def test_a_source_that_loses_its_connection_is_moved_all_the_same(
    short_tmp_path: Path,
) -> None:
    async with running(short_tmp_path, parameters=LIVELY) as two:
        migration = await in_precopy(two)
        os.kill(await only_guest(two, "alpha"), signal.SIGUSR1)
        await asyncio.sleep(0.5)
        await change(two, "alpha", migration, FAST)
        await moved(two, migration)


async def test_a_guest_larger_than_the_destination_allows_is_refused(short_tmp_path: Path) -> None:
    small = {"beta": {"end": "[direct]\nlargest_guest_mib = 32\n"}}
    async with running(short_tmp_path, settings=small) as two:
        migration = await two.migrate("alpha", "beta")
        seen = await two.ended("alpha", migration)
        assert seen["phase"] == "refused"
        assert "largest_guest_mib" in seen["refusals"][0]["message"]
