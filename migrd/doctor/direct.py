"""The direct engine: whether this kernel tells what a process wrote, and how fast bitmaps are here.

The first is tried, not read from a version: memory of our own is watched, written and looked at.
"""

from functools import partial
from typing import Final

from migrd.config import Settings
from migrd.core import bits
from migrd.core.bitmap import DirtyBitmap
from migrd.direct.guest_memory import GuestRegion, WriteTracking
from migrd.direct.profile_files import load_direct_profiles
from migrd.doctor.finding import Check, Finding, fail, ok, warn
from migrd.errors import ConfigError, KernelError
from migrd.kernel.dirty_process import ProcessRange, ProcessSource

TRACKING: Final = "write tracking"
BITMAPS: Final = "bitmaps"
PAGES: Final = 4
WRITTEN: Final = 2


def checks(settings: Settings | None) -> list[Check]:
    """Without settings: what can be said of any host."""
    return [
        Check(TRACKING, blocking=lambda: look_at_tracking(is_wanted=_is_wanted(settings))),
        Check(BITMAPS, blocking=partial(look_at_bitmaps, bits.BACKEND)),
    ]


def _is_wanted(settings: Settings | None) -> bool:
    """A profile of the direct engine is here. Blocking."""
    if settings is None:
        return False
    try:
        return bool(load_direct_profiles(settings.host.profiles_dir).by_name)
    except ConfigError:
        return False  # a finding of its own


def look_at_tracking(*, is_wanted: bool) -> Finding:
    """Blocking."""
    try:
        told = _try()
    except (OSError, KernelError) as failure:
        message = f"this kernel does not tell what a process wrote: {failure}"
        if not is_wanted:
            return ok(TRACKING, f"{message} (no launch profile of the direct engine needs it)")
        cure = "run Linux 6.7 or newer, with CONFIG_USERFAULTFD and CONFIG_PROC_PAGE_MONITOR"
        return fail(TRACKING, message, cure)
    if told != [WRITTEN]:
        message = f"page {WRITTEN} of {PAGES} was written, and the kernel told of {told}"
        return fail(TRACKING, message, "use another kernel: guests would lose memory with this one")
    return ok(TRACKING, "the kernel tells what a process wrote (PAGEMAP_SCAN, userfaultfd)")


def _try() -> list[int]:
    """Which pages a look finds written. Raises OSError, KernelError."""
    length_bytes = PAGES * 4096
    region = GuestRegion.create(id=0, gpa=0, length_bytes=length_bytes)
    tracking = WriteTracking()
    tracking.watch(region)
    ranges = [ProcessRange(region.hva, length_bytes, 0)]
    source = ProcessSource(tracking.pagemap_fd, ranges, "the doctor's own memory")
    try:
        source.start_tracking()
        region.memory[WRITTEN * 4096] = 1
        found = DirtyBitmap(PAGES)
        source.read_and_clear(found)
        return [page for page in range(PAGES) if found.count(page, 1)]
    finally:
        source.close()
        tracking.close()


def look_at_bitmaps(backend: str) -> Finding:
    if backend == "c":
        return ok(BITMAPS, "computed in C, at memory speed")
    message = "computed in numpy: finding scattered pages of large guests is about ten times slower"
    cure = "install a C compiler and Python's headers (apt-get install gcc python3-dev)"
    return warn(BITMAPS, message, f"{cure}\nthen install migrd again")
