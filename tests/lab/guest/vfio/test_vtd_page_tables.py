"""iommufd on an emulated VT-d, with a real driver's answers: what no mock device shows."""

from __future__ import annotations

import errno
import mmap
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrd.abi.iommufd import iommu_hw_info_type
from migrd.errors import KernelRejected, KernelUnsupported
from migrd.kernel.iommufd import Iommufd
from migrd.kernel.vfio import VfioDevice
from tests.lab.guest import raw

PAGE = 4096
IOVA = 1 << 30
INTERRUPTS = 0xFEE0_0000
"""Where a PCI device's writes are interrupts: never memory on x86."""


@pytest.fixture
def iommufd() -> Iterator[Iommufd]:
    with Iommufd.open() as iommufd:
        yield iommufd


@pytest.fixture
def nic(iommufd: Iommufd) -> Iterator[VfioDevice]:
    with raw.bound_to_vfio(raw.nics()[0]) as node, VfioDevice.open(str(node), "nic") as device:
        yield device


def test_the_registers_are_those_in_sysfs(iommufd: Iommufd, nic: VfioDevice) -> None:
    said = iommufd.hw_info(nic.bind(iommufd.fileno()))
    [shown] = Path("/sys/class/iommu").glob("dmar*/intel-iommu")
    assert said.hardware_type == iommu_hw_info_type.INTEL_VTD
    assert said.vtd is not None
    assert said.vtd.cap == int((shown / "cap").read_text(), 16)
    assert said.vtd.ecap == int((shown / "ecap").read_text(), 16)
    assert said.vtd.address_width_bits == 48
    assert not said.vtd.has_scalable_mode
    assert not said.tracks_dirty
    assert said.unknown_capability_bits == 0


def test_a_page_table_is_made_without_tracking_where_there_is_none(
    iommufd: Iommufd, nic: VfioDevice
) -> None:
    dev_id, ioas = nic.bind(iommufd.fileno()), iommufd.allocate_ioas()
    with pytest.raises(KernelUnsupported) as caught:
        iommufd.allocate_hwpt(dev_id, ioas, dirty_tracking=True)
    assert caught.value.code == "iommu_no_dirty_tracking"
    hwpt = iommufd.allocate_hwpt(dev_id, ioas)
    assert nic.attach(hwpt.id) == hwpt.id
    ioas.map(mmap.mmap(-1, PAGE), IOVA)
    with pytest.raises(KernelUnsupported) as caught:
        hwpt.set_tracking(True)
    assert caught.value.code == "hwpt_without_dirty_tracking"
    found = iommufd.find_objects()
    assert (found.devices, found.ioases) == ((dev_id,), (ioas.id,))
    assert (found.plain_hwpts, found.tracking_hwpts) == ((hwpt.id,), ())
    nic.detach()
    hwpt.destroy()
    ioas.destroy()


def test_memory_is_mapped_round_the_interrupts(iommufd: Iommufd, nic: VfioDevice) -> None:
    dev_id, ioas = nic.bind(iommufd.fileno()), iommufd.allocate_ioas()
    hwpt = iommufd.allocate_hwpt(dev_id, ioas)
    nic.attach(hwpt.id)
    ranges = ioas.iova_ranges()
    assert ranges.alignment_bytes == PAGE
    assert len(ranges.ranges) > 1
    assert not any(each.first <= INTERRUPTS <= each.last for each in ranges.ranges)
    with pytest.raises(KernelRejected) as caught:
        ioas.map(mmap.mmap(-1, PAGE), INTERRUPTS)
    assert (caught.value.code, caught.value.errno) == ("iova_not_allowed", errno.EINVAL)
