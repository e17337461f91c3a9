"""A daemon killed at each record of its journal, and stopped for a while: nothing changes the fate.

Held just before or just after a record is durable, killed there, started again: the migration goes
on and succeeds, with one copy of the guest.
"""

import asyncio
import os
import signal
from pathlib import Path

import pytest

from tests.integration.fleet import SMALL
from tests.integration.scenarios import (
    has_condition,
    hurry,
    in_precopy,
    in_switchover,
    moved,
    running,
    stays_and_moves_again,
)

pytestmark = [pytest.mark.real, pytest.mark.timeout(240)]


RECORDS: dict[str, list[tuple[str, str]]] = {
    "source": [
        ("after", "preflight_passed"),
        ("after", "destination_prepared"),
        ("before", "transfer_completed"),
        ("after", "transfer_completed"),
        ("before", "destination_ran"),
        ("after", "destination_ran"),
        ("before", "source_released"),
    ],
    "destination": [
        ("before", "incoming_ready"),
        ("after", "incoming_ready"),
        ("before", "start_ordered"),
        ("after", "start_ordered"),
        ("before", "guest_ran"),
        ("after", "guest_ran"),
    ],
}


@pytest.mark.parametrize("role", ["source", "destination"])
async def test_a_daemon_killed_at_a_record_takes_the_migration_up_again(
    short_tmp_path: Path, newer: Path, role: str
) -> None:
    """There and back with one guest, killed at the next record each time."""
    async with running(short_tmp_path, newer, image=SMALL) as two:
        source, destination = "alpha", "beta"
        for moves, (when, trigger) in enumerate(RECORDS[role], 1):
            host = source if role == "source" else destination
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


@pytest.mark.parametrize("host", ["alpha", "beta", "both"])
async def test_daemons_killed_in_the_switchover_take_it_up_again(
    short_tmp_path: Path, newer: Path, host: str
) -> None:
    """The guest stands still meanwhile; QEMU needs nobody to go on."""
    async with running(short_tmp_path, newer, proxied=True) as two:
        migration = await in_switchover(two)
        names = ["alpha", "beta"] if host == "both" else [host]
        for name in names:
            await two.kill_daemon(name)
        for name in names:
            await two.start_daemon(name)
        await moved(two, migration)


async def test_both_daemons_killed_with_the_grant_under_way_agree_after_their_restart(
    short_tmp_path: Path, binary: Path
) -> None:
    async with running(short_tmp_path, binary, image=SMALL) as two:
        two.hold("beta", "after", "start_ordered")
        migration = await two.migrate("alpha", "beta")
        await two.held("beta", "after", "start_ordered")
        assert (await two.migration("alpha", migration))["phase"] == "granted"
        for name in ("alpha", "beta"):
            await two.kill_daemon(name)
        two.let_go("beta", "after", "start_ordered")
        for name in ("alpha", "beta"):
            await two.start_daemon(name)
        await moved(two, migration)


async def test_a_source_killed_while_it_rolls_back_rolls_back(
    short_tmp_path: Path, newer: Path
) -> None:
    async with running(short_tmp_path, newer) as two:
        migration = await in_precopy(two)
        two.hold("alpha", "before", "cancel_completed")
        await two.call("alpha", "POST", f"/v1/migrations/{migration}:cancel")
        await two.held("alpha", "before", "cancel_completed")
        await two.kill_daemon("alpha")
        two.let_go("alpha", "before", "cancel_completed")
        await two.start_daemon("alpha")
        await stays_and_moves_again(two, migration, "cancelled", "cancelled")


async def test_a_source_quitting_slowly_is_released_after_a_restart(
    short_tmp_path: Path, newer: Path
) -> None:
    """`completing`: the source's QEMU hangs and its daemon is killed; it is ended all the same."""
    async with running(short_tmp_path, newer, image=SMALL) as two:
        two.hold("beta", "before", "start_ordered")
        migration = await two.migrate("alpha", "beta")
        await two.phase("alpha", migration, "granted")
        (pid,) = await two.qemus("alpha")
        os.kill(pid, signal.SIGSTOP)
        two.let_go("beta", "before", "start_ordered")
        await two.phase("alpha", migration, "completing")
        await two.kill_daemon("alpha")
        await two.start_daemon("alpha")
        await moved(two, migration)


