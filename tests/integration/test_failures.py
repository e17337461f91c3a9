"""Each thing that can break in a migration, broken for real.

After each: the API's last word is the truth, one copy of the guest runs, its count and memory are
whole, nothing of the attempt is left, and the same VM migrates again.
"""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from migrd.cli.client import Problem
from migrd.cli.seen import Json
from migrd.demo.image import GuestImage
from tests.integration.fleet import BUSY, SMALL, Fleet, fleet

pytestmark = [pytest.mark.real, pytest.mark.timeout(240)]

SLOW: dict[str, Json] = {"max_bandwidth_bytes_per_s": 15 << 20}
"""BUSY dirties more than that: precopy goes on until something happens."""
LONG_SWITCHOVER: dict[str, Json] = {
    "max_bandwidth_bytes_per_s": 10 << 20,
    "downtime_limit_ms": 20_000,
}
"""So long a limit that tens of MiB are left for the switchover: it lasts for seconds."""


@contextlib.asynccontextmanager
async def running(
    directory: Path,
    binary: Path,
    *,
    image: GuestImage = BUSY,
    proxied: bool = False,
    settings: Mapping[str, Mapping[str, str]] | None = None,
) -> AsyncIterator[Fleet]:
    """A fleet whose guest counts on alpha."""
    async with fleet(
        directory, (binary, binary), image=image, proxied=proxied, settings=settings
    ) as two:
        await two.start_guest("alpha")
        yield two


@pytest.fixture(params=["7.2", "10"])
def binary(request: pytest.FixtureRequest, qemu_binaries: dict[str, Path]) -> Path:
    return qemu_binaries[request.param]


@pytest.fixture
def newer(qemu_binaries: dict[str, Path]) -> Path:
    return qemu_binaries["10"]


async def in_precopy(two: Fleet, **more: Json) -> str:
    """A migration that is copying memory and will not end by itself."""
    migration = await two.migrate("alpha", "beta", **{"policy": SLOW, **more})
    await two.until(
        "alpha",
        migration,
        lambda seen: seen["phase"] == "precopy" and seen["progress"]["rounds"] >= 1,
    )
    return migration


async def stays_and_moves_again(
    two: Fleet, migration: str, phase: str, cause: str
) -> dict[str, Any]:
    """It ended as said, the guest is whole on alpha, beta has nothing left; then it moves."""
    seen = await two.ended("alpha", migration)
    assert (seen["phase"], (seen["cause"] or {}).get("code")) == (phase, cause), seen["cause"]
    assert seen["guest_runs_on"] == "source"
    await two.only_qemus(1)
    await two.prove(0, on="alpha")
    again = await two.migrate("alpha", "beta", policy={"max_bandwidth_bytes_per_s": 0})
    last = await two.ended("alpha", again)
    assert last["phase"] == "succeeded", last["cause"]
    await two.prove(1, on="beta")
    assert (await two.migration("alpha", migration))["phase"] == phase  # ended is ended
    return seen


# The destination ----------------------------------------------------------------------------------


async def test_a_destination_that_is_down_is_said_and_nothing_is_touched(
    short_tmp_path: Path, newer: Path
) -> None:
    async with running(short_tmp_path, newer, image=SMALL) as two:
        await two.kill_daemon("beta")
        migration = await two.migrate("alpha", "beta")
        seen = await two.ended("alpha", migration)
        assert seen["phase"] == "refused"
        assert [refusal["code"] for refusal in seen["refusals"]] == ["destination_unreachable"]
        await two.start_daemon("beta")
        again = await two.migrate("alpha", "beta")
        assert (await two.ended("alpha", again))["phase"] == "succeeded"
        await two.prove(1, on="beta")


async def test_a_full_destination_refuses(short_tmp_path: Path, newer: Path) -> None:
    full = {"beta": {"migration": "incoming_slots = 0\n"}}
    async with running(short_tmp_path, newer, image=SMALL, settings=full) as two:
        migration = await two.migrate("alpha", "beta")
        seen = await two.ended("alpha", migration)
        assert seen["phase"] == "refused"
        assert [refusal["code"] for refusal in seen["refusals"]] == ["destination_full"]
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
        migration = await two.migrate("alpha", "beta")
        seen = await two.ended("alpha", migration)
        assert seen["phase"] == "refused"
        assert [refusal["code"] for refusal in seen["refusals"]] == ["profile_differs"]
        await two.prove(0, on="alpha")


async def test_the_destinations_qemu_dying_in_precopy_leaves_the_guest_where_it_is(
    short_tmp_path: Path, binary: Path
) -> None:
    async with running(short_tmp_path, binary) as two:
        migration = await in_precopy(two)
        os.kill((await two.qemus("beta"))[0], signal.SIGKILL)
        seen = await two.ended("alpha", migration)
        assert seen["cause"]["code"] in ("transfer_failed", "destination_refused"), seen["cause"]
        await stays_and_moves_again(two, migration, "rolled_back", seen["cause"]["code"])


