"""The host's hardware as clients are told of it: snapshots, events, questions to the kernel."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from structlog.testing import capture_logs

from migrd.core.devices import Capability, Device, Inventory, Unknown
from migrd.engine import device_changes
from migrd.engine.device_verdict import judge
from migrd.engine.devices import MOST_TOLD, HostDevices
from migrd.engine.options import EngineOptions
from migrd.engine.service import DeviceVerdict, Published
from migrd.engine.stream import Stream
from migrd.engine.world import NobodyWatches, World
from migrd.errors import Conflict, NotFound, Unavailable
from tests.fakes.inventory import (
    CAN,
    CANNOT,
    FakeInventory,
    FakePassthrough,
    inventory,
    mixed_host,
    pci,
)
from tests.fakes.virtual_time import LoopClock, now_s, until

VF = "0000:41:00.1"
GPU = "0000:c1:00.0"


@dataclass
class Counts(NobodyWatches):
    seen: list[Inventory] = field(default_factory=list)
    wrong: int = 0

    def inventory_seen(self, inventory: Inventory) -> None:
        self.seen.append(inventory)

    def estimate_was_wrong(self) -> None:
        self.wrong += 1


class Stage:
    """HostDevices over a made-up host."""

    def __init__(self, truth: Inventory | None = None) -> None:
        clock = LoopClock()
        self.inventory = FakeInventory(truth or mixed_host())
        self.passthrough = FakePassthrough()
        self.observer = Counts()
        self.stream = Stream(history=10_000, queue=10_000, wall_s=clock.wall_s)
        nothing: Any = None
        world = World(
            EngineOptions(host="a"), nothing, nothing, {}, self.stream, clock, self.observer,
            self.inventory, self.passthrough,
        )  # fmt: skip
        self.devices = HostDevices(world)
        self.begun_at = self.stream.resource_version

    async def told(self) -> list[Published]:
        """Every event so far."""
        async with self.stream.events(after_id=self.begun_at) as events:
            count = self.stream.resource_version - self.begun_at
            got = [await anext(events) for _ in range(count)]
        return [event for event in got if event.kind != "events.lost"]

    async def settled(self) -> None:
        """Until what has happened was told."""
        await until(
            lambda: self.inventory.is_seen and self.devices.inventory == self.inventory.current,
            within_s=120.0,
            what="the newest snapshot published",
        )


@asynccontextmanager
async def watching(truth: Inventory | None = None) -> AsyncIterator[Stage]:
    stage = Stage(truth)
    task = asyncio.create_task(stage.devices.watch())
    await stage.devices.first_look()
    try:
        yield stage
    finally:
        task.cancel()
        await asyncio.wait([task])
        if not task.cancelled():
            task.result()


def many(count: int, **facts: object) -> list[Device]:
    return [pci(f"{n >> 8:04x}:{n & 0xFF:02x}:00.0", **facts) for n in range(count)]  # type: ignore[arg-type]  # a test's shorthand


# Snapshots and events


async def test_the_first_look_is_complete_and_no_event() -> None:
    async with watching() as stage:
        _, views = stage.devices.views()
        assert [view.device.address for view in views] == sorted(mixed_host().devices)
        assert stage.devices.inventory.all_iommus_track_dirty is False
        assert await stage.told() == []
        assert len(stage.observer.seen) == 1


async def test_a_driver_that_changes_is_one_event_and_a_newer_version() -> None:
    async with watching() as stage:
        before = stage.devices.view(GPU).resource_version
        stage.inventory.plug(replace(mixed_host().devices[GPU], driver="vfio-pci"))
        await stage.settled()
        (event,) = await stage.told()
        assert event.kind == "device.changed"
        assert (event.body["address"], event.body["change"]) == (GPU, "changed")
        assert event.body["driver"] == "vfio-pci"
        assert stage.devices.view(GPU).resource_version == event.id > before
        assert stage.devices.view(VF).resource_version == before


async def test_four_thousand_changes_at_once_are_one_event() -> None:
    async with watching(inventory([CAN])) as stage:
        stage.inventory.plug(*many(4096))
        await stage.settled()
        (event,) = await stage.told()
        assert event.body == {
            "address": None, "change": "many", "added": 4096, "removed": 0, "changed": 0
        }  # fmt: skip
        assert stage.devices.view("0000:07:00.0").resource_version == event.id


async def test_a_storm_that_lasts_is_told_a_few_times_a_second() -> None:
    devices = many(64)
    async with watching(inventory([CAN], devices)) as stage:
        for number in range(2000):
            device = devices[number % 64]
            stage.inventory.plug(replace(device, iommu_group=number))
            await asyncio.sleep(0.001)
        await stage.settled()
        assert len(stage.observer.seen) <= 12
        assert len(await stage.told()) <= 12 * MOST_TOLD


async def test_a_change_whose_uevent_was_lost_is_found_by_the_rescan() -> None:
    async with watching() as stage:
        stage.inventory.unplug(VF, is_heard=False)
        begun_s = now_s()
        await stage.settled()
        assert now_s() - begun_s <= stage.inventory.rescan_interval_s + 2.0
        (event,) = await stage.told()
        assert (event.body["address"], event.body["change"]) == (VF, "removed")


async def test_a_device_that_went_away_is_not_found_and_that_is_said() -> None:
    async with watching() as stage:
        stage.inventory.unplug(VF)
        await stage.settled()
        with pytest.raises(NotFound, match=f"{VF} was a device of this host and went away"):
            stage.devices.view(VF)
        stage.inventory.plug(mixed_host().devices[VF])
        await stage.settled()
        assert stage.devices.view(VF).device.address == VF


async def test_an_instance_that_comes_changes_the_answer_of_the_host() -> None:
    async with watching(inventory([CAN])) as stage:
        stage.inventory.become(inventory([CAN, CANNOT]))
        await stage.settled()
        iommu, host = await stage.told()
        assert (iommu.kind, iommu.body["iommu"]) == ("iommu.changed", "dmar1")
        assert (iommu.body["change"], iommu.body["dirty_tracking"]) == ("added", "no")
        assert (host.kind, host.body["all_iommus_track_dirty"]) == ("host.changed", False)


async def test_that_a_device_comes_below_an_instance_is_no_change_of_it() -> None:
    async with watching(inventory([CAN])) as stage:
        stage.inventory.plug(pci(VF))
        await stage.settled()
        assert [event.kind for event in await stage.told()] == ["device.changed"]
        assert stage.devices.inventory.iommus[CAN.name].devices == (VF,)


async def test_only_what_has_changed_is_judged_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[str] = []

    def counted(device: Device, seen: Inventory) -> DeviceVerdict:
        judged.append(device.address)
        return judge(device, seen)

    monkeypatch.setattr(device_changes, "judge", counted)
    async with watching() as stage:
        judged.clear()
        stage.inventory.plug(replace(mixed_host().devices[VF], numa_node=1))
        await stage.settled()
        assert judged == [VF]


# What goes wrong


async def test_a_look_that_fails_leaves_what_was_known_and_is_tried_again() -> None:
    with capture_logs() as logged:
        async with watching() as stage:
            stage.inventory.error = OSError("planted")
            stage.inventory.unplug(VF)
            await asyncio.sleep(1.0)
            assert stage.devices.view(VF).device.address == VF
            await stage.settled()
            with pytest.raises(NotFound):
                stage.devices.view(VF)
    assert [line["log_level"] for line in logged if "failed" in line["event"]] == ["error"]


async def test_a_host_that_cannot_be_read_at_first_holds_nothing_up() -> None:
    stage = Stage()

    async def hang() -> Inventory:
        await asyncio.sleep(3600)
        raise AssertionError

    stage.inventory.rescan = hang  # type: ignore[method-assign]  # the fault, planted
    task = asyncio.create_task(stage.devices.watch())
    begun_s = now_s()
    await stage.devices.first_look()
    assert now_s() - begun_s < 60
    assert stage.devices.views()[1] == ()
    assert stage.devices.inventory.all_iommus_track_dirty is None
    task.cancel()
    await asyncio.wait([task])


# Asking the kernel


async def test_a_probe_is_kept_and_the_instance_learns_from_it() -> None:
    async with watching(inventory([CAN], [pci(VF)])) as stage:
        found = Capability.probed(True, "capabilities 0x5")
        stage.passthrough.answers[VF] = replace(pci(VF), iommu_dirty_tracking=found)
        view = await stage.devices.probe(VF, by="me")
        assert view.device.iommu_dirty_tracking == found
        assert stage.devices.inventory.iommus[CAN.name].dirty_tracking == found
        assert stage.observer.wrong == 0
        assert {event.kind for event in await stage.told()} == {"device.changed", "iommu.changed"}


async def test_t4_an_estimate_that_a_bind_contradicts_is_counted_once_and_changes_the_answer() -> (
    None
):
    async with watching(inventory([CAN], [pci(VF)])) as stage:
        found = Capability.probed(False, "capabilities 0x0")
        stage.passthrough.answers[VF] = replace(pci(VF), iommu_dirty_tracking=found)
        for _ in range(3):
            await stage.devices.probe(VF, by="me")
        assert stage.observer.wrong == 1
        assert stage.devices.inventory.all_iommus_track_dirty is False
        assert "host.changed" in {event.kind for event in await stage.told()}


async def test_what_the_kernel_would_not_say_contradicts_nothing() -> None:
    async with watching(inventory([CAN], [pci(VF)])) as stage:
        unknown = Capability.unknown(Unknown.PROBE_FAILED, "EIO")
        stage.passthrough.answers[VF] = replace(pci(VF), iommu_dirty_tracking=unknown)
        await stage.devices.probe(VF, by="me")
        assert stage.observer.wrong == 0


async def test_what_is_in_use_unbound_or_unknown_is_not_asked_and_that_is_said() -> None:
    async with watching() as stage:
        stage.passthrough.in_use[VF] = "opened by pid 4711"
        with pytest.raises(Conflict, match="opened by pid 4711") as used:
            await stage.devices.probe(VF, by="me")
        with pytest.raises(Conflict, match=f"driverctl set-override {GPU} vfio-pci") as unbound:
            await stage.devices.probe(GPU, by="me")
        with pytest.raises(NotFound) as unknown:
            await stage.devices.probe("0000:ff:00.0", by="me")
        codes = [e.value.code for e in (used, unbound, unknown)]
        assert codes == ["device_in_use", "driver_not_bound", "unknown_device"]
        assert stage.passthrough.asked == [VF]


async def test_a_device_in_use_keeps_what_was_known_of_it() -> None:
    async with watching() as stage:
        before = stage.devices.view(VF).device
        stage.passthrough.in_use[VF] = "opened by pid 4711"
        with pytest.raises(Conflict):
            await stage.devices.probe(VF, by="me")
        assert stage.devices.view(VF).device == before


async def test_a_device_that_does_not_answer_ends_in_time_and_the_next_is_asked() -> None:
    async with watching() as stage:
        stage.passthrough.delay_s = 3600
        begun_s = now_s()
        with pytest.raises(Unavailable) as late:
            await stage.devices.probe(VF, by="me")
        assert late.value.code == "probe_timed_out"
        assert now_s() - begun_s < 60
        stage.passthrough.delay_s = 0.0
        assert (await stage.devices.probe(VF, by="me")).device.address == VF