# Stopped, not killed ------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["alpha", "beta"])
async def test_a_daemon_that_stands_still_in_precopy_goes_on_afterwards(
    short_tmp_path: Path, newer: Path, host: str
) -> None:
    async with running(short_tmp_path, newer) as two:
        migration = await in_precopy(two)
        two.signal_daemon(host, signal.SIGSTOP)
        if host == "beta":
            await two.until("alpha", migration, has_condition("DestinationUnreachable"))
        await two.counts_on("alpha", 200)  # two seconds and more
        two.signal_daemon(host, signal.SIGCONT)
        await hurry(two, migration)
        await moved(two, migration)


@pytest.mark.parametrize("host", ["alpha", "beta"])
async def test_a_daemon_that_stands_still_in_the_switchover_goes_on_afterwards(
    short_tmp_path: Path, newer: Path, host: str
) -> None:
    async with running(short_tmp_path, newer, proxied=True) as two:
        migration = await in_switchover(two)
        two.signal_daemon(host, signal.SIGSTOP)
        assert two.stream is not None
        two.stream.to_target.delay_s = 0.0
        await two.stands_still("alpha", for_s=3.0)
        two.signal_daemon(host, signal.SIGCONT)
        await moved(two, migration)


async def test_a_grant_without_an_answer_calls_the_operator_and_the_answer_settles_it(
    short_tmp_path: Path, newer: Path
) -> None:
    quick = {"alpha": {"migration": "grant_deadline_s = 1.5\n"}}
    async with running(short_tmp_path, newer, image=SMALL, settings=quick) as two:
        two.hold("beta", "before", "start_ordered")
        migration = await two.migrate("alpha", "beta")
        await two.held("beta", "before", "start_ordered")
        two.signal_daemon("beta", signal.SIGSTOP)
        seen = await two.phase("alpha", migration, "needs_operator")
        assert seen["guest_runs_on"] == "unknown"
        assert seen["cause"]["code"] == "grant_unanswered"
        assert "beta" in seen["next_step"]
        await two.stands_still("alpha")
        two.let_go("beta", "before", "start_ordered")
        two.signal_daemon("beta", signal.SIGCONT)
        await moved(two, migration)


async def test_a_destination_proven_dead_after_the_grant_gives_the_guest_back(
    short_tmp_path: Path, newer: Path
) -> None:
    """The operator's fence: its daemon and QEMU are gone, and were gone before the guest ran."""
    quick = {"alpha": {"migration": "grant_deadline_s = 1.5\n"}}
    async with running(short_tmp_path, newer, image=SMALL, settings=quick) as two:
        two.hold("beta", "before", "start_ordered")
        migration = await two.migrate("alpha", "beta")
        await two.held("beta", "before", "start_ordered")
        await two.kill_daemon("beta")
        two.let_go("beta", "before", "start_ordered")
        await two.phase("alpha", migration, "needs_operator")
        os.kill((await two.qemus("beta"))[0], signal.SIGKILL)
        await two.only_qemus(1)
        await two.call(
            "alpha",
            "POST",
            f"/v1/migrations/{migration}:resolve",
            body={"resolution": "destination_fenced", "evidence": "powered off"},
        )
        (word,) = (await two.ended("alpha", migration))["resolutions"]
        assert (word["evidence"], word["outcome"]) == ("powered off", "carried_out")
        assert word["by"].startswith(f"uid:{os.getuid()}")
        assert word["known"]["peer_phase"] is None, "nobody answered there"
        await two.counts_on("alpha")
        await two.start_daemon("beta")
        await stays_and_moves_again(two, migration, "rolled_back", "operator_destination_fenced")


async def test_killed_again_and_again_it_still_ends(short_tmp_path: Path, newer: Path) -> None:
    """The guest is not kept waiting for a destination that is away: it may be taken back."""
    async with running(short_tmp_path, newer, image=SMALL) as two:
        migration = await two.migrate("alpha", "beta")
        for _ in range(3):
            for name in ("alpha", "beta"):
                await asyncio.sleep(0.05)
                await two.kill_daemon(name)
                await two.start_daemon(name)
        if (await two.ended("alpha", migration))["phase"] == "succeeded":
            await moved(two, migration)
        else:
            away = ("destination_unreachable", "switchover_timed_out")  # before it, or during it
            await stays_and_moves_again(two, migration, "rolled_back", *away)
