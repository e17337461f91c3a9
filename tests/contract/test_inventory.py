"""What the engine relies on, of the host's inventory and of its simulator alike."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import pytest

from migrd.core.devices import Answer, Capability, Evidence, Inventory, IommuHardware
from migrd.engine.device_ports import DeviceInventory
from migrd.engine.threads import in_thread
from migrd.kernel.inventory import HostInventory
from tests.fakes.inventory import CANNOT, FakeInventory, inventory, pci
from tests.fakes.sysfs import FakeHost
from tests.fakes.uevents import FakeKernelMessages, until

VF = "0000:41:00.1"
RESCAN_S = 0.1


class Stage(Protocol):
    """A host with the instance dmar1, which its registers say cannot track."""

    inventory: DeviceInventory

    async def plug(self, address: str, driver: str = "vfio-pci") -> None:
        """It comes, or has this driver now; no uevent is heard."""

    async def unplug(self, address: str) -> None: ...


class Simulated:
    def __init__(self) -> None:
        self.fake = FakeInventory(inventory([CANNOT]), rescan_interval_s=RESCAN_S)
        self.inventory: DeviceInventory = self.fake

    async def plug(self, address: str, driver: str = "vfio-pci") -> None:
        self.fake.plug(pci(address, CANNOT, driver=driver), is_heard=False)

    async def unplug(self, address: str) -> None:
        self.fake.unplug(address, is_heard=False)


class OfFiles:
    def __init__(self, root: Path) -> None:
        self.host = FakeHost(root)
        self.host.add_vtd(CANNOT.name)
        self.inventory: DeviceInventory = HostInventory(
            self.host.roots, listen=FakeKernelMessages().listen, rescan_every_s=RESCAN_S
        )

    async def plug(self, address: str, driver: str = "vfio-pci") -> None:
        await in_thread(self._plug, address, driver)

    def _plug(self, address: str, driver: str) -> None:
        if address in self.host.look().devices:
            self.host.unbind(address)
            self.host.bind(address, driver)
        else:
            self.host.add_function(address, iommu=CANNOT.name, group=7, driver=driver)

    async def unplug(self, address: str) -> None:
        await in_thread(self.host.remove, address)


@pytest.fixture(params=["simulated", "files"])
async def stage(request: pytest.FixtureRequest, tmp_path: Path) -> Stage:
    return Simulated() if request.param == "simulated" else await in_thread(OfFiles, tmp_path)


@asynccontextmanager
async def watched(stage: Stage) -> AsyncIterator[list[Inventory]]:
    told: list[Inventory] = []
    watching = asyncio.create_task(stage.inventory.watch(told.append))
    try:
        yield told
    finally:
        watching.cancel()
        await asyncio.wait([watching])
        assert watching.cancelled()


async def test_before_the_first_look_nothing_is_there_and_nothing_is_promised(stage: Stage) -> None:
    assert dict(stage.inventory.current.devices) == {}
    assert stage.inventory.current.all_iommus_track_dirty is None


async def test_a_rescan_is_the_truth_and_a_generation_is_a_change(stage: Stage) -> None:
    first = await stage.inventory.rescan()
    assert stage.inventory.current is first
    assert (await stage.inventory.rescan()).generation == first.generation
    await stage.plug(VF)
    second = await stage.inventory.rescan()
    assert second.generation > first.generation
    assert (set(first.devices), set(second.devices)) == (set(), {VF})
    assert second.devices[VF].iommu == CANNOT.name
    assert second.iommus[CANNOT.name].devices == (VF,)
    await stage.unplug(VF)
    assert dict((await stage.inventory.rescan()).devices) == {}


async def test_what_no_uevent_told_is_found_by_the_period_and_told_to_the_watcher(
    stage: Stage,
) -> None:
    await stage.inventory.rescan()
    async with watched(stage) as told:
        await stage.plug(VF)
        await until(lambda: told and VF in told[-1].devices)
        await stage.unplug(VF)
        await until(lambda: VF not in told[-1].devices)
    generations = [seen.generation for seen in told]
    assert generations == sorted(set(generations))
    assert told[-1] is stage.inventory.current


async def test_an_instance_learns_from_a_device_that_was_probed(stage: Stage) -> None:
    await stage.plug(VF)
    seen = await stage.inventory.rescan()
    assert seen.iommus[CANNOT.name].dirty_tracking.answer is Answer.NO
    found = Capability.probed(True, "capabilities 0x5")
    noted = stage.inventory.note_probed(
        replace(seen.devices[VF], iommu_dirty_tracking=found, dma_logging=found)
    )
    assert noted is stage.inventory.current
    assert noted.generation > seen.generation
    assert noted.iommus[CANNOT.name].dirty_tracking.answer is Answer.YES
    assert noted.iommus[CANNOT.name].dirty_tracking.evidence is Evidence.PROBED
    assert noted.devices[VF].dma_logging == found
    assert (await stage.inventory.rescan()).devices[VF].dma_logging == found


async def test_an_instance_shows_the_numbers_that_its_device_was_told(stage: Stage) -> None:
    await stage.plug(VF)
    seen = await stage.inventory.rescan()
    assert seen.iommus[CANNOT.name].capability_bits is None
    told = IommuHardware(1, capability_bits=0x80000001, unknown_capability_bits=0x80000000)
    found = Capability.probed(True)
    stage.inventory.note_probed(
        replace(seen.devices[VF], iommu_dirty_tracking=found, iommu_hardware=told)
    )
    for _ in range(2):
        iommu = stage.inventory.current.iommus[CANNOT.name]
        assert (iommu.hardware_type, iommu.capability_bits) == (1, 0x80000001)
        assert iommu.unknown_capability_bits == 0x80000000
        await stage.inventory.rescan()


async def test_an_answer_ends_with_the_driver_that_gave_it(stage: Stage) -> None:
    await stage.plug(VF)
    seen = await stage.inventory.rescan()
    found = Capability.probed(True)
    stage.inventory.note_probed(replace(seen.devices[VF], dma_logging=found))
    await stage.plug(VF, "mlx5_vfio_pci")
    again = (await stage.inventory.rescan()).devices[VF]
    assert again.driver == "mlx5_vfio_pci"
    assert again.dma_logging.evidence is Evidence.NONE


async def test_an_answer_about_a_device_that_has_gone_changes_nothing(stage: Stage) -> None:
    await stage.plug(VF)
    seen = await stage.inventory.rescan()
    await stage.unplug(VF)
    gone = await stage.inventory.rescan()
    late = replace(seen.devices[VF], dma_logging=Capability.probed(True))
    assert stage.inventory.note_probed(late).generation == gone.generation
