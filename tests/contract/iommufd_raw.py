"""What the kernel answers below the adapter: every errno, and every success that is none.

The adapter relies on the first and must keep its callers from the second. Where a call succeeds
and loses something, the same test shows that the adapter does not get there.

Runs like tests/contract/iommufd.py. If a newer kernel fails one of these, it has changed: see
whether the adapter's guard may go.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
from collections.abc import Callable
from typing import Any

import pytest

from migrd.abi import iommufd as abi
from migrd.abi.ioctl import UapiStruct, io
from migrd.errors import KernelRejected
from tests.contract.iommufd_bench import (
    IOVA,
    LENGTH,
    OUT_OF_REACH,
    PAGE,
    UNKNOWN_ID,
    Bench,
    Rig,
    WithBench,
)

NO_CLEAR = abi.iommufd_hwpt_get_dirty_bitmap_flags.NO_CLEAR
FIXED = abi.iommufd_ioas_map_flags.FIXED_IOVA
READ_WRITE = abi.iommufd_ioas_map_flags.WRITEABLE.value | abi.iommufd_ioas_map_flags.READABLE.value
UNMAPPED = 0x10000
UNKNOWN_CALL = io(abi.IOMMUFD_TYPE, 0x9F)
RESERVED = {"__reserved": 1}

Attempt = Callable[[Bench], tuple[int, UapiStruct]]


def _get_dirty(bench: Bench, **fields: Any) -> tuple[int, UapiStruct]:
    given = {
        "hwpt_id": bench.hwpt.id,
        "flags": NO_CLEAR,
        "iova": IOVA,
        "length": LENGTH,
        "page_size": PAGE,
        "data": ctypes.addressof(_room),
        **fields,
    }
    return abi.IOMMU_HWPT_GET_DIRTY_BITMAP, abi.iommu_hwpt_get_dirty_bitmap(**given)


def _set_dirty(bench: Bench, **fields: Any) -> tuple[int, UapiStruct]:
    given = {"hwpt_id": bench.hwpt.id, "flags": 1, **fields}
    return abi.IOMMU_HWPT_SET_DIRTY_TRACKING, abi.iommu_hwpt_set_dirty_tracking(**given)


def _map(bench: Bench, **fields: Any) -> tuple[int, UapiStruct]:
    given = {
        "ioas_id": bench.ioas.id,
        "flags": FIXED | READ_WRITE,
        "iova": IOVA + 4 * LENGTH,
        "length": PAGE,
        "user_va": UNMAPPED,
        **fields,
    }
    return abi.IOMMU_IOAS_MAP, abi.iommu_ioas_map(**given)


def _copy(bench: Bench, **fields: Any) -> tuple[int, UapiStruct]:
    given = {
        "src_ioas_id": bench.ioas.id,
        "dst_ioas_id": bench.ioas.id,
        "flags": FIXED | READ_WRITE,
        "src_iova": IOVA,
        "dst_iova": IOVA + 4 * LENGTH,
        "length": LENGTH,
        **fields,
    }
    return abi.IOMMU_IOAS_COPY, abi.iommu_ioas_copy(**given)


def _unmap(bench: Bench, iova: int, length: int) -> tuple[int, UapiStruct]:
    argument = abi.iommu_ioas_unmap(ioas_id=bench.ioas.id, iova=iova, length=length)
    return abi.IOMMU_IOAS_UNMAP, argument


def _hwpt_alloc(bench: Bench, **fields: Any) -> tuple[int, UapiStruct]:
    given = {"dev_id": bench.device.dev_id, "pt_id": bench.ioas.id, **fields}
    return abi.IOMMU_HWPT_ALLOC, abi.iommu_hwpt_alloc(**given)


def _hw_info(bench: Bench, **fields: Any) -> tuple[int, UapiStruct]:
    return abi.IOMMU_GET_HW_INFO, abi.iommu_hw_info(dev_id=bench.device.dev_id, **fields)


def _ranges(bench: Bench, **fields: Any) -> tuple[int, UapiStruct]:
    return abi.IOMMU_IOAS_IOVA_RANGES, abi.iommu_ioas_iova_ranges(**fields)


def _destroy(object_id: int) -> tuple[int, UapiStruct]:
    return abi.IOMMU_DESTROY, abi.iommu_destroy(id=object_id)


_room = (ctypes.c_uint64 * 64)()

ANSWERS: list[tuple[str, int, Attempt]] = [
    ("an unknown call", errno.ENOTTY, lambda b: (UNKNOWN_CALL, abi.iommu_destroy(id=1))),
    ("ioas: a flag", errno.EOPNOTSUPP, lambda b: (0x3B81, abi.iommu_ioas_alloc(flags=1))),
    ("ranges: no room", errno.EMSGSIZE, lambda b: _ranges(b, ioas_id=b.ioas.id)),
    ("ranges: unknown id", errno.ENOENT, lambda b: _ranges(b, ioas_id=UNKNOWN_ID)),
    ("ranges: id 0", errno.ENOENT, lambda b: _ranges(b, ioas_id=0)),
    ("destroy: unknown id", errno.ENOENT, lambda b: _destroy(UNKNOWN_ID)),
    ("destroy: a device", errno.EBUSY, lambda b: _destroy(b.device.dev_id)),
    ("destroy: a page table with devices", errno.EBUSY, lambda b: _destroy(b.hwpt.id)),
    ("destroy: an ioas with page tables", errno.EBUSY, lambda b: _destroy(b.ioas.id)),
    ("hw info: a flag", errno.EOPNOTSUPP, lambda b: _hw_info(b, flags=1)),
    ("hwpt: an unknown flag", errno.EOPNOTSUPP, lambda b: _hwpt_alloc(b, flags=1 << 5)),
    ("hwpt: reserved", errno.EOPNOTSUPP, lambda b: _hwpt_alloc(b, **RESERVED)),
    ("hwpt: unknown device", errno.ENOENT, lambda b: _hwpt_alloc(b, dev_id=UNKNOWN_ID)),
    ("hwpt: the ioas as device", errno.ENOENT, lambda b: _hwpt_alloc(b, dev_id=b.ioas.id)),
    ("hwpt: unknown ioas", errno.EINVAL, lambda b: _hwpt_alloc(b, pt_id=UNKNOWN_ID)),
    ("map: no memory there", errno.EFAULT, _map),
    ("map: an unknown flag", errno.EOPNOTSUPP, lambda b: _map(b, flags=FIXED | 8)),
    ("map: unknown ioas", errno.ENOENT, lambda b: _map(b, ioas_id=UNKNOWN_ID)),
    ("map: nothing", errno.EINVAL, lambda b: _map(b, length=0)),
    ("map: taken", errno.EEXIST, lambda b: _map(b, iova=IOVA)),
    ("map: out of reach", errno.EINVAL, lambda b: _map(b, iova=OUT_OF_REACH)),
    ("map: not aligned", errno.EINVAL, lambda b: _map(b, iova=IOVA + 4 * LENGTH + 1)),
    ("map: overflow", errno.EOVERFLOW, lambda b: _map(b, iova=(1 << 64) - PAGE, length=2 * PAGE)),
    ("copy: a hole", errno.ENOENT, lambda b: _copy(b, length=LENGTH + PAGE)),
    ("copy: nothing", errno.EINVAL, lambda b: _copy(b, length=0)),
    ("copy: unknown source", errno.ENOENT, lambda b: _copy(b, src_ioas_id=UNKNOWN_ID)),
    ("copy: unknown target", errno.ENOENT, lambda b: _copy(b, dst_ioas_id=UNKNOWN_ID)),
    ("copy: taken", errno.EEXIST, lambda b: _copy(b, dst_iova=IOVA)),
    ("unmap: half a mapping", errno.ENOENT, lambda b: _unmap(b, IOVA, LENGTH // 2)),
    ("unmap: nothing there", errno.ENOENT, lambda b: _unmap(b, IOVA + 4 * LENGTH, PAGE)),
    ("set: unknown id", errno.ENOENT, lambda b: _set_dirty(b, hwpt_id=UNKNOWN_ID)),
    ("set: an ioas", errno.ENOENT, lambda b: _set_dirty(b, hwpt_id=b.ioas.id)),
    ("set: an unknown flag", errno.EOPNOTSUPP, lambda b: _set_dirty(b, flags=2)),
    ("set: reserved is not looked at", 0, lambda b: _set_dirty(b, **RESERVED)),
    ("get: unknown id", errno.ENOENT, lambda b: _get_dirty(b, hwpt_id=UNKNOWN_ID)),
    ("get: an ioas", errno.ENOENT, lambda b: _get_dirty(b, hwpt_id=b.ioas.id)),
    ("get: a device", errno.ENOENT, lambda b: _get_dirty(b, hwpt_id=b.device.dev_id)),
    ("get: an unknown flag", errno.EOPNOTSUPP, lambda b: _get_dirty(b, flags=2)),
    ("get: reserved", errno.EOPNOTSUPP, lambda b: _get_dirty(b, **RESERVED)),
    ("get: too short", errno.EINVAL, lambda b: _get_dirty(b, size=40)),
    ("get: page size 0", errno.EINVAL, lambda b: _get_dirty(b, page_size=0)),
    ("get: nothing", errno.EINVAL, lambda b: _get_dirty(b, length=0)),
    ("get: iova not aligned", errno.EINVAL, lambda b: _get_dirty(b, iova=IOVA + 2048)),
    ("get: length not aligned", errno.EINVAL, lambda b: _get_dirty(b, length=LENGTH - 2048)),
    ("get: page larger than range", errno.EINVAL, lambda b: _get_dirty(b, page_size=4 * LENGTH)),
    ("get: overflow", errno.EOVERFLOW, lambda b: _get_dirty(b, iova=(1 << 64) - LENGTH // 2)),
]


class IommufdRawContract(WithBench):
    """Give it a fixture `rig`."""

    @pytest.mark.parametrize(
        ("number", "attempt"),
        [(number, attempt) for _, number, attempt in ANSWERS],
        ids=[name for name, _, _ in ANSWERS],
    )
    def test_the_kernel_answers(self, bench: Bench, number: int, attempt: Attempt) -> None:
        assert answer(bench, *attempt(bench)) == number

    def test_a_device_that_cannot_track_is_not_attached_where_it_must(
        self, rig: Rig, bench: Bench
    ) -> None:
        with pytest.raises(OSError) as caught:  # noqa: PT011 - the number is looked at
            rig.mock_device(bench.iommufd.fileno(), bench.hwpt.id, can_track=False)
        assert caught.value.errno == errno.EINVAL
        second = rig.mock_device(bench.iommufd.fileno(), bench.hwpt.id)
        assert second.hwpt_id == bench.hwpt.id

    def test_an_ioas_gives_one_page_table_without_tracking_to_all(
        self, rig: Rig, bench: Bench
    ) -> None:
        fd = bench.iommufd.fileno()
        first = rig.mock_device(fd, bench.ioas.id)
        second = rig.mock_device(fd, bench.ioas.id, can_track=False)
        assert first.hwpt_id == second.hwpt_id
        plain = _set_dirty(bench, hwpt_id=first.hwpt_id)
        assert answer(bench, *plain) == errno.EOPNOTSUPP

    # ---- successes that are none

    def test_silent_all_seems_clean_while_tracking_is_off(self, bench: Bench) -> None:
        assert raw_read(bench) == 0
        with pytest.raises(KernelRejected):
            bench.hwpt.peek(IOVA, LENGTH, PAGE)
        bench.hwpt.set_tracking(True)
        bench.write(1)
        raw_switch(bench, on=False)
        assert raw_read(bench) == 0

    def test_silent_all_is_clean_after_switching_on_twice(self, bench: Bench) -> None:
        bench.hwpt.set_tracking(True)
        bench.write(1, 2)
        assert raw_read(bench) == 2
        raw_switch(bench, on=True)
        assert raw_read(bench) == 0
        bench.write(1, 2)
        bench.hwpt.set_tracking(True)
        assert bench.read_and_clear() == [1, 2]

    def test_silent_nothing_is_said_of_what_lies_behind_a_hole(self, bench: Bench) -> None:
        beyond = IOVA + 2 * LENGTH
        bench.ioas.map(mmap.mmap(-1, LENGTH), beyond)
        bench.hwpt.set_tracking(True)
        bench.write(0, 1, 2)
        bench.write(0, 1, iova=beyond)
        assert raw_read(bench, length=3 * LENGTH) == 3
        assert raw_read(bench, iova=IOVA + LENGTH, length=2 * LENGTH) == 0
        with pytest.raises(KernelRejected):
            bench.read_and_clear(IOVA, 3 * LENGTH)
        assert bench.read_and_clear(beyond) == [0, 1]

    @pytest.mark.parametrize("where", ["nowhere", "unmapped", "read-only"])
    def test_silent_a_clearing_read_into_a_bad_buffer_loses_the_pages(
        self, bench: Bench, where: str
    ) -> None:
        bench.hwpt.set_tracking(True)
        bench.write(0, 1, 2)
        with read_only_page() as read_only:
            address = {"nowhere": 0, "unmapped": UNMAPPED, "read-only": read_only.address}[where]
            raw_read(bench, data=address, flags=0)
        assert raw_read(bench) == 0
        bench.write(0, 1, 2)
        assert bench.read_and_clear() == [0, 1, 2]

    def test_silent_old_bits_stay_in_the_buffer(self, bench: Bench) -> None:
        bench.hwpt.set_tracking(True)
        buffer = (ctypes.c_uint64 * 8)()
        buffer[0] = 1 << 63
        bench.write(0)
        raw_read(bench, data=ctypes.addressof(buffer))
        assert buffer[0] == 1 << 63 | 1
        for _ in range(2):
            assert bench.hwpt.peek(IOVA, LENGTH, PAGE).dirty_pages == 1

    def test_silent_a_page_size_that_is_no_power_of_two_is_taken_for_another(
        self, bench: Bench
    ) -> None:
        odd, length = 3 * PAGE, 3 * PAGE * 16
        bench.hwpt.set_tracking(True)
        bench.write(3, 4, 5)  # one page of three, were it meant
        assert raw_read(bench, length=length, page_size=odd) == 3
        with pytest.raises(KernelRejected) as caught:
            bench.hwpt.peek(IOVA, length, odd)
        assert caught.value.code == "bad_page_size"

    def test_silent_unmapping_drops_the_pages_of_the_range(self, bench: Bench) -> None:
        bench.hwpt.set_tracking(True)
        bench.write(0, 1)
        bench.ioas.unmap(bench.mapping, drop_dirty=True)
        assert raw_read(bench) == 0
        bench.ioas.map(bench.memory, IOVA)
        assert raw_read(bench) == 0


def answer(bench: Bench, request: int, argument: UapiStruct) -> int:
    """The errno, 0 for success."""
    try:
        bench.rig.ioctl(bench.iommufd.fileno(), request, argument)
    except OSError as error:
        return error.errno or 0
    return 0


def raw_read(bench: Bench, **fields: Any) -> int:
    """How many bits the kernel sets, whatever the adapter would say to it."""
    buffer = (ctypes.c_uint64 * 64)()
    call = _get_dirty(bench, **{"data": ctypes.addressof(buffer), **fields})
    bench.rig.ioctl(bench.iommufd.fileno(), *call)
    return int.from_bytes(bytes(buffer), "little").bit_count()


def raw_switch(bench: Bench, *, on: bool) -> None:
    bench.rig.ioctl(bench.iommufd.fileno(), *_set_dirty(bench, flags=int(on)))


class read_only_page:
    """A page of this process that may not be written."""

    def __enter__(self) -> read_only_page:
        self._page = mmap.mmap(-1, PAGE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._page))
        self._protect(mmap.PROT_READ)
        return self

    def __exit__(self, *_: object) -> None:
        self._protect(mmap.PROT_READ | mmap.PROT_WRITE)
        self._page.close()

    def _protect(self, protection: int) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mprotect(ctypes.c_void_p(self.address), PAGE, protection) == 0
