"""PAGEMAP_SCAN as verbs: which pages of a process were written, and protecting them again.

    scan     written pages of a range, as rows (start, end); with `clear` protected in the same step
    arm      protect a range, whatever is in it
    unmapped the first address of a range that is not mapped and registered, page by page

Traps
- Asked for PAGE_IS_WRITTEN and nothing else, both in the mask and in the answer, the kernel takes a
  way that costs a tenth of any other: a page that is clean costs as much as in mincore(2).
- A scan ends where the rows or `max_pages` are full: go on at the address it returns.
- A range without a page table (never touched, or a huge page that was discarded) is told of as
  written only by kernels that were mended (6.12.117 and 6.18.44 are); others say nothing.
  `tells_of_holes` asks the kernel by an experiment; where it does not, `holes` finds and protects
  them, at the price of another scan.
- After an error it is not known how much was protected anew.

Source: linux/fs.h, Documentation/admin-guide/mm/pagemap.rst.
"""

import contextlib
import ctypes
import errno
import functools
import mmap
import os
from typing import Final

import numpy as np
from numpy.typing import NDArray

from migrd.abi import pagemap as abi
from migrd.errors import KernelError, KernelGone, KernelRejected, KernelTooOld
from migrd.kernel.calls import Ioctl, Meaning, Verb, call, system_ioctl

ROWS: Final = 16384
"""Runs that one call can tell of."""
_ROW_WORDS: Final = ctypes.sizeof(abi.page_region) // 8
_IS: Final = abi.page_categories
_THERE: Final = _IS.PRESENT | _IS.SWAPPED
_ARM: Final = abi.pm_scan_flags.WP_MATCHING | abi.pm_scan_flags.CHECK_WPASYNC
_PROVEN_AT_ONCE_BYTES: Final = 256 << 20
_HUGE_BYTES: Final = 2 << 20
_USERFAULTFD: Final = "/dev/userfaultfd"

SCAN: Final = Verb(
    "PAGEMAP_SCAN",
    abi.PAGEMAP_SCAN,
    {
        errno.EPERM: Meaning(
            KernelRejected,
            "not_registered",
            "part of it is not registered with a userfaultfd: the process must register all its"
            " guest memory with UFFDIO_REGISTER_MODE_WP, on a userfaultfd made with"
            " UFFD_FEATURE_WP_ASYNC, and keep that open",
        ),
        errno.ENOTTY: Meaning(
            KernelTooOld,
            "pagemap_scan_missing",
            "use Linux 6.7 or newer, and pass the descriptor of /proc/self/pagemap",
        ),
        errno.ESRCH: Meaning(KernelGone, "process_gone", "the process has exited"),
        errno.EINVAL: Meaning(
            KernelRejected, "range_rejected", "the range is no range of pages, or of huge pages cut"
        ),
        errno.EFAULT: Meaning(
            KernelRejected, "range_rejected", "the range is beyond the address space of a process"
        ),
    },
)


