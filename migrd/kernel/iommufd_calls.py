"""The calls on an iommufd, what their errnos mean, and who closes its descriptor.

One table per call, for the same errno says different things: EINVAL of HWPT_ALLOC is an unknown
IOAS, of IOAS_MAP an address outside what the IOMMU can reach, of GET_DIRTY_BITMAP a range that
is not aligned. Checked against Linux 6.12 (tests/lab/guest/mock).

EOPNOTSUPP of HWPT_ALLOC depends on what was asked for, so there is one Verb per wish:
`hwpt_alloc(flags)`.

Source: "General ioctl format" in linux/iommufd.h; the kernel's drivers/iommu/iommufd.
"""

import contextlib
import errno
import os
import threading
from collections.abc import Iterator
from typing import Final

from migrd.abi import iommufd as abi
from migrd.abi.ioctl import UapiStruct
from migrd.errors import (
    KernelBusy,
    KernelDenied,
    KernelGone,
    KernelRejected,
    KernelTooOld,
    KernelUnsupported,
)
from migrd.kernel.calls import Ioctl, Meaning, Verb, call

_NO_IOMMUFD = Meaning(
    KernelTooOld,
    "iommufd_missing",
    "this kernel offers no iommufd: use Linux 6.7 or newer with CONFIG_IOMMUFD, and load the"
    " module iommufd",
)
_DENIED = Meaning(
    KernelDenied, "iommufd_denied", "give migrd's user read and write access to the device node"
)
_TOO_MANY_FILES = Meaning(
    KernelBusy, "too_many_files", "too many files are open: raise LimitNOFILE of migrd's service"
)
OPEN: Final = {
    errno.ENOENT: _NO_IOMMUFD,
    errno.ENODEV: _NO_IOMMUFD,
    errno.ENXIO: _NO_IOMMUFD,
    errno.EACCES: _DENIED,
    errno.EPERM: _DENIED,
    errno.EMFILE: _TOO_MANY_FILES,
    errno.ENFILE: _TOO_MANY_FILES,
}
_PROCESS_DENIED = Meaning(
    KernelDenied, "process_denied", "migrd may not trace that process: run it as root"
)
_PROCESS_GONE = Meaning(KernelGone, "process_gone", "the process has exited")
LIST: Final = {
    errno.EACCES: _PROCESS_DENIED,
    errno.EPERM: _PROCESS_DENIED,
    errno.ENOENT: _PROCESS_GONE,
    errno.ESRCH: _PROCESS_GONE,
}
GETFD: Final = {
    errno.EPERM: _PROCESS_DENIED,
    errno.ESRCH: _PROCESS_GONE,
    errno.EBADF: Meaning(KernelGone, "descriptor_gone", "the process has no such descriptor"),
    errno.ENOSYS: Meaning(KernelTooOld, "pidfd_getfd_missing", "use Linux 5.6 or newer"),
    errno.EMFILE: _TOO_MANY_FILES,
    errno.ENFILE: _TOO_MANY_FILES,
}

_NO_IOAS = Meaning(KernelGone, "ioas_gone", "there is no such IOAS")
_NO_HWPT = Meaning(KernelGone, "hwpt_gone", "there is no such page table")
_NO_LOCKED_MEMORY = Meaning(
    KernelBusy,
    "memory_lock_limit",
    "it may lock no more memory: raise LimitMEMLOCK (RLIMIT_MEMLOCK) of the process",
)

