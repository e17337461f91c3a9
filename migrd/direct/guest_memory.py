"""Guest memory of a VMM that uses the client library: in memfds, with its writes tracked.

    region = GuestRegion.create(id=0, gpa=0, length_bytes=1 << 30)     memfd, mapped, at region.hva
    tracking = WriteTracking(); tracking.watch(region)                 userfaultfd, WP_ASYNC
    tracking.pagemap_fd                                                what is handed to migrd

The userfaultfd stays open as long as the memory is to be tracked, and nothing is ever read from it:
with UFFD_FEATURE_WP_ASYNC the kernel notes a write and lets it pass. Nothing slows down until migrd
starts a transfer. It is made in the first of these ways that works:

    /dev/userfaultfd                         whoever may open it
    userfaultfd(2)                           root, CAP_SYS_PTRACE, vm.unprivileged_userfaultfd=1
    userfaultfd(2), UFFD_USER_MODE_ONLY      anyone

Standard library alone: this is part of the client library for authors of VMMs. So the few numbers
of linux/userfaultfd.h are here again; a test compares them with migrd.abi.pagemap.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import platform
import struct
from dataclasses import dataclass
from typing import Final, Self

from migrd.direct.messages import PAGE_BYTES

UFFD_API: Final = 0xAA
UFFD_USER_MODE_ONLY: Final = 1
USERFAULTFD_IOC_NEW: Final = 0xAA00
UFFDIO_API: Final = 0xC018AA3F
UFFDIO_REGISTER: Final = 0xC020AA00
UFFDIO_REGISTER_MODE_WP: Final = 1 << 1
FEATURES: Final = 1 << 0 | 1 << 12 | 1 << 13 | 1 << 15
"""PAGEFAULT_FLAG_WP, WP_HUGETLBFS_SHMEM, WP_UNPOPULATED, WP_ASYNC."""
_API: Final = struct.Struct("=QQQ")
_REGISTER: Final = struct.Struct("=QQQQ")
_SYSCALL: Final = {"x86_64": 323}
_GENERIC_SYSCALL: Final = 282
"""Of userfaultfd(2), on aarch64, riscv64, loongarch64 and whatever comes after them."""


@dataclass(frozen=True)
class GuestRegion:
    """One piece of guest memory: a file, mapped MAP_SHARED."""

    id: int
    gpa: int
    memory: mmap.mmap
    """Write through this one mapping only: others are not watched."""
    fd: int
    offset_bytes: int = 0

    @classmethod
    def create(cls, *, id: int, gpa: int, length_bytes: int) -> Self:
        """New memory, zeroed. Raises OSError."""
        fd = os.memfd_create(f"guest-{id}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, length_bytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            return cls.map(id=id, gpa=gpa, fd=fd, offset_bytes=0, length_bytes=length_bytes)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def map(cls, *, id: int, gpa: int, fd: int, offset_bytes: int, length_bytes: int) -> Self:
        """Memory that is there already; `fd` is the region's from then on. Raises OSError."""
        if not length_bytes or (length_bytes | offset_bytes | gpa) % PAGE_BYTES:
            raise OSError(errno.EINVAL, f"region {id}: gpa, offset, length: whole pages only")
        memory = mmap.mmap(fd, length_bytes, mmap.MAP_SHARED, offset=offset_bytes)
        return cls(id, gpa, memory, fd, offset_bytes)

    @property
    def length_bytes(self) -> int:
        return len(self.memory)

    @property
    def hva(self) -> int:
        """Its address in this process."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self.memory))


class WriteTracking:
    """A userfaultfd of this process and its page map; both stay open."""

    def __init__(self) -> None:
        """Raises OSError, which says what is missing."""
        self.pagemap_fd: Final = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._fd: Final = _userfaultfd()
        except BaseException:
            os.close(self.pagemap_fd)
            raise

    def watch(self, region: GuestRegion) -> None:
        """Raises OSError."""
        argument = bytearray(
            _REGISTER.pack(region.hva, region.length_bytes, UFFDIO_REGISTER_MODE_WP, 0)
        )
        fcntl.ioctl(self._fd, UFFDIO_REGISTER, argument)

    def close(self) -> None:
        os.close(self._fd)
        os.close(self.pagemap_fd)


def _userfaultfd() -> int:
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    fd = _of_device(flags)
    for more in (0, UFFD_USER_MODE_ONLY):
        if fd < 0:
            fd = _of_syscall(flags | more)
    if fd < 0:
        raise OSError(ctypes.get_errno(), "userfaultfd cannot be had; is it in this kernel?")
    try:
        fcntl.ioctl(fd, UFFDIO_API, bytearray(_API.pack(UFFD_API, FEATURES, 0)))
    except OSError as failure:
        os.close(fd)
        text = "userfaultfd has no WP_ASYNC, which tracks writes; run Linux 6.7 or later"
        raise OSError(failure.errno, text) from failure
    return fd


def _of_device(flags: int) -> int:
    try:
        device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return -1
    try:
        return fcntl.ioctl(device, USERFAULTFD_IOC_NEW, flags)
    except OSError:
        return -1
    finally:
        os.close(device)


def _of_syscall(flags: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    number = _SYSCALL.get(platform.machine(), _GENERIC_SYSCALL)
    return int(libc.syscall(ctypes.c_long(number), ctypes.c_int(flags)))
