"""The contract of VFIO devices on the kernel's sample device, mtty; asking it and NICs by the port.

On mtty behind an IOMMU that tracks: tests/lab/guest/e2e/test_passthrough.py.
"""

import contextlib
import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrd.abi import iommufd as iommufd_abi
from migrd.core.device_state import DeviceState
from migrd.core.devices import Device, DeviceKind, MigrationFlag, Unknown
from migrd.engine.threads import in_thread
from migrd.errors import KernelGone
from migrd.kernel.iommufd import Iommufd
from migrd.kernel.passthrough import KernelPassthrough
from migrd.kernel.vfio import VfioDevice
from migrd.kernel.vfio_calls import LINUX
from tests.contract.vfio import VfioContract
from tests.lab.guest import raw

_REGION_INFO = 0x3B6C  # VFIO_DEVICE_GET_REGION_INFO
_SCRATCH = 7  # of a UART: it keeps what is written to it


class MttyWorld:
    """Fresh mdevs, removed in the end: state survives close."""

    system = LINUX

    def __init__(self, mdevs: contextlib.ExitStack) -> None:
        self._mdevs = mdevs
        self._iommufds: dict[int, Iommufd] = {}

    def new_mdev(self, ports: int = 2) -> str:
        made = self._mdevs.enter_context(raw.mtty(kind=f"mtty-{ports}"))
        return str(made.node)

    def new_iommufd(self) -> int:
        opened = Iommufd.open()
        self._iommufds[opened.fileno()] = opened
        return opened.fileno()

    def new_ioas(self, iommufd: int) -> int:
        return self._iommufds[iommufd].allocate_ioas().id

    def close_iommufd(self, fd: int) -> None:
        self._iommufds.pop(fd).close()

    def set_register(self, device: VfioDevice, value: int) -> None:
        os.pwrite(device.fd, bytes([value]), self._offset(device))

    def register(self, device: VfioDevice) -> int:
        return os.pread(device.fd, 1, self._offset(device))[0]

    def _offset(self, device: VfioDevice) -> int:
        region = bytearray(struct.pack("=IIIIQQ", 32, 0, 0, 0, 0, 0))
        fcntl.ioctl(device.fd, _REGION_INFO, region, True)
        return int(struct.unpack("=IIIIQQ", region)[5]) + _SCRATCH


@pytest.fixture
def world() -> Iterator[MttyWorld]:
    with contextlib.ExitStack() as mdevs:
        yield MttyWorld(mdevs)


class TestMtty(VfioContract):
    """Everything there."""


def test_an_emulated_mdev_answers_no_question_about_an_iommu(world: MttyWorld) -> None:
    with (
        Iommufd.open() as iommufd,
        VfioDevice.open(world.new_mdev(), "a", LINUX) as device,
    ):
        dev_id = device.bind(iommufd.fileno())
        with pytest.raises(KernelGone) as failed:
            iommufd.hw_info(dev_id)
        assert failed.value.errno == errno.ENOENT
        with pytest.raises(KernelGone):
            iommufd.allocate_hwpt(dev_id, iommufd.allocate_ioas())


def test_debugfs_shows_the_state_without_opening_the_device() -> None:
    with raw.mtty() as made, Iommufd.open() as iommufd:
        with VfioDevice.open(str(made.node), "a") as device:
            device.bind(iommufd.fileno())
            stream = device.move(DeviceState.PRE_COPY)
            assert stream is not None
            stream.close()
        shown = Path("/sys/kernel/debug/vfio", made.sysfs.name, "migration/state").read_text()
        assert shown.strip() == "PRE_COPY"


# ---- asking devices through the port


def device_at(node: Path, kind: DeviceKind) -> Device:
    address = Path("/sys/class/vfio-dev", node.name, "device").resolve().name
    return Device(address=address, kind=kind, vfio_cdev=str(node))


def descriptors() -> set[str]:
    found = set()
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one of this listing
            found.add(os.readlink(f"/proc/self/fd/{entry}"))
    return found


