"""A source whose QEMU dies, hangs or cannot be asked, and a guest that ends or resets itself."""

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest

from migrd.cli.client import Problem
from migrd.cli.seen import Json
from migrd.demo.image import GuestImage, Pattern
from migrd.demo.proof import heartbeats
from tests.integration.fleet import LIVELY, SMALL, Fleet
from tests.integration.scenarios import (
    SLOW,
    full_speed,
    hurry,
    in_precopy,
    in_switchover,
    moved,
    moves_again,
    running,
    stayed,
)

pytestmark = [pytest.mark.real, pytest.mark.timeout(120)]


@pytest.mark.parametrize("phase", ["precopy", "switchover"])
async def test_the_sources_qemu_dying_loses_the_guest_and_says_so(
    short_tmp_path: Path, newer: Path, phase: str
) -> None:
    async with running(short_tmp_path, newer, proxied=True) as two:
        migration = await (in_precopy(two) if phase == "precopy" else in_switchover(two))
        os.kill((await two.qemus("alpha"))[0], signal.SIGKILL)
        seen = await two.ended("alpha", migration)
        assert seen["phase"] == "guest_lost", seen
        assert seen["guest_runs_on"] == "nowhere"
        assert seen["cause"]["code"] == "vmm_died"
        assert "start" in seen["next_step"]
        await two.only_qemus(0)
        await two.call("alpha", "POST", "/v1/vms/guest:start")
        await two.counts_on("alpha")
        full_speed(two)
        again = await two.migrate("alpha", "beta")
        assert (await two.ended("alpha", again))["phase"] == "succeeded"
        await two.only_qemus(1)
        await two.counts_on("beta")


async def test_the_source_dying_with_all_of_the_guest_at_the_destination_saves_it(
    short_tmp_path: Path, newer: Path
) -> None:
    """Everything is over there and the source can run no more: there is nothing to lose by it."""
    async with running(short_tmp_path, newer, image=SMALL) as two:
        two.hold("alpha", "before", "transfer_completed")
        migration = await two.migrate("alpha", "beta")
        await two.held("alpha", "before", "transfer_completed")
        os.kill((await two.qemus("alpha"))[0], signal.SIGKILL)
        two.let_go("alpha", "before", "transfer_completed")
        await moved(two, migration)


async def shown_as(two: Fleet, state: str, *, within_s: float = 20.0) -> None:
    """The API shows the VM on alpha in this state."""
    give_up_at = time.monotonic() + within_s
    while (seen := (await two.vm("alpha"))["state"]) != state:
        assert time.monotonic() < give_up_at, f"it is {seen}"
        await asyncio.sleep(0.05)


async def test_a_qemu_that_does_not_answer_is_shown_so_and_its_guest_is_not_moved(
    short_tmp_path: Path, newer: Path
) -> None:
    async with running(short_tmp_path, newer, image=SMALL) as two:
        (pid,) = await two.qemus()
        os.kill(pid, signal.SIGSTOP)
        await shown_as(two, "unreachable")
        seen = await two.ended("alpha", await two.migrate("alpha", "beta"))
        assert seen["phase"] == "refused", seen
        assert "source_unreachable" in [refusal["code"] for refusal in seen["refusals"]]
        assert await two.qemus() == [pid]
        os.kill(pid, signal.SIGCONT)
        await shown_as(two, "running")
        await moves_again(two)


async def test_a_qemu_that_hangs_for_a_moment_in_precopy_is_waited_for(
    short_tmp_path: Path, newer: Path
) -> None:
    async with running(short_tmp_path, newer) as two:
        migration = await in_precopy(two)
        (pid,) = await two.qemus("alpha")
        os.kill(pid, signal.SIGSTOP)
        await two.until("alpha", migration, lambda seen: seen["progress"]["stalled_ms"])
        os.kill(pid, signal.SIGCONT)
        await hurry(two, migration)
        await moved(two, migration)


async def test_a_source_that_hangs_while_it_is_rolled_back_is_not_guessed_about(
    short_tmp_path: Path, newer: Path
) -> None:
    quick = {"alpha": {"migration": "stall_s = 4.0\nrollback_deadline_s = 2.0\n"}}
    async with running(short_tmp_path, newer, settings=quick) as two:
        migration = await in_precopy(two)
        (pid,) = await two.qemus("alpha")
        os.kill(pid, signal.SIGSTOP)
        seen = await two.phase("alpha", migration, "needs_operator")
        assert seen["cause"]["code"] == "source_unclear"
        assert str(pid) in seen["next_step"]
        os.kill(pid, signal.SIGCONT)
        await stayed(two, migration, "rolled_back", "link_stalled", "source_unclear")
        await moves_again(two)


