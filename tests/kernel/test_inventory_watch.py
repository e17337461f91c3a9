"""How the inventory is kept fresh: by uevents, by its period, and never by blocking the loop."""

import asyncio
import errno
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import structlog

from migrd.core.devices import Capability, Inventory
from migrd.engine.device_ports import DeviceInventory
from migrd.kernel import inventory as module
from migrd.kernel.host_scan import HostScan, scan_again, scan_host
from migrd.kernel.inventory import MAX_PENDING, HostInventory
from migrd.kernel.probed import assemble
from migrd.kernel.sysfs import Roots
from migrd.kernel.uevents import Uevent
from tests.fakes.sysfs import VTD_ECAP_TRACKS, FakeHost, bdf
from tests.fakes.uevents import FakeKernelMessages, until

NIC, VF = "0000:41:00.0", "0000:41:00.2"
TTY = "0d0d0d0d-1111-2222-3333-444444444444"


@pytest.fixture
def host(tmp_path: Path) -> FakeHost:
    host = FakeHost(tmp_path)
    host.add_vtd("dmar0")
    host.add_function(NIC, iommu="dmar0", group=1, driver="mlx5_core")
    return host


class Scans:
    """Counts the scans, may hold them up, and sees that they are not on the loop's thread."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.whole = 0
        self.partial: list[list[str]] = []
        self.at_once = self.most_at_once = 0
        self.go = threading.Event()
        self.go.set()
        self._loop_thread = threading.get_ident()
        patch.setattr(module, "scan_host", self._scan_host)
        patch.setattr(module, "scan_again", self._scan_again)

    def _enter(self) -> None:
        assert threading.get_ident() != self._loop_thread
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        assert self.go.wait(30)
        self.at_once -= 1

    def _scan_host(self, roots: Roots) -> HostScan:
        self.whole += 1
        self._enter()
        return scan_host(roots)

    def _scan_again(self, roots: Roots, before: HostScan, addresses: list[str]) -> HostScan:
        self.partial.append(sorted(addresses))
        self._enter()
        return scan_again(roots, before, addresses)


@pytest.fixture
async def scans(monkeypatch: pytest.MonkeyPatch) -> Scans:
    return Scans(monkeypatch)


@asynccontextmanager
async def watched(
    host: FakeHost, messages: FakeKernelMessages, rescan_every_s: float = 3600.0
) -> AsyncIterator[tuple[HostInventory, list[Inventory]]]:
    """An inventory that is being watched and has been read once."""
    inventory = HostInventory(host.roots, listen=messages.listen, rescan_every_s=rescan_every_s)
    told: list[Inventory] = []
    watching = asyncio.create_task(inventory.watch(told.append))
    try:
        await until(lambda: told or watching.done())
        yield inventory, told
    finally:
        watching.cancel()
        await asyncio.wait([watching])
        assert watching.cancelled(), watching.exception()
    assert messages.listeners == []


def fulfils_the_port(inventory: HostInventory) -> DeviceInventory:
    """For the type checker: in the port's own words."""
    return inventory


def test_before_the_first_scan_there_is_an_inventory_that_says_so() -> None:
    current = HostInventory().current
    assert (current.generation, dict(current.devices)) == (0, {})
    assert "not been read" in current.trouble[0]
    assert current.all_iommus_track_dirty is None


async def test_a_rescan_finds_what_has_changed_and_says_so_by_a_generation(
    host: FakeHost,
) -> None:
    inventory = HostInventory(host.roots)
    first = await inventory.rescan()
    assert first.generation == 1
    assert (await inventory.rescan()) is first
    host.add_function(VF, iommu="dmar0", group=2)
    second = await inventory.rescan()
    assert second.generation == 2
    assert VF in second.devices
    assert VF not in first.devices


async def test_a_uevent_has_its_device_read_again_and_nothing_else(
    host: FakeHost, scans: Scans
) -> None:
    messages = FakeKernelMessages()
    async with watched(host, messages) as (inventory, told):
        before = inventory.current
        host.add_function(VF, iommu="dmar0", group=2, driver="vfio-pci", physical_function=NIC)
        host.add_function("0000:42:00.0")  # no uevent about this one
        messages.send("add", VF)
        await until(lambda: len(told) == 2)
        assert (scans.whole, scans.partial) == (1, [[VF]])
        now = told[-1]
        assert now is inventory.current
        assert now.generation == before.generation + 1
        assert set(now.devices) == {NIC, VF}
        assert list(now.devices) == sorted(now.devices)
        assert now.devices[NIC].virtual_functions == (VF,)
        assert now.iommus["dmar0"].devices == (NIC, VF)
        host.remove("0000:42:00.0")
        assert (await inventory.rescan()) is now  # what was patched is what a full scan finds


