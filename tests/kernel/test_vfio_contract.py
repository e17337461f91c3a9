"""The contract of VFIO devices, on the simulator. On the real kernel: tests/lab/guest/test_mtty."""

import os
from collections.abc import Iterator

import pytest

from migrd.kernel.vfio import VfioDevice
from tests.contract.vfio import VfioContract
from tests.fakes.vfio import IOMMU_PATH, VfioKernel
from tests.fakes.vfio_device import SimDevice


class FakeWorld:
    def __init__(self) -> None:
        self.kernel = VfioKernel()
        self.system = self.kernel.system

    def new_mdev(self, ports: int = 2) -> str:
        return self.kernel.add(SimDevice(ports=ports))

    def new_iommufd(self) -> int:
        return self.kernel.open_path(IOMMU_PATH, os.O_CLOEXEC)

    def new_ioas(self, iommufd: int) -> int:
        return self.kernel.new_ioas(iommufd)

    def close_iommufd(self, fd: int) -> None:
        self.kernel.close_fd(fd)

    def set_register(self, device: VfioDevice, value: int) -> None:
        self.kernel.device_of(device.fd).registers = bytes([value])

    def register(self, device: VfioDevice) -> int:
        return self.kernel.device_of(device.fd).registers[0]


class TestSimulator(VfioContract):
    @pytest.fixture
    def world(self) -> Iterator[FakeWorld]:
        world = FakeWorld()
        yield world
        assert world.kernel.left_open() == []
