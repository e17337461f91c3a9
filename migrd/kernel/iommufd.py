"""iommufd as verbs: the objects of one open /dev/iommu. All block: run them in a worker thread.

    Iommufd ──┬── Ioas ─────────── Mapping            ours
      open    ├── OwnedHwpt                           ours
      adopt   ├── HwInfo of a bound device
      from_process
              └── find_objects ──► ForeignIoas, ForeignHwpt    a VMM's, by probing

An iommufd may be shared with a VMM: migrd opens it and hands it over, or gets it from the VMM.
The descriptor is full authority (it could unmap the guest's memory), so what a VMM owns is only
reachable through Foreign* objects, which have no verb that changes anything (and HandedOverHwpt,
where it has made us the harvester); and what is ours only through the objects that made it. There
is no verb that takes a bare id and destroys it.

Rules
1. The descriptor is closed once, by `close`. It keeps everything alive, the VMM's memory pinned
   included, so it must be closed when the VMM has exited.
2. Objects go in the order page tables, then IOAS; whatever is left goes with the descriptor.

How what is mapped is known: `io_address_space`. How dirty bits are not lost: `page_table`.
"""

import contextlib
import ctypes
import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from migrd.abi import iommufd as abi
from migrd.errors import KernelError, KernelGone, KernelRejected, KernelUnsupported
from migrd.kernel.calls import Ioctl, kernel_error, system_ioctl
from migrd.kernel.hw_info import HwInfo
from migrd.kernel.io_address_space import ForeignIoas, Ioas, allocate_ioas, iova_ranges
from migrd.kernel.iommufd_calls import (
    GET_DIRTY_BITMAP,
    GET_HW_INFO,
    GETFD,
    IS_IOMMUFD,
    LIST,
    OPEN,
    Context,
    hwpt_alloc,
)
from migrd.kernel.page_table import ForeignHwpt, HandedOverHwpt, OwnedHwpt

DEVICE: Final = "/dev/iommu"
MAX_PROBED_ID: Final = 4096
"""No id above is looked at."""
_MAX_GAP = 64
"""Ids are given lowest first, so after so many free ones there are no more."""
_HW_INFO_ROOM_BYTES = 4096
_PROBED_BYTES = 2 << 20  # aligned for every IOMMU there is
_PIDFD_GETFD = 438  # the same on all architectures

GetFd = Callable[[int, int], int]


def pidfd_getfd(pidfd: int, number: int) -> int:
    """pidfd_getfd(2): a duplicate, close-on-exec, of another process' descriptor."""
    libc = ctypes.CDLL(None, use_errno=True)
    got = int(libc.syscall(_PIDFD_GETFD, pidfd, number, 0))
    if got < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return got


def numbers_in(pid: int, proc: str = "/proc") -> tuple[int, ...]:
    """The descriptors of a process that are a /dev/iommu, for `Iommufd.from_process`.

    Two of them may be the same one, duplicated. Raises KernelDenied, KernelGone.
    """
    directory = f"{proc}/{pid}/fd"
    try:
        numbers = [name for name in os.listdir(directory) if name.isdecimal()]
    except OSError as cause:
        raise kernel_error(cause, f"list {directory}", LIST, "open") from cause
    found = []
    for number in numbers:
        with contextlib.suppress(OSError):  # closed meanwhile
            if os.readlink(f"{directory}/{number}") == DEVICE:
                found.append(int(number))
    return tuple(sorted(found))


@dataclass(frozen=True)
class FoundObjects:
    """What probing found on an iommufd; ids."""

    ioases: tuple[int, ...]
    devices: tuple[int, ...]
    """Bound devices that have an IOMMU: emulated mdevs do not show."""
    tracking_hwpts: tuple[int, ...]
    """Page tables made with dirty tracking; whether it is on cannot be asked."""
    plain_hwpts: tuple[int, ...]
    is_complete: bool
    """False: ids above MAX_PROBED_ID may be in use."""


