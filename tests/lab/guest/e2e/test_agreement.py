"""QEMU, launched as planned, does what the plan says of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrd.core.tracking import Migratability
from tests.lab.guest.nested import move, tracked_tables
from tests.lab.guest.planned import launched, plan_for
from tests.lab.guest.raw import Mtty, mtty

# Name of a device -> can its IOMMU track, does it log its own DMA?
KINDS = {
    "iommu": (True, False),
    "both": (True, True),
    "log": (False, True),
    "none": (False, False),
}
MIXES = [
    *((kind,) for kind in KINDS),
    ("iommu", "log"),
    ("iommu", "none"),
    ("log", "none"),
    ("none", "log", "iommu"),
]


@contextlib.contextmanager
def made(mix: tuple[str, ...]) -> Iterator[dict[str, Mtty]]:
    with contextlib.ExitStack() as held:
        yield {kind: held.enter_context(mtty(tracked=KINDS[kind][0])) for kind in mix}


def without_log(mix: tuple[str, ...]) -> list[str]:
    return [kind for kind in mix if not KINDS[kind][1]]


@pytest.mark.parametrize("mix", MIXES, ids="+".join)
async def test_qemu_launched_as_planned_is_blocked_exactly_when_the_plan_says_so(
    mix: tuple[str, ...], tmp_path: Path
) -> None:
    with made(mix) as mdevs:
        addresses = {kind: mdev.sysfs.name for kind, mdev in mdevs.items()}
        plan = await plan_for(addresses, without_log=without_log(mix))
        nodes = {mdev.sysfs.name: mdev.node for mdev in mdevs.values()}
        async with launched(tmp_path, plan, nodes, without_log=without_log(mix)) as qemu:
            reasons = await qemu.blocked_reasons()
    can = plan.migratability in (Migratability.LIVE, Migratability.STOP_AND_COPY)
    assert (reasons == []) is can, (plan.migratability, plan.reasons, reasons)


async def test_a_vm_planned_live_has_all_its_devices_watched_when_it_moves(tmp_path: Path) -> None:
    """H2's mix: a device that only its IOMMU can track, and one that only logs by itself."""
    mix = ("iommu", "log")
    with made(mix) as here, made(mix) as there:
        plans = []
        for mdevs in (here, there):
            addresses = {kind: mdev.sysfs.name for kind, mdev in mdevs.items()}
            plans.append(await plan_for(addresses, without_log=without_log(mix)))
        assert [plan.migratability for plan in plans] == [Migratability.LIVE] * 2
        nodes = {mdev.sysfs.name: mdev.node for mdevs in (here, there) for mdev in mdevs.values()}
        logless = without_log(mix)
        async with (
            launched(tmp_path, plans[0], nodes, without_log=logless) as source,
            launched(
                tmp_path, plans[1], nodes, without_log=logless, name="to", incoming=True
            ) as destination,
        ):
            await move(source, destination)
            assert len(tracked_tables(source)) == 1
            assert source.trace("vfio_device_dirty_tracking_start")
