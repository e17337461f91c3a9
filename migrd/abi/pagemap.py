"""Mirror of what finds pages that the CPU wrote: PAGEMAP_SCAN and PROCMAP_QUERY (linux/fs.h), and
write-protecting userfaultfd (linux/userfaultfd.h), Linux 6.12.

    /dev/userfaultfd -- UFFDIO_API (WP_ASYNC) -- UFFDIO_REGISTER (MODE_WP) -- UFFDIO_WRITEPROTECT
    /proc/PID/pagemap -- PAGEMAP_SCAN: pages whose write protection was lifted; WP_MATCHING puts
                         it back in the same step, so no write is missed
"""

from typing import Final

from migrd.abi.ioctl import UapiEnum, UapiFlag, UapiStruct, io, ior, iowr, u32, u64

HEADERS: Final = ("linux/fs.h", "linux/userfaultfd.h")

# linux/fs.h


class page_region(UapiStruct):
    _fields_ = [
        ("start", u64),
        ("end", u64),  # exclusive
        ("categories", u64),
    ]


class page_categories(UapiFlag, prefix="PAGE_IS_"):  # macros in the header, without a common name
    WPALLOWED = 1 << 0
    WRITTEN = 1 << 1
    FILE = 1 << 2
    PRESENT = 1 << 3
    SWAPPED = 1 << 4
    PFNZERO = 1 << 5
    HUGE = 1 << 6
    SOFT_DIRTY = 1 << 7


class pm_scan_flags(UapiFlag, prefix="PM_SCAN_"):
    WP_MATCHING = 1 << 0
    CHECK_WPASYNC = 1 << 1


class pm_scan_arg(UapiStruct):
    _fields_ = [
        ("size", u64),
        ("flags", u64),
        ("start", u64),
        ("end", u64),
        ("walk_end", u64),  # out: where the scan stopped
        ("vec", u64),  # user pointer to page_region[]
        ("vec_len", u64),
        ("max_pages", u64),
        ("category_inverted", u64),
        ("category_mask", u64),
        ("category_anyof_mask", u64),
        ("return_mask", u64),
    ]


PROCFS_IOCTL_MAGIC: Final = ord("f")
PAGEMAP_SCAN: Final = iowr(PROCFS_IOCTL_MAGIC, 16, pm_scan_arg)


class procmap_query_flags(UapiFlag, prefix="PROCMAP_QUERY_"):
    COVERING_OR_NEXT_VMA = 0x10


class procmap_query(UapiStruct):
    _fields_ = [
        ("size", u64),
        ("query_flags", u64),
        ("query_addr", u64),
        ("vma_start", u64),
        ("vma_end", u64),
        ("vma_flags", u64),
        ("vma_page_size", u64),
        ("vma_offset", u64),
        ("inode", u64),
        ("dev_major", u32),
        ("dev_minor", u32),
        ("vma_name_size", u32),
        ("build_id_size", u32),
        ("vma_name_addr", u64),
        ("build_id_addr", u64),
    ]


PROCMAP_QUERY: Final = iowr(PROCFS_IOCTL_MAGIC, 17, procmap_query)

# linux/userfaultfd.h

USERFAULTFD_IOC: Final = 0xAA
USERFAULTFD_IOC_NEW: Final = io(USERFAULTFD_IOC, 0x00)
UFFD_API: Final = 0xAA
UFFD_USER_MODE_ONLY: Final = 1


class uffd_features(UapiFlag, prefix="UFFD_FEATURE_"):
    PAGEFAULT_FLAG_WP = 1 << 0
    EVENT_FORK = 1 << 1
    EVENT_REMAP = 1 << 2
    EVENT_REMOVE = 1 << 3
    MISSING_HUGETLBFS = 1 << 4
    MISSING_SHMEM = 1 << 5
    EVENT_UNMAP = 1 << 6
    SIGBUS = 1 << 7
    THREAD_ID = 1 << 8
    MINOR_HUGETLBFS = 1 << 9
    MINOR_SHMEM = 1 << 10
    EXACT_ADDRESS = 1 << 11
    WP_HUGETLBFS_SHMEM = 1 << 12
    WP_UNPOPULATED = 1 << 13
    POISON = 1 << 14
    WP_ASYNC = 1 << 15
    MOVE = 1 << 16


class uffdio_numbers(UapiEnum, prefix="_UFFDIO_"):
    """Also the bits of `ioctls` in the answers of UFFDIO_API and UFFDIO_REGISTER: 1 << number."""

    REGISTER = 0x00
    UNREGISTER = 0x01
    WAKE = 0x02
    WRITEPROTECT = 0x06
    API = 0x3F


class uffdio_api(UapiStruct):
    _fields_ = [
        ("api", u64),
        ("features", u64),  # in: wanted; out: all that the kernel has
        ("ioctls", u64),
    ]


class uffdio_range(UapiStruct):
    _fields_ = [
        ("start", u64),
        ("len", u64),
    ]


class uffdio_register_modes(UapiFlag, prefix="UFFDIO_REGISTER_MODE_"):
    MISSING = 1 << 0
    WP = 1 << 1
    MINOR = 1 << 2


class uffdio_register(UapiStruct):
    _fields_ = [
        ("range", uffdio_range),
        ("mode", u64),
        ("ioctls", u64),
    ]


class uffdio_writeprotect_modes(UapiFlag, prefix="UFFDIO_WRITEPROTECT_MODE_"):
    WP = 1 << 0
    DONTWAKE = 1 << 1


class uffdio_writeprotect(UapiStruct):
    _fields_ = [
        ("range", uffdio_range),
        ("mode", u64),
    ]


UFFDIO_API: Final = iowr(USERFAULTFD_IOC, uffdio_numbers.API, uffdio_api)
UFFDIO_REGISTER: Final = iowr(USERFAULTFD_IOC, uffdio_numbers.REGISTER, uffdio_register)
UFFDIO_UNREGISTER: Final = ior(USERFAULTFD_IOC, uffdio_numbers.UNREGISTER, uffdio_range)
UFFDIO_WAKE: Final = ior(USERFAULTFD_IOC, uffdio_numbers.WAKE, uffdio_range)
UFFDIO_WRITEPROTECT: Final = iowr(USERFAULTFD_IOC, uffdio_numbers.WRITEPROTECT, uffdio_writeprotect)
