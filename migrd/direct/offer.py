"""What a VMM hands over, as the daemon keeps it: memory, dirty sources, devices; all of it checked.

    messages of the VMM ─ gathered in order ─► OfferBuilder ─ checked() ─► Offer
                                                   │ Invalid, TooLarge: names field, value, cure

Every page of every region must be watched by a process source: a CPU can write anywhere, and a
write that nobody saw would be missing at the destination. Pages mapped twice may be watched twice
(two addresses, one page); one address cannot stand for two pages. And what is watched must be the
region: its file, mapped shared (mapped.py).

The descriptors belong to whoever has the Offer, who closes them with `close_descriptors`; before
`release` they are the builder's.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from migrd.core.memory_map import MemoryMap, Region
from migrd.direct.descriptors import DescriptorKinds, FilePlace
from migrd.direct.mapped import Watched, check_mapped
from migrd.direct.messages import (
    PAGE_BYTES,
    DeviceMessage,
    OfferEnd,
    RangeMessage,
    RegionMessage,
    SourceKind,
    SourceMessage,
)
from migrd.errors import Invalid, TooLarge

_ADDRESS_SPACE: Final = 1 << 64
_LARGEST_PAGE_BYTES: Final = 1 << 30


@dataclass(frozen=True)
class OfferLimits:
    """The most that one process may hand over."""

    regions: int = 1024
    sources: int = 64
    devices: int = 64


@dataclass(frozen=True)
class OfferedRange:
    """Pages of the merged page space, and the address under which a source knows them."""

    address: int
    """Virtual, in the VMM, for a process source; an IOVA for the others."""
    length_bytes: int
    first_page: int


@dataclass(frozen=True)
class OfferedProcess:
    """CPU writes of the VMM's threads, read by PAGEMAP_SCAN."""

    pagemap_fd: int
    ranges: tuple[OfferedRange, ...]


@dataclass(frozen=True)
class OfferedHwpt:
    """DMA that an IOMMU page table saw."""

    iommufd_fd: int
    hwpt_id: int
    ranges: tuple[OfferedRange, ...]
    page_size_bytes: int


@dataclass(frozen=True)
class OfferedDeviceLog:
    """DMA that a VFIO device logs itself."""

    device_fd: int
    ranges: tuple[OfferedRange, ...]
    page_size_bytes: int


OfferedSource: TypeAlias = OfferedProcess | OfferedHwpt | OfferedDeviceLog


@dataclass(frozen=True)
class OfferedDevice:
    """A VFIO device whose state is to be moved."""

    id: str
    device_fd: int


@dataclass(frozen=True)
class Offer:
    """All that a VMM handed over."""

    memory: MemoryMap
    region_fds: Mapping[int, int]
    """The file of each region, by its id; readable, at least as long as the region."""
    region_offsets: Mapping[int, int]
    """Where in its file each region begins, in bytes."""
    sources: tuple[OfferedSource, ...]
    devices: tuple[OfferedDevice, ...]
    earlier_devices: tuple[OfferedDevice, ...] = ()
    """The same, as they were handed over while the process waited for its guest."""

    def descriptors(self) -> tuple[int, ...]:
        return (
            *self.region_fds.values(),
            *(_fd_of(source) for source in self.sources),
            *(device.device_fd for device in (*self.devices, *self.earlier_devices)),
        )

    def close_descriptors(self) -> None:
        for fd in self.descriptors():
            os.close(fd)


