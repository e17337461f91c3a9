"""The mock devices of the kernel's own iommufd selftest, from Python: a `Rig` of the contracts.

Only a kernel with CONFIG_IOMMUFD_TEST has the call, so this is no part of migrd.abi. All of its
forms are 72 bytes: 16 in common, then a union (drivers/iommu/iommufd/iommufd_test.h, Linux 6.12).
"""

from __future__ import annotations

import ctypes
import os

from migrd.abi.ioctl import UapiFlag, UapiStruct, io, u8, u32, u64
from migrd.abi.iommufd import IOMMUFD_TYPE
from migrd.kernel.calls import Argument, system_ioctl
from migrd.kernel.iommufd import DEVICE
from tests.fakes.iommufd import MOCK_PAGE_BYTES, MockDevice

IOMMU_TEST_CMD = io(IOMMUFD_TYPE, 0xA0)
OP_MOCK_DOMAIN_REPLACE = 10
OP_MOCK_DOMAIN_FLAGS = 12
OP_DIRTY = 13


class mock_flags(UapiFlag, prefix="MOCK_FLAGS_DEVICE_"):
    NO_DIRTY = 1
    HUGE_IOVA = 2


class mock_domain_flags(UapiStruct):
    _fields_ = [
        ("size", u32),
        ("op", u32),
        ("id", u32),  # what to attach to
        ("__reserved", u32),
        ("out_stdev_id", u32),
        ("out_hwpt_id", u32),
        ("out_idev_id", u32),
        ("dev_flags", u32),
        ("__rest", u8 * 40),
    ]


class mock_domain_replace(UapiStruct):
    _fields_ = [
        ("size", u32),
        ("op", u32),
        ("id", u32),
        ("__reserved", u32),
        ("pt_id", u32),
        ("__rest", u8 * 52),
    ]


class dirty(UapiStruct):
    _fields_ = [
        ("size", u32),
        ("op", u32),
        ("id", u32),
        ("__reserved", u32),
        ("flags", u32),
        ("__gap", u32),
        ("iova", u64),
        ("length", u64),
        ("page_size", u64),  # MOCK_PAGE_BYTES: with another, other pages are marked
        ("uptr", u64),
        ("out_nr_dirty", u64),
        ("__rest", u8 * 8),
    ]


class SelftestKernel:
    """The kernel that this runs on. Needs root and CONFIG_IOMMUFD_TEST."""

    def open(self) -> int:
        return os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)

    def ioctl(self, fd: int, request: int, argument: Argument, /) -> int:
        return system_ioctl(fd, request, argument)

    def mock_device(
        self, fd: int, pt_id: int, *, can_track: bool = True, has_huge_pages: bool = False
    ) -> MockDevice:
        flags = 0 if can_track else mock_flags.NO_DIRTY
        flags |= mock_flags.HUGE_IOVA if has_huge_pages else 0
        argument = mock_domain_flags(op=OP_MOCK_DOMAIN_FLAGS, id=pt_id, dev_flags=flags)
        system_ioctl(fd, IOMMU_TEST_CMD, argument)
        return MockDevice(argument.out_stdev_id, argument.out_hwpt_id, argument.out_idev_id)

    def attach(self, fd: int, stdev_id: int, pt_id: int) -> None:
        argument = mock_domain_replace(op=OP_MOCK_DOMAIN_REPLACE, id=stdev_id, pt_id=pt_id)
        system_ioctl(fd, IOMMU_TEST_CMD, argument)

    def make_dirty(self, fd: int, hwpt_id: int, iova: int, mock_pages: list[int]) -> None:
        words = max(mock_pages) // 64 + 1
        bitmap = (ctypes.c_uint64 * words)()
        for number in mock_pages:
            bitmap[number // 64] |= 1 << number % 64
        argument = dirty(
            op=OP_DIRTY,
            id=hwpt_id,
            iova=iova,
            length=words * 64 * MOCK_PAGE_BYTES,
            page_size=MOCK_PAGE_BYTES,
            uptr=ctypes.addressof(bitmap),
        )
        system_ioctl(fd, IOMMU_TEST_CMD, argument)
