"""What iommufd is tested with: a kernel with mock devices, and one of them ready to use."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import pytest

from migrd.kernel.calls import Argument
from migrd.kernel.io_address_space import Ioas, Mapping
from migrd.kernel.iommufd import Iommufd
from migrd.kernel.page_table import DirtyBits, OwnedHwpt
from tests.fakes.iommufd import MOCK_PAGE_BYTES, MockDevice

PAGE = 4096
PAGES = 64
LENGTH = PAGES * PAGE
IOVA = 0x1000_0000
OUT_OF_REACH = 1 << 48
UNKNOWN_ID = 999


class Rig(Protocol):
    """A kernel with mock devices. The simulator is one by itself."""

    def ioctl(self, fd: int, request: int, argument: Argument, /) -> int:
        """As `calls.Ioctl`."""

    def open(self) -> int:
        """A new /dev/iommu; the caller closes it."""

    def mock_device(self, fd: int, pt_id: int, *, can_track: bool = True) -> MockDevice:
        """Make a device and attach it."""

    def attach(self, fd: int, stdev_id: int, pt_id: int) -> None:
        """Attach it to something else."""

    def make_dirty(self, fd: int, hwpt_id: int, iova: int, mock_pages: list[int]) -> None:
        """Let a device write to pages of MOCK_PAGE_BYTES, counted from `iova`."""


@dataclass
class Bench:
    """A device that can track, attached to a page table of ours with memory behind it."""

    rig: Rig
    iommufd: Iommufd
    ioas: Ioas
    device: MockDevice
    hwpt: OwnedHwpt
    memory: mmap.mmap
    mapping: Mapping
    merged: list[DirtyBits] = field(default_factory=list)

    def write(self, *pages: int, iova: int = IOVA) -> None:
        """Let the device write to these pages of PAGE bytes."""
        mock_pages = [number * PAGE // MOCK_PAGE_BYTES for number in pages]
        self.rig.make_dirty(self.iommufd.fileno(), self.hwpt.id, iova, mock_pages)

    def read_and_clear(self, iova: int = IOVA, length: int = LENGTH) -> list[int]:
        """Numbers of the dirty pages, counted from `iova`."""
        self.merged.clear()
        count = self.hwpt.read_and_clear(iova, length, PAGE, self.merged.append)
        [found] = self.merged
        assert count == found.dirty_pages
        return numbers(found)

    def shared(self) -> Iommufd:
        """A second owner of the same iommufd, as another process would be."""
        return Iommufd.adopt(os.dup(self.iommufd.fileno()), self.rig.ioctl)


def numbers(found: DirtyBits) -> list[int]:
    """Numbers of the dirty pages."""
    value = int.from_bytes(found.bits, "little")
    return [number for number in range(found.pages) if value >> number & 1]


class WithBench:
    """Give it a fixture `rig`."""

    @pytest.fixture
    def iommufd(self, rig: Rig) -> Iterator[Iommufd]:
        with Iommufd.adopt(rig.open(), rig.ioctl) as iommufd:
            yield iommufd

    @pytest.fixture
    def bench(self, rig: Rig, iommufd: Iommufd) -> Bench:
        ioas = iommufd.allocate_ioas()
        device = rig.mock_device(iommufd.fileno(), ioas.id)
        hwpt = iommufd.allocate_hwpt(device.dev_id, ioas, dirty_tracking=True)
        rig.attach(iommufd.fileno(), device.stdev_id, hwpt.id)
        memory = mmap.mmap(-1, LENGTH)
        mapping = ioas.map(memory, IOVA)
        return Bench(rig, iommufd, ioas, device, hwpt, memory, mapping)
