"""What each errno means that a real kernel was seen to answer, call by call (Linux 6.12, the lab).

That the kernel answers so is in tests/contract (iommufd_raw, vfio); here is what people and callers
are told of it. None of these may fall through to a plain KernelError.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from types import ModuleType

import pytest

from migrd.abi.iommufd import iommufd_hwpt_alloc_flags as wish
from migrd.errors import (
    KernelBusy,
    KernelDenied,
    KernelError,
    KernelGone,
    KernelRejected,
    KernelTooOld,
    KernelUnsupported,
)
from migrd.kernel import iommufd_calls, vfio_calls, vfio_data
from migrd.kernel.calls import COMMON, Meaning, Verb, kernel_error
from migrd.kernel.iommufd_calls import (
    DESTROY,
    GET_DIRTY_BITMAP,
    GET_HW_INFO,
    IOAS_ALLOC,
    IOAS_COPY,
    IOAS_MAP,
    IOAS_UNMAP,
    IOVA_RANGES,
    IS_IOMMUFD,
    SET_DIRTY_TRACKING,
    hwpt_alloc,
)
from migrd.kernel.vfio_calls import (
    ATTACH,
    ATTACH_TRACKING,
    BIND,
    DETACH,
    GET_INFO,
    GET_STATE,
    LOG_REPORT,
    LOG_START,
    LOG_STOP,
    MIGRATION,
    RESET,
    SET_STATE,
)
from migrd.kernel.vfio_data import PRECOPY_INFO, READ, WRITE

PLAIN, TRACKING, NESTING = hwpt_alloc(wish(0)), hwpt_alloc(wish(2)), hwpt_alloc(wish(1))
Table = Verb | Mapping[int, Meaning]
SEEN: list[tuple[str, Table, int, type[KernelError], str]] = [
    ("open", iommufd_calls.OPEN, errno.ENOENT, KernelTooOld, "iommufd_missing"),
    ("open", iommufd_calls.OPEN, errno.EACCES, KernelDenied, "iommufd_denied"),
    ("an unknown call", IOAS_ALLOC, errno.ENOTTY, KernelTooOld, "ioctl_unknown"),
    ("an unknown flag", IOAS_ALLOC, errno.EOPNOTSUPP, KernelUnsupported, "not_supported"),
    ("no iommufd", IS_IOMMUFD, errno.ENOTTY, KernelRejected, "not_an_iommufd"),
    ("ranges", IOVA_RANGES, errno.ENOENT, KernelGone, "ioas_gone"),
    ("hw info", GET_HW_INFO, errno.ENOENT, KernelGone, "no_iommu_device"),
    ("hwpt", TRACKING, errno.EOPNOTSUPP, KernelUnsupported, "iommu_no_dirty_tracking"),
    ("hwpt, nested", NESTING, errno.EOPNOTSUPP, KernelUnsupported, "iommu_no_nesting"),
    ("hwpt, plain", PLAIN, errno.EOPNOTSUPP, KernelUnsupported, "iommu_no_page_table"),
    ("hwpt, bad device", TRACKING, errno.ENOENT, KernelGone, "no_iommu_device"),
    ("hwpt, bad ioas", TRACKING, errno.EINVAL, KernelRejected, "ioas_unfit"),
    ("destroy", DESTROY, errno.EBUSY, KernelBusy, "object_busy"),
    ("destroy", DESTROY, errno.ENOENT, KernelGone, "object_gone"),
    ("map, taken", IOAS_MAP, errno.EEXIST, KernelRejected, "iova_taken"),
    ("map, out of reach", IOAS_MAP, errno.EINVAL, KernelRejected, "iova_not_allowed"),
    ("map, no memory", IOAS_MAP, errno.EFAULT, KernelRejected, "bad_address"),
    ("map, overflow", IOAS_MAP, errno.EOVERFLOW, KernelRejected, "range_overflows"),
    ("map, limit", IOAS_MAP, errno.ENOMEM, KernelBusy, "memory_lock_limit"),
    ("map, no ioas", IOAS_MAP, errno.ENOENT, KernelGone, "ioas_gone"),
    ("copy, hole", IOAS_COPY, errno.ENOENT, KernelGone, "range_has_holes"),
    ("copy, read-only", IOAS_COPY, errno.EPERM, KernelRejected, "memory_read_only"),
    ("copy, taken", IOAS_COPY, errno.EEXIST, KernelRejected, "iova_taken"),
    ("unmap, half", IOAS_UNMAP, errno.ENOENT, KernelGone, "mapping_gone"),
    (
        "switch",
        SET_DIRTY_TRACKING,
        errno.EOPNOTSUPP,
        KernelUnsupported,
        "hwpt_without_dirty_tracking",
    ),
    ("switch", SET_DIRTY_TRACKING, errno.ENOENT, KernelGone, "hwpt_gone"),
    ("read", GET_DIRTY_BITMAP, errno.EOPNOTSUPP, KernelUnsupported, "hwpt_without_dirty_tracking"),
    ("read", GET_DIRTY_BITMAP, errno.ENOENT, KernelGone, "hwpt_gone"),
    ("read, not aligned", GET_DIRTY_BITMAP, errno.EINVAL, KernelRejected, "range_not_aligned"),
    ("read, overflow", GET_DIRTY_BITMAP, errno.EOVERFLOW, KernelRejected, "range_overflows"),
    ("read, old kernel", GET_DIRTY_BITMAP, errno.ENOTTY, KernelTooOld, "dirty_tracking_missing"),
    ("cdev", vfio_calls.OPEN, errno.ENOENT, KernelGone, "no_vfio_cdev"),
    ("bind, interrupts", BIND, errno.EPERM, KernelDenied, "unsafe_interrupts"),
    ("bind, a second time", BIND, errno.EINVAL, KernelBusy, "device_in_use"),
    (
        "attach, to tracking",
        ATTACH_TRACKING,
        errno.EINVAL,
        KernelRejected,
        "iommu_no_dirty_tracking_on_attach",
    ),
    ("attach, misfit", ATTACH, errno.EINVAL, KernelRejected, "page_table_does_not_fit"),
    ("attach, an mdev", ATTACH, errno.ENOENT, KernelGone, "no_page_table"),
    ("detach, before bind", DETACH, errno.EINVAL, KernelRejected, "arguments_rejected"),
    ("info, before bind", GET_INFO, errno.EINVAL, KernelRejected, "arguments_rejected"),
    ("reset", RESET, errno.ENOTTY, KernelUnsupported, "no_reset"),
    ("feature", MIGRATION.verb, errno.ENOTTY, KernelUnsupported, "feature_not_supported"),
    ("feature, before bind", GET_STATE.verb, errno.EINVAL, KernelRejected, "arguments_rejected"),
    ("state", SET_STATE.verb, errno.EINVAL, KernelRejected, "device_state_refused"),
    ("log, 257 ranges", LOG_START.verb, errno.E2BIG, KernelRejected, "too_many_ranges"),
    ("log, misaligned", LOG_START.verb, errno.EINVAL, KernelRejected, "arguments_rejected"),
    ("log, overflow", LOG_START.verb, errno.EOVERFLOW, KernelRejected, "range_overflows"),
    ("log, none", LOG_STOP.verb, errno.ENOTTY, KernelUnsupported, "feature_not_supported"),
    ("report, overflow", LOG_REPORT.verb, errno.EOVERFLOW, KernelRejected, "range_overflows"),
    ("precopy info, later", PRECOPY_INFO, errno.EINVAL, KernelRejected, "not_in_precopy"),
    ("precopy info, ended", PRECOPY_INFO, errno.ENODEV, KernelGone, "session_ended"),
    ("data, ended", READ, errno.ENODEV, KernelGone, "session_ended"),
    ("data, read while loading", READ, errno.EBADF, KernelRejected, "wrong_direction"),
    ("data, of another kind", WRITE, errno.EFAULT, KernelRejected, "device_data_rejected"),
    ("data, too long", WRITE, errno.ENOMEM, KernelRejected, "device_data_too_long"),
]


@pytest.mark.parametrize(
    ("table", "number", "kind", "code"),
    [row[1:] for row in SEEN],
    ids=[f"{what}: {errno.errorcode[number]}" for what, _, number, _, _ in SEEN],
)
def test_what_the_kernel_was_seen_to_answer_has_its_meaning_and_a_cure(
    table: Table, number: int, kind: type[KernelError], code: str
) -> None:
    meanings = table.meanings if isinstance(table, Verb) else table
    error = kernel_error(OSError(number, os.strerror(number)), "do it", meanings, "CALL")
    assert (type(error), error.code, error.errno) == (kind, code, number)
    assert errno.errorcode[number] in error.message
    assert (meanings.get(number) or COMMON[number]).cure in error.message


@pytest.mark.parametrize("module", [iommufd_calls, vfio_calls, vfio_data])
def test_every_table_is_met_here(module: ModuleType) -> None:
    met = [table.name if isinstance(table, Verb) else table for _, table, *_ in SEEN]
    for name, found in vars(module).items():
        if isinstance(found, Verb):
            assert found.name in met, name