async def test_an_mdev_is_asked_and_let_go_as_it_was() -> None:
    passthrough = KernelPassthrough()
    with raw.mtty() as made:
        device = device_at(made.node, DeviceKind.VFIO_MDEV)
        probed = await passthrough.probe(device)
        assert probed.iommu_dirty_tracking.is_no
        assert probed.cache_coherent.reason is Unknown.NO_IOMMU
        assert probed.migration.can.is_yes
        assert probed.migration.flags == frozenset(MigrationFlag)
        assert probed.migration.stop_copy_bytes == 96
        assert probed.dma_logging.is_yes
        assert probed.can_reset.is_no
        assert str(made.node) not in await in_thread(descriptors)
    passthrough.close()


async def test_a_nic_behind_vt_d_can_neither_migrate_nor_be_tracked() -> None:
    passthrough = KernelPassthrough()
    with raw.bound_to_vfio(raw.nics()[0]) as node:
        probed = await passthrough.probe(device_at(node, DeviceKind.VFIO_PCI))
        assert probed.iommu_dirty_tracking.is_no
        vtd = iommufd_abi.iommu_hw_info_type.INTEL_VTD
        assert f"type {int(vtd)}," in probed.iommu_dirty_tracking.detail
        assert probed.migration.can.is_no
        assert probed.dma_logging.is_no
        assert probed.can_reset.is_yes
        assert probed.cache_coherent.is_yes
        opened = await passthrough.open([device_at(node, DeviceKind.VFIO_PCI)], 1)
        vmm = raw.Vfio(node)
        vmm.bind(raw.Iommufd(opened.iommufds[0]))
        vmm.close()
        await opened.close()
    passthrough.close()


async def test_a_node_that_is_another_device_by_now_is_not_opened() -> None:
    passthrough = KernelPassthrough()
    with raw.bound_to_vfio(raw.nics()[0]) as node:
        other = Device("0000:ff:1f.7", DeviceKind.VFIO_PCI, vfio_cdev=str(node))
        with pytest.raises(KernelGone, match="by now, not 0000:ff:1f"):
            await passthrough.open([other], 1)
    passthrough.close()


async def test_a_device_that_a_vmm_has_is_in_use() -> None:
    passthrough = KernelPassthrough()
    with raw.bound_to_vfio(raw.nics()[0]) as node:
        iommufd, vmm = raw.Iommufd(), raw.Vfio(node)
        vmm.bind(iommufd)
        probed = await passthrough.probe(device_at(node, DeviceKind.VFIO_PCI))
        assert probed.migration.can.reason is Unknown.IN_USE
        vmm.close()
        iommufd.close()
        probed = await passthrough.probe(device_at(node, DeviceKind.VFIO_PCI))
        assert probed.migration.can.is_no
    passthrough.close()


async def test_a_member_of_a_group_that_a_vmm_has_cannot_be_asked_and_that_is_said() -> None:
    """BIND says EPERM, which has nothing to do with permission."""
    passthrough = KernelPassthrough()
    first, second = _group_mates()
    with raw.bound_to_vfio(first) as node, raw.bound_to_vfio(second) as other:
        iommufd, vmm = raw.Iommufd(), raw.Vfio(node)
        vmm.bind(iommufd)
        probed = await passthrough.probe(device_at(other, DeviceKind.VFIO_PCI))
        vmm.close()
        iommufd.close()
        assert probed.migration.can.reason is Unknown.PROBE_FAILED
        assert "another member of its IOMMU group" in probed.migration.can.detail
        assert "EPERM" in probed.migration.can.detail
    passthrough.close()


def _group_mates() -> list[Path]:
    by_group: dict[str, list[Path]] = {}
    for nic in raw.nics():
        group = os.path.realpath(nic / "iommu_group")
        by_group.setdefault(group, []).append(nic)
    return next(members for members in by_group.values() if len(members) == 2)


def test_attaching_a_nic_to_nothing_is_told_apart_from_a_misfit() -> None:
    with (
        raw.bound_to_vfio(raw.nics()[0]) as node,
        Iommufd.open() as iommufd,
        VfioDevice.open(str(node), "nic") as device,
    ):
        device.bind(iommufd.fileno())
        with pytest.raises(KernelGone) as failed:
            device.attach(4095, tracks_dirty=True)
        assert failed.value.code == "no_page_table"
        assert device.migration_flags() is None
        assert device.stop_copy_bytes() is None
