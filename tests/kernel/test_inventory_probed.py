"""What probes answer: it beats estimates, survives rescans, and ends with the bind."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
import structlog

from migrd.core.devices import (
    Answer,
    Capability,
    Device,
    DeviceMigration,
    Evidence,
    Inventory,
    MigrationFlag,
    Unknown,
)
from migrd.kernel.host_scan import scan_host
from migrd.kernel.inventory import HostInventory
from migrd.kernel.probed import Answers, assemble
from tests.fakes.sysfs import VTD_ECAP_TRACKS, FakeHost
from tests.fakes.uevents import FakeKernelMessages, until

NIC, OTHER, THIRD = "0000:41:00.0", "0000:41:00.1", "0000:42:00.0"

CAN = Capability.probed(True, "IOMMU_HW_CAP_DIRTY_TRACKING")
CANNOT = Capability.probed(False, "no IOMMU_HW_CAP_DIRTY_TRACKING")
BUSY = Capability.unknown(Unknown.IN_USE, "EBUSY")
MOVES = DeviceMigration(
    Capability.probed(True), frozenset({MigrationFlag.STOP_COPY}), stop_copy_bytes=96
)


@pytest.fixture
def host(tmp_path: Path) -> FakeHost:
    host = FakeHost(tmp_path)
    host.add_vtd("dmar0")
    host.add_vtd("dmar1", VTD_ECAP_TRACKS)
    host.add_function(NIC, iommu="dmar0", driver="vfio-pci", group=1)
    host.add_function(OTHER, iommu="dmar0", driver="vfio-pci", group=2)
    host.add_function(THIRD, iommu="dmar1", driver="vfio-pci", group=3)
    return host


@pytest.fixture
async def inventory(host: FakeHost) -> HostInventory:
    inventory = HostInventory(host.roots)
    await inventory.rescan()
    return inventory


def probed(inventory: HostInventory, address: str, tracking: Capability = CANNOT) -> Device:
    """As Passthrough.probe would answer."""
    return replace(
        inventory.current.devices[address],
        iommu_dirty_tracking=tracking,
        dma_logging=Capability.probed(False),
        migration=MOVES,
        can_reset=Capability.probed(True),
        cache_coherent=Capability.probed(True),
    )


def facts(device: Device) -> tuple[object, ...]:
    return (
        device.iommu_dirty_tracking,
        device.dma_logging,
        device.migration,
        device.can_reset,
        device.cache_coherent,
    )


async def test_probed_facts_are_in_the_snapshot_at_once_and_survive_rescans(
    inventory: HostInventory,
) -> None:
    before = inventory.current
    told = probed(inventory, NIC)
    after = inventory.note_probed(told)
    assert after is inventory.current
    assert after.generation == before.generation + 1
    assert facts(after.devices[NIC]) == facts(told)
    assert facts(before.devices[NIC]) != facts(told)
    assert (await inventory.rescan()) is after


async def test_an_instance_learns_from_any_device_and_so_do_the_others_below_it(
    inventory: HostInventory,
) -> None:
    after = inventory.note_probed(probed(inventory, NIC))
    tracking = after.iommus["dmar0"].dirty_tracking
    assert (tracking.answer, tracking.evidence) == (Answer.NO, Evidence.PROBED)
    assert NIC in tracking.detail
    assert after.devices[OTHER].iommu_dirty_tracking == tracking
    assert after.iommus["dmar1"].dirty_tracking.evidence is Evidence.ESTIMATED
    assert after.devices[THIRD].iommu_dirty_tracking.evidence is Evidence.ESTIMATED
    assert after.devices[OTHER].migration.can.answer is Answer.UNKNOWN


async def test_what_a_probe_could_not_find_out_replaces_no_estimate_and_no_answer(
    inventory: HostInventory,
) -> None:
    in_use = replace(
        inventory.current.devices[NIC],
        iommu_dirty_tracking=BUSY,
        dma_logging=BUSY,
        migration=DeviceMigration(BUSY),
    )
    device = inventory.note_probed(in_use).devices[NIC]
    assert device.iommu_dirty_tracking.evidence is Evidence.ESTIMATED
    assert device.dma_logging == BUSY
    assert device.migration.can == BUSY
    inventory.note_probed(probed(inventory, NIC))
    answered = inventory.current.devices[NIC]
    inventory.note_probed(replace(in_use, driver="vfio-pci"))
    assert inventory.current.devices[NIC] == answered


async def test_answers_end_when_the_driver_changes(
    host: FakeHost, inventory: HostInventory
) -> None:
    inventory.note_probed(probed(inventory, NIC))
    host.unbind(NIC)
    host.bind(NIC, "mlx5_vfio_pci")
    device = (await inventory.rescan()).devices[NIC]
    assert device.migration.can.reason is Unknown.NOT_PROBED
    assert device.cache_coherent.reason is Unknown.NOT_PROBED


async def test_answers_end_when_the_device_goes_but_its_iommu_remembers(
    host: FakeHost, inventory: HostInventory
) -> None:
    inventory.note_probed(probed(inventory, NIC))
    host.remove(NIC)
    assert NIC not in (await inventory.rescan()).devices
    host.add_function(NIC, iommu="dmar0", driver="vfio-pci", group=1)
    after = await inventory.rescan()
    assert after.devices[NIC].migration.can.reason is Unknown.NOT_PROBED
    assert after.devices[NIC].iommu_dirty_tracking.evidence is Evidence.PROBED
    assert after.iommus["dmar0"].dirty_tracking.is_no


async def test_an_unbind_ends_answers_even_if_the_same_driver_is_back_before_anybody_looks(
    host: FakeHost,
) -> None:
    messages = FakeKernelMessages()
    inventory = HostInventory(host.roots, listen=messages.listen)
    told: list[Inventory] = []
    watching = asyncio.create_task(inventory.watch(told.append))
    try:
        await until(lambda: told)
        inventory.note_probed(probed(inventory, NIC))
        assert len(told) == 2
        messages.send("unbind", NIC)
        messages.send("bind", NIC)
        await until(lambda: not inventory.current.devices[NIC].migration.can.is_yes)
    finally:
        watching.cancel()
        await asyncio.wait([watching])


async def test_answers_about_a_device_that_is_gone_or_another_now_are_ignored(
    host: FakeHost, inventory: HostInventory
) -> None:
    told = probed(inventory, NIC)
    host.unbind(NIC)
    host.bind(NIC, "mlx5_vfio_pci")
    now = await inventory.rescan()
    assert inventory.note_probed(told) is now
    host.remove(NIC)
    now = await inventory.rescan()
    assert inventory.note_probed(told) is now
    assert now.iommus["dmar0"].dirty_tracking.evidence is Evidence.ESTIMATED


async def test_answers_of_the_old_driver_that_arrive_while_the_new_one_is_read_do_not_stay(
    host: FakeHost, inventory: HostInventory
) -> None:
    told = probed(inventory, NIC)
    host.unbind(NIC)
    host.bind(NIC, "mlx5_vfio_pci")
    rescan = asyncio.create_task(inventory.rescan())
    await asyncio.sleep(0)
    inventory.note_probed(told)
    assert (await rescan).devices[NIC].migration.can.reason is Unknown.NOT_PROBED


def test_answers_are_never_put_beside_another_driver(host: FakeHost) -> None:
    told = replace(host.look().devices[NIC], migration=MOVES)
    host.unbind(NIC)
    host.bind(NIC, "mlx5_vfio_pci")
    device = assemble(scan_host(host.roots), Answers({NIC: told})).devices[NIC]
    assert device.migration.can.reason is Unknown.NOT_PROBED


async def test_a_probe_that_answers_during_a_scan_is_in_its_result(
    inventory: HostInventory,
) -> None:
    rescan = asyncio.create_task(inventory.rescan())
    await asyncio.sleep(0)
    told = probed(inventory, NIC)
    inventory.note_probed(told)
    assert facts((await rescan).devices[NIC]) == facts(told)


async def test_an_estimate_that_was_wrong_is_told_once_per_instance_and_counted(
    inventory: HostInventory,
) -> None:
    with structlog.testing.capture_logs() as lines:
        inventory.note_probed(probed(inventory, THIRD))
        inventory.note_probed(probed(inventory, THIRD))
        inventory.note_probed(probed(inventory, NIC, CAN))
        inventory.note_probed(probed(inventory, OTHER, CAN))
    assert inventory.estimates_wrong == 2
    assert [(line["iommu"], line["estimated"], line["probed"]) for line in lines] == [
        ("dmar1", "yes", "no"),
        ("dmar0", "no", "yes"),
    ]
    assert "SSADS" in lines[0]["registers"]
    assert inventory.current.iommus["dmar1"].dirty_tracking.is_no


async def test_an_estimate_that_was_right_is_neither_told_nor_counted(
    inventory: HostInventory,
) -> None:
    with structlog.testing.capture_logs() as lines:
        inventory.note_probed(probed(inventory, NIC, CANNOT))
        inventory.note_probed(probed(inventory, THIRD, CAN))
    assert (inventory.estimates_wrong, lines) == (0, [])


async def test_an_instance_whose_devices_were_answered_differently_counts_as_unable(
    inventory: HostInventory,
) -> None:
    inventory.note_probed(probed(inventory, NIC, CAN))
    after = inventory.note_probed(probed(inventory, OTHER, CANNOT))
    assert after.iommus["dmar0"].dirty_tracking.is_no
    assert OTHER in after.iommus["dmar0"].dirty_tracking.detail
    assert after.devices[NIC].iommu_dirty_tracking.is_yes
    assert after.all_iommus_track_dirty is False


async def test_the_same_answer_again_is_no_new_generation(inventory: HostInventory) -> None:
    told = probed(inventory, NIC)
    after = inventory.note_probed(told)
    assert inventory.note_probed(told) is after