async def test_the_destinations_qemu_dying_in_the_switchover_brings_the_guest_back(
    short_tmp_path: Path, binary: Path
) -> None:
    async with running(short_tmp_path, binary) as two:
        migration = await two.migrate("alpha", "beta", policy=LONG_SWITCHOVER)
        await two.phase("alpha", migration, "switchover")
        os.kill((await two.qemus("beta"))[0], signal.SIGKILL)
        seen = await two.ended("alpha", migration)
        assert seen["cause"]["code"] in ("switchover_failed", "destination_refused"), seen
        await stays_and_moves_again(two, migration, "rolled_back", seen["cause"]["code"])


# The source ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [SLOW, LONG_SWITCHOVER], ids=["precopy", "switchover"])
async def test_the_sources_qemu_dying_loses_the_guest_and_says_so(
    short_tmp_path: Path, newer: Path, policy: dict[str, Json]
) -> None:
    async with running(short_tmp_path, newer) as two:
        migration = await two.migrate("alpha", "beta", policy=policy)
        phase = "precopy" if policy is SLOW else "switchover"
        await two.phase("alpha", migration, phase)
        os.kill((await two.qemus("alpha"))[0], signal.SIGKILL)
        seen = await two.ended("alpha", migration)
        assert seen["phase"] == "guest_lost", seen
        assert seen["guest_runs_on"] == "nowhere"
        assert seen["cause"]["code"] == "vmm_died"
        assert "start" in seen["next_step"]
        await two.only_qemus(0)
        await two.call("alpha", "POST", "/v1/vms/guest:start")
        await two.counts_on("alpha")
        again = await two.migrate("alpha", "beta")
        assert (await two.ended("alpha", again))["phase"] == "succeeded"
        await two.only_qemus(1)


# Cancel -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("multifd", [0, 2])
async def test_a_cancel_in_precopy_leaves_the_guest_where_it_is(
    short_tmp_path: Path, binary: Path, multifd: int
) -> None:
    async with running(short_tmp_path, binary) as two:
        migration = await in_precopy(two, multifd_channels=multifd)
        reply = await two.call("alpha", "POST", f"/v1/migrations/{migration}:cancel")
        assert reply.status == 202
        await stays_and_moves_again(two, migration, "cancelled", "cancelled")
        reply = await two.call("alpha", "POST", f"/v1/migrations/{migration}:cancel")
        assert reply.status == 200  # already so


async def test_a_cancel_in_the_switchover_brings_the_guest_back(
    short_tmp_path: Path, binary: Path
) -> None:
    async with running(short_tmp_path, binary) as two:
        migration = await two.migrate("alpha", "beta", policy=LONG_SWITCHOVER)
        await two.phase("alpha", migration, "switchover")
        await two.call("alpha", "POST", f"/v1/migrations/{migration}:cancel")
        await stays_and_moves_again(two, migration, "cancelled", "cancelled")


async def test_a_cancel_of_one_that_waits_for_a_slot_and_of_one_that_is_over(
    short_tmp_path: Path, newer: Path
) -> None:
    none = {"alpha": {"migration": "outgoing_slots = 0\n"}}
    async with running(short_tmp_path, newer, image=SMALL, settings=none) as two:
        migration = await two.migrate("alpha", "beta")
        seen = await two.phase("alpha", migration, "pending")
        assert seen["queue_position"] == 1
        await two.call("alpha", "POST", f"/v1/migrations/{migration}:cancel")
        assert (await two.ended("alpha", migration))["phase"] == "cancelled"
        await two.prove(0, on="alpha")


async def test_a_cancel_after_the_grant_is_denied_with_the_reason(
    short_tmp_path: Path, newer: Path
) -> None:
    async with running(short_tmp_path, newer, image=SMALL) as two:
        migration = await two.migrate("alpha", "beta")
        assert (await two.ended("alpha", migration))["phase"] == "succeeded"
        with pytest.raises(Problem) as denied:
            await two.call("alpha", "POST", f"/v1/migrations/{migration}:cancel")
        assert (denied.value.status, denied.value.code) == (409, "past_point_of_no_return")


# The link -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("multifd", [0, 2])
async def test_a_link_cut_in_precopy_leaves_the_guest_where_it_is(
    short_tmp_path: Path, binary: Path, multifd: int
) -> None:
    async with running(short_tmp_path, binary, proxied=True) as two:
        migration = await in_precopy(two, multifd_channels=multifd)
        assert two.stream is not None
        two.stream.cut(abruptly=True)
        seen = await two.ended("alpha", migration)
        assert seen["cause"]["code"] in ("transfer_failed", "destination_refused"), seen
        await stays_and_moves_again(two, migration, "rolled_back", seen["cause"]["code"])


