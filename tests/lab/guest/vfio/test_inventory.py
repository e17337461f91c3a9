"""The inventory on a real kernel: emulated VT-d, NICs given to vfio-pci, VFs and mtty mdevs."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from migrd.core.devices import Answer, DeviceKind, Evidence, Inventory, IommuKind, Unknown
from migrd.kernel.inventory import HostInventory
from migrd.kernel.passthrough import KernelPassthrough
from tests.lab.guest import raw

E1000E, IGB = (0x8086, 0x10D3), (0x8086, 0x10C9)


@contextlib.asynccontextmanager
async def watched() -> AsyncIterator[tuple[HostInventory, list[Inventory]]]:
    """Kept fresh by the kernel's messages alone: no periodic rescan comes to help."""
    inventory = HostInventory(rescan_every_s=3600)
    told: list[Inventory] = []
    watching = asyncio.create_task(inventory.watch(told.append))
    try:
        await until(lambda: told)
        yield inventory, told
    finally:
        watching.cancel()
        await asyncio.wait([watching])


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - the kernel tells, and that is what is tested
            await asyncio.sleep(0.01)


async def look() -> Inventory:
    return await HostInventory().rescan()


@contextlib.contextmanager
def virtual_functions(number: int) -> Iterator[tuple[Path, list[str]]]:
    """Of the igb, which is given to vfio-pci for that; the host's driver is not built."""
    [physical] = [nic for nic in raw.nics() if (nic / "sriov_totalvfs").exists()]
    before = set(raw.nics())
    with raw.bound_to_vfio(physical):
        (physical / "sriov_numvfs").write_text(str(number))
        try:
            yield physical, sorted(nic.name for nic in set(raw.nics()) - before)
        finally:
            (physical / "sriov_numvfs").write_text("0")


async def test_the_emulated_vt_d_is_found_with_its_registers_and_is_expected_not_to_track() -> None:
    inventory = await look()
    unit = inventory.iommus["dmar0"]
    assert unit.kind is IommuKind.INTEL_VTD
    shown = Path("/sys/class/iommu/dmar0/intel-iommu")
    assert unit.registers["ecap"] == int((shown / "ecap").read_text(), 16)
    assert unit.registers["cap"] == int((shown / "cap").read_text(), 16)
    assert unit.dirty_tracking.is_no
    assert unit.dirty_tracking.evidence is Evidence.ESTIMATED
    assert inventory.all_iommus_track_dirty is False
    assert inventory.trouble == ()


async def test_the_selftests_own_iommu_is_of_a_kind_that_nobody_has_met() -> None:
    inventory = await look()
    assert set(inventory.iommus) == set(os.listdir("/sys/class/iommu"))
    for other in inventory.iommus.keys() - {"dmar0"}:
        assert inventory.iommus[other].kind is IommuKind.OTHER
        assert inventory.iommus[other].dirty_tracking.reason is Unknown.NO_REGISTERS


async def test_what_is_below_the_vt_d_is_what_the_kernel_says_less_bridges() -> None:
    inventory = await look()
    below = set(inventory.iommus["dmar0"].devices)
    kernels = set(os.listdir("/sys/class/iommu/dmar0/devices"))
    bridges = {name for name in kernels if _class(name).startswith("0x06")}
    assert bridges
    assert below == kernels - bridges


def _class(address: str) -> str:
    return (Path("/sys/bus/pci/devices") / address / "class").read_text()


async def test_every_nic_is_found_with_its_ids_and_group() -> None:
    devices = (await look()).devices
    for nic in raw.nics():
        device = devices[nic.name]
        assert (device.vendor_id, device.device_id) in (E1000E, IGB)
        assert device.class_code == 0x020000
        assert device.iommu == "dmar0"
        assert device.iommu_group == int(os.path.basename(os.readlink(nic / "iommu_group")))
        members = set(os.listdir(nic / "iommu_group" / "devices")) - {nic.name}
        assert set(device.group_devices) == {
            name for name in members if not _class(name).startswith("0x06")
        }
        assert device.migration.can.reason is Unknown.DRIVER_NOT_BOUND
        assert device.trouble == ()
    shared = [devices[nic.name] for nic in raw.nics() if devices[nic.name].group_devices]
    assert len(shared) == 2  # the two functions of one slot