IS_IOMMUFD = Verb(
    "IOMMU_IOAS_IOVA_RANGES",
    abi.IOMMU_IOAS_IOVA_RANGES,
    {
        number: Meaning(KernelRejected, "not_an_iommufd", "it is not an open /dev/iommu")
        for number in (errno.ENOTTY, errno.EINVAL, errno.ENODEV, errno.EIO)
    },
)
IOAS_ALLOC = Verb("IOMMU_IOAS_ALLOC", abi.IOMMU_IOAS_ALLOC)
IOVA_RANGES = Verb("IOMMU_IOAS_IOVA_RANGES", abi.IOMMU_IOAS_IOVA_RANGES, {errno.ENOENT: _NO_IOAS})
IOAS_MAP = Verb(
    "IOMMU_IOAS_MAP",
    abi.IOMMU_IOAS_MAP,
    {
        errno.EEXIST: Meaning(
            KernelRejected, "iova_taken", "something is mapped there already: unmap it first"
        ),
        errno.EADDRINUSE: Meaning(
            KernelRejected, "iova_taken", "something is mapped there already: unmap it first"
        ),
        errno.EINVAL: Meaning(
            KernelRejected,
            "iova_not_allowed",
            "the IOVA is not aligned or not within what all IOMMUs can reach: see the IOVA ranges",
        ),
        errno.EFAULT: Meaning(
            KernelRejected, "bad_address", "the memory given is not mapped, or not writeable"
        ),
        errno.ENOENT: _NO_IOAS,
        errno.ENOSPC: Meaning(KernelRejected, "no_iova_left", "no free IOVA range is large enough"),
        errno.ENOMEM: _NO_LOCKED_MEMORY,
    },
)
IOAS_COPY = Verb(
    "IOMMU_IOAS_COPY",
    abi.IOMMU_IOAS_COPY,
    {
        **IOAS_MAP.meanings,
        errno.ENOENT: Meaning(
            KernelGone, "range_has_holes", "not all of the range is mapped, or an IOAS is gone"
        ),
        errno.EPERM: Meaning(
            KernelRejected, "memory_read_only", "part of the range is mapped read-only"
        ),
    },
)
IOAS_UNMAP = Verb(
    "IOMMU_IOAS_UNMAP",
    abi.IOMMU_IOAS_UNMAP,
    {
        errno.ENOENT: Meaning(
            KernelGone, "mapping_gone", "no whole mapping is there, or the IOAS is gone"
        ),
        errno.EBUSY: Meaning(KernelBusy, "mapping_busy", "an emulated device has it pinned"),
    },
)
DESTROY = Verb(
    "IOMMU_DESTROY",
    abi.IOMMU_DESTROY,
    {
        errno.EBUSY: Meaning(
            KernelBusy, "object_busy", "devices or page tables still use it: detach them first"
        ),
    },
)
GET_HW_INFO = Verb(
    "IOMMU_GET_HW_INFO",
    abi.IOMMU_GET_HW_INFO,
    {
        errno.ENOENT: Meaning(
            KernelGone,
            "no_iommu_device",
            "no device with an IOMMU has this id (an emulated mdev has none)",
        ),
    },
)
_HWPT_ALLOC_COMMON: Final = {
    errno.ENOENT: GET_HW_INFO.meanings[errno.ENOENT],
    errno.EINVAL: Meaning(
        KernelRejected, "ioas_unfit", "there is no such IOAS, or the IOMMU cannot use it"
    ),
    errno.EADDRINUSE: Meaning(
        KernelRejected, "iova_not_allowed", "memory is mapped where this IOMMU cannot reach"
    ),
    errno.ENOMEM: _NO_LOCKED_MEMORY,
}
_NO_TRACKING = Meaning(
    KernelUnsupported,
    "iommu_no_dirty_tracking",
    "the device's IOMMU cannot track dirty pages: make a page table without",
)
_NO_NESTING = Meaning(
    KernelUnsupported, "iommu_no_nesting", "the device's IOMMU cannot nest: make it without"
)
_NO_TRACKING_AND_NESTING = Meaning(
    KernelUnsupported,
    "iommu_no_dirty_tracking_with_nesting",
    "the device's IOMMU cannot track dirty pages, or cannot nest, or not both: leave one out",
)
_NO_PAGE_TABLE = Meaning(
    KernelUnsupported, "iommu_no_page_table", "the device's IOMMU takes no page table of its own"
)
SET_DIRTY_TRACKING = Verb(
    "IOMMU_HWPT_SET_DIRTY_TRACKING",
    abi.IOMMU_HWPT_SET_DIRTY_TRACKING,
    {
        errno.ENOENT: _NO_HWPT,
        errno.EOPNOTSUPP: Meaning(
            KernelUnsupported, "hwpt_without_dirty_tracking", "it was made without dirty tracking"
        ),
    },
)
GET_DIRTY_BITMAP = Verb(
    "IOMMU_HWPT_GET_DIRTY_BITMAP",
    abi.IOMMU_HWPT_GET_DIRTY_BITMAP,
    {
        **SET_DIRTY_TRACKING.meanings,
        errno.ENOTTY: Meaning(
            KernelTooOld, "dirty_tracking_missing", "use Linux 6.7 or newer with an IOMMU driver"
        ),
        errno.EINVAL: Meaning(
            KernelRejected, "range_not_aligned", "the range is not aligned to the page size"
        ),
    },
)


def hwpt_alloc(flags: abi.iommufd_hwpt_alloc_flags) -> Verb:
    """IOMMU_HWPT_ALLOC with these flags: what EOPNOTSUPP means depends on them."""
    wish = abi.iommufd_hwpt_alloc_flags
    if wish.ALLOC_DIRTY_TRACKING in flags and wish.ALLOC_NEST_PARENT in flags:
        unsupported = _NO_TRACKING_AND_NESTING
    elif wish.ALLOC_DIRTY_TRACKING in flags:
        unsupported = _NO_TRACKING
    elif wish.ALLOC_NEST_PARENT in flags:
        unsupported = _NO_NESTING
    else:
        unsupported = _NO_PAGE_TABLE
    return Verb(
        "IOMMU_HWPT_ALLOC",
        abi.IOMMU_HWPT_ALLOC,
        {**_HWPT_ALLOC_COMMON, errno.EOPNOTSUPP: unsupported},
    )


class Context:
    """One iommufd: its descriptor, closed once, and the calls on it.

    A descriptor that is closed under a call would give the call to whoever has its number next.
    So `close` only forbids new calls while one is going on, and the last of them closes.
    """

    def __init__(self, fd: int, ioctl: Ioctl) -> None:
        self._fd = fd
        self._ioctl = ioctl
        self._lock = threading.Lock()
        self._calls = 0
        self._is_closed = False

    def fileno(self) -> int:
        """The descriptor, for passing it on. Raises KernelGone when it is closed."""
        with self._lock:
            self._check_open()
            return self._fd

    def call(self, verb: Verb, argument: UapiStruct, subject: str) -> None:
        """`calls.call` on this iommufd. Raises KernelGone when it is closed."""
        with self._in_call():
            call(self._ioctl, self._fd, verb, argument, subject)

    def close(self) -> None:
        """Idempotent. May block: the last reference to an iommufd unpins all its memory."""
        with self._lock:
            close_here = not self._is_closed and self._calls == 0
            self._is_closed = True
        if close_here:
            os.close(self._fd)

    @contextlib.contextmanager
    def _in_call(self) -> Iterator[None]:
        with self._lock:
            self._check_open()
            self._calls += 1
        try:
            yield
        finally:
            with self._lock:
                self._calls -= 1
                close_here = self._is_closed and self._calls == 0
            if close_here:
                os.close(self._fd)

    def _check_open(self) -> None:
        if self._is_closed:
            raise KernelGone("the iommufd is closed", errno=errno.EBADF, code="descriptor_closed")
