"""A model of how QEMU gives page tables to VFIO devices on iommufd, and how it watches their DMA.

Written from a description of QEMU (hw/vfio/: iommufd.c, migration.c, container.c, listener.c); the
lab shows the same holes on a real one. What is modelled:

1. Attach (iommufd_cdev_autodomains_get), device by device, per container (one per iommufd object):
   an mdev goes to the IOAS and has no page table; any other is tried on each page table that the
   container has, newest first. The kernel refuses a page table with tracking to a device whose
   IOMMU cannot (EINVAL: the next is tried), and accepts a plain one. When none fits, one is
   allocated, with tracking whenever the IOMMU can; a kernel that refuses the flags fails the start.
2. The container's `dirty_pages_supported` is only ever set, and dies with its last device.
3. Realize (vfio_migration_realize), device by device: enable-migration=off, no migration support,
   nothing that tracks this device (let through with "on"), a second migrating device while one
   lacks P2P, an enabled device log under a vIOMMU. Each is a blocker; with "on" a failed start.
4. Start of a migration, one way per container: all its devices log and may: their logs; else if
   `dirty_pages_supported`: the page tables with tracking, and nothing else; else nothing at all,
   which is sound for a guest that is stopped before it is copied (ALL_DIRTY).
5. The legacy group interface: one container, which takes all memory for dirty unless all log.

Not modelled: what the guest maps, sizes, errors of a migration under way.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum


class StartFails(Exception):
    """QEMU does not start (or refuses device_add)."""


class Seen(StrEnum):
    """What becomes of a device's DMA at a migration."""

    LOG = "log"
    PAGE_TABLE = "page_table"
    ALL_DIRTY = "all_dirty"
    """By stopping the guest, and its devices, before anything is copied."""
    UNSEEN = "unseen"
    """Lost: the destination goes on with old memory."""


class Outcome(StrEnum):
    """What a migration of the VM would be, best first."""

    LIVE = "live"
    ALL_DIRTY = "all_dirty"
    BLOCKED = "blocked"
    CORRUPTS = "corrupts"

    @property
    def rank(self) -> int:
        return list(Outcome).index(self)


@dataclass(frozen=True)
class Given:
    """One -device vfio-pci, with what is true of the device."""

    id: str
    cap: bool = False
    """Its IOMMU can track."""
    log: bool = False
    migrates: bool = True
    p2p: bool = True
    is_mdev: bool = False
    instance: str = "iommu0"
    container: str | None = "iommufd0"
    """None: the legacy interface."""
    enable_migration: str = "auto"
    log_on: bool = True
    """x-device-dirty-page-tracking."""
    refuses_flags: bool = False
    """The kernel refuses tracking together with what the vIOMMU wants (H5)."""

    @property
    def logs(self) -> bool:
        return self.log and self.log_on


@dataclass
class _PageTable:
    tracks: bool
    instance: str
    devices: list[str] = field(default_factory=list)


@dataclass
class _Container:
    page_tables: list[_PageTable] = field(default_factory=list)
    devices: list[Given] = field(default_factory=list)
    dirty_pages_supported: bool = False


