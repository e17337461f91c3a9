"""Postcopy: from when the guest has left nothing is killed, and nowhere does it run twice."""

import asyncio
import os
import signal
from pathlib import Path

import pytest

from migrd.cli.seen import Json
from tests.integration.fleet import LIVELY, Fleet
from tests.integration.scenarios import (
    full_speed,
    has_condition,
    moved,
    moves_again,
    running,
    stayed,
)

pytestmark = [pytest.mark.real, pytest.mark.timeout(120)]

POSTCOPY: dict[str, Json] = {
    "max_bandwidth_bytes_per_s": 6 << 20,
    "when_not_converging": "postcopy",
}

CRAWL_S = 0.1
"""What each 64 KiB takes: some 600 KiB/s."""


async def leaving(two: Fleet) -> str:
    """A guest that goes by postcopy, over a road so slow that megabytes are left for seconds.

    (With little left the source may have sent all of it before a test breaks the road; what is
    lost then nothing resumes.)
    """
    assert two.stream is not None
    two.hold("alpha", "after", "postcopy_chosen")
    migration = await two.migrate("alpha", "beta", policy=POSTCOPY)
    await two.held("alpha", "after", "postcopy_chosen")
    two.stream.to_target.delay_s = CRAWL_S
    two.let_go("alpha", "after", "postcopy_chosen")
    return migration


async def test_postcopy_moves_a_guest_that_would_not_converge(
    short_tmp_path: Path, binary: Path
) -> None:
    async with running(short_tmp_path, binary, image=LIVELY) as two:
        migration = await two.migrate("alpha", "beta", policy=POSTCOPY)
        seen = await moved(two, migration)
        assert seen["mode"] == "postcopy"
        assert seen["blackout_ms"] < 5000


async def test_a_broken_postcopy_is_recovered_and_no_page_is_lost(
    short_tmp_path: Path, binary: Path
) -> None:
    async with running(short_tmp_path, binary, image=LIVELY, proxied=True) as two:
        migration = await leaving(two)
        await two.phase("alpha", migration, "completing")
        assert two.stream is not None
        two.stream.cut(abruptly=True)
        full_speed(two)
        await moved(two, migration)


async def test_a_stalled_postcopy_is_recovered_when_the_link_is_mended(
    short_tmp_path: Path, newer: Path
) -> None:
    async with running(short_tmp_path, newer, image=LIVELY, proxied=True) as two:
        migration = await leaving(two)
        await two.phase("alpha", migration, "completing")
        assert two.stream is not None
        two.stream.freeze()
        seen = await two.until("alpha", migration, has_condition("PostcopyPaused"))
        assert "Kill neither" in seen["next_step"]
        assert len(await two.qemus()) == 2
        two.stream.cut(abruptly=True)
        two.stream.resume()
        full_speed(two)
        await moved(two, migration)


async def test_a_source_that_fails_with_all_of_the_guest_over_there_never_runs_it_again(
    short_tmp_path: Path, binary: Path
) -> None:
    """The last word of the destination is lost; QEMU 10 then starts a guest that it had stopped."""
    async with running(short_tmp_path, binary, image=LIVELY, proxied=True) as two:
        migration = await leaving(two)
        await two.phase("alpha", migration, "completing")
        assert two.stream is not None
        two.stream.to_client.freeze()
        full_speed(two)
        await at_rest(two)
        two.stream.cut(abruptly=True)
        two.stream.resume()
        await moved(two, migration)


async def at_rest(two: Fleet) -> None:
    """All that the source has to send has passed."""
    assert two.stream is not None
    before = -1
    while before != two.stream.to_target.passed_bytes:
        before = two.stream.to_target.passed_bytes
        await asyncio.sleep(0.5)


@pytest.mark.parametrize("killed", ["alpha", "beta", "both"])
async def test_daemons_killed_in_postcopy_go_on_with_it(
    short_tmp_path: Path, newer: Path, killed: str
) -> None:
    async with running(short_tmp_path, newer, image=LIVELY, proxied=True) as two:
        migration = await leaving(two)
        await two.phase("alpha", migration, "completing")
        names = ["alpha", "beta"] if killed == "both" else [killed]
        for name in names:
            await two.kill_daemon(name)
        for name in names:
            await two.start_daemon(name)
        full_speed(two)
        await moved(two, migration)


async def test_postcopy_with_the_destinations_daemon_away_waits_for_it(
    short_tmp_path: Path, newer: Path
) -> None:
    """Nobody may start the guest there, and QEMU takes none back: both wait, and that is said."""
    quick = {"alpha": {"migration": "switchover_deadline_s = 2.0\n"}}
    async with running(short_tmp_path, newer, image=LIVELY, settings=quick) as two:
        two.hold("alpha", "after", "postcopy_chosen")
        migration = await two.migrate("alpha", "beta", policy=POSTCOPY)
        await two.held("alpha", "after", "postcopy_chosen")
        two.signal_daemon("beta", signal.SIGSTOP)
        two.let_go("alpha", "after", "postcopy_chosen")
        seen = await two.phase("alpha", migration, "needs_operator", "rolled_back")
        if seen["phase"] == "needs_operator":
            assert len(await two.qemus()) == 2
            two.signal_daemon("beta", signal.SIGCONT)
            await moved(two, migration)
        else:
            two.signal_daemon("beta", signal.SIGCONT)
            await stayed(two, migration, "rolled_back")
            await moves_again(two)


@pytest.mark.parametrize("killed", ["alpha", "beta"])
async def test_a_qemu_killed_in_postcopy_takes_the_guest_with_it_and_that_is_said(
    short_tmp_path: Path, newer: Path, killed: str
) -> None:
    async with running(short_tmp_path, newer, image=LIVELY, proxied=True) as two:
        migration = await leaving(two)
        await two.phase("alpha", migration, "completing")
        os.kill((await two.qemus(killed))[0], signal.SIGKILL)
        seen = await two.ended("alpha", migration)
        assert seen["phase"] == "guest_lost", seen
        assert seen["guest_runs_on"] == "nowhere"
        assert await two.qemus() == []  # nothing that might be taken for it
        full_speed(two)
        await two.call("beta", "POST", "/v1/vms/guest:start")  # it had moved: it belongs there
        await two.counts_on("beta")
        again = await two.ended("beta", await two.migrate("beta", "alpha"))
        assert again["phase"] == "succeeded", again["cause"]
