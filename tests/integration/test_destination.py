"""A destination that is down, unfit, or whose QEMU dies: the guest stays where it is."""

import asyncio
import os
import signal
from pathlib import Path

import pytest

from tests.integration.fleet import SMALL, Fleet
from tests.integration.scenarios import (
    in_precopy,
    in_switchover,
    moved,
    moves_again,
    running,
    stays_and_moves_again,
)

pytestmark = [pytest.mark.real, pytest.mark.timeout(120)]


async def refused(two: Fleet, code: str) -> str:
    """Ask for a migration, and see it refused for this reason alone; its message."""
    seen = await two.ended("alpha", await two.migrate("alpha", "beta"))
    assert seen["phase"] == "refused", seen
    assert [refusal["code"] for refusal in seen["refusals"]] == [code]
    assert seen["guest_runs_on"] == "source"
    await two.only_qemus(1)
    return str(seen["refusals"][0]["message"])


async def test_a_destination_that_is_down_is_said_and_nothing_is_touched(
    short_tmp_path: Path, newer: Path
) -> None:
    async with running(short_tmp_path, newer, image=SMALL) as two:
        await two.kill_daemon("beta")
        await refused(two, "destination_unreachable")
        await two.start_daemon("beta")
        await moves_again(two)


async def test_a_destination_of_another_protocol_version_is_refused_with_both_versions(
    short_tmp_path: Path, newer: Path
) -> None:
    async with running(short_tmp_path, newer, image=SMALL) as two:
        await two.kill_daemon("beta")
        protocol = two.hosts["beta"].directory / "holds" / "protocol"
        await asyncio.to_thread(protocol.write_text, "99")
        await two.start_daemon("beta")
        assert "99" in await refused(two, "protocol_mismatch")
        await two.kill_daemon("beta")
        await asyncio.to_thread(protocol.unlink)
        await two.start_daemon("beta")
        await moves_again(two)


async def test_a_full_destination_refuses(short_tmp_path: Path, newer: Path) -> None:
    full = {"beta": {"migration": "incoming_slots = 0\n"}}
    async with running(short_tmp_path, newer, image=SMALL, settings=full) as two:
        await refused(two, "destination_full")
        await two.prove(0, on="alpha")


async def test_a_destination_whose_profile_makes_another_machine_refuses(
    short_tmp_path: Path, newer: Path
) -> None:
    async with running(short_tmp_path, newer, image=SMALL) as two:
        await two.kill_daemon("beta")
        profile = two.hosts["beta"].directory / "profiles" / "demo.toml"
        text = await asyncio.to_thread(profile.read_text)
        await asyncio.to_thread(profile.write_text, text.replace('"qemu64"', '"Nehalem"'))
        await two.start_daemon("beta")
        await refused(two, "profile_differs")
        await two.prove(0, on="alpha")


async def test_a_destination_whose_qemu_does_not_start_rolls_back_with_its_last_words(
    short_tmp_path: Path, newer: Path
) -> None:
    async with running(short_tmp_path, newer, image=SMALL) as two:
        failing = short_tmp_path / "failing-qemu"
        script = f"""#!/bin/sh
            case "$*" in *-incoming*) echo "no room on this ship" >&2; exit 1;; esac
            exec {newer} "$@"
            """
        await asyncio.to_thread(failing.write_text, script)
        failing.chmod(0o755)
        profile = two.hosts["beta"].directory / "profiles" / "demo.toml"
        text = await asyncio.to_thread(profile.read_text)
        await two.kill_daemon("beta")
        await asyncio.to_thread(profile.write_text, text.replace(str(newer), str(failing)))
        await two.start_daemon("beta")
        migration = await two.migrate("alpha", "beta")
        seen = await two.ended("alpha", migration)
        assert "no room on this ship" in seen["cause"]["message"]
        await two.kill_daemon("beta")
        await asyncio.to_thread(profile.write_text, text)
        await two.start_daemon("beta")
        await stays_and_moves_again(two, migration, "rolled_back", "destination_refused")


async def kill_qemu(two: Fleet, host: str) -> None:
    (pid,) = await two.qemus(host)
    os.kill(pid, signal.SIGKILL)