class Iommufd:
    """One open /dev/iommu. A context manager: leaving it closes."""

    def __init__(self, fd: int, ioctl: Ioctl = system_ioctl) -> None:
        """Takes ownership of `fd`."""
        self._context = Context(fd, ioctl)

    @classmethod
    def open(cls, path: str = DEVICE, ioctl: Ioctl = system_ioctl) -> Self:
        """Raises KernelTooOld (`iommufd_missing`), KernelDenied, KernelBusy."""
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as cause:
            raise kernel_error(cause, f"open {path}", OPEN, "open") from cause
        return cls(fd, ioctl)

    @classmethod
    def adopt(cls, fd: int, ioctl: Ioctl = system_ioctl) -> Self:
        """Take ownership of a descriptor that was received; it is closed if it is no iommufd.

        Raises KernelRejected (`not_an_iommufd`).
        """
        adopted = cls(fd, ioctl)
        try:
            adopted._check_is_iommufd()
        except BaseException:
            adopted.close()
            raise
        return adopted

    @classmethod
    def share(cls, fd: int, ioctl: Ioctl = system_ioctl) -> Self:
        """A duplicate of a descriptor that stays its owner's. Raises as `adopt`, and KernelGone."""
        try:
            own = os.dup(fd)
        except OSError as cause:
            raise kernel_error(cause, f"take over descriptor {fd}", {}, "dup") from cause
        return cls.adopt(own, ioctl)

    @classmethod
    def from_process(
        cls, pidfd: int, number: int, ioctl: Ioctl = system_ioctl, getfd: GetFd = pidfd_getfd
    ) -> Self:
        """A duplicate of descriptor `number` of another process, which needs not cooperate.

        Raises KernelDenied, KernelGone, KernelRejected (`not_an_iommufd`).
        """
        try:
            fd = getfd(pidfd, number)
        except OSError as cause:
            subject = f"take descriptor {number} of a process"
            raise kernel_error(cause, subject, GETFD, "pidfd_getfd") from cause
        return cls.adopt(fd, ioctl)

    def fileno(self) -> int:
        """For binding devices and for handing it over. Raises KernelGone when closed."""
        return self._context.fileno()

    def close(self) -> None:
        """Idempotent, and safe while a call is going on: then that call closes at its end.

        May take seconds: the last reference to an iommufd unpins all memory mapped in it.
        """
        self._context.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def allocate_ioas(self) -> Ioas:
        return Ioas(self._context, allocate_ioas(self._context))

    def hw_info(self, dev_id: int) -> HwInfo:
        """What the IOMMU behind a bound device can. Raises KernelGone: no device with an IOMMU."""
        room = (ctypes.c_char * _HW_INFO_ROOM_BYTES)()
        argument = abi.iommu_hw_info(
            dev_id=dev_id, data_len=_HW_INFO_ROOM_BYTES, data_uptr=ctypes.addressof(room)
        )
        self._context.call(GET_HW_INFO, argument, f"ask about the IOMMU of device {dev_id}")
        return HwInfo(
            dev_id=dev_id,
            hardware_type=argument.out_data_type,
            capabilities=abi.iommufd_hw_capabilities(argument.out_capabilities),
            max_pasid_log2=argument.out_max_pasid_log2,
            registers=room.raw[: argument.data_len],
        )

    def allocate_hwpt(
        self, dev_id: int, ioas: Ioas, *, dirty_tracking: bool = False, nest_parent: bool = False
    ) -> OwnedHwpt:
        """Make a page table for a bound device, filled from `ioas`; attaching is the device's.

        Raises KernelUnsupported: `iommu_no_dirty_tracking`, `iommu_no_nesting`,
        `iommu_no_dirty_tracking_with_nesting`; KernelGone: no such device (an emulated mdev).
        """
        ioas.check_usable_on(self._context)
        wish = abi.iommufd_hwpt_alloc_flags
        flags = wish(0)
        if dirty_tracking:
            flags |= wish.ALLOC_DIRTY_TRACKING
        if nest_parent:
            flags |= wish.ALLOC_NEST_PARENT
        argument = abi.iommu_hwpt_alloc(flags=flags, dev_id=dev_id, pt_id=ioas.id)
        subject = f"make a page table for device {dev_id} on IOAS {ioas.id}"
        self._context.call(hwpt_alloc(flags), argument, subject)
        return OwnedHwpt(self._context, argument.out_hwpt_id, ioas)

    def foreign_ioas(self, ioas_id: int) -> ForeignIoas:
        return ForeignIoas(self._context, ioas_id)

    def foreign_hwpt(self, hwpt_id: int, ioas_ids: tuple[int, ...]) -> ForeignHwpt:
        """`ioas_ids`: all IOAS that it may be filled from, at least one."""
        if not ioas_ids:
            raise ValueError(f"page table {hwpt_id} must be filled from some IOAS")
        return ForeignHwpt(self._context, hwpt_id, tuple(map(self.foreign_ioas, ioas_ids)))

    def handed_over_hwpt(self, hwpt_id: int, ioas_ids: tuple[int, ...] = ()) -> HandedOverHwpt:
        """A page table whose owner has made us its harvester. `ioas_ids`: all IOAS that it may be
        filled from; none: all that are found on this iommufd. Raises KernelError."""
        ioas_ids = ioas_ids or self.find_objects().ioases
        return HandedOverHwpt(self._context, hwpt_id, tuple(map(self.foreign_ioas, ioas_ids)))

    def find_objects(self) -> FoundObjects:
        """Find what others made here, by asking each small id what it answers to. Changes nothing.

        Raises KernelTooOld: this kernel has no dirty tracking to ask for.
        """
        found: dict[str, list[int]] = {"ioas": [], "device": [], "tracking": [], "plain": []}
        gap, object_id = 0, 0
        while gap < _MAX_GAP and object_id < MAX_PROBED_ID:
            object_id += 1
            kind = self._kind_of(object_id)
            gap = 0 if kind else gap + 1
            if kind:
                found[kind].append(object_id)
        return FoundObjects(
            ioases=tuple(found["ioas"]),
            devices=tuple(found["device"]),
            tracking_hwpts=tuple(found["tracking"]),
            plain_hwpts=tuple(found["plain"]),
            is_complete=gap >= _MAX_GAP,
        )

    def _kind_of(self, object_id: int) -> str | None:
        """None: free, or of a kind that does not concern us."""
        try:
            iova_ranges(self._context, object_id)
        except KernelError as error:
            if error.errno != errno.ENOENT:
                raise
        else:
            return "ioas"
        try:
            self.hw_info(object_id)
        except KernelGone as error:
            _raise_if_closed(error)
        except KernelUnsupported:
            return "device"
        else:
            return "device"
        return self._kind_of_hwpt(object_id)

    def _kind_of_hwpt(self, object_id: int) -> str | None:
        bitmap = ctypes.c_uint64()
        argument = abi.iommu_hwpt_get_dirty_bitmap(
            hwpt_id=object_id,
            flags=abi.iommufd_hwpt_get_dirty_bitmap_flags.NO_CLEAR,
            iova=0,
            length=_PROBED_BYTES,
            page_size=_PROBED_BYTES,
            data=ctypes.addressof(bitmap),
        )
        try:
            self._context.call(GET_DIRTY_BITMAP, argument, f"look at object {object_id}")
        except KernelUnsupported:
            return "plain"
        except KernelGone as error:
            _raise_if_closed(error)
            return None
        except KernelRejected:
            return "tracking"  # only a page table gets as far as the range
        return "tracking"

    def _check_is_iommufd(self) -> None:
        """Id 0 is never given, so an iommufd says that there is no such IOAS."""
        argument = abi.iommu_ioas_iova_ranges(ioas_id=0)
        try:
            self._context.call(IS_IOMMUFD, argument, "take over a descriptor")
        except KernelGone as error:
            _raise_if_closed(error)


def _raise_if_closed(error: KernelGone) -> None:
    if error.errno == errno.EBADF:
        raise error
