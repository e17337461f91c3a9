"""The iommufd adapter where the contract cannot go: errnos at will, threads, descriptors."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from migrd.abi import iommufd as abi
from migrd.errors import (
    KernelBusy,
    KernelDenied,
    KernelError,
    KernelGone,
    KernelRejected,
    KernelTooOld,
    KernelUnsupported,
)
from migrd.kernel.calls import Argument
from migrd.kernel.iommufd import Iommufd, numbers_in
from migrd.kernel.page_table import MAX_BITMAP_BYTES, DirtyBits
from tests.contract.iommufd_bench import IOVA, LENGTH, PAGE, Bench, WithBench, numbers
from tests.fakes.iommufd import IommufdKernel
from tests.kernel.simulated_iommufd import OnTheSimulator

GRACE_S = 30.0
TRACKING = abi.IOMMU_HWPT_SET_DIRTY_TRACKING
READING = abi.IOMMU_HWPT_GET_DIRTY_BITMAP


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


# ---- opening


@pytest.mark.parametrize(
    ("number", "kind", "code"),
    [
        (errno.ENOENT, KernelTooOld, "iommufd_missing"),
        (errno.ENODEV, KernelTooOld, "iommufd_missing"),
        (errno.EACCES, KernelDenied, "iommufd_denied"),
        (errno.EPERM, KernelDenied, "iommufd_denied"),
        (errno.EMFILE, KernelBusy, "too_many_files"),
        (errno.EIO, KernelError, "kernel_error"),
    ],
)
def test_a_device_node_that_does_not_open_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, number: int, kind: type[KernelError], code: str
) -> None:
    def failing(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", failing)
    with pytest.raises(kind, match="cannot open /dev/iommu") as caught:
        Iommufd.open()
    assert (caught.value.code, caught.value.errno) == (code, number)


def test_a_host_without_iommufd_is_told_to_upgrade(tmp_path: Path) -> None:
    with pytest.raises(KernelTooOld, match="CONFIG_IOMMUFD"):
        Iommufd.open(str(tmp_path / "iommu"))


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.EPERM, KernelDenied),
        (errno.ESRCH, KernelGone),
        (errno.EBADF, KernelGone),
        (errno.ENOSYS, KernelTooOld),
    ],
)
def test_a_descriptor_that_cannot_be_taken_says_why(number: int, kind: type[KernelError]) -> None:
    def getfd(pidfd: int, wanted: int) -> int:
        raise OSError(number, os.strerror(number))

    with pytest.raises(kind, match="take descriptor 9"):
        Iommufd.from_process(3, 9, getfd=getfd)


def test_the_iommufds_among_a_process_descriptors_are_found(tmp_path: Path) -> None:
    directory = tmp_path / "77" / "fd"
    directory.mkdir(parents=True)
    for number, target in (("0", "/dev/null"), ("12", "/dev/iommu"), ("9", "/dev/iommu")):
        (directory / number).symlink_to(target)
    (directory / "5").write_text("not a link")
    assert numbers_in(77, str(tmp_path)) == (9, 12)
    with pytest.raises(KernelGone) as caught:
        numbers_in(78, str(tmp_path))
    assert caught.value.code == "process_gone"


def test_descriptors_that_may_not_be_listed_are_not_taken_for_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def listdir(directory: str) -> list[str]:
        raise PermissionError(errno.EACCES, "denied")

    monkeypatch.setattr(os, "listdir", listdir)
    with pytest.raises(KernelDenied) as caught:
        numbers_in(1)
    assert caught.value.code == "process_denied"


class TestAdapter(OnTheSimulator, WithBench):
    def test_a_descriptor_is_taken_from_another_process(self, bench: Bench) -> None:
        def getfd(pidfd: int, wanted: int) -> int:
            return os.dup(wanted)

        taken = Iommufd.from_process(3, bench.iommufd.fileno(), bench.rig.ioctl, getfd)
        with taken:
            assert taken.find_objects() == bench.iommufd.find_objects()

    # ---- the descriptor

    def test_closing_twice_closes_once(self, rig: IommufdKernel) -> None:
        iommufd = Iommufd.adopt(rig.open(), rig.ioctl)
        number = iommufd.fileno()
        iommufd.close()
        reused = os.open("/dev/null", os.O_RDONLY)
        assert reused == number
        iommufd.close()
        assert is_open(reused)
        with pytest.raises(KernelGone, match="closed"):
            iommufd.fileno()
        os.close(reused)

    def test_closing_under_a_call_lets_it_end_first(self, kernel: IommufdKernel) -> None:
        entered, go_on = threading.Event(), threading.Event()

        def slow(fd: int, request: int, argument: Argument, /) -> int:
            entered.set()
            assert go_on.wait(GRACE_S)
            assert is_open(fd)
            return kernel.ioctl(fd, request, argument)

        iommufd = Iommufd(kernel.open(), slow)
        number = iommufd.fileno()
        caller = threading.Thread(target=iommufd.allocate_ioas)
        caller.start()
        assert entered.wait(GRACE_S)
        iommufd.close()
        assert is_open(number)
        with pytest.raises(KernelGone, match="closed"):
            iommufd.allocate_ioas()
        go_on.set()
        caller.join(GRACE_S)
        assert not is_open(number)

    def test_an_ioas_lets_go_of_its_memory_after_its_iommufd(self, bench: Bench) -> None:
        bench.iommufd.close()
        bench.hwpt.destroy()
        bench.ioas.destroy()
        bench.memory.close()

    # ---- errors

    @pytest.mark.parametrize(
        ("request_", "number", "kind", "code", "act"),
        [
            (
                abi.IOMMU_HWPT_ALLOC,
                errno.EOPNOTSUPP,
                KernelUnsupported,
                "iommu_no_dirty_tracking_with_nesting",
                lambda b: allocate(b, dirty_tracking=True, nest_parent=True),
            ),
            (
                abi.IOMMU_HWPT_ALLOC,
                errno.EOPNOTSUPP,
                KernelUnsupported,
                "iommu_no_nesting",
                lambda b: allocate(b, nest_parent=True),
            ),
            (
                abi.IOMMU_HWPT_ALLOC,
                errno.EOPNOTSUPP,
                KernelUnsupported,
                "iommu_no_page_table",
                lambda b: allocate(b),
            ),
            (
                abi.IOMMU_HWPT_ALLOC,
                errno.ENOMEM,
                KernelBusy,
                "memory_lock_limit",
                lambda b: allocate(b, dirty_tracking=True),
            ),
            (
                abi.IOMMU_IOAS_MAP,
                errno.ENOMEM,
                KernelBusy,
                "memory_lock_limit",
                lambda b: b.ioas.map(mmap.mmap(-1, PAGE)),
            ),
            (
                abi.IOMMU_HWPT_SET_DIRTY_TRACKING,
                errno.ENOTTY,
                KernelTooOld,
                "ioctl_unknown",
                lambda b: b.hwpt.set_tracking(True),
            ),
            (
                abi.IOMMU_HWPT_GET_DIRTY_BITMAP,
                errno.ENOTTY,
                KernelTooOld,
                "dirty_tracking_missing",
                lambda b: b.iommufd.find_objects(),
            ),
            (
                abi.IOMMU_IOAS_ALLOC,
                errno.ENOMEM,
                KernelBusy,
                "out_of_memory",
                lambda b: b.iommufd.allocate_ioas(),
            ),
        ],
    )
    def test_an_errno_says_what_the_caller_can_do(
        self,
        bench: Bench,
        kernel: IommufdKernel,
        request_: int,
        number: int,
        kind: type[KernelError],
        code: str,
        act: Callable[[Bench], object],
    ) -> None:
        kernel.failures[request_] = number
        with pytest.raises(kind) as caught:
            act(bench)
        assert (caught.value.code, caught.value.errno) == (code, number)
        assert isinstance(caught.value.__cause__, OSError)

    def test_an_ioas_of_another_iommufd_is_no_place_for_a_page_table(
        self, bench: Bench, rig: IommufdKernel
    ) -> None:
        with (
            Iommufd.adopt(rig.open(), rig.ioctl) as other,
            pytest.raises(ValueError, match="another iommufd"),
        ):
            other.allocate_hwpt(1, bench.ioas)

    # ---- dirty pages

    def test_pages_that_a_failed_read_has_cleared_are_merged(
        self, bench: Bench, kernel: IommufdKernel
    ) -> None:
        bench.hwpt.set_tracking(True)
        bench.write(3, 6)
        kernel.failures[READING] = errno.EIO  # after its effect
        merged: list[DirtyBits] = []
        with pytest.raises(KernelError):
            bench.hwpt.read_and_clear(IOVA, LENGTH, PAGE, merged.append)
        assert [numbers(each) for each in merged] == [[3, 6]]
        kernel.failures.clear()
        assert bench.read_and_clear() == []

    def test_a_refused_read_merges_nothing(self, bench: Bench) -> None:
        bench.hwpt.set_tracking(True)
        merged: list[DirtyBits] = []
        with pytest.raises(KernelRejected):
            bench.hwpt.read_and_clear(IOVA, LENGTH, PAGE + 1, merged.append)
        assert merged == []

    def test_tracking_that_failed_to_switch_is_not_taken_for_on(
        self, bench: Bench, kernel: IommufdKernel
    ) -> None:
        kernel.failures[TRACKING] = errno.EIO
        with pytest.raises(KernelError):
            bench.hwpt.set_tracking(True)
        assert bench.hwpt.is_tracking is None
        with pytest.raises(KernelRejected, match="not on"):
            bench.read_and_clear()
        with pytest.raises(KernelRejected, match="would lose its dirty bits"):
            bench.ioas.unmap(bench.mapping)
        kernel.failures.clear()
        bench.hwpt.set_tracking(False)
        bench.ioas.unmap(bench.mapping)

    def test_nothing_is_unmapped_from_under_a_read(
        self, bench: Bench, kernel: IommufdKernel
    ) -> None:
        bench.hwpt.set_tracking(True)
        refusals = []

        def merge(found: DirtyBits) -> None:  # the range is still held here
            with pytest.raises(KernelBusy) as caught:
                bench.ioas.unmap(bench.mapping, drop_dirty=True)
            refusals.append(caught.value.code)

        bench.hwpt.read_and_clear(IOVA, LENGTH, PAGE, merge)
        assert refusals == ["being_read"]
        bench.ioas.unmap(bench.mapping, drop_dirty=True)

    @pytest.mark.parametrize(
        ("iova", "length", "page_size", "code"),
        [
            (IOVA, LENGTH, 0, "bad_page_size"),
            (IOVA, LENGTH, -4096, "bad_page_size"),
            (IOVA, LENGTH, 12288, "bad_page_size"),
            (IOVA, 0, PAGE, "range_not_aligned"),
            (IOVA, -LENGTH, PAGE, "range_not_aligned"),
            (-LENGTH, LENGTH, PAGE, "range_not_aligned"),
            (IOVA + 2048, LENGTH, PAGE, "range_not_aligned"),
            (IOVA, LENGTH + 2048, PAGE, "range_not_aligned"),
            ((1 << 64) - LENGTH, 2 * LENGTH, PAGE, "range_overflows"),
            (0, MAX_BITMAP_BYTES * 8 * PAGE + PAGE, PAGE, "range_too_large"),
        ],
    )
    def test_a_range_that_the_kernel_might_misread_never_reaches_it(
        self,
        bench: Bench,
        kernel: IommufdKernel,
        iova: int,
        length: int,
        page_size: int,
        code: str,
    ) -> None:
        with bench.shared() as shared:
            hwpt = shared.foreign_hwpt(bench.hwpt.id, (bench.ioas.id,))
            kernel.calls.clear()
            with pytest.raises(KernelRejected) as caught:
                hwpt.peek(iova, length, page_size)
        assert caught.value.code == code
        assert kernel.calls == []

    def test_what_a_read_gives_cannot_be_changed(self, bench: Bench) -> None:
        bench.hwpt.set_tracking(True)
        found = bench.hwpt.peek(IOVA, PAGE, PAGE)
        assert found.bits.readonly
        assert len(found.bits) == 8
        assert found.pages == 1


def allocate(bench: Bench, **wishes: bool) -> object:
    return bench.iommufd.allocate_hwpt(bench.device.dev_id, bench.ioas, **wishes)
