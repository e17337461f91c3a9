"""Page tables and device logs as sources of dirty pages, on the simulators.

Page tables on the real kernel: tests/lab/guest/mock/test_dirty_iommufd.py. No device of the lab has
a log worth the name: mtty's takes every call and never has anything in it (tests/contract/vfio.py).
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from migrd.abi import iommufd as abi
from migrd.abi import vfio as vfio_abi
from migrd.core.bitmap import PAGE_BYTES, DirtyBitmap
from migrd.core.harvest_round import Tracker
from migrd.core.memory_map import MemoryMap
from migrd.engine.dirty_ports import IovaPiece
from migrd.errors import KernelError, KernelGone, KernelRejected, KernelUnsupported, LogLost
from migrd.kernel.dirty_device import DeviceLogSource
from migrd.kernel.dirty_iommufd import HwptPeeks, HwptSource
from migrd.kernel.dirty_pieces import parts_of
from migrd.kernel.iommufd import Iommufd
from tests.contract.dirty_hwpt import HwptContract, HwptRig, hwpt_rig
from tests.contract.dirty_source import DirtySourceContract, dirty_pages
from tests.fakes.iommufd import IommufdKernel
from tests.fakes.vfio import VfioKernel
from tests.fakes.vfio_device import SimDevice, SimDmaLog
from tests.kernel.vfio_bench import Bench as DeviceBench

HUGE = 2 << 20
MEMORY = MemoryMap.of([(0, 0, 500 * PAGE_BYTES), (1, 1 << 32, 1024 * PAGE_BYTES)])
PIECES = [
    IovaPiece(0, 500 * PAGE_BYTES, 0),
    IovaPiece(1 << 32, 1024 * PAGE_BYTES, MEMORY.regions[1].first_page),
]


class TestHwpt(HwptContract):
    @pytest.fixture(params=[PAGE_BYTES, HUGE])
    def rig(self, request: pytest.FixtureRequest) -> Iterator[HwptRig]:
        yield from hwpt_rig(IommufdKernel(), request.param)


# ---- a device's log


class DeviceRig:
    tracker = Tracker.DEVICE
    can_peek = False
    memory = MEMORY

    def __init__(self, bench: DeviceBench, coarsest_page_bytes: int) -> None:
        self.log = SimDmaLog(coarsest_page_bytes=coarsest_page_bytes)
        self.bench = bench
        self.device = bench.bind(SimDevice(log=self.log))
        self.source = DeviceLogSource(
            self.device.fd, PIECES, coarsest_page_bytes, "nic", bench.kernel.system
        )

    def write(self, *pages: int) -> None:
        for page in pages:
            for region, offset, _ in MEMORY.pieces(page, 1):
                self.log.write(region.gpa + offset)

    def lose(self) -> None:
        (path,) = self.bench.kernel.nodes
        self.bench.kernel.nodes[path].failures = {vfio_abi.VFIO_DEVICE_FEATURE: errno.EIO}


@pytest.fixture
def device_bench() -> Iterator[DeviceBench]:
    kernel = VfioKernel()
    with Iommufd(kernel.open(), kernel.ioctl) as iommufd:
        bench = DeviceBench(kernel, iommufd)
        yield bench
        for device in bench.opened:
            device.close()
    assert kernel.left_open() == []


class TestDeviceLog(DirtySourceContract):
    @pytest.fixture(params=[PAGE_BYTES, 4 * PAGE_BYTES])
    def rig(self, request: pytest.FixtureRequest, device_bench: DeviceBench) -> Iterator[DeviceRig]:
        rig = DeviceRig(device_bench, request.param)
        yield rig
        (path,) = device_bench.kernel.nodes
        device_bench.kernel.nodes[path].failures = None
        rig.source.close()

    def test_a_report_that_fails_makes_all_that_it_was_to_tell_of_dirty(
        self, rig: DeviceRig
    ) -> None:
        rig.source.start_tracking()
        rig.lose()
        into = DirtyBitmap(MEMORY.pages)
        with pytest.raises(LogLost):
            rig.source.read_and_clear(into)
        assert set(dirty_pages(into)) >= set(range(500))


def test_a_device_without_a_log_says_so(device_bench: DeviceBench) -> None:
    device = device_bench.bind(SimDevice(log=None))
    source = DeviceLogSource(device.fd, PIECES, PAGE_BYTES, "nic", device_bench.kernel.system)
    with pytest.raises(KernelUnsupported):
        source.start_tracking()
    source.close()


def test_ranges_that_touch_are_given_to_the_device_as_one(device_bench: DeviceBench) -> None:
    log = SimDmaLog()
    device = device_bench.bind(SimDevice(log=log))
    pieces = [IovaPiece(n * HUGE, HUGE, n * 512) for n in (2, 0, 1)]
    source = DeviceLogSource(device.fd, pieces, PAGE_BYTES, "nic", device_bench.kernel.system)
    source.start_tracking()
    assert log.ranges == [(0, 3 * HUGE)]
    log.write(HUGE + 5)
    into = DirtyBitmap(3 * 512)
    source.read_and_clear(into)
    assert dirty_pages(into) == [512]
    source.close()


def test_a_range_is_read_in_parts_and_in_the_largest_pages_that_it_is_aligned_to() -> None:
    pieces = [IovaPiece(3 * HUGE, 5 * HUGE, 64), IovaPiece(1 << 32, 4 * PAGE_BYTES, 4096)]
    assert list(parts_of(pieces, HUGE, 4 * HUGE)) == [
        (IovaPiece(3 * HUGE, HUGE, 64), HUGE),
        (IovaPiece(4 * HUGE, 4 * HUGE, 64 + 512), HUGE),
        (IovaPiece(1 << 32, 4 * PAGE_BYTES, 4096), 4 * PAGE_BYTES),
    ]


# ---- refusals


@pytest.mark.parametrize(
    ("pieces", "page_size"),
    [
        ([], PAGE_BYTES),
        ([IovaPiece(0, 0, 0)], PAGE_BYTES),
        ([IovaPiece(-PAGE_BYTES, PAGE_BYTES, 0)], PAGE_BYTES),
        ([IovaPiece(0, PAGE_BYTES, -1)], PAGE_BYTES),
        ([IovaPiece(1, PAGE_BYTES, 0)], PAGE_BYTES),
        ([IovaPiece((1 << 64) - PAGE_BYTES, 2 * PAGE_BYTES, 0)], PAGE_BYTES),
        ([IovaPiece(0, HUGE, 0), IovaPiece(PAGE_BYTES, PAGE_BYTES, 512)], PAGE_BYTES),
        ([IovaPiece(0, HUGE, 0)], 2048),
        ([IovaPiece(0, HUGE, 0)], 12288),
        ([IovaPiece(n * HUGE, HUGE, n * 512) for n in range(1025)], PAGE_BYTES),
    ],
)
def test_ranges_that_cannot_be_are_refused(pieces: list[IovaPiece], page_size: int) -> None:
    with pytest.raises(KernelRejected) as refused:
        DeviceLogSource(0, pieces, page_size, "nic")
    assert refused.value.code == "bad_ranges"


def test_only_an_iommufd_is_taken_over() -> None:
    kernel = IommufdKernel()
    with open("/dev/null", "rb") as other, pytest.raises(KernelRejected) as refused:
        HwptSource.handed_over(other.fileno(), 3, PIECES, PAGE_BYTES, "iommu", ioctl=kernel.ioctl)
    assert refused.value.code == "not_an_iommufd"
    with pytest.raises(KernelGone):
        HwptSource.handed_over(1 << 20, 3, PIECES, PAGE_BYTES, "iommu", ioctl=kernel.ioctl)


def test_what_a_vmm_harvests_itself_can_only_be_looked_at() -> None:
    for verb in ("read_and_clear", "start_tracking", "stop_tracking"):
        assert not hasattr(HwptPeeks, verb)


@pytest.mark.parametrize("after_effect", [False, True])
def test_a_read_that_fails_loses_nothing_that_it_cleared(after_effect: bool) -> None:
    kernel = IommufdKernel()
    for rig in hwpt_rig(kernel, PAGE_BYTES):
        rig.source.start_tracking()
        rig.write(3, 600)
        into = DirtyBitmap(rig.memory.pages)
        if after_effect:
            kernel.failures[abi.IOMMU_HWPT_GET_DIRTY_BITMAP] = errno.EIO
        else:
            kernel.failures[abi.IOMMU_IOAS_COPY] = errno.ENOMEM
        with pytest.raises(KernelError):
            rig.source.read_and_clear(into)
        kernel.failures.clear()
        rig.source.read_and_clear(into)
        assert dirty_pages(into) == [3, 600]
