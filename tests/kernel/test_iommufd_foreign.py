"""What a VMM owns on an iommufd that migrd shares: found, looked at, never changed."""

from __future__ import annotations

import errno
import inspect
import os

import pytest

from migrd.abi import iommufd as abi
from migrd.errors import KernelBusy, KernelGone
from migrd.kernel import iommufd as adapter
from migrd.kernel.calls import Argument
from migrd.kernel.iommufd import Iommufd
from migrd.kernel.page_table import ForeignHwpt
from tests.contract.iommufd_bench import IOVA, LENGTH, PAGE, Bench, WithBench
from tests.fakes.iommufd import IommufdKernel
from tests.kernel.simulated_iommufd import OnTheSimulator

READING = abi.IOMMU_HWPT_GET_DIRTY_BITMAP


class TestForeign(OnTheSimulator, WithBench):
    def test_nothing_of_a_vmms_is_ever_changed(self, bench: Bench, kernel: IommufdKernel) -> None:
        bench.hwpt.set_tracking(True)
        device = bench.device
        theirs = {bench.ioas.id, bench.hwpt.id, device.stdev_id, device.dev_id}
        with bench.shared() as shared:
            kernel.calls.clear()
            found = shared.find_objects()
            for hwpt_id in found.tracking_hwpts:
                shared.foreign_hwpt(hwpt_id, found.ioases).peek(IOVA, LENGTH, PAGE)
                shared.foreign_hwpt(hwpt_id, found.ioases).peek(IOVA, 2 * LENGTH, PAGE)
        asked = {number for number, _ in kernel.calls}
        assert asked == {
            abi.IOMMU_IOAS_IOVA_RANGES,
            abi.IOMMU_GET_HW_INFO,
            abi.IOMMU_IOAS_ALLOC,
            abi.IOMMU_IOAS_COPY,
            abi.IOMMU_DESTROY,
            READING,
        }
        for number, argument in kernel.calls:
            match number:
                case abi.IOMMU_DESTROY:
                    assert argument.id not in theirs
                case abi.IOMMU_IOAS_COPY:
                    assert argument.dst_ioas_id not in theirs
                    assert not argument.flags & abi.iommufd_ioas_map_flags.WRITEABLE
                case _ if number == READING:
                    assert argument.flags == abi.iommufd_hwpt_get_dirty_bitmap_flags.NO_CLEAR

    def test_a_vmms_page_table_has_no_verb_that_changes_it(self) -> None:
        public = {name for name, _ in inspect.getmembers(ForeignHwpt) if not name.startswith("_")}
        assert public == {"peek", "is_wholly_mapped"}

    def test_a_vmm_that_unmaps_during_a_peek_does_not_seem_clean(
        self, bench: Bench, kernel: IommufdKernel
    ) -> None:
        bench.hwpt.set_tracking(True)
        bench.write(1)

        def unmapping(fd: int, request: int, argument: Argument, /) -> int:
            if request == READING:
                bench.ioas.unmap(bench.mapping, drop_dirty=True)
            return kernel.ioctl(fd, request, argument)

        with Iommufd.adopt(os.dup(bench.iommufd.fileno()), unmapping) as shared:
            hwpt = shared.foreign_hwpt(bench.hwpt.id, (bench.ioas.id,))
            assert hwpt.peek(IOVA, LENGTH, PAGE) is None

    def test_a_vmm_that_maps_during_a_peek_does_not_seem_clean(
        self, bench: Bench, kernel: IommufdKernel
    ) -> None:
        bench.hwpt.set_tracking(True)
        beyond = IOVA + LENGTH

        def mapping(fd: int, request: int, argument: Argument, /) -> int:
            answer = kernel.ioctl(fd, request, argument)
            if request == READING:
                bench.ioas.map(bytearray(LENGTH), beyond)
            return answer

        with Iommufd.adopt(os.dup(bench.iommufd.fileno()), mapping) as shared:
            hwpt = shared.foreign_hwpt(bench.hwpt.id, (bench.ioas.id,))
            assert hwpt.peek(IOVA, 2 * LENGTH, PAGE) is None

    def test_no_scratch_ioas_is_left_when_the_proof_fails(
        self, bench: Bench, kernel: IommufdKernel
    ) -> None:
        with bench.shared() as shared:
            before = shared.find_objects()
            kernel.failures[abi.IOMMU_IOAS_COPY] = errno.ENOMEM
            with pytest.raises(KernelBusy):
                shared.foreign_ioas(bench.ioas.id).is_wholly_mapped(IOVA, LENGTH)
            assert shared.find_objects() == before

    def test_a_page_table_must_be_filled_from_somewhere(self, bench: Bench) -> None:
        with pytest.raises(ValueError, match="some IOAS"):
            bench.iommufd.foreign_hwpt(bench.hwpt.id, ())

    def test_objects_behind_a_gap_of_freed_ids_are_found(self, bench: Bench) -> None:
        freed = [bench.iommufd.allocate_ioas() for _ in range(50)]
        last = bench.iommufd.allocate_ioas()
        for ioas in freed:
            ioas.destroy()
        found = bench.iommufd.find_objects()
        assert found.ioases == (bench.ioas.id, last.id)
        assert found.is_complete

    def test_probing_ends_and_says_that_it_did_not_see_all(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(adapter, "MAX_PROBED_ID", 20)
        for _ in range(30):
            bench.iommufd.allocate_ioas()
        found = bench.iommufd.find_objects()
        assert not found.is_complete
        assert max(found.ioases) == 20

    def test_probing_a_closed_iommufd_is_an_error(self, bench: Bench) -> None:
        bench.iommufd.close()
        with pytest.raises(KernelGone, match="closed"):
            bench.iommufd.find_objects()
