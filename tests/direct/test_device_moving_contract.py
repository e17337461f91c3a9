"""Moving devices' state, on the simulator. On the real kernel: tests/lab/guest/vfio."""

import os
from collections.abc import Iterator

import pytest

from migrd.kernel.vfio import VfioDevice
from tests.contract.device_moving import DeviceMovingContract
from tests.direct.device_rig import Rig, Watched
from tests.fakes.vfio import IOMMU_PATH


class FakeWorld:
    """Fresh simulated mdevs."""

    def __init__(self) -> None:
        rig = Rig()
        self.rig = rig
        self.system = rig.system

    def new_mdev(self, ports: int = 2) -> str:
        return self.rig.kernel.add(Watched(ports=ports))

    def new_iommufd(self) -> int:
        return self.rig.kernel.open_path(IOMMU_PATH, os.O_CLOEXEC)

    def new_ioas(self, iommufd: int) -> int:
        return self.rig.kernel.new_ioas(iommufd)

    def close_iommufd(self, fd: int) -> None:
        self.rig.kernel.close_fd(fd)

    def set_register(self, device: VfioDevice, value: int) -> None:
        self.rig.kernel.device_of(device.fd).registers = bytes([value])

    def register(self, device: VfioDevice) -> int:
        return self.rig.kernel.device_of(device.fd).registers[0]


class TestSimulator(DeviceMovingContract):
    @pytest.fixture
    def world(self) -> Iterator[FakeWorld]:
        world = FakeWorld()
        yield world
        world.rig.close()
