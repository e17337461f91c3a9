"""How much memory a QEMU with passthrough devices may lock: RLIMIT_MEMLOCK of its process.

The kernel pins all memory of a guest for its devices' DMA, once for each iommufd object, when QEMU
maps it. What it counts against the limit (Linux, drivers/iommu/iommufd/pages.c; vfio the same):

    with CAP_IPC_LOCK   nothing: no limit applies, whatever it is
    by user             (a /dev/iommu as it is opened) all that the *user* has pinned, by every
                        process, against the limit of the one that pins
    by process          (IOMMU_OPTION_RLIMIT_MODE was set; the legacy VFIO interface) its own alone

What is given is the need of this guest and of the others that run here with devices: more than
enough when it is counted by process. Counted by user it holds for what is pinned at the start, but
not for what others pin later; so whoever opens /dev/iommu should have it counted by process.

Rules
1. A limit is raised, never lowered: a larger one is an administrator's.
2. A new QEMU has it from its first instruction: it is set on this process, for as long as the fork
   takes, under a lock that every start of a QEMU takes; a QEMU without devices gets nothing.
3. Above the hard limit one needs CAP_SYS_RESOURCE, or `LimitMEMLOCK=infinity` in the unit. Without
   it the limit is raised as far as may be, and the kernel judges: QEMU may be above all limits.
"""

import contextlib
import logging
import resource
import threading
from collections.abc import Iterator
from typing import Final

OTHER_BYTES: Final = 1 << 30
"""What QEMU maps for devices besides the guest's RAM: ROMs, video memory, other devices' BARs."""
NO_MEMORY: Final = "Cannot allocate memory"
"""ENOMEM, which is also what the kernel says when the limit is too low."""
CURE: Final = (
    "if it may not lock enough memory: LimitMEMLOCK=infinity in migrd's unit, or CAP_SYS_RESOURCE"
)

_starting = threading.Lock()

log = logging.getLogger(__name__)


def needed_bytes(memory_bytes: int, iommufds: int) -> int:
    """What one guest may have to lock; at least one container maps it."""
    return max(1, iommufds) * memory_bytes + OTHER_BYTES


@contextlib.contextmanager
def inherited(locked_bytes: int) -> Iterator[None]:
    """A child that is started in this block may lock so much (0: as much as this process may).

    Blocks while another start is going on.
    """
    with _starting:
        before = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        if not locked_bytes or _covers(before[0], locked_bytes):
            yield
            return
        _raise_to(0, locked_bytes, before[1])
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_MEMLOCK, before)


def raise_limit(pid: int, more_bytes: int) -> tuple[int, int]:
    """Let a running process lock so much more than it might; its limits before, for `restore`.

    The caller knows that the pid is still that of its process. Raises OSError.
    """
    before = resource.prlimit(pid, resource.RLIMIT_MEMLOCK)
    if before[0] != resource.RLIM_INFINITY:
        _raise_to(pid, before[0] + more_bytes, before[1])
    return before


def restore(pid: int, limits: tuple[int, int]) -> None:
    """Raises OSError."""
    resource.prlimit(pid, resource.RLIMIT_MEMLOCK, limits)


def _covers(limit: int, wanted_bytes: int) -> bool:
    return limit == resource.RLIM_INFINITY or limit >= wanted_bytes


def _raise_to(pid: int, soft: int, hard: int) -> None:
    try:
        limits = (soft, hard if _covers(hard, soft) else soft)
        resource.prlimit(pid, resource.RLIMIT_MEMLOCK, limits)
    except (ValueError, PermissionError):
        log.info("a QEMU may lock %d MiB, and may need %d; %s", hard >> 20, soft >> 20, CURE)
        resource.prlimit(pid, resource.RLIMIT_MEMLOCK, (hard, hard))
