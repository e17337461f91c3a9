"""A link that breaks or stalls: in precopy the guest runs on, stopped it is brought back soon."""

import time
from pathlib import Path

import pytest

from tests.integration.fleet import Fleet
from tests.integration.scenarios import (
    has_condition,
    hurry,
    in_precopy,
    in_switchover,
    moved,
    moves_again,
    running,
    stayed,
)

pytestmark = [pytest.mark.real, pytest.mark.timeout(120)]

either = pytest.mark.parametrize(("version", "multifd"), [("7.2", 2), ("10", 0)])
with_multifd = pytest.mark.parametrize(("version", "multifd"), [("7.2", 2), ("10", 2)])
"""Where one or the other tells enough."""
AGAIN_S = 5.0
"""After a decision to roll back the guest is to run within a second; the machine is shared."""


def mend(two: Fleet) -> None:
    """What hung in the old connections is gone; new ones work."""
    assert two.stream is not None
    two.stream.cut(abruptly=True)
    two.stream.resume()


@either
async def test_a_link_cut_in_precopy_leaves_the_guest_where_it_is(
    short_tmp_path: Path, qemu_binaries: dict[str, Path], version: str, multifd: int
) -> None:
    async with running(short_tmp_path, qemu_binaries[version], proxied=True) as two:
        migration = await in_precopy(two, multifd_channels=multifd)
        assert two.stream is not None
        two.stream.cut(abruptly=True)
        seen = await stayed(two, migration, "rolled_back", "transfer_failed", "destination_refused")
        seen_by = {"transfer_failed": "on alpha", "destination_refused": "beta gave up"}
        assert seen_by[seen["cause"]["code"]] in seen["cause"]["message"]  # who was first
        await moves_again(two)


@either
async def test_a_link_that_stalls_in_precopy_is_given_up(
    short_tmp_path: Path, qemu_binaries: dict[str, Path], version: str, multifd: int
) -> None:
    quick = {"alpha": {"migration": "stall_s = 2.0\n"}}
    async with running(short_tmp_path, qemu_binaries[version], proxied=True, settings=quick) as two:
        migration = await in_precopy(two, multifd_channels=multifd)
        assert two.stream is not None
        two.stream.freeze()
        await stayed(two, migration, "rolled_back", "link_stalled")
        mend(two)
        await moves_again(two)


@with_multifd
async def test_a_cancel_behind_a_stalled_link_ends(
    short_tmp_path: Path, qemu_binaries: dict[str, Path], version: str, multifd: int
) -> None:
    """With multifd QEMU stays `cancelling` for ever: its connection is yanked."""
    async with running(short_tmp_path, qemu_binaries[version], proxied=True) as two:
        migration = await in_precopy(two, multifd_channels=multifd)
        assert two.stream is not None
        two.stream.freeze()
        await two.until("alpha", migration, lambda seen: seen["progress"]["stalled_ms"])
        await two.call("alpha", "POST", f"/v1/migrations/{migration}:cancel")
        await stayed(two, migration, "cancelled", "cancelled")
        mend(two)
        await moves_again(two)


async def test_a_link_that_stalls_for_a_moment_is_waited_for(
    short_tmp_path: Path, newer: Path
) -> None:
    async with running(short_tmp_path, newer, proxied=True) as two:
        migration = await in_precopy(two)
        assert two.stream is not None
        two.stream.freeze()
        await two.until("alpha", migration, has_condition("LinkStalled"))
        two.stream.resume()
        await hurry(two, migration)
        await moved(two, migration)


@pytest.mark.parametrize("multifd", [0, 2])
async def test_a_link_that_stalls_with_the_guest_stopped_is_cut_and_the_guest_goes_on(
    short_tmp_path: Path, binary: Path, multifd: int
) -> None:
    """QEMU's monitor is blocked then: only the out-of-band yank gets through."""
    quick = {"alpha": {"migration": "switchover_deadline_s = 3.0\n"}}
    async with running(short_tmp_path, binary, proxied=True, settings=quick) as two:
        migration = await in_switchover(two, multifd_channels=multifd)
        assert two.stream is not None
        two.stream.freeze()
        await two.phase("alpha", migration, "rolling_back", "rolled_back")
        decided_at = time.monotonic()
        await two.counts_on("alpha")
        assert time.monotonic() - decided_at < AGAIN_S
        await stayed(two, migration, "rolled_back", "switchover_timed_out")
        mend(two)
        await moves_again(two)


async def test_a_link_that_stalls_shortly_with_the_guest_stopped_is_waited_for(
    short_tmp_path: Path, newer: Path
) -> None:
    async with running(short_tmp_path, newer, proxied=True) as two:
        migration = await in_switchover(two)
        assert two.stream is not None
        two.stream.freeze()
        await two.stands_still("alpha", for_s=2.0)
        two.stream.resume()
        seen = await moved(two, migration)
        assert seen["blackout_ms"] > 2000


async def test_a_lost_last_acknowledgement_leaves_one_copy(
    short_tmp_path: Path, binary: Path
) -> None:
    """All has arrived, the source never hears of it: its guest is taken back, the other is not."""
    quick = {"alpha": {"migration": "switchover_deadline_s = 3.0\n"}}
    async with running(short_tmp_path, binary, proxied=True, settings=quick) as two:
        assert two.stream is not None
        migration = await in_switchover(two)
        two.stream.to_client.freeze()
        await stayed(two, migration, "rolled_back", "switchover_timed_out")
        mend(two)
        await moves_again(two)