async def test_the_destinations_qemu_dying_in_precopy_leaves_the_guest_where_it_is(
    short_tmp_path: Path, binary: Path
) -> None:
    async with running(short_tmp_path, binary) as two:
        migration = await in_precopy(two)
        await kill_qemu(two, "beta")
        seen = await stays_and_moves_again(
            two, migration, "rolled_back", "transfer_failed", "destination_refused"
        )
        assert "beta" in seen["cause"]["message"]


async def test_the_destinations_qemu_dying_with_the_source_paused_before_switchover(
    short_tmp_path: Path, binary: Path
) -> None:
    async with running(short_tmp_path, binary) as two:
        migration = await two.migrate(
            "alpha",
            "beta",
            policy={"max_bandwidth_bytes_per_s": 30 << 20, "downtime_limit_ms": 1000},
        )
        await two.until(
            "alpha",
            migration,
            lambda seen: (
                seen["phase"] == "precopy"
                and seen["progress"]["qemu_status"] in ("setup", "active")
            ),
        )
        two.signal_daemon("alpha", signal.SIGSTOP)  # nobody says migrate-continue
        await two.stands_still("alpha")
        await kill_qemu(two, "beta")
        two.signal_daemon("alpha", signal.SIGCONT)
        await stays_and_moves_again(
            two,
            migration,
            "rolled_back",
            *("switchover_failed", "destination_refused", "transfer_failed"),
        )


async def test_the_destinations_qemu_dying_in_the_switchover_brings_the_guest_back(
    short_tmp_path: Path, binary: Path
) -> None:
    async with running(short_tmp_path, binary, proxied=True) as two:
        migration = await in_switchover(two)
        await kill_qemu(two, "beta")
        await stays_and_moves_again(
            two, migration, "rolled_back", "switchover_failed", "destination_refused"
        )


async def test_the_destinations_qemu_dying_loaded_but_not_started_brings_the_guest_back(
    short_tmp_path: Path, newer: Path
) -> None:
    """The source cannot resume by itself any more; the refusal is what lets it."""
    async with running(short_tmp_path, newer, image=SMALL) as two:
        two.hold("alpha", "before", "transfer_completed")
        migration = await two.migrate("alpha", "beta")
        await two.held("alpha", "before", "transfer_completed")
        await kill_qemu(two, "beta")
        await two.phase("beta", migration, "refused")  # its death is known, before GRANT comes
        two.let_go("alpha", "before", "transfer_completed")
        await stays_and_moves_again(two, migration, "rolled_back", "destination_refused")


async def test_the_destinations_qemu_dying_at_its_start_is_not_guessed_about(
    short_tmp_path: Path, newer: Path
) -> None:
    """Whether the guest ran there nobody can know: an operator has to say."""
    async with running(short_tmp_path, newer, image=SMALL) as two:
        two.hold("beta", "after", "start_ordered")
        migration = await two.migrate("alpha", "beta")
        await two.held("beta", "after", "start_ordered")
        await kill_qemu(two, "beta")
        two.let_go("beta", "after", "start_ordered")
        seen = await two.phase("alpha", migration, "needs_operator")
        assert seen["guest_runs_on"] == "unknown"
        assert seen["cause"]["code"] == "destination_died_starting"
        (pid,) = await two.qemus()
        await two.call(
            "alpha",
            "POST",
            f"/v1/migrations/{migration}:resolve",
            body={"resolution": "destination_fenced", "evidence": "its QEMU was seen to be dead"},
        )
        await stays_and_moves_again(two, migration, "rolled_back", "operator_destination_fenced")
        assert pid not in await two.qemus()


async def test_a_destination_that_comes_back_knows_nothing_of_a_migration_that_ended(
    short_tmp_path: Path, newer: Path
) -> None:
    """Killed in precopy, and rolled back meanwhile: its copy is discarded at its restart."""
    async with running(short_tmp_path, newer) as two:
        migration = await in_precopy(two)
        await two.kill_daemon("beta")
        await two.call("alpha", "POST", f"/v1/migrations/{migration}:cancel")
        assert (await two.ended("alpha", migration))["phase"] == "cancelled"
        await two.start_daemon("beta")
        await two.only_qemus(1, within_s=20)
        await moved(two, await two.migrate("alpha", "beta"))