class Pagemap:
    """A pagemap that was passed, and the rows that scans of it fill. Verbs block; one thread at a
    time."""

    def __init__(self, fd: int, ioctl: Ioctl = system_ioctl) -> None:
        """Keeps a duplicate of `fd`, which stays its owner's."""
        self._fd: int | None = os.dup(fd)
        self._ioctl = ioctl
        self.rows: NDArray[np.uint64] = np.empty((ROWS, _ROW_WORDS), np.uint64)
        self.rows.fill(0)  # written to, so it is resident
        self._rows_at = self.rows.ctypes.data
        self._argument = abi.pm_scan_arg()

    @property
    def fd(self) -> int:
        """Raises KernelGone when it is closed."""
        if self._fd is None:
            raise KernelGone("the pagemap is closed", errno=errno.EBADF, code="descriptor_closed")
        return self._fd

    def scan(
        self, start: int, end: int, *, clear: bool, max_pages: int = 0, first_row: int = 0
    ) -> tuple[int, int]:
        """Written pages of [start, end) into `rows` from `first_row` on, as (start, end, _) in
        ascending order; returns how many rows, and how far it got. `clear`: they are protected
        anew. `max_pages` 0: any number.

        Raises KernelRejected (`not_registered`), KernelGone.
        """
        flags = _ARM if clear else abi.pm_scan_flags.CHECK_WPASYNC
        return self._scan(start, end, flags, _IS.WRITTEN, max_pages, first_row)

    def holes(
        self, start: int, end: int, *, clear: bool, max_pages: int = 0, first_row: int = 0
    ) -> tuple[int, int]:
        """As `scan`: what is mapped and has neither page nor marker."""
        flags = _ARM if clear else abi.pm_scan_flags.CHECK_WPASYNC
        return self._scan(start, end, flags, _THERE, max_pages, first_row, inverted=_THERE)

    def arm(self, start: int, end: int) -> int:
        """Protect all of [start, end) that is mapped; returns how far it got. Raises as `scan`."""
        argument = self._argument
        ctypes.memset(ctypes.addressof(argument), 0, ctypes.sizeof(argument))
        argument.size, argument.flags = ctypes.sizeof(argument), _ARM
        argument.start, argument.end = start, end
        call(self._ioctl, self.fd, SCAN, argument, f"protect process memory {start:#x}-{end:#x}")
        return int(argument.walk_end)

    def unmapped(self, start: int, end: int) -> int | None:
        """The first address of [start, end) that is not mapped and registered; None: all of it is.
        Looks at each page: ten times as dear as a scan."""
        reached = start
        while reached < end:
            until = min(end, reached + _PROVEN_AT_ONCE_BYTES)
            found, _ = self._scan(reached, until, abi.pm_scan_flags(0), _IS.WPALLOWED)
            if not found or int(self.rows[0, 0]) > reached:
                return reached
            reached = int(self.rows[0, 1])
        return None

    def close(self) -> None:
        """Idempotent."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def _scan(
        self,
        start: int,
        end: int,
        flags: abi.pm_scan_flags,
        mask: abi.page_categories,
        max_pages: int = 0,
        first_row: int = 0,
        *,
        inverted: abi.page_categories | int = 0,
    ) -> tuple[int, int]:
        argument = self._argument
        argument.size, argument.flags = ctypes.sizeof(argument), flags
        argument.start, argument.end, argument.walk_end = start, end, 0
        argument.vec = self._rows_at + first_row * _ROW_WORDS * 8
        argument.vec_len = ROWS - first_row
        argument.max_pages = max_pages
        argument.category_mask = argument.return_mask = mask
        argument.category_inverted, argument.category_anyof_mask = inverted, 0
        subject = f"scan process memory {start:#x}-{end:#x}"
        found = call(self._ioctl, self.fd, SCAN, argument, subject)
        return found, int(argument.walk_end)


@functools.cache
def tells_of_holes() -> bool:
    """Whether this kernel takes what has no page table for written; found by trying it on memory of
    our own. False also when it cannot be tried. Blocks, for a millisecond."""
    with contextlib.suppress(OSError, KernelError):
        return _try_hole(os.open(_USERFAULTFD, os.O_RDWR | os.O_CLOEXEC))
    return False


def _try_hole(device: int) -> bool:
    with contextlib.ExitStack() as undo:
        undo.callback(os.close, device)
        uffd = system_ioctl(device, abi.USERFAULTFD_IOC_NEW, os.O_CLOEXEC | os.O_NONBLOCK)
        undo.callback(os.close, uffd)
        wish = abi.uffd_features.WP_ASYNC | abi.uffd_features.PAGEFAULT_FLAG_WP
        system_ioctl(uffd, abi.UFFDIO_API, abi.uffdio_api(api=abi.UFFD_API, features=wish))
        memory = mmap.mmap(-1, 2 * _HUGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        undo.callback(memory.close)
        start = _address_of(memory)
        whole = abi.uffdio_range(start=start, len=len(memory))
        register = abi.uffdio_register(range=whole, mode=abi.uffdio_register_modes.WP)
        system_ioctl(uffd, abi.UFFDIO_REGISTER, register)
        fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        undo.callback(os.close, fd)
        pagemap = Pagemap(fd)
        undo.callback(pagemap.close)
        found, _ = pagemap.scan(start, start + len(memory), clear=False)
        return bool(found)


def _address_of(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
