"""A device's own log of its DMA, on the simulator; mtty's is a stub."""

import errno
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from migrd.abi import vfio as abi
from migrd.core.device_state import DeviceState
from migrd.errors import (
    KernelBusy,
    KernelRejected,
)
from migrd.kernel.iommufd import Iommufd
from migrd.kernel.vfio import DmaRange
from tests.contract.vfio import start_log_unchecked
from tests.fakes.vfio import VfioKernel
from tests.fakes.vfio_device import SimDevice, SimDmaLog
from tests.kernel.vfio_bench import Bench

S = DeviceState
MIB = 1 << 20
RAW = abi.vfio_device_mig_state
FLAGS = [1, 0b11, 0b101, 0b111]


@pytest.fixture
def kernel() -> Iterator[VfioKernel]:
    kernel = VfioKernel()
    yield kernel
    assert kernel.left_open() == []


@pytest.fixture
def iommufd(kernel: VfioKernel) -> Iterator[Iommufd]:
    with Iommufd(kernel.open(), kernel.ioctl) as iommufd:
        yield iommufd


@pytest.fixture
def bench(kernel: VfioKernel, iommufd: Iommufd) -> Iterator[Bench]:
    bench = Bench(kernel, iommufd)
    yield bench
    for device in bench.opened:
        device.close()


def test_the_log_tells_what_was_written_once(bench: Bench) -> None:
    log = SimDmaLog()
    device = bench.bind(SimDevice(log=log))
    assert device.start_dma_log([DmaRange(MIB, 16 * MIB)], 4096) == 4096
    for page in (0, 3, 511):
        log.write(MIB + page * 4096)
    log.write(64 * MIB)  # outside
    found = device.read_dma_log(MIB, 2 * MIB, 4096)
    assert found.dirty_pages == 3
    assert int.from_bytes(found.bits, "little") == 1 | 1 << 3 | 1 << 511
    assert device.read_dma_log(MIB, 2 * MIB, 4096).dirty_pages == 0
    log.write(MIB + 5)
    assert device.read_dma_log(MIB, 16 * MIB, 1 << 20).dirty_pages == 1
    device.stop_dma_log()


def test_the_device_may_choose_smaller_pages_than_were_wished_for(bench: Bench) -> None:
    device = bench.bind(SimDevice(log=SimDmaLog(coarsest_page_bytes=4096)))
    assert device.start_dma_log([DmaRange(0, 16 * MIB)], 2 * MIB) == 4096
    device.stop_dma_log()


def test_a_reset_ends_the_log(bench: Bench) -> None:
    """What is read afterwards would seem all clean."""
    device = bench.bind(SimDevice(log=SimDmaLog(stub=True)))
    device.start_dma_log([DmaRange(0, MIB)], 4096)
    device.reset()
    with pytest.raises(KernelRejected) as failed:
        device.read_dma_log(0, MIB, 4096)
    assert failed.value.code == "dma_not_logged"
    device.start_dma_log([DmaRange(0, MIB)], 4096)


def test_a_log_that_did_not_start_is_not_on(bench: Bench, kernel: VfioKernel) -> None:
    device = bench.bind(SimDevice(log=SimDmaLog()))
    (path,) = kernel.nodes
    kernel.nodes[path].failures = {abi.VFIO_DEVICE_FEATURE: errno.ENOMEM}
    with pytest.raises(KernelBusy):
        device.start_dma_log([DmaRange(0, MIB)], 4096)
    kernel.nodes[path].failures = None
    with pytest.raises(KernelRejected):
        device.read_dma_log(0, MIB, 4096)
    assert device.start_dma_log([DmaRange(0, MIB)], 4096) == 4096


addresses = st.one_of(
    st.integers(0, 64).map(lambda n: n * 4096),
    st.integers(0, 1 << 20),
    st.integers((1 << 64) - 8192, (1 << 64) - 1),
)
lengths = st.one_of(st.integers(0, 8).map(lambda n: n * 4096), st.integers(0, 1 << 16))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(ranges=st.lists(st.tuples(addresses, lengths), max_size=6))
def test_what_is_let_through_is_what_the_kernel_takes(
    bench: Bench, ranges: list[tuple[int, int]]
) -> None:
    """Except ranges of no length, which the kernel takes for something else."""
    if not bench.opened:
        bench.bind(SimDevice())
    (device,) = bench.opened
    kernels_errno = start_log_unchecked(device, ranges)
    if kernels_errno or any(length == 0 for _, length in ranges):
        with pytest.raises(KernelRejected) as refused:
            device.start_dma_log([DmaRange(*one) for one in ranges], 4096)
        assert refused.value.code == "bad_dma_ranges"
    else:
        device.start_dma_log([DmaRange(*one) for one in ranges], 4096)
        device.stop_dma_log()


@pytest.mark.parametrize("page_size_bytes", [0, 2048, 12288, -4096])
def test_no_log_has_pages_that_no_kernel_has(bench: Bench, page_size_bytes: int) -> None:
    device = bench.bind(SimDevice())
    with pytest.raises(KernelRejected, match="power of two"):
        device.start_dma_log([DmaRange(0, MIB)], page_size_bytes)
