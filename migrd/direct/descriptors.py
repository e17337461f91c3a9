"""What a descriptor that somebody sent really is. Blocking: in a thread, never on the event loop.

    guest memory    a memfd, or a file on tmpfs or hugetlbfs: the files that can be asked for seals;
                    readable, as long as it says, and not sealed against writing
    opaque state    a memfd sealed against writing, growing and shrinking
    pagemap         answers PAGEMAP_SCAN (of no page)
    iommufd         the character device that /dev/iommu is
    VFIO device     a character device of the class vfio-dev, or an anonymous [vfio-device]

Guest memory need not be sealed against shrinking: migrd never maps it, so a file that is truncated
while it is read gives a short read, an error of that transfer and nothing else.

Huge pages (hugetlbfs): PAGEMAP_SCAN does not protect pages of more than 2 MiB, and says nothing.
And where it is to protect one that is not there it waits for itself, unkillable, with a lock of the
process' memory held: in all kernels from 6.7 on that have no mend of pagemap_scan_pte_hole (mid
2026). So each huge page must be there when it is handed over, and must stay.
"""

import ctypes
import errno
import fcntl
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from migrd.abi.pagemap import PAGEMAP_SCAN, page_categories, page_region, pm_scan_arg
from migrd.errors import Invalid

LARGEST_PAGE_BYTES: Final = 2 << 20
STATE_SEALS: Final = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


@dataclass(frozen=True)
class FilePlace:
    """A piece of a file: (device, inode), and bytes from `start` to `end`."""

    file: tuple[int, int]
    start: int
    end: int
    page_bytes: int = 4096
    """Larger: a file on hugetlbfs."""


@dataclass(frozen=True)
class DescriptorKinds:
    """Looks at descriptors; each check raises Invalid, naming `field`, what is there, the cure."""

    root: Path = Path("/")
    """Where /dev and /sys are; elsewhere only in tests."""

    def memory(self, fd: int, field: str, offset_bytes: int, length_bytes: int) -> FilePlace:
        found = os.fstat(fd)
        seals = _seals(fd)
        if not stat.S_ISREG(found.st_mode) or seals is None:
            raise Invalid(
                f"{field}: its descriptor is {_name(fd)}; pass a memfd, or a file on tmpfs or "
                "hugetlbfs"
            )
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY:
            raise Invalid(f"{field}: its descriptor cannot be read; open it for reading, too")
        if seals & fcntl.F_SEAL_WRITE:
            raise Invalid(
                f"{field}: its memfd is sealed against writing (F_SEAL_WRITE), so it is not a "
                "guest's memory; pass the memfd that the guest writes to"
            )
        end = offset_bytes + length_bytes
        if end > found.st_size:
            raise Invalid(
                f"{field}: it ends at byte {end} of its file, which has {found.st_size}; "
                "give its true length, or make the file longer"
            )
        page_bytes = os.fstatvfs(fd).f_bsize
        if page_bytes > LARGEST_PAGE_BYTES:
            raise Invalid(
                f"{field}: it is in huge pages of {page_bytes >> 20} MiB; Linux finds writes to "
                f"pages of up to {LARGEST_PAGE_BYTES >> 20} MiB; use these"
            )
        return FilePlace((found.st_dev, found.st_ino), offset_bytes, end, page_bytes)

    def populated(self, pagemap_fd: int, field: str, address: int, length_bytes: int) -> None:
        """That all huge pages of a range are there."""
        there = page_categories.PRESENT | page_categories.SWAPPED
        row = page_region()
        asked = pm_scan_arg(
            start=address,
            end=address + length_bytes,
            vec=ctypes.addressof(row),
            vec_len=1,
            max_pages=1,
            category_inverted=there,
            category_mask=there,
            return_mask=there,
        )
        try:
            found = fcntl.ioctl(pagemap_fd, PAGEMAP_SCAN, bytearray(asked))
        except OSError as failure:
            raise Invalid(
                f"{field}: its pages cannot be looked at: {failure.strerror}"
            ) from failure
        if found:
            raise Invalid(
                f"{field}: the huge page at {row.start:#x} is not there yet, and Linux could hang "
                "where its writes are to be found; map it with MAP_POPULATE, or touch each page"
            )

    def opaque_state(self, fd: int, length_bytes: int, most_bytes: int) -> None:
        """That `fd` is a sealed memfd of just this length."""
        seals = _seals(fd)
        if seals is None or seals & STATE_SEALS != STATE_SEALS:
            raise Invalid(
                f"state: its descriptor is {_name(fd)}, not a memfd sealed with F_SEAL_WRITE, "
                "F_SEAL_SHRINK and F_SEAL_GROW; seal it before it is sent"
            )
        size = os.fstat(fd).st_size
        if size != length_bytes:
            raise Invalid(f"state: value says {length_bytes} bytes, and its file has {size}")
        if size > most_bytes:
            raise Invalid(
                f"state: it has {size} bytes, more than {most_bytes}; keep what is large in guest "
                "memory, or raise the limit"
            )

    def pagemap(self, fd: int, field: str) -> None:
        name = _name(fd)
        refused = Invalid(
            f"{field}: its descriptor is {name}, not a process's page map; pass one of "
            "/proc/self/pagemap, opened by the VMM itself"
        )
        if not name.endswith("/pagemap") or not stat.S_ISREG(os.fstat(fd).st_mode):
            raise refused
        try:
            fcntl.ioctl(fd, PAGEMAP_SCAN, bytearray(pm_scan_arg()))
        except OSError as failure:
            if failure.errno == errno.ENOTTY:
                raise Invalid(
                    f"{field}: this kernel has no PAGEMAP_SCAN, which finds the pages that were "
                    "written; run Linux 6.7 or later"
                ) from None
            raise refused from failure

    def iommufd(self, fd: int, field: str) -> None:
        found = os.fstat(fd)
        try:
            wanted = (self.root / "dev/iommu").stat().st_rdev
        except OSError:
            wanted = None
        if not stat.S_ISCHR(found.st_mode) or found.st_rdev != wanted:
            raise Invalid(f"{field}: its descriptor is {_name(fd)}; pass one of /dev/iommu")

    def vfio_device(self, fd: int, field: str) -> None:
        found = os.fstat(fd)
        name = _name(fd)
        if name == "anon_inode:[vfio-device]":
            return
        if stat.S_ISCHR(found.st_mode):
            number = f"{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}"
            subsystem = self.root / "sys/dev/char" / number / "subsystem"
            if subsystem.resolve().name == "vfio-dev":
                return
        raise Invalid(
            f"{field}: its descriptor is {name}, not a VFIO device; pass one of "
            "/dev/vfio/devices/, or one that VFIO_GROUP_GET_DEVICE_FD gave"
        )


def _seals(fd: int) -> int | None:
    """None: a file that cannot have seals."""
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        return None


def _name(fd: int) -> str:
    """What the kernel calls it."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}")[:200]
    except OSError:
        return "of an unknown kind"
