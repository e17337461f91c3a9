"""The calls on VFIO character devices, what their errnos mean, and who closes a descriptor.

Traps in the errnos (the tables below say the same to people):
- BIND says EPERM for two things, and neither is a matter of privilege: interrupts are not remapped,
  or another member of the device's IOMMU group belongs to somebody else.
- BIND says EINVAL when somebody else has the device; also on a platform whose IOMMU is not cache
  coherent, which no x86 is.
- ATTACH says EINVAL when the page table does not fit the device's IOMMU. That dirty tracking is the
  reason only the maker of the page table can know: hence two tables.
- Before BIND every other call says EINVAL.

Source: linux/vfio.h; the kernel's drivers/vfio and drivers/iommu/iommufd.
"""

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from migrd.abi import vfio as abi
from migrd.errors import KernelBusy, KernelDenied, KernelGone, KernelRejected, KernelUnsupported
from migrd.kernel.calls import Ioctl, Meaning, Verb, system_ioctl


def device_of(fd: int) -> str | None:
    """Name in sysfs of the device that a character device stands for (a PCI address, the UUID of an
    mdev); None where sysfs does not say."""
    try:
        number = os.fstat(fd).st_rdev
        link = os.readlink(f"/sys/dev/char/{os.major(number)}:{os.minor(number)}/device")
    except OSError:
        return None
    return os.path.basename(link)


@dataclass(frozen=True)
class SystemCalls:
    """What is asked of the kernel. Tests put a simulator here."""

    open: Callable[[str, int], int] = os.open
    close: Callable[[int], None] = os.close
    read: Callable[[int, int], bytes] = os.read
    write: Callable[[int, memoryview], int] = os.write
    ioctl: Ioctl = system_ioctl
    device_of: Callable[[int], str | None] = device_of


LINUX: Final = SystemCalls()

OPEN: Final = {
    errno.ENOENT: Meaning(
        KernelGone, "no_vfio_cdev", "bind a VFIO driver to it; the kernel needs VFIO_DEVICE_CDEV"
    ),
    errno.EACCES: Meaning(
        KernelDenied, "not_permitted", "give migrd's user access to the character device"
    ),
    errno.ENXIO: Meaning(KernelGone, "device_gone", "the device is gone"),
}
_IN_USE = Meaning(
    KernelBusy,
    "device_in_use",
    "another process has it open: stop that VM, or choose another device",
)
BIND = Verb(
    "VFIO_DEVICE_BIND_IOMMUFD",
    abi.VFIO_DEVICE_BIND_IOMMUFD,
    {
        errno.EINVAL: _IN_USE,
        errno.EBUSY: _IN_USE,
        errno.EPERM: Meaning(
            KernelDenied,
            "unsafe_interrupts",
            "interrupts are not remapped (switch that on in the firmware, or set"
            " iommufd.allow_unsafe_interrupts=1 if all guests are trusted), or another member of"
            " its IOMMU group belongs to another process or a host driver",
        ),
        errno.ENODEV: Meaning(KernelGone, "no_iommu", "it is behind no IOMMU, or is gone"),
    },
)
_NO_PAGE_TABLE = Meaning(
    KernelGone, "no_page_table", "no such page table, or the device is an emulated mdev"
)
ATTACH = Verb(
    "VFIO_DEVICE_ATTACH_IOMMUFD_PT",
    abi.VFIO_DEVICE_ATTACH_IOMMUFD_PT,
    {
        errno.EINVAL: Meaning(
            KernelRejected, "page_table_does_not_fit", "give the device a page table of its own"
        ),
        errno.ENOENT: _NO_PAGE_TABLE,
    },
)
ATTACH_TRACKING = Verb(
    ATTACH.name,
    ATTACH.number,
    {
        errno.EINVAL: Meaning(
            KernelRejected,
            "iommu_no_dirty_tracking_on_attach",
            "its IOMMU cannot track dirty pages, and the page table insists: give the device a"
            " page table of its own",
        ),
        errno.ENOENT: _NO_PAGE_TABLE,
    },
)
DETACH = Verb("VFIO_DEVICE_DETACH_IOMMUFD_PT", abi.VFIO_DEVICE_DETACH_IOMMUFD_PT)
GET_INFO = Verb("VFIO_DEVICE_GET_INFO", abi.VFIO_DEVICE_GET_INFO)
RESET = Verb(
    "VFIO_DEVICE_RESET",
    abi.VFIO_DEVICE_RESET,
    {errno.ENOTTY: Meaning(KernelUnsupported, "no_reset", "the device has no way to be reset")},
)
_NOT_SUPPORTED = Meaning(KernelUnsupported, "feature_not_supported", "the device does not have it")
_TOO_MANY_RANGES = Meaning(
    KernelRejected, "too_many_ranges", "the kernel takes fewer ranges at once: merge them"
)


@dataclass(frozen=True)
class Feature:
    """One VFIO_DEVICE_FEATURE_<name>, with the direction it is used in."""

    name: str
    number: int
    access: int
    rejected: Meaning | None = None
    """What EINVAL means, where it means more than usual."""

    @property
    def verb(self) -> Verb:
        meanings = {errno.ENOTTY: _NOT_SUPPORTED, errno.E2BIG: _TOO_MANY_RANGES}
        if self.rejected is not None:
            meanings[errno.EINVAL] = self.rejected
        return Verb(f"VFIO_DEVICE_FEATURE {self.name}", abi.VFIO_DEVICE_FEATURE, meanings)


_GET, _SET = abi.VFIO_DEVICE_FEATURE_GET, abi.VFIO_DEVICE_FEATURE_SET
MIGRATION: Final = Feature("MIGRATION", abi.VFIO_DEVICE_FEATURE_MIGRATION, _GET)
DATA_SIZE: Final = Feature("MIG_DATA_SIZE", abi.VFIO_DEVICE_FEATURE_MIG_DATA_SIZE, _GET)
GET_STATE: Final = Feature("MIG_DEVICE_STATE", abi.VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE, _GET)
SET_STATE: Final = Feature(
    "MIG_DEVICE_STATE",
    abi.VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE,
    _SET,
    Meaning(
        KernelRejected,
        "device_state_refused",
        "no way leads there from where it is, or what was loaded into it is not complete",
    ),
)
LOG_START: Final = Feature("DMA_LOGGING_START", abi.VFIO_DEVICE_FEATURE_DMA_LOGGING_START, _SET)
LOG_STOP: Final = Feature("DMA_LOGGING_STOP", abi.VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP, _SET)
LOG_REPORT: Final = Feature("DMA_LOGGING_REPORT", abi.VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT, _GET)


class Descriptor:
    """Owns a descriptor and closes it once."""

    def __init__(self, fd: int, name: str, system: SystemCalls) -> None:
        self._fd: int | None = fd
        self._system = system
        self.name = name

    @property
    def fd(self) -> int:
        """Raises KernelGone when it is closed: its number may be somebody else's by now."""
        if self._fd is None:
            raise KernelGone(f"{self.name} is closed", errno=errno.EBADF, code="descriptor_closed")
        return self._fd

    def close(self) -> None:
        """Idempotent."""
        fd, self._fd = self._fd, None
        if fd is not None:
            self._system.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
