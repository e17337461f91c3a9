"""The host's passthrough hardware, as clients see it: the port's snapshots, published.

    DeviceInventory ──each generation──► the newest one waits ──every PAUSE_S at most──► publish
                                                                  compared in a worker thread
    publish: the snapshot replaced as a whole · events · the observer (metrics)

Rules
1. What clients see is one snapshot, whole: facts, verdicts and versions belong together.
2. However much changes at once, a publication is at most MOST_TOLD events about devices; beyond
   that it is one event that says how many. Who hears it lists the devices again.
3. Nothing that sysfs or a port does wrong ends the daemon: the last snapshot stays.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import structlog

from migrd.core.devices import (
    Capability,
    Device,
    DeviceMigration,
    Evidence,
    Inventory,
    Unknown,
)
from migrd.engine.device_changes import Changes, compare
from migrd.engine.device_verdict import why_all_track
from migrd.engine.service import DeviceVerdict, DeviceView
from migrd.engine.threads import in_thread
from migrd.engine.world import World
from migrd.errors import Conflict, NotFound, Unavailable

log = structlog.get_logger(__name__)

FIRST_LOOK_S: Final = 10.0
"""So long a start waits for the first look; a host whose sysfs hangs is served without."""
PAUSE_S: Final = 0.25
RETRY_S: Final = 5.0
PROBE_S: Final = 45.0
"""The adapter has a limit of its own for each device, and asks a few at a time."""
MOST_TOLD: Final = 16
MOST_GONE: Final = 256


@dataclass(frozen=True)
class Shown:
    """What clients see."""

    inventory: Inventory
    verdicts: Mapping[str, DeviceVerdict] = field(default_factory=dict)
    versions: Mapping[str, int] = field(default_factory=dict)


class HostDevices:
    """What is known of devices and IOMMUs; `watch` keeps it fresh."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._shown = Shown(world.inventory.current)
        self._views: Mapping[str, DeviceView] | None = None
        self._news = asyncio.Event()
        self._first = asyncio.Event()
        self._gone: OrderedDict[str, float] = OrderedDict()
        self._publishing = asyncio.Lock()

    # Looking ------------------------------------------------------------------------------------

    @property
    def inventory(self) -> Inventory:
        """As last published."""
        return self._shown.inventory

    def views(self) -> tuple[int, Sequence[DeviceView]]:
        """(resource_version, all by address)."""
        return self._world.stream.resource_version, tuple(self._by_address().values())

    def view(self, address: str) -> DeviceView:
        """Raises NotFound, which says so of a device that was here and is gone."""
        view = self._by_address().get(address)
        if view is not None:
            return view
        gone_wall_s = self._gone.get(address)
        if gone_wall_s is not None:
            ago_s = max(0, round(self._world.clock.wall_s() - gone_wall_s))
            raise NotFound(
                f"{address} was a device of this host and went away {ago_s} s ago",
                code="unknown_device",
            )
        raise NotFound(
            f"{address} is no device of this host that could be passed through: "
            "/v1/devices lists those that are",
            code="unknown_device",
        )

    def _by_address(self) -> Mapping[str, DeviceView]:
        """Built when first asked for after a publication: thousands are milliseconds."""
        if self._views is None:
            shown = self._shown
            self._views = {
                address: DeviceView(device, shown.verdicts[address], shown.versions[address])
                for address, device in sorted(shown.inventory.devices.items())
                if address in shown.verdicts
            }
        return self._views

    # Keeping it fresh ---------------------------------------------------------------------------

    async def watch(self) -> None:
        """Runs until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._keep_fresh(), name="inventory")
            group.create_task(self._publish_news(), name="inventory-news")

    async def first_look(self) -> None:
        """Until something was published, or FIRST_LOOK_S have passed."""
        try:
            async with asyncio.timeout(FIRST_LOOK_S):
                await self._first.wait()
        except TimeoutError:
            log.warning("the host's devices are not read yet", waited_s=FIRST_LOOK_S)

    async def _keep_fresh(self) -> None:
        inventory = self._world.inventory
        while True:
            try:
                await inventory.rescan()
                self._news.set()
                await inventory.watch(lambda _: self._news.set())
            except Exception as exc:  # what is only looked at must not end the daemon
                log.error("looking at devices failed", exc_info=exc)
                self._news.set()  # the first look is over, too, when it has failed
            await asyncio.sleep(RETRY_S)

    async def _publish_news(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            try:
                await self._publish()
            except Exception as exc:
                log.error("telling what changed of devices failed", exc_info=exc)
            self._first.set()
            await asyncio.sleep(PAUSE_S)

    async def _publish(self) -> None:
        async with self._publishing:
            await self._publish_newest()

    async def _publish_newest(self) -> None:
        before, inventory = self._shown, self._world.inventory.current
        changes = await in_thread(compare, before.inventory, before.verdicts, inventory)
        is_first = not self._first.is_set()
        if changes.is_empty and not is_first:
            self._shown = Shown(inventory, changes.verdicts, before.versions)
            return
        version = self._world.stream.resource_version if is_first else self._tell(changes)
        versions = {**before.versions, **dict.fromkeys(changes.touched, version)}
        for address in changes.removed:
            versions.pop(address, None)
            self._remember_gone(address)
        self._shown, self._views = Shown(inventory, changes.verdicts, versions), None
        self._world.observer.inventory_seen(inventory)
        log.info(
            "devices",
            devices=len(inventory.devices),
            iommus=len(inventory.iommus),
            all_iommus_track_dirty=inventory.all_iommus_track_dirty,
            trouble=len(inventory.trouble),
        )

    def _remember_gone(self, address: str) -> None:
        self._gone[address] = self._world.clock.wall_s()
        self._gone.move_to_end(address)
        while len(self._gone) > MOST_GONE:
            self._gone.popitem(last=False)

    def _tell(self, changes: Changes) -> int:
        """Publish the events of these changes; the version that clients can wait for."""
        publish = self._world.stream.publish
        version = self._world.stream.resource_version
        if changes.device_count > MOST_TOLD:
            version = publish("device.changed", changes.counts())
        else:
            for body in changes.device_bodies():
                version = publish("device.changed", body)
        if len(changes.iommus) > MOST_TOLD:
            many = {"iommu": None, "change": "many", "changed": len(changes.iommus)}
            version = publish("iommu.changed", many)
        else:
            for body in changes.iommus:
                version = publish("iommu.changed", body)
        if changes.is_host_changed:
            told = changes.inventory.all_iommus_track_dirty
            why = why_all_track(changes.inventory)
            version = publish("host.changed", {"all_iommus_track_dirty": told, "why": why})
        return version

    # Asking -------------------------------------------------------------------------------------

    async def probe(self, address: str, *, by: str) -> DeviceView:
        """Ask the kernel about a device and note its answers; see `service.Service`."""
        device = self._ready_to_ask(address)
        try:
            async with asyncio.timeout(PROBE_S):
                answered = await self._world.passthrough.probe(_forgotten(device))
        except TimeoutError:
            message = f"{address} has not answered within {PROBE_S:g} s"
            raise Unavailable(message, code="probe_timed_out") from None
        used = _in_use(answered)
        if used is not None:
            raise Conflict(
                f"{address} is in use, and a device answers only to the process that has it: "
                f"{used.detail or 'somebody has it open'}; ask again when it is free",
                code="device_in_use",
            )
        log.info("probed", address=address, by=by)
        self.note_probed(answered)
        await self._publish()
        return self.view(address)

    async def is_in_use(self, address: str) -> bool:
        """Somebody has it open: the kernel says so to who asks. False for what cannot be asked."""
        device = self._world.inventory.current.devices.get(address)
        if device is None:
            return False
        try:
            async with asyncio.timeout(PROBE_S):
                return _in_use(await self._world.passthrough.probe(_forgotten(device))) is not None
        except TimeoutError:
            return False

    def _ready_to_ask(self, address: str) -> Device:
        view = self.view(address)
        if not view.is_ready:
            driver = view.device.driver
            bound = f"the driver {driver} has it" if driver else "no driver has it"
            raise Conflict(
                f"{address} cannot be asked: {bound}, and only a VFIO driver answers; "
                f"bind it first: driverctl set-override {address} vfio-pci",
                code="driver_not_bound",
            )
        return view.device

    def note_probed(self, device: Device) -> None:
        """Keep what the kernel answered about a device; count it when the registers had promised
        something else (the adapter logs that)."""
        known = self._world.inventory.current.devices.get(device.address)
        if known is not None and _contradicts(
            known.iommu_dirty_tracking, device.iommu_dirty_tracking
        ):
            self._world.observer.estimate_was_wrong()
        self._world.inventory.note_probed(device)
        self._news.set()


_NOT_ASKED: Final = Capability.unknown(Unknown.NOT_PROBED)


def _forgotten(device: Device) -> Device:
    """Without what it answered before: what it has afterwards is this probe's."""
    return replace(device, dma_logging=_NOT_ASKED, migration=DeviceMigration(_NOT_ASKED))


def _contradicts(before: Capability, after: Capability) -> bool:
    return (
        before.evidence is Evidence.ESTIMATED
        and after.evidence is Evidence.PROBED
        and before.answer is not after.answer
    )


def _in_use(device: Device) -> Capability | None:
    """The answer that was not given because another process has the device."""
    answers = (device.iommu_dirty_tracking, device.dma_logging, device.migration.can)
    return next((answer for answer in answers if answer.reason is Unknown.IN_USE), None)
