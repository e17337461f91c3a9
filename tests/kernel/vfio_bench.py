"""What the tests of VFIO devices share: devices in the simulator, and ways to be in their way."""

import asyncio
import errno
import threading

from migrd.core.devices import Device, DeviceKind
from migrd.kernel.iommufd import Iommufd
from migrd.kernel.vfio import VfioDevice
from tests.fakes.vfio import IOMMU_PATH, Iommu, VfioKernel
from tests.fakes.vfio_device import SimDevice

GENEROUS_S = 30.0


async def left_open(kernel: VfioKernel) -> list[str]:
    return await asyncio.to_thread(kernel.left_open)


def device_at(path: str | None, address: str = "0000:41:00.2") -> Device:
    return Device(address=address, kind=DeviceKind.VFIO_PCI, vfio_cdev=path, driver="vfio-pci")


def denied(kernel: VfioKernel, path: str) -> None:
    kernel.open_errnos[path] = errno.EACCES


def iommufd_missing(kernel: VfioKernel, path: str) -> None:
    kernel.open_errnos[IOMMU_PATH] = errno.ENOENT


class HeldUp:
    """Holds up calls with this number, in their thread."""

    def __init__(self, kernel: VfioKernel, request: int) -> None:
        self.entered = threading.Event()
        self.go_on = threading.Event()
        self.request = request
        kernel.before_ioctl = self

    def __call__(self, request: int) -> None:
        if request == self.request:
            self.entered.set()
            assert self.go_on.wait(GENEROUS_S)

    async def is_entered(self) -> None:
        assert await asyncio.to_thread(self.entered.wait, GENEROUS_S)


class Bench:
    """Opens and binds simulated devices, and closes them in the end."""

    def __init__(self, kernel: VfioKernel, iommufd: Iommufd) -> None:
        self.kernel = kernel
        self.iommufd = iommufd
        self.opened: list[VfioDevice] = []

    def bind(self, sim: SimDevice, iommu: Iommu = Iommu.NONE) -> VfioDevice:
        device = VfioDevice.open(self.kernel.add(sim, iommu), "a", self.kernel.system)
        self.opened.append(device)
        device.bind(self.iommufd.fileno())
        return device
