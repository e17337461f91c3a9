"""Two hosts in two network namespaces, and the cable between them pulled: nobody is told anything.

The daemons' own link and the guest's stream break at once, as they do in life. Only unix sockets
work on: clients and QEMU's monitors.
"""

import contextlib
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import pytest

from migrd.demo.image import GuestImage
from tests.integration.fleet import BUSY, SMALL, Fleet
from tests.integration.scenarios import (
    PATIENT,
    has_condition,
    hurry,
    in_precopy,
    moved,
    moves_again,
    running,
    stayed,
)
from tests.lab.netns import LEFT_ADDRESS, RIGHT_ADDRESS, TwoHosts, two_hosts

pytestmark = [pytest.mark.real, pytest.mark.netns, pytest.mark.timeout(120)]

SLOW_CABLE_BYTES_PER_S = 8 << 20
GOOD_CABLE_BYTES_PER_S = 256 << 20


@contextlib.asynccontextmanager
async def apart(
    directory: Path,
    binary: Path,
    *,
    image: GuestImage = BUSY,
    settings: Mapping[str, str] | None = None,
) -> AsyncIterator[tuple[Fleet, TwoHosts]]:
    """A guest counts on alpha; the cable to beta is good."""
    more = {"alpha": dict(settings or {})}
    async with two_hosts() as cable:
        links = {"alpha": (cable.left, LEFT_ADDRESS), "beta": (cable.right, RIGHT_ADDRESS)}
        async with running(directory, binary, image=image, settings=more, links=links) as two:
            yield two, cable


async def in_slow_switchover(two: Fleet, cable: TwoHosts) -> str:
    """The guest stands still while all of it goes over a slow cable."""
    await cable.limit_rate(SLOW_CABLE_BYTES_PER_S)
    migration = await two.migrate("alpha", "beta", policy=PATIENT)
    await two.phase("alpha", migration, "switchover")
    return migration


async def test_a_cable_pulled_for_a_moment_in_precopy_is_waited_for(
    short_tmp_path: Path, newer: Path
) -> None:
    async with apart(short_tmp_path, newer) as (two, cable):
        migration = await in_precopy(two)
        await cable.partition()
        await two.until("alpha", migration, has_condition("LinkStalled"))
        await two.counts_on("alpha", 100)
        await cable.heal()
        await hurry(two, migration)
        await moved(two, migration)


@pytest.mark.parametrize(("version", "multifd"), [("7.2", 0), ("10", 2)])
async def test_a_cable_pulled_for_long_in_precopy_rolls_back(
    short_tmp_path: Path, qemu_binaries: dict[str, Path], version: str, multifd: int
) -> None:
    stall = {"migration": "stall_s = 2.0\n"}
    async with apart(short_tmp_path, qemu_binaries[version], settings=stall) as (two, cable):
        migration = await in_precopy(two, multifd_channels=multifd)
        await cable.partition()
        seen = await two.ended("alpha", migration)
        assert (seen["phase"], seen["cause"]["code"]) == ("rolled_back", "link_stalled")
        await two.counts_on("alpha")
        assert len(await two.qemus()) == 2  # beta cannot know yet
        await cable.heal()
        await two.only_qemus(1, within_s=25)
        await stayed(two, migration, "rolled_back")
        await moves_again(two)


async def test_a_cable_pulled_with_the_guest_stopped_brings_it_back(
    short_tmp_path: Path, newer: Path
) -> None:
    deadline = {"migration": "switchover_deadline_s = 4.0\n"}
    async with apart(short_tmp_path, newer, settings=deadline) as (two, cable):
        migration = await in_slow_switchover(two, cable)
        await cable.partition()
        await two.ended("alpha", migration)
        await two.counts_on("alpha")
        await cable.heal()
        await two.only_qemus(1, within_s=25)
        await stayed(two, migration, "rolled_back", "switchover_timed_out")
        await cable.limit_rate(GOOD_CABLE_BYTES_PER_S)
        await moves_again(two)


async def test_a_cable_pulled_shortly_with_the_guest_stopped_is_waited_for(
    short_tmp_path: Path, newer: Path
) -> None:
    async with apart(short_tmp_path, newer) as (two, cable):
        migration = await in_slow_switchover(two, cable)
        await cable.partition()
        await two.stands_still("alpha", for_s=1.5)
        await cable.heal()
        await moved(two, migration)


async def test_a_cable_pulled_before_the_grant_arrives_settles_when_it_is_back(
    short_tmp_path: Path, newer: Path
) -> None:
    deadline = {"migration": "grant_deadline_s = 2.0\n"}
    async with apart(short_tmp_path, newer, image=SMALL, settings=deadline) as (two, cable):
        two.hold("alpha", "after", "transfer_completed")
        migration = await two.migrate("alpha", "beta")
        await two.held("alpha", "after", "transfer_completed")
        await cable.partition()
        two.let_go("alpha", "after", "transfer_completed")
        seen = await two.phase("alpha", migration, "needs_operator")
        assert seen["guest_runs_on"] == "unknown"
        await two.stands_still("alpha")
        await two.stands_still("beta")
        await cable.heal()
        await moved(two, migration)


async def test_a_cable_pulled_before_the_answer_to_the_grant_settles_when_it_is_back(
    short_tmp_path: Path, newer: Path
) -> None:
    """The guest runs on beta meanwhile, and on alpha never again, though alpha cannot know."""
    deadline = {"migration": "grant_deadline_s = 2.0\n"}
    async with apart(short_tmp_path, newer, image=SMALL, settings=deadline) as (two, cable):
        two.hold("beta", "before", "guest_ran")
        migration = await two.migrate("alpha", "beta")
        await two.held("beta", "before", "guest_ran")
        await cable.partition()
        two.let_go("beta", "before", "guest_ran")
        await two.phase("alpha", migration, "needs_operator")
        await two.counts_on("beta")
        await two.stands_still("alpha")
        await cable.heal()
        await moved(two, migration)