async def test_a_monitor_socket_that_is_gone_leaves_the_vm_unreachable_until_it_is_back(
    short_tmp_path: Path, newer: Path
) -> None:
    async with running(short_tmp_path, newer, image=SMALL) as two:
        (monitor,) = await asyncio.to_thread(
            lambda: list((two.hosts["alpha"].directory / "run").glob("vms/*/*/qmp.sock"))
        )
        await two.kill_daemon("alpha")
        away = await asyncio.to_thread(monitor.rename, monitor.with_name("away"))
        await two.start_daemon("alpha")
        await shown_as(two, "unreachable")
        seen = await two.ended("alpha", await two.migrate("alpha", "beta"))
        assert seen["phase"] == "refused", seen
        assert "source_unreachable" in [refusal["code"] for refusal in seen["refusals"]]
        await two.counts_on("alpha")
        await asyncio.to_thread(away.rename, monitor)
        await shown_as(two, "running")
        await moves_again(two)


async def test_multifd_together_with_postcopy_is_refused_before_anything_is_touched(
    short_tmp_path: Path, binary: Path
) -> None:
    async with running(short_tmp_path, binary, image=SMALL) as two:
        policy: dict[str, Json] = {"when_not_converging": "postcopy"}
        migration = await two.migrate("alpha", "beta", policy=policy, multifd_channels=2)
        seen = await two.ended("alpha", migration)
        assert seen["phase"] == "refused", seen["cause"]
        assert [refusal["code"] for refusal in seen["refusals"]] == ["multifd_with_postcopy"]
        await moves_again(two)


# What the guest does to itself --------------------------------------------------------------------

RESETTING = GuestImage(
    working_set_pages=4 * 256,
    pages_per_s=2000,
    pattern=Pattern.RANDOM,
    noise=True,
    reset_after_heartbeats=60,
)


def boots(two: Fleet) -> list[list[int]]:
    """The numbers counted after each boot, over both hosts."""
    rows: list[list[int]] = []
    for beat in heartbeats([tap for tap in two.taps if tap.chunks]):
        assert beat.integrity_errors == 0
        if beat.sequence == 1:
            rows.append([])
        rows[-1].append(beat.sequence)
    return rows


async def test_a_guest_that_resets_in_the_middle_is_moved_and_boots_on(
    short_tmp_path: Path, binary: Path
) -> None:
    async with running(short_tmp_path, binary, image=RESETTING) as two:
        slow: dict[str, Json] = {"max_bandwidth_bytes_per_s": 2 << 20, "downtime_limit_ms": 60}
        migration = await two.migrate("alpha", "beta", policy=slow)
        await two.phase("alpha", migration, "precopy")
        before = len(boots(two))
        give_up_at = time.monotonic() + 20
        while len(boots(two)) < before + 2:
            assert time.monotonic() < give_up_at, "it does not reset"
            await asyncio.sleep(0.05)
        assert (await two.migration("alpha", migration))["phase"] == "precopy"
        await hurry(two, migration)
        seen = await two.ended("alpha", migration)
        assert seen["phase"] == "succeeded", seen["cause"]
        await two.counts_on("beta", 150)
        for row in boots(two)[:-1]:
            assert row == list(range(1, len(row) + 1))  # each boot counts on over the move
            assert len(row) == RESETTING.reset_after_heartbeats
        await two.only_qemus(1)


async def test_a_guest_that_shuts_itself_down_in_the_middle_is_lost_by_its_own_wish(
    short_tmp_path: Path, binary: Path
) -> None:
    """With `-no-reboot` in the profile its reset is a shutdown, and its QEMU exits."""
    image = GuestImage(
        working_set_pages=48 * 256, pages_per_s=5000, noise=True, reset_after_heartbeats=400
    )
    async with running(short_tmp_path, binary, image=image, no_reboot=True) as two:
        migration = await two.migrate("alpha", "beta", policy=SLOW)
        await two.phase("alpha", migration, "precopy")
        seen = await two.ended("alpha", migration)
        assert seen["phase"] == "guest_lost", seen["cause"]
        assert seen["cause"]["code"] == "guest_shut_down"
        await two.only_qemus(0)
        await two.call("alpha", "POST", "/v1/vms/guest:start")
        await two.counts_on("alpha")
        again = await two.ended("alpha", await two.migrate("alpha", "beta"))
        assert again["phase"] == "succeeded", again["cause"]


async def test_an_ended_migration_stays_ended_when_the_daemon_starts_again(
    short_tmp_path: Path, newer: Path
) -> None:
    async with running(short_tmp_path, newer, image=LIVELY) as two:
        migration = await in_precopy(two, policy={"max_bandwidth_bytes_per_s": 4 << 20})
        await two.call("alpha", "POST", f"/v1/migrations/{migration}:cancel")
        await stayed(two, migration, "cancelled", "cancelled")
        await two.kill_daemon("alpha")
        await two.start_daemon("alpha")
        assert (await two.migration("alpha", migration))["phase"] == "cancelled"
        with pytest.raises(Problem) as denied:
            await two.call("alpha", "POST", f"/v1/migrations/{migration}:switchover")
        assert denied.value.status == 409
        await moves_again(two)
