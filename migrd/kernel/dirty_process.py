"""Which pages of a process' memory were written, by PAGEMAP_SCAN on a pagemap that it passed.

    the process, once                               migrd, for each transfer
    userfaultfd(O_CLOEXEC | O_NONBLOCK)             start_tracking   protects all pages (arming)
    UFFDIO_API       features, see below            read_and_clear   finds the written ones and
    UFFDIO_REGISTER  mode WP, all guest memory                       protects them anew, in one step
    open("/proc/self/pagemap"), pass it with the    stop_tracking    nothing more is read
      ranges; keep the userfaultfd open

**What the process must ask for with UFFDIO_API** (Linux 6.7 or newer), all in one:

    UFFD_FEATURE_WP_ASYNC            the kernel lifts the protection itself; nobody waits for an
                                     event, and nothing is ever to be read from the userfaultfd
    UFFD_FEATURE_WP_UNPOPULATED      pages that are not there yet are protected too (WP_ASYNC
                                     implies it; ask, so that a kernel without it says so)
    UFFD_FEATURE_WP_HUGETLBFS_SHMEM  memory in memfds (MAP_SHARED)
    UFFD_FEATURE_PAGEFAULT_FLAG_WP   what the mode WP rests on

and register each range whole with UFFDIO_REGISTER_MODE_WP and no other mode. UFFDIO_WRITEPROTECT is
not needed: migrd arms by PM_SCAN_WP_MATCHING. The ranges are addresses of the process that opened
the pagemap, multiples of 4096. Anonymous private memory and memfds mapped MAP_SHARED both work.
It needs CAP_SYS_PTRACE, or vm.unprivileged_userfaultfd=1, or access to /dev/userfaultfd; with
UFFD_USER_MODE_ONLY the kernel's own writes into the memory (read(2) into it) would fail.

What is seen: every write through these mappings, by the process' threads and by system calls that
it makes (read(2) into guest memory); pages that it discards (MADV_DONTNEED of private memory).

**What is not seen, and must not be done to the memory while it is tracked**: writes by devices
(DMA: that takes another source) and by the kernel into pages that were pinned before a read
(O_DIRECT, io_uring fixed buffers); writes through another mapping of the same memfd, in this
process or another, and by pwrite(2) on it; holes punched into a memfd (MADV_REMOVE, fallocate).

Rules
1. Arming protects every page, also those without a page table: the kernel leaves a marker that the
   first write turns into a written page. Without arming, the first write into an untouched 2 MiB
   would tell of all its pages.
2. One ioctl walks at least 256 MiB while little is dirty, and ends early when enough pages or runs
   were found; the sizes adapt so that one takes less than 5 ms. Its end is a multiple of 2 MiB, so
   that no huge page is split for it.
3. What is not mapped is told of as clean, with success. So after each read the mappings are looked
   at (`process_maps`, else page by page); a gap is LogLost. Registered anew it may be: what was
   never armed counts as written.
4. A range that is not registered (the userfaultfd was closed, or the memory mapped anew) is EPERM:
   KernelRejected at the start, LogLost later.
5. When a call fails, the whole piece that it was to walk is taken for dirty: what it had protected
   anew before it failed, it does not say.

Stopping cannot lift the protection, only the process' userfaultfd can: each page that is clean then
costs its next writer one short fault (1 to 2 us), once.

Source: Documentation/admin-guide/mm/{pagemap,userfaultfd}.rst; the rest was seen on Linux 6.12 and
6.18 and is pinned by tests/contract/dirty_process.py.
"""
