"""How much memory a QEMU with passthrough devices may lock: RLIMIT_MEMLOCK of its process.

The kernel pins all memory of a guest for its devices' DMA, once for each iommufd object, when QEMU
maps it. Without CAP_IPC_LOCK or the like QEMU may pin no more than the limit; what is counted
against it is

    by user      (a /dev/iommu as it is opened) all that the *user* has pinned, by every process,
                 against the limit of the process that pins (io_uring and others count there too)
    by process   (IOMMU_OPTION_RLIMIT_MODE was set; the legacy VFIO interface) this process alone

What is given is the need of this guest and of the others that run here with devices: more than
enough when it is counted by process. Counted by user it holds for what is pinned at the start, but
not for what others pin later; so whoever opens /dev/iommu should have it counted by process.

Rules
1. A limit is raised, never lowered: a larger one is an administrator's.
2. A new QEMU has it from its first instruction: it is set on this process, for as long as the fork
   takes, under a lock that every start of a QEMU takes; a QEMU without devices gets nothing.
3. Raising above the hard limit needs CAP_SYS_RESOURCE, or `LimitMEMLOCK=infinity` in the unit.
"""

import contextlib
import errno
import resource
import threading
from collections.abc import Iterator
from typing import Final

OTHER_BYTES: Final = 1 << 30
"""What QEMU maps for devices besides the guest's RAM: ROMs, video memory, other devices' BARs."""

LIMIT: Final = "RLIMIT_MEMLOCK"
LIMIT_CURE: Final = "set LimitMEMLOCK=infinity in migrd's unit, or give it CAP_SYS_RESOURCE"

_starting = threading.Lock()


def needed_bytes(memory_bytes: int, iommufds: int) -> int:
    """What one guest may have to lock; at least one container maps it."""
    return max(1, iommufds) * memory_bytes + OTHER_BYTES


@contextlib.contextmanager
def inherited(locked_bytes: int) -> Iterator[None]:
    """A child that is started in this block may lock so much (0: as much as this process may).

    Blocks while another start is going on. Raises OSError (EPERM) naming LIMIT.
    """
    with _starting:
        soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        if not locked_bytes or _covers(soft, locked_bytes):
            yield
            return
        _set(0, locked_bytes, hard)
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (soft, hard))


def raise_limit(pid: int, more_bytes: int) -> None:
    """Let a running process lock so much more than it might. Raises OSError as `inherited`, or
    ESRCH; the caller knows that the pid is still that of its process."""
    soft, hard = resource.prlimit(pid, resource.RLIMIT_MEMLOCK)
    if soft != resource.RLIM_INFINITY:
        _set(pid, soft + more_bytes, hard)


def _covers(limit: int, wanted_bytes: int) -> bool:
    return limit == resource.RLIM_INFINITY or limit >= wanted_bytes


def _set(pid: int, soft: int, hard: int) -> None:
    limits = (soft, hard if _covers(hard, soft) else soft)
    try:
        resource.prlimit(pid, resource.RLIMIT_MEMLOCK, limits)
    except (ValueError, PermissionError) as failure:
        text = f"it must be able to lock {soft >> 20} MiB of memory, and {hard >> 20} are allowed"
        raise OSError(errno.EPERM, text, LIMIT) from failure