@pytest.mark.parametrize("multifd", [0, 2])
async def test_a_link_that_stalls_in_precopy_is_given_up(
    short_tmp_path: Path, binary: Path, multifd: int
) -> None:
    quick = {"alpha": {"migration": "stall_s = 2.0\n"}}
    async with running(short_tmp_path, binary, proxied=True, settings=quick) as two:
        migration = await in_precopy(two, multifd_channels=multifd)
        assert two.stream is not None
        two.stream.freeze()
        await two.ended("alpha", migration)
        two.stream.cut(abruptly=True)
        two.stream.resume()
        await stays_and_moves_again(two, migration, "rolled_back", "link_stalled")


async def test_a_link_that_stalls_for_a_moment_is_waited_for(
    short_tmp_path: Path, newer: Path
) -> None:
    async with running(short_tmp_path, newer, proxied=True) as two:
        migration = await in_precopy(two)
        assert two.stream is not None
        two.stream.freeze()
        await two.until("alpha", migration, lambda seen: seen["progress"]["stalled_ms"])
        two.stream.resume()
        await two.call(
            "alpha",
            "PATCH",
            f"/v1/migrations/{migration}/policy",
            body={"max_bandwidth_bytes_per_s": 0},
        )
        assert (await two.ended("alpha", migration))["phase"] == "succeeded"
        await two.prove(1, on="beta")


@pytest.mark.parametrize("multifd", [0, 2])
async def test_a_link_that_stalls_with_the_guest_stopped_is_cut_and_the_guest_goes_on(
    short_tmp_path: Path, binary: Path, multifd: int
) -> None:
    quick = {"alpha": {"migration": "switchover_deadline_s = 3.0\n"}}
    async with running(short_tmp_path, binary, proxied=True, settings=quick) as two:
        migration = await two.migrate(
            "alpha", "beta", policy=LONG_SWITCHOVER, multifd_channels=multifd
        )
        await two.phase("alpha", migration, "switchover")
        assert two.stream is not None
        two.stream.freeze()
        await two.ended("alpha", migration)
        two.stream.cut(abruptly=True)
        two.stream.resume()
        await stays_and_moves_again(two, migration, "rolled_back", "switchover_timed_out")


# Asking twice, and giving up ----------------------------------------------------------------------


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
        await two.call("alpha", "POST", f"/v1/migrations/{migration}:cancel")
        await stays_and_moves_again(two, migration, "cancelled", "cancelled")


async def test_the_deadline_rolls_back_a_guest_that_does_not_converge(
    short_tmp_path: Path, binary: Path
) -> None:
    async with running(short_tmp_path, binary) as two:
        migration = await two.migrate("alpha", "beta", policy={**SLOW, "deadline_s": 6})
        await stays_and_moves_again(two, migration, "rolled_back", "deadline")


async def test_a_throttle_makes_a_guest_converge_that_would_not(
    short_tmp_path: Path, binary: Path
) -> None:
    async with running(short_tmp_path, binary) as two:
        policy: dict[str, Json] = {**SLOW, "when_not_converging": "throttle"}
        migration = await two.migrate("alpha", "beta", policy=policy)
        seen = await two.ended("alpha", migration, within_s=60)
        assert seen["phase"] == "succeeded", seen["cause"]
        reply = await two.call("alpha", "GET", f"/v1/migrations/{migration}/decisions")
        verdicts = [row.text("verdict") for row in reply.seen.parts("items")]
        assert "throttle" in verdicts
        await two.prove(1, on="beta")


async def test_a_forced_switchover_does_not_wait_for_convergence(
    short_tmp_path: Path, binary: Path
) -> None:
    async with running(short_tmp_path, binary) as two:
        migration = await in_precopy(two)
        await two.call("alpha", "POST", f"/v1/migrations/{migration}:switchover")
        seen = await two.ended("alpha", migration)
        assert seen["phase"] == "succeeded", seen["cause"]
        await two.prove(1, on="beta")


async def test_postcopy_moves_a_guest_that_would_not_converge(
    short_tmp_path: Path, binary: Path
) -> None:
    async with running(short_tmp_path, binary) as two:
        policy: dict[str, Json] = {**SLOW, "when_not_converging": "postcopy"}
        migration = await two.migrate("alpha", "beta", policy=policy)
        seen = await two.ended("alpha", migration, within_s=60)
        assert seen["phase"] == "succeeded", seen["cause"]
        assert seen["mode"] == "postcopy"
        await two.prove(1, on="beta")


async def test_a_broken_postcopy_is_recovered_and_no_page_is_lost(
    short_tmp_path: Path, newer: Path
) -> None:
    async with running(short_tmp_path, newer, proxied=True) as two:
        policy: dict[str, Json] = {
            "max_bandwidth_bytes_per_s": 4 << 20,
            "when_not_converging": "postcopy",
        }
        migration = await two.migrate("alpha", "beta", policy=policy)
        await two.until("alpha", migration, lambda seen: seen["phase"] == "completing", within_s=60)
        assert two.stream is not None
        two.stream.cut(abruptly=True)
        seen = await two.ended("alpha", migration, within_s=60)
        assert seen["phase"] == "succeeded", seen
        await two.prove(1, on="beta")