@dataclass
class OfferBuilder:
    """Gathers the messages of one hand-over. Its descriptors are its own until `release`."""

    limits: OfferLimits
    kinds: DescriptorKinds
    pid: int
    """The process that hands over."""
    _regions: list[tuple[RegionMessage, int]] = field(default_factory=list)
    _sources: list[tuple[SourceMessage, int]] = field(default_factory=list)
    _devices: list[tuple[DeviceMessage, int]] = field(default_factory=list)
    _places: dict[int, FilePlace] = field(default_factory=dict)
    """Of the regions, by their ids."""

    def add(self, message: RegionMessage | SourceMessage | DeviceMessage, fd: int) -> None:
        """Take a message and its descriptor. Raises TooLarge; `fd` is ours even then."""
        if isinstance(message, RegionMessage):
            self._regions.append((message, fd))
        elif isinstance(message, SourceMessage):
            self._sources.append((message, fd))
        else:
            self._devices.append((message, fd))
        for what, count, most in (
            ("regions", len(self._regions), self.limits.regions),
            ("sources", len(self._sources), self.limits.sources),
            ("devices", len(self._devices), self.limits.devices),
        ):
            if count > most:
                raise TooLarge(f"{what}: more than {most} are handed over; hand over fewer")

    def checked(self, end: OfferEnd) -> Offer:
        """The whole offer. Blocking (looks at descriptors). Raises Invalid."""
        self._check_counts(end)
        memory = self._memory()
        regions = {region.id: region for region in memory.regions}
        sources = tuple(
            self._source(f"source {number} ({message.kind.name.lower()})", message, fd, regions)
            for number, (message, fd) in enumerate(self._sources)
        )
        _check_all_is_watched(memory, sources)
        self._check_mapped()
        devices = self._checked_devices()
        return Offer(
            memory,
            {message.id: fd for message, fd in self._regions},
            {message.id: message.offset_bytes for message, _ in self._regions},
            sources,
            devices,
        )

    def checked_devices(self, end: OfferEnd) -> Offer:
        """The devices of a process that waits for its guest. Blocking. Raises Invalid."""
        self._check_counts(end)
        if self._regions or self._sources:
            raise Invalid("state: incoming, and memory came; hand over devices, and nothing else")
        return Offer(MemoryMap(()), {}, {}, (), self._checked_devices())

    def _check_counts(self, end: OfferEnd) -> None:
        sent = len(self._regions), len(self._sources), len(self._devices)
        if sent != (end.regions, end.sources, end.devices):
            said = f"{end.regions} regions, {end.sources} sources, {end.devices} devices"
            raise Invalid(
                f"OFFER_END: says {said}, and {sent[0]}, {sent[1]}, {sent[2]} came; count what "
                "was sent"
            )

    def _checked_devices(self) -> tuple[OfferedDevice, ...]:
        devices = tuple(self._device(message, fd) for message, fd in self._devices)
        _check_unlike([device.id for device in devices], "device id")
        return devices

    def close(self) -> None:
        """Close what is still ours."""
        for _, fd in (*self._regions, *self._sources, *self._devices):
            os.close(fd)
        self.release()

    def release(self) -> None:
        """They are the Offer's from now on."""
        for gathered in (self._regions, self._sources, self._devices):
            gathered.clear()

    def _memory(self) -> MemoryMap:
        if not self._regions:
            raise Invalid("regions: none was handed over; a guest has memory")
        memory = MemoryMap.of([(m.id, m.gpa, m.length_bytes) for m, _ in self._regions])
        places: list[tuple[FilePlace, str]] = []
        for message, fd in self._regions:
            field_name = f"region {message.id}"
            if message.offset_bytes % PAGE_BYTES:
                raise Invalid(
                    f"{field_name}: its offset is {message.offset_bytes:#x}; take a multiple of "
                    f"{PAGE_BYTES}"
                )
            place = self.kinds.memory(fd, field_name, message.offset_bytes, message.length_bytes)
            places.append((place, field_name))
            self._places[message.id] = place
        _check_files_apart(places)
        return memory

    def _source(
        self, name: str, message: SourceMessage, fd: int, regions: Mapping[int, Region]
    ) -> OfferedSource:
        size = message.page_size_bytes
        if not PAGE_BYTES <= size <= _LARGEST_PAGE_BYTES or size & (size - 1):
            raise Invalid(
                f"{name}: page_size is {size}; take a power of two from {PAGE_BYTES} to "
                f"{_LARGEST_PAGE_BYTES}"
            )
        ranges = tuple(_range(name, wanted, regions) for wanted in message.ranges)
        _check_addresses_apart(name, ranges)
        if message.kind is SourceKind.PROCESS:
            self.kinds.pagemap(fd, name)
            for one in message.ranges:
                if self._places[one.region_id].page_bytes > PAGE_BYTES:
                    self.kinds.populated(fd, name, one.address, one.length_bytes)
            return OfferedProcess(fd, ranges)
        if message.kind is SourceKind.HWPT:
            self.kinds.iommufd(fd, name)
            return OfferedHwpt(fd, message.object_id, ranges, size)
        self.kinds.vfio_device(fd, name)
        return OfferedDeviceLog(fd, ranges, size)

    def _check_mapped(self) -> None:
        """That each range of a process source is the region itself."""
        for message, fd in self._sources:
            if message.kind is SourceKind.PROCESS:
                check_mapped(self.pid, fd, [self._watched(one) for one in message.ranges])

    def _watched(self, one: RangeMessage) -> Watched:
        place = self._places[one.region_id]
        offset_bytes = place.start + one.offset_bytes
        return Watched(one.region_id, one.address, one.length_bytes, place.file, offset_bytes)

    def _device(self, message: DeviceMessage, fd: int) -> OfferedDevice:
        self.kinds.vfio_device(fd, f"device {message.id}")
        return OfferedDevice(message.id, fd)