async def test_unbinding_and_binding_are_seen(host: FakeHost) -> None:
    messages = FakeKernelMessages()
    async with watched(host, messages) as (inventory, told):
        host.unbind(NIC)
        messages.send("unbind", NIC)
        await until(lambda: len(told) == 2)
        assert inventory.current.devices[NIC].driver is None
        host.bind(NIC, "vfio-pci")
        messages.send("bind", NIC)
        await until(lambda: len(told) == 3)
        assert inventory.current.devices[NIC].vfio_cdev is not None


async def test_an_mdev_that_comes_and_goes_is_seen(host: FakeHost) -> None:
    messages = FakeKernelMessages()
    async with watched(host, messages) as (inventory, told):
        host.add_mdev(TTY)
        messages.send("add", TTY, "mdev")
        await until(lambda: TTY in inventory.current.devices)
        host.remove(TTY)
        messages.send("remove", TTY, "mdev")
        await until(lambda: TTY not in inventory.current.devices)
        assert [one.generation for one in told] == [1, 2, 3]


async def test_an_instance_that_has_changed_changes_all_devices_below_it(host: FakeHost) -> None:
    messages = FakeKernelMessages()
    host.add_function(VF, iommu="dmar0", group=2)
    async with watched(host, messages) as (inventory, told):
        ecap = host.sys / "devices/virtual/iommu/dmar0/intel-iommu/ecap"
        ecap.write_text(f"{VTD_ECAP_TRACKS:x}\n")
        messages.send("change", NIC)
        await until(lambda: len(told) == 2)
        assert inventory.current.devices[VF].iommu_dirty_tracking.is_yes


async def test_uevents_about_other_things_cost_nothing(host: FakeHost, scans: Scans) -> None:
    messages = FakeKernelMessages()
    async with watched(host, messages) as (_, told):
        for subsystem in ("net", "block", "drivers", "cpu"):
            messages.send("add", NIC, subsystem)
        messages.send("change", NIC)  # one that is about it, to wait for
        await until(lambda: scans.partial)
        assert (scans.whole, len(scans.partial), len(told)) == (1, 1, 1)


async def test_a_new_iommu_or_module_has_everything_read(host: FakeHost, scans: Scans) -> None:
    messages = FakeKernelMessages()
    async with watched(host, messages) as (inventory, _):
        host.add_vtd("dmar1")
        messages.send_event(Uevent("add", "/devices/virtual/iommu/dmar1", "iommu"))
        await until(lambda: "dmar1" in inventory.current.iommus)
        assert (scans.whole, scans.partial) == (2, [])


async def test_a_storm_comes_to_one_scan_at_a_time_and_few_of_them(
    host: FakeHost, scans: Scans
) -> None:
    messages = FakeKernelMessages()
    async with watched(host, messages):
        scans.go.clear()
        messages.send("change", NIC)
        await until(lambda: scans.partial)
        for number in range(100):
            messages.send("change", bdf(number))
            messages.send("bind", bdf(number))
        scans.go.set()
        await until(lambda: len(scans.partial) == 2 and scans.at_once == 0)
        assert (scans.whole, len(scans.partial[1])) == (1, 100)
        assert scans.most_at_once == 1


async def test_more_than_can_be_remembered_has_everything_read_once(
    host: FakeHost, scans: Scans
) -> None:
    messages = FakeKernelMessages()
    async with watched(host, messages):
        scans.go.clear()
        messages.send("change", NIC)
        await until(lambda: scans.partial)
        for number in range(20 * MAX_PENDING):
            messages.send("change", bdf(number))
        [pending] = messages.listeners
        assert len(pending.addresses) <= MAX_PENDING  # type: ignore[attr-defined]  # it is Pending
        scans.go.set()
        await until(lambda: scans.whole == 2 and scans.at_once == 0)
        assert len(scans.partial) == 1


