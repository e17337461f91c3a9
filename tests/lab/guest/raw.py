"""The kernel as the tests see it, without migrd's own adapters: numbers and structs by hand.

It proves the lab before anything of ours is tested in it, plays the device (dirtying memory
through the selftest's own ioctl), and judges what migrd's adapters say. Layouts: Linux 6.12,
include/uapi/linux/iommufd.h and vfio.h, drivers/iommu/iommufd/iommufd_test.h.

    Iommufd       /dev/iommu, or a descriptor shared with a VMM; ids are plain ints
    Vfio          the cdev of a VFIO device
    mtty(), nics() what there is to open, made or bound first
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import struct
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20
DIRTY_TRACKING = 2  # IOMMU_HWPT_ALLOC_DIRTY_TRACKING
CAN_TRACK = 1  # IOMMU_HW_CAP_DIRTY_TRACKING
NO_CLEAR = 1  # IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR
NO_DIRTY = 1  # MOCK_FLAGS_DEVICE_NO_DIRTY
MOCK_PAGE_BYTES = 2048  # the mock's own; asked with another size it marks the wrong pages

_DESTROY, _IOAS_ALLOC, _HWPT_ALLOC, _HW_INFO = 0x3B80, 0x3B81, 0x3B89, 0x3B8A
_IOAS_MAP, _FIXED_RW = 0x3B85, 7
_SET_DIRTY, _GET_DIRTY, _TEST = 0x3B8B, 0x3B8C, 0x3BA0
_FEATURE, _BIND, _ATTACH = 0x3B75, 0x3B76, 0x3B77
_GET_MIG_STATE = 1 << 16 | 2  # VFIO_DEVICE_FEATURE_GET of MIG_DEVICE_STATE
_OP_MOCK_DOMAIN_FLAGS, _OP_DIRTY = 12, 13
_MTTY = Path("/sys/devices/virtual/mtty/mtty/mdev_supported_types")
_PCI = Path("/sys/bus/pci/devices")


def _call(fd: int, number: int, layout: str, *values: int) -> tuple[int, ...]:
    """One ioctl on a struct that begins with its own size; returns the struct as left behind."""
    size = struct.calcsize(layout)
    buffer = bytearray(struct.pack(layout, size, *values))
    fcntl.ioctl(fd, number, buffer, True)
    return struct.unpack(layout, buffer)


class Iommufd:
    """An iommufd. Errors are OSErrors, as the kernel gives them."""

    def __init__(self, fd: int | None = None) -> None:
        self.fd = os.open("/dev/iommu", os.O_RDWR | os.O_CLOEXEC) if fd is None else fd

    def close(self) -> None:
        os.close(self.fd)

    def ioas(self) -> int:
        return _call(self.fd, _IOAS_ALLOC, "=III", 0, 0)[2]

    def destroy(self, object_id: int) -> None:
        _call(self.fd, _DESTROY, "=II", object_id)

    def capabilities(self, dev_id: int) -> int:
        return _call(self.fd, _HW_INFO, "=IIIIQIB3xQ", 0, dev_id, 0, 0, 0, 0, 0)[7]

    def hwpt(self, dev_id: int, ioas_id: int, flags: int) -> int:
        return _call(self.fd, _HWPT_ALLOC, "=IIIIIIIIQII", flags, dev_id, ioas_id, *[0] * 7)[4]

    def map(self, ioas_id: int, iova: int, length: int) -> mmap.mmap:
        """Map fresh memory at `iova`; it must outlive the mapping."""
        memory = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # The view must go at once, or the memory could never be closed.
        view = ctypes.c_char.from_buffer(memory)
        where = ctypes.addressof(view)
        del view
        self.map_at(ioas_id, iova, where, length)
        return memory

    def map_at(self, ioas_id: int, iova: int, where: int, length: int) -> None:
        """Map memory of this process, which must outlive the mapping."""
        _call(self.fd, _IOAS_MAP, "=IIIIQQQ", _FIXED_RW, ioas_id, 0, where, length, iova)

    def set_tracking(self, hwpt_id: int, on: bool) -> None:
        _call(self.fd, _SET_DIRTY, "=IIII", int(on), hwpt_id, 0)

    def peek(self, hwpt_id: int, iova: int, length: int, page_bytes: int = 4096) -> int:
        """How many pages are dirty; they stay so."""
        bits = (ctypes.c_uint64 * -(-length // page_bytes // 64))()
        where = ctypes.addressof(bits)
        _call(
            self.fd, _GET_DIRTY, "=IIIIQQQQ", hwpt_id, NO_CLEAR, 0, iova, length, page_bytes, where
        )
        return sum(word.bit_count() for word in bits)

    def mock_device(self, ioas_id: int, flags: int = 0) -> tuple[int, int, int]:
        """A device of the selftest, attached: ids of the device, its page table, its binding."""
        made = self._test(_OP_MOCK_DOMAIN_FLAGS, ioas_id, struct.pack("=IIII", 0, 0, 0, flags))
        found: tuple[int, int, int] = struct.unpack_from("=III", made, 16)
        return found

    def make_dirty(self, hwpt_id: int, iova: int, length: int) -> None:
        """As a device would: write to every page. EINVAL while tracking is off."""
        bits = (ctypes.c_uint8 * -(-length // MOCK_PAGE_BYTES // 8))()
        ctypes.memset(bits, 0xFF, len(bits))
        where = ctypes.addressof(bits)
        asked = struct.pack("=IIQQQQQ", 0, 0, iova, length, MOCK_PAGE_BYTES, where, 0)
        self._test(_OP_DIRTY, hwpt_id, asked)

    def _test(self, operation: int, object_id: int, arguments: bytes) -> bytearray:
        buffer = bytearray(struct.pack("=IIII", 72, operation, object_id, 0))
        buffer += arguments.ljust(56, b"\0")
        fcntl.ioctl(self.fd, _TEST, buffer, True)
        return buffer


class Vfio:
    """The cdev of a VFIO device."""

    def __init__(self, node: Path) -> None:
        self.fd = os.open(node, os.O_RDWR | os.O_CLOEXEC)

    def close(self) -> None:
        os.close(self.fd)

    def bind(self, iommufd: Iommufd) -> int:
        return _call(self.fd, _BIND, "=IIiI", 0, iommufd.fd, 0)[3]

    def attach(self, page_table_id: int) -> int:
        return _call(self.fd, _ATTACH, "=III", 0, page_table_id)[2]

    def state(self) -> int:
        return state_of(self.fd)


def state_of(vfio_fd: int) -> int:
    """Migration state of a bound device, as vfio.h numbers them."""
    return _call(vfio_fd, _FEATURE, "=IIIi", _GET_MIG_STATE, 0, -1)[2]


@dataclass(frozen=True)
class Mtty:
    """One mdev of the sample driver."""

    sysfs: Path
    node: Path


@contextlib.contextmanager
def mtty(*, tracked: bool = True, kind: str = "mtty-2") -> Iterator[Mtty]:
    """Make an mdev; `tracked` decides whether the mock IOMMU under it tracks dirty pages."""
    name = str(uuid.uuid4())
    if not tracked:
        name = "0d0d0d0d" + name[8:]
    (_MTTY / kind / "create").write_text(name)
    sysfs = Path("/sys/bus/mdev/devices") / name
    try:
        yield Mtty(sysfs, _node(sysfs))
    finally:
        (sysfs / "remove").write_text("1")


def nics() -> list[Path]:
    """Every Ethernet controller in sysfs, by address."""
    found = [path for path in _PCI.iterdir() if (path / "class").read_text().startswith("0x0200")]
    return sorted(found)


@contextlib.contextmanager
def bound_to_vfio(device: Path) -> Iterator[Path]:
    """Give a PCI function to vfio-pci; yields its cdev."""
    (device / "driver_override").write_text("vfio-pci")
    try:
        (_PCI.parent / "drivers_probe").write_text(device.name)
        yield _node(device)
    finally:
        if (device / "driver").exists():
            (device / "driver" / "unbind").write_text(device.name)
        (device / "driver_override").write_text("\n")


def _node(sysfs: Path) -> Path:
    [device] = (sysfs / "vfio-dev").iterdir()
    return Path("/dev/vfio/devices") / device.name