def _fd_of(source: OfferedSource) -> int:
    if isinstance(source, OfferedProcess):
        return source.pagemap_fd
    return source.iommufd_fd if isinstance(source, OfferedHwpt) else source.device_fd


def _range(name: str, wanted: RangeMessage, regions: Mapping[int, Region]) -> OfferedRange:
    region = regions.get(wanted.region_id)
    if region is None:
        raise Invalid(f"{name}: watches region {wanted.region_id}, which was not handed over")
    named = f"{name}: a range of region {region.id}"
    for what, value in (
        ("offset", wanted.offset_bytes),
        ("address", wanted.address),
        ("length", wanted.length_bytes),
    ):
        if value % PAGE_BYTES:
            raise Invalid(f"{named}: its {what} is {value:#x}; take a multiple of {PAGE_BYTES}")
    if not wanted.length_bytes:
        raise Invalid(f"{named} at {wanted.offset_bytes:#x} is empty: leave it out")
    end = wanted.offset_bytes + wanted.length_bytes
    if end > region.length_bytes:
        raise Invalid(
            f"{named}: it ends at {end:#x} of the region, which has {region.length_bytes:#x} bytes"
        )
    if wanted.address + wanted.length_bytes > _ADDRESS_SPACE:
        raise Invalid(f"{named}: address {wanted.address:#x} and length reach beyond 64 bits")
    first_page = region.first_page + wanted.offset_bytes // PAGE_BYTES
    return OfferedRange(wanted.address, wanted.length_bytes, first_page)


def _check_addresses_apart(name: str, ranges: Iterable[OfferedRange]) -> None:
    end = 0
    for one in sorted(ranges, key=lambda r: r.address):
        if one.address < end:
            raise Invalid(
                f"{name}: address {one.address:#x} is in two ranges; give each address once"
            )
        end = one.address + one.length_bytes


def _check_files_apart(places: Iterable[tuple[FilePlace, str]]) -> None:
    """That no page of a file is two pages of the guest: at the destination they would be apart."""
    before: tuple[FilePlace, str] | None = None
    for place, name in sorted(places, key=lambda p: (p[0].file, p[0].start)):
        if before and before[0].file == place.file and place.start < before[0].end:
            raise Invalid(
                f"{name}: it shares pages of its file with {before[1]}; hand over each page once"
            )
        before = place, name


def _check_all_is_watched(memory: MemoryMap, sources: Iterable[OfferedSource]) -> None:
    runs = sorted(
        (r.first_page, r.first_page + r.length_bytes // PAGE_BYTES)
        for source in sources
        if isinstance(source, OfferedProcess)
        for r in source.ranges
    )
    number = 0
    for region in sorted(memory.regions, key=lambda r: r.first_page):
        watched = region.first_page
        while number < len(runs) and runs[number][0] <= watched < region.end_page:
            watched = max(watched, runs[number][1])
            number += 1
        if watched < region.end_page:
            offset = (watched - region.first_page) * PAGE_BYTES
            raise Invalid(
                f"region {region.id}: no process source watches it at offset {offset:#x}, so a "
                "write there would be lost; hand over a source of kind process that covers it"
            )


def _check_unlike(names: Sequence[str], what: str) -> None:
    for name in sorted(names):
        if not name:
            raise Invalid(f"{what}: one is empty; name each device")
        if names.count(name) > 1:
            raise Invalid(f"{what}: {name} is two devices'; name each device once")