async def test_lost_uevents_have_everything_read(host: FakeHost, scans: Scans) -> None:
    messages = FakeKernelMessages()
    async with watched(host, messages) as (inventory, _):
        host.add_function(VF)
        messages.overflow()
        await until(lambda: VF in inventory.current.devices)
        assert (scans.whole, scans.partial) == (2, [])


async def test_without_permission_for_uevents_the_period_goes_on_and_it_is_said_once(
    host: FakeHost, scans: Scans
) -> None:
    messages = FakeKernelMessages(PermissionError(errno.EPERM, "Operation not permitted"))
    with structlog.testing.capture_logs() as lines:
        async with watched(host, messages, rescan_every_s=0.01) as (inventory, told):
            assert "Operation not permitted" in told[0].trouble[-1]
            host.add_function(VF)
            await until(lambda: VF in inventory.current.devices)
            await until(lambda: scans.whole > 4)
            assert len(told) == 2
    assert len(lines) == 1


async def test_uevents_that_break_off_are_told_and_the_period_goes_on(host: FakeHost) -> None:
    messages = FakeKernelMessages()
    with structlog.testing.capture_logs() as lines:
        async with watched(host, messages, rescan_every_s=0.01) as (inventory, told):
            messages.break_off(OSError(errno.EBADF, "Bad file descriptor"))
            await until(lambda: len(told) == 2)
            assert "Bad file descriptor" in told[1].trouble[-1]
            host.add_function(VF)
            await until(lambda: VF in inventory.current.devices)
    assert len(lines) == 1


async def test_everyone_who_asks_while_a_scan_runs_gets_a_later_one_and_they_share_it(
    host: FakeHost, scans: Scans
) -> None:
    inventory = HostInventory(host.roots)
    scans.go.clear()
    first = asyncio.create_task(inventory.rescan())
    await until(lambda: scans.whole == 1)
    others = [asyncio.create_task(inventory.rescan()) for _ in range(10)]
    await asyncio.sleep(0.01)
    host.add_function(VF)
    scans.go.set()
    await first
    for other in others:
        assert VF in (await other).devices
    assert scans.whole == 2


async def test_a_probe_that_answers_while_the_snapshot_is_put_together_is_in_it(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    inventory = HostInventory(host.roots)
    device = (await inventory.rescan()).devices[NIC]
    host.add_function(VF)
    reached, go, loops = threading.Event(), threading.Event(), threading.get_ident()

    def held(*scan: Any, **more: Any) -> Inventory:
        made = assemble(*scan, **more)
        if threading.get_ident() != loops:
            reached.set()
            assert go.wait(30)
        return made

    monkeypatch.setattr(module, "assemble", held)
    rescan = asyncio.create_task(inventory.rescan())
    await until(reached.is_set)
    inventory.note_probed(replace(device, can_reset=Capability.probed(False)))
    go.set()
    after = await rescan
    assert after.devices[NIC].can_reset == Capability.probed(False)
    assert VF in after.devices


async def test_who_gives_up_waiting_for_a_scan_takes_it_from_nobody(
    host: FakeHost, scans: Scans
) -> None:
    inventory = HostInventory(host.roots)
    scans.go.clear()
    first, second = (asyncio.create_task(inventory.rescan()) for _ in range(2))
    await until(lambda: scans.whole == 1)
    first.cancel()
    scans.go.set()
    assert NIC in (await second).devices
    assert first.cancelled()


async def test_a_shortage_of_descriptors_leaves_the_last_inventory_and_says_so(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    inventory = HostInventory(host.roots)
    before = await inventory.rescan()

    def short(_: Roots) -> HostScan:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch, structlog.testing.capture_logs() as lines:
        patch.setattr(module, "scan_host", short)
        after = await inventory.rescan()
        assert (await inventory.rescan()) is after
    assert after.devices == before.devices
    assert "Too many open files" in after.trouble[-1]
    assert len(lines) == 1
    assert (await inventory.rescan()).trouble == ()


async def test_a_scan_that_takes_long_is_told(
    host: FakeHost, scans: Scans, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SLOW_S", 0.01)
    inventory = HostInventory(host.roots)
    scans.go.clear()
    with structlog.testing.capture_logs() as lines:
        rescan = asyncio.create_task(inventory.rescan())
        await until(lambda: lines)
        scans.go.set()
        await rescan
    assert "lock" in lines[0]["event"]