class QemuModel:
    """One QEMU."""

    def __init__(self, *, has_viommu: bool = False, plain_fits_elsewhere: bool = True) -> None:
        self.has_viommu = has_viommu
        self.plain_fits_elsewhere = plain_fits_elsewhere
        """A plain page table of one IOMMU instance is accepted by another (not by SMMUv3)."""
        self._containers: dict[str | None, _Container] = {}
        self._blockers: dict[str, str] = {}

    def attach(self, device: Given) -> None:
        """At the start, or by device_add. Raises StartFails; the device is then not there."""
        container = self._containers.setdefault(device.container, _Container())
        tracks = False
        if device.container is None:
            container.dirty_pages_supported = True
        elif not device.is_mdev:
            tracks = self._page_table(container, device).tracks
            container.dirty_pages_supported |= tracks
        container.devices.append(device)
        try:
            self._realize(device, tracks=tracks)
        except StartFails:
            self.unplug(device.id)
            raise

    def _page_table(self, container: _Container, device: Given) -> _PageTable:
        for table in container.page_tables:
            is_near = table.instance == device.instance or self.plain_fits_elsewhere
            if device.cap if table.tracks else is_near:
                break
        else:
            if device.cap and device.refuses_flags:
                self._forget_empty()
                raise StartFails(f"{device.id}: EOPNOTSUPP")
            table = _PageTable(device.cap, device.instance)
            container.page_tables.insert(0, table)
        table.devices.append(device.id)
        return table

    def _realize(self, device: Given, *, tracks: bool) -> None:
        why = None
        if device.enable_migration == "off":
            why = "migration is off"
        elif not device.migrates:
            why = "VFIO migration is not supported in kernel"
        elif not device.logs and not tracks and device.enable_migration == "auto":
            why = "neither device nor IOMMU dirty tracking"
        elif self._lacks_p2p() and device.enable_migration == "on":
            why = "multiple devices, one without P2P"
        elif device.logs and self.has_viommu:
            why = "vIOMMU"
        if why is not None and device.enable_migration == "on":
            raise StartFails(f"{device.id}: {why}")
        if why is not None:
            self._blockers[device.id] = why

    def _lacks_p2p(self) -> bool:
        moving = [one for one in self.devices() if one.migrates]
        return len(moving) > 1 and not all(one.p2p for one in moving)

    def unplug(self, id_: str) -> None:
        for container in self._containers.values():
            container.devices = [one for one in container.devices if one.id != id_]
            for table in container.page_tables:
                table.devices = [one for one in table.devices if one != id_]
            container.page_tables = [one for one in container.page_tables if one.devices]
        self._blockers.pop(id_, None)
        self._forget_empty()

    def _forget_empty(self) -> None:
        self._containers = {id_: one for id_, one in self._containers.items() if one.devices}

    def devices(self) -> list[Given]:
        return [device for one in self._containers.values() for device in one.devices]

    def blockers(self) -> list[str]:
        """query-migrate's blocked-reasons."""
        several = ["multiple devices, one without P2P"] if self._lacks_p2p() else []
        return [*self._blockers.values(), *several]

    def migrate(self) -> dict[str, Seen]:
        """How each device's DMA would be seen, if nothing blocked."""
        return {
            device.id: self._seen(container, device)
            for container in self._containers.values()
            for device in container.devices
        }

    def _seen(self, container: _Container, device: Given) -> Seen:
        if all(one.logs for one in container.devices):
            return Seen.LOG
        if device.container is None or not container.dirty_pages_supported:
            return Seen.ALL_DIRTY
        tables = [one for one in container.page_tables if device.id in one.devices]
        return Seen.PAGE_TABLE if any(one.tracks for one in tables) else Seen.UNSEEN

    def outcome(self) -> Outcome:
        """What asking for a migration now comes to."""
        if self.blockers():
            return Outcome.BLOCKED
        seen = set(self.migrate().values())
        if Seen.UNSEEN in seen:
            return Outcome.CORRUPTS
        return Outcome.ALL_DIRTY if Seen.ALL_DIRTY in seen else Outcome.LIVE


def started(
    devices: Iterable[Given], *, has_viommu: bool = False, plain_fits_elsewhere: bool = True
) -> QemuModel:
    """A QEMU with these devices, attached in this order. Raises StartFails."""
    qemu = QemuModel(has_viommu=has_viommu, plain_fits_elsewhere=plain_fits_elsewhere)
    for device in devices:
        qemu.attach(device)
    return qemu


def worst_outcome(devices: Iterable[Given], *, has_viommu: bool = False) -> Outcome:
    """Whether or not a plain page table of one IOMMU instance fits another. Raises StartFails."""
    given = list(devices)
    return max(
        (
            started(given, has_viommu=has_viommu, plain_fits_elsewhere=fits).outcome()
            for fits in (True, False)
        ),
        key=lambda outcome: outcome.rank,
    )