async def test_a_nic_given_to_vfio_is_seen_by_the_kernels_message_and_so_is_its_way_back() -> None:
    nic = raw.nics()[0]
    async with watched() as (inventory, told):
        with raw.bound_to_vfio(nic) as node:
            await until(lambda: inventory.current.devices[nic.name].vfio_cdev)
            device = inventory.current.devices[nic.name]
            assert (device.vfio_cdev, device.driver) == (str(node), "vfio-pci")
            assert device.migration.can.reason is Unknown.NOT_PROBED
            assert device.can_reset.answer is not Answer.UNKNOWN
        await until(lambda: inventory.current.devices[nic.name].driver is None)
        after = inventory.current.devices[nic.name]
        assert (after.vfio_cdev, after.driver_override) == (None, None)
        assert [one.generation for one in told] == sorted({one.generation for one in told})
        assert (await inventory.rescan()) is inventory.current


async def test_a_nic_that_waits_for_vfio_says_so() -> None:
    nic = raw.nics()[0]
    (nic / "driver_override").write_text("vfio-pci")
    try:
        assert (await look()).devices[nic.name].driver_override == "vfio-pci"
    finally:
        (nic / "driver_override").write_text("\n")


async def test_virtual_functions_that_come_and_go_are_seen_with_their_physical_function() -> None:
    async with watched() as (inventory, _):
        with virtual_functions(3) as (physical, made):
            await until(lambda: set(made) <= inventory.current.devices.keys())
            # vfio-pci claims the VFs of its own PF
            await until(lambda: all(inventory.current.devices[name].vfio_cdev for name in made))
            devices = inventory.current.devices
            assert devices[physical.name].virtual_functions == tuple(made)
            assert {devices[name].physical_function for name in made} == {physical.name}
            assert {devices[name].iommu for name in made} == {"dmar0"}
        await until(lambda: not set(made) & inventory.current.devices.keys())
        await until(lambda: inventory.current.devices[physical.name].driver is None)
        assert inventory.current.devices[physical.name].virtual_functions == ()
        fresh = await look()
        assert inventory.current.devices == fresh.devices
        assert inventory.current.iommus == fresh.iommus


async def test_an_mtty_is_seen_with_its_type_and_node_and_no_iommu_sees_its_dma() -> None:
    async with watched() as (inventory, _):
        with raw.mtty() as mdev:
            name = mdev.sysfs.name
            await until(lambda: name in inventory.current.devices)
            await until(lambda: inventory.current.devices[name].vfio_cdev)
            device = inventory.current.devices[name]
            assert device.kind is DeviceKind.VFIO_MDEV
            assert (device.mdev_parent, device.mdev_type) == ("mtty", "mtty-2")
            assert device.vfio_cdev == str(mdev.node)
            assert device.iommu is None
            assert device.iommu_dirty_tracking.is_no
            assert device.trouble == ()
        await until(lambda: name not in inventory.current.devices)


async def test_a_probe_confirms_the_estimate_and_stays_until_the_nic_is_taken_away() -> None:
    nic = raw.nics()[0]
    async with watched() as (inventory, _):
        with raw.bound_to_vfio(nic):
            await until(lambda: inventory.current.devices[nic.name].vfio_cdev)
            passthrough = KernelPassthrough()
            told = await passthrough.probe(inventory.current.devices[nic.name])
            after = inventory.note_probed(told)
            unit = after.iommus["dmar0"].dirty_tracking
            assert (unit.answer, unit.evidence) == (Answer.NO, Evidence.PROBED)
            assert after.devices[nic.name].migration.can.is_no
            assert inventory.estimates_wrong == 0
            assert (await inventory.rescan()).devices[nic.name].migration.can.is_no
        await until(
            lambda: (
                inventory.current.devices[nic.name].migration.can.reason is Unknown.DRIVER_NOT_BOUND
            )
        )
        assert inventory.current.iommus["dmar0"].dirty_tracking.evidence is Evidence.PROBED


async def test_the_kernel_offers_iommufd_and_character_devices() -> None:
    kernel = (await look()).kernel
    assert kernel.release == os.uname().release
    assert kernel.iommufd.is_yes
    assert kernel.vfio_cdev.is_yes
    assert kernel.unsafe_interrupts is False


@pytest.mark.parametrize("times", [3])
async def test_a_storm_of_real_messages_ends_in_what_is_there(times: int) -> None:
    async with watched() as (inventory, _):
        for _ in range(times):
            with virtual_functions(7), raw.mtty(), raw.mtty():
                pass
        fresh = await look()
        await until(lambda: inventory.current.devices == fresh.devices)
