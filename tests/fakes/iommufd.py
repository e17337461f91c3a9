"""A simulator of /dev/iommu with mock devices, behind the adapter's `ioctl`.

It follows what Linux 6.12 was seen to do with the mock devices of its own selftest, errno by
errno, and also what it does without saying so (each found in this file by the word "silently"):

    reading before tracking is on, or from a hole on    success, and less than the truth
    a clearing read into memory that cannot be written  success, and the bits are gone
    switching tracking on a second time                 success, and all is clean
    a page size that is no power of two                 success, for its lowest set bit
    old bits in the buffer                              stay: bits are ORed in

tests/contract/iommufd.py holds it against the real kernel. A descriptor is a memfd, so it can be
duplicated, passed on and closed like the real one. Addresses are those of this process.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from migrd.abi import iommufd as abi
from migrd.abi.ioctl import UapiStruct
from migrd.kernel.calls import Argument

MOCK_PAGE_BYTES = 2048
APERTURE = (1 << 24, (1 << 31) - 1)
MOCK_HW_INFO_TYPE = 0xFEEDBEEF
_REGISTERS = bytes(4) + 0xDEADBEEF.to_bytes(4, "little")
_WORD = (1 << 64) - 1
_MAP_FLAGS = 0b111
_TRACK = abi.iommufd_hwpt_alloc_flags.ALLOC_DIRTY_TRACKING


@dataclass
class Area:
    iova: int
    length: int
    user_va: int
    is_writeable: bool

    @property
    def end(self) -> int:
        return self.iova + self.length


@dataclass
class Ioas:
    areas: list[Area] = field(default_factory=list)


@dataclass
class Hwpt:
    ioas: Ioas
    can_track: bool
    is_automatic: bool = False
    is_tracking: bool = False
    dirty: set[int] = field(default_factory=set)
    """Numbers of mock pages."""


@dataclass
class Device:
    can_track: bool
    hwpt: Hwpt


@dataclass
class Selftest:
    """What holds a mock device bound and attached."""

    device: Device


@dataclass(frozen=True)
class MockDevice:
    """Ids of one mock device: of the test object, its page table when made, the bound device."""

    stdev_id: int
    hwpt_id: int
    dev_id: int


class Context:
    """The objects of one open /dev/iommu."""

    def __init__(self) -> None:
        self.objects: dict[int, Any] = {}

    def add(self, new: Any) -> int:
        """Lowest free id first, from 1: ids are used again."""
        object_id = next(i for i in range(1, 1 << 31) if i not in self.objects)
        self.objects[object_id] = new
        return object_id

    def get(self, object_id: int, kind: type[Any], missing: int = errno.ENOENT) -> Any:
        found = self.objects.get(object_id)
        if found is None or not isinstance(found, kind):
            raise _error(missing)
        return found

    def id_of(self, wanted: Any) -> int:
        return next(number for number, found in self.objects.items() if found is wanted)

    def all(self, kind: type[Any]) -> list[Any]:
        return [found for found in self.objects.values() if isinstance(found, kind)]

    def hwpts_of(self, ioas: Ioas) -> list[Hwpt]:
        return [hwpt for hwpt in self.all(Hwpt) if hwpt.ioas is ioas]

    def devices_on(self, hwpt: Hwpt) -> list[Device]:
        return [device for device in self.all(Device) if device.hwpt is hwpt]


class IommufdKernel:
    """Opens and answers. Pass `ioctl` to the adapter."""

    def __init__(self) -> None:
        self._contexts: dict[tuple[int, int], Context] = {}
        self.calls: list[tuple[int, UapiStruct]] = []
        """Number and argument, as given, of each call."""
        self.failures: dict[int, int] = {}
        """Number of a call -> errno that it fails with from now on, after its effect."""
        self._answers: dict[int, Callable[[Context, Any], None]] = {
            abi.IOMMU_DESTROY: self._destroy,
            abi.IOMMU_IOAS_ALLOC: self._ioas_alloc,
            abi.IOMMU_IOAS_IOVA_RANGES: self._iova_ranges,
            abi.IOMMU_IOAS_MAP: self._map,
            abi.IOMMU_IOAS_COPY: self._copy,
            abi.IOMMU_IOAS_UNMAP: self._unmap,
            abi.IOMMU_HWPT_ALLOC: self._hwpt_alloc,
            abi.IOMMU_GET_HW_INFO: self._hw_info,
            abi.IOMMU_HWPT_SET_DIRTY_TRACKING: self._set_dirty,
            abi.IOMMU_HWPT_GET_DIRTY_BITMAP: self._get_dirty,
        }

    def open(self) -> int:
        """The caller closes it."""
        fd = os.memfd_create("iommufd")
        self._contexts[_identity(fd)] = Context()
        return fd

    def ioctl(self, fd: int, request: int, argument: Argument, /) -> int:
        context = self._contexts.get(_identity(fd))
        answer = self._answers.get(request)
        if context is None or answer is None:
            raise _error(errno.ENOTTY)
        assert isinstance(argument, UapiStruct)
        given = type(argument).from_buffer_copy(argument)
        self.calls.append((request, given))
        if argument.size < ctypes.sizeof(argument):
            raise _error(errno.EINVAL)
        if argument.size > ctypes.sizeof(argument):
            raise _error(errno.E2BIG)
        answer(context, argument)
        if request in self.failures:
            raise _error(self.failures[request])
        return 0

    # ---- what the selftest's own calls do

    def mock_device(self, fd: int, pt_id: int, *, can_track: bool = True) -> MockDevice:
        """Make one and attach it; to an IOAS it gets a page table without tracking."""
        context = self._contexts[_identity(fd)]
        hwpt = self._attachable(context, pt_id, can_track)
        device = Device(can_track, hwpt)
        stdev_id = context.add(Selftest(device))
        dev_id = context.add(device)
        if hwpt not in context.all(Hwpt):
            context.add(hwpt)
        return MockDevice(stdev_id, context.id_of(hwpt), dev_id)

    def attach(self, fd: int, stdev_id: int, pt_id: int) -> None:
        context = self._contexts[_identity(fd)]
        device = context.get(stdev_id, Selftest).device
        new, old = self._attachable(context, pt_id, device.can_track), device.hwpt
        device.hwpt = new
        if new not in context.all(Hwpt):
            context.add(new)
        self._forget_automatic(context, old)

    def make_dirty(self, fd: int, hwpt_id: int, iova: int, mock_pages: list[int]) -> None:
        """As if a device wrote to these pages of MOCK_PAGE_BYTES, counted from `iova`."""
        hwpt = self._contexts[_identity(fd)].get(hwpt_id, Hwpt)
        if not hwpt.is_tracking:
            raise _error(errno.EINVAL)
        for number in mock_pages:
            address = iova + number * MOCK_PAGE_BYTES
            if any(area.iova <= address < area.end for area in hwpt.ioas.areas):
                hwpt.dirty.add(address // MOCK_PAGE_BYTES)

    def _attachable(self, context: Context, pt_id: int, can_track: bool) -> Hwpt:
        target = context.objects.get(pt_id)
        if isinstance(target, Ioas):
            shared = [each for each in context.hwpts_of(target) if each.is_automatic]
            return shared[0] if shared else Hwpt(target, can_track=False, is_automatic=True)
        if not isinstance(target, Hwpt):
            raise _error(errno.ENOENT)
        if target.can_track and not can_track:
            raise _error(errno.EINVAL)
        return target

    def _forget_automatic(self, context: Context, hwpt: Hwpt) -> None:
        if hwpt.is_automatic and not context.devices_on(hwpt):
            del context.objects[context.id_of(hwpt)]

    # ---- objects

    def _destroy(self, context: Context, argument: Any) -> None:
        found = context.get(argument.id, object)
        in_use = (
            isinstance(found, Device)
            or (isinstance(found, Hwpt) and bool(context.devices_on(found)))
            or (isinstance(found, Ioas) and bool(context.hwpts_of(found)))
        )
        _require(not in_use, errno.EBUSY)
        del context.objects[argument.id]
        if isinstance(found, Selftest):
            del context.objects[context.id_of(found.device)]
            self._forget_automatic(context, found.device.hwpt)

    def _ioas_alloc(self, context: Context, argument: Any) -> None:
        _require(not argument.flags, errno.EOPNOTSUPP)
        argument.out_ioas_id = context.add(Ioas())

    def _hw_info(self, context: Context, argument: Any) -> None:
        _require(not argument.flags, errno.EOPNOTSUPP)
        device = context.get(argument.dev_id, Device)
        room = argument.data_len
        _require(_is_writeable(argument.data_uptr, room), errno.EFAULT)
        ctypes.memmove(argument.data_uptr, _REGISTERS.ljust(room, b"\0")[:room], room)
        argument.data_len = len(_REGISTERS)
        argument.out_data_type = MOCK_HW_INFO_TYPE
        argument.out_capabilities = int(device.can_track)

    def _hwpt_alloc(self, context: Context, argument: Any) -> None:
        known = sum(bit.value for bit in abi.iommufd_hwpt_alloc_flags)
        _require(not getattr(argument, "__reserved"), errno.EOPNOTSUPP)
        device = context.get(argument.dev_id, Device)
        ioas = context.get(argument.pt_id, Ioas, missing=errno.EINVAL)
        _require(not argument.flags & ~known, errno.EOPNOTSUPP)
        can_track = bool(argument.flags & _TRACK)
        _require(device.can_track or not can_track, errno.EOPNOTSUPP)
        argument.out_hwpt_id = context.add(Hwpt(ioas, can_track))

    # ---- maps

    def _iova_ranges(self, context: Context, argument: Any) -> None:
        ioas = context.get(argument.ioas_id, Ioas)
        is_bound = bool(context.hwpts_of(ioas))
        first, last = APERTURE if is_bound else (0, _WORD)
        room, argument.num_iovas = argument.num_iovas, 1
        argument.out_iova_alignment = MOCK_PAGE_BYTES if is_bound else 1
        _require(room >= 1, errno.EMSGSIZE)
        _require(_is_writeable(argument.allowed_iovas, 16), errno.EFAULT)
        answer = first.to_bytes(8, "little") + last.to_bytes(8, "little")
        ctypes.memmove(argument.allowed_iovas, answer, len(answer))

    def _map(self, context: Context, argument: Any) -> None:
        _require(not argument.flags & ~_MAP_FLAGS, errno.EOPNOTSUPP)
        ioas = context.get(argument.ioas_id, Ioas)
        is_fixed = argument.flags & abi.iommufd_ioas_map_flags.FIXED_IOVA
        is_writeable = bool(argument.flags & abi.iommufd_ioas_map_flags.WRITEABLE)
        if not is_fixed:
            argument.iova = self._free_iova(context, ioas, argument.length)
        self._check_free(context, ioas, argument.iova, argument.length)
        if context.hwpts_of(ioas):  # else pages are pinned later, or never
            _require(_is_writeable(argument.user_va, argument.length), errno.EFAULT)
        ioas.areas.append(Area(argument.iova, argument.length, argument.user_va, is_writeable))

    def _copy(self, context: Context, argument: Any) -> None:
        _require(not argument.flags & ~_MAP_FLAGS, errno.EOPNOTSUPP)
        _require(argument.length > 0, errno.EINVAL)
        source = context.get(argument.src_ioas_id, Ioas)
        end = argument.src_iova + argument.length
        parts, reached = _contiguous(source, argument.src_iova, end)
        _require(reached == end, errno.ENOENT)
        target = context.get(argument.dst_ioas_id, Ioas)
        if argument.flags & abi.iommufd_ioas_map_flags.WRITEABLE:
            _require(all(part.is_writeable for part in parts), errno.EPERM)
        self._check_free(context, target, argument.dst_iova, argument.length)
        writeable = all(part.is_writeable for part in parts)
        target.areas.append(Area(argument.dst_iova, argument.length, 0, writeable))

    def _unmap(self, context: Context, argument: Any) -> None:
        ioas = context.get(argument.ioas_id, Ioas)
        end = argument.iova + argument.length
        inside = [area for area in ioas.areas if argument.iova <= area.iova < area.end <= end]
        partly = [area for area in ioas.areas if area.iova < end and argument.iova < area.end]
        _require(bool(inside) and len(partly) == len(inside), errno.ENOENT)
        argument.length = sum(area.length for area in inside)
        for area in inside:
            ioas.areas.remove(area)
            for hwpt in context.hwpts_of(ioas):
                hwpt.dirty -= set(_mock_pages(area.iova, area.end))  # silently

    def _free_iova(self, context: Context, ioas: Ioas, length: int) -> int:
        first, last = APERTURE if context.hwpts_of(ioas) else (1 << 20, _WORD)
        start = max([first, *(area.end for area in ioas.areas)])
        _require(start + length - 1 <= last, errno.ENOSPC)
        return start

    def _check_free(self, context: Context, ioas: Ioas, iova: int, length: int) -> None:
        _require(length > 0, errno.EINVAL)
        _require(iova + length - 1 <= _WORD, errno.EOVERFLOW)
        if context.hwpts_of(ioas):
            _require((iova | length) % MOCK_PAGE_BYTES == 0, errno.EINVAL)
            inside = APERTURE[0] <= iova and iova + length - 1 <= APERTURE[1]
            _require(inside, errno.EINVAL)
        overlaps = any(area.iova < iova + length and iova < area.end for area in ioas.areas)
        _require(not overlaps, errno.EEXIST)

    # ---- dirty bits

    def _set_dirty(self, context: Context, argument: Any) -> None:
        enable = abi.iommufd_hwpt_set_dirty_tracking_flags.ENABLE.value
        _require(not argument.flags & ~enable, errno.EOPNOTSUPP)
        hwpt = context.get(argument.hwpt_id, Hwpt)
        _require(hwpt.can_track, errno.EOPNOTSUPP)
        hwpt.is_tracking = bool(argument.flags & enable)
        hwpt.dirty.clear()  # silently, also when it was on

    def _get_dirty(self, context: Context, argument: Any) -> None:
        no_clear = abi.iommufd_hwpt_get_dirty_bitmap_flags.NO_CLEAR.value
        _require(not argument.flags & ~no_clear, errno.EOPNOTSUPP)
        _require(not getattr(argument, "__reserved"), errno.EOPNOTSUPP)
        hwpt = context.get(argument.hwpt_id, Hwpt)
        _require(hwpt.can_track, errno.EOPNOTSUPP)
        end = argument.iova + argument.length
        _require(0 < end <= _WORD + 1, errno.EOVERFLOW)
        _require(argument.length > 0 and argument.page_size > 0, errno.EINVAL)
        mask = argument.page_size - 1 | MOCK_PAGE_BYTES - 1
        _require(not argument.iova & mask and not end & mask, errno.EINVAL)
        if not hwpt.is_tracking:
            return  # silently
        _, reached = _contiguous(hwpt.ioas, argument.iova, end)  # silently not to the end
        found = hwpt.dirty.intersection(_mock_pages(argument.iova, reached))
        page_size = argument.page_size & -argument.page_size  # silently
        _or_into(argument.data, {(n * MOCK_PAGE_BYTES - argument.iova) // page_size for n in found})
        if not argument.flags & no_clear:
            hwpt.dirty -= found  # silently, whether they could be written or not


def _contiguous(ioas: Ioas, start: int, end: int) -> tuple[list[Area], int]:
    """The areas from `start` on without a gap, and how far they reach."""
    parts, reached = [], start
    for area in sorted(ioas.areas, key=lambda area: area.iova):
        if area.iova <= reached < area.end and reached < end:
            parts.append(area)
            reached = min(area.end, end)
    return parts, reached


def _mock_pages(start: int, end: int) -> range:
    return range(start // MOCK_PAGE_BYTES, -(-end // MOCK_PAGE_BYTES))


def _or_into(address: int, bits: set[int]) -> None:
    if bits and _is_writeable(address, max(bits) // 8 + 1):
        for bit in bits:
            byte = ctypes.c_uint8.from_address(address + bit // 8)
            byte.value |= 1 << bit % 8


def _is_writeable(address: int, length: int) -> bool:
    """Whether this process may write there; what the kernel finds out by faulting."""
    reached = address
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, permissions = line.split()[:2]
        first, end = (int(part, 16) for part in span.split("-"))
        if first <= reached < end and "w" in permissions:
            reached = end
    return reached >= address + length


def _identity(fd: int) -> tuple[int, int]:
    with contextlib.suppress(OSError):
        status = os.fstat(fd)
        return status.st_dev, status.st_ino
    raise _error(errno.EBADF)


def _require(condition: bool, number: int) -> None:
    if not condition:
        raise _error(number)


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))
