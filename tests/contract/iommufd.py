"""What holds of the iommufd adapter, on the simulator and on the real kernel.

    class TestHere(IommufdContract):
        @pytest.fixture
        def rig(self) -> Iterator[Rig]: ...

The simulator: tests/kernel/test_iommufd_contract.py. The kernel, with the mock devices of its own
selftest: tests/lab/guest/mock/test_iommufd.py. What the kernel does below the adapter, and the
adapter must keep callers from: tests/contract/iommufd_raw.py.
"""

from __future__ import annotations

import errno
import mmap
import os

import pytest

from migrd.errors import KernelBusy, KernelGone, KernelRejected, KernelUnsupported
from migrd.kernel.iommufd import Iommufd
from tests.contract.iommufd_bench import (
    IOVA,
    LENGTH,
    OUT_OF_REACH,
    PAGE,
    PAGES,
    UNKNOWN_ID,
    Bench,
    Rig,
    WithBench,
    numbers,
)
from tests.fakes.iommufd import MOCK_PAGE_BYTES


class IommufdContract(WithBench):
    """Give it a fixture `rig`."""

    # ---- what a device's IOMMU can

    @pytest.mark.parametrize("can_track", [True, False])
    def test_an_iommu_says_whether_it_tracks_dirty_pages(
        self, rig: Rig, iommufd: Iommufd, can_track: bool
    ) -> None:
        ioas = iommufd.allocate_ioas()
        device = rig.mock_device(iommufd.fileno(), ioas.id, can_track=can_track)
        said = iommufd.hw_info(device.dev_id)
        assert said.tracks_dirty is can_track
        assert said.hardware_type == 0xFEEDBEEF
        assert said.vtd is None
        assert len(said.registers) == 8

    def test_only_bound_devices_are_asked(self, iommufd: Iommufd) -> None:
        for object_id in (UNKNOWN_ID, iommufd.allocate_ioas().id):
            with pytest.raises(KernelGone) as caught:
                iommufd.hw_info(object_id)
            assert caught.value.code == "no_iommu_device"
            assert caught.value.errno == errno.ENOENT
            assert isinstance(caught.value.__cause__, OSError)

    def test_a_page_table_with_tracking_is_refused_where_the_iommu_cannot(
        self, rig: Rig, iommufd: Iommufd
    ) -> None:
        ioas = iommufd.allocate_ioas()
        device = rig.mock_device(iommufd.fileno(), ioas.id, can_track=False)
        with pytest.raises(KernelUnsupported, match=f"device {device.dev_id} ") as caught:
            iommufd.allocate_hwpt(device.dev_id, ioas, dirty_tracking=True)
        assert caught.value.code == "iommu_no_dirty_tracking"
        assert caught.value.errno == errno.EOPNOTSUPP
        plain = iommufd.allocate_hwpt(device.dev_id, ioas)
        with pytest.raises(KernelUnsupported) as caught:
            plain.set_tracking(True)
        assert caught.value.code == "hwpt_without_dirty_tracking"

    def test_a_page_table_for_an_unknown_device_is_refused(self, iommufd: Iommufd) -> None:
        with pytest.raises(KernelGone) as caught:
            iommufd.allocate_hwpt(UNKNOWN_ID, iommufd.allocate_ioas(), dirty_tracking=True)
        assert caught.value.code == "no_iommu_device"

    def test_a_page_table_on_a_destroyed_ioas_is_refused(self, bench: Bench) -> None:
        gone = bench.iommufd.allocate_ioas()
        gone.destroy()
        with pytest.raises(KernelGone, match="destroyed"):
            bench.iommufd.allocate_hwpt(bench.device.dev_id, gone)

    def test_a_nest_parent_can_be_made(self, bench: Bench) -> None:
        parent = bench.iommufd.allocate_hwpt(bench.device.dev_id, bench.ioas, nest_parent=True)
        assert parent.id != bench.hwpt.id

    # ---- maps

    def test_what_can_be_mapped_shrinks_to_what_the_iommu_reaches(
        self, rig: Rig, iommufd: Iommufd
    ) -> None:
        ioas = iommufd.allocate_ioas()
        [everything] = ioas.iova_ranges().ranges
        assert (everything.first, everything.last) == (0, (1 << 64) - 1)
        rig.mock_device(iommufd.fileno(), ioas.id)
        reachable = ioas.iova_ranges()
        assert reachable.ranges[-1].last < OUT_OF_REACH
        assert reachable.alignment_bytes == MOCK_PAGE_BYTES

    def test_memory_is_mapped_where_there_is_room(self, bench: Bench) -> None:
        with pytest.raises(KernelRejected) as caught:
            bench.ioas.map(mmap.mmap(-1, PAGE), IOVA + PAGE)
        assert caught.value.code == "iova_taken"
        with pytest.raises(KernelRejected, match="0x1000000000000") as caught:
            bench.ioas.map(mmap.mmap(-1, PAGE), OUT_OF_REACH)
        assert caught.value.code == "iova_not_allowed"
        anywhere = bench.ioas.map(mmap.mmap(-1, PAGE))
        assert anywhere.end <= IOVA or anywhere.iova >= IOVA + LENGTH
        assert bench.ioas.mappings == tuple(
            sorted([bench.mapping, anywhere], key=lambda mapping: mapping.iova)
        )

    def test_mapped_memory_cannot_go_away_until_it_is_unmapped(self, bench: Bench) -> None:
        with pytest.raises(BufferError):
            bench.memory.close()
        bench.ioas.unmap(bench.mapping)
        bench.memory.close()
        with pytest.raises(KernelGone) as caught:
            bench.ioas.unmap(bench.mapping)
        assert caught.value.code == "mapping_gone"

    def test_a_refused_map_holds_no_memory(self, bench: Bench) -> None:
        memory = mmap.mmap(-1, PAGE)
        with pytest.raises(KernelRejected):
            bench.ioas.map(memory, IOVA)
        memory.close()

    def test_a_copy_shows_the_same_memory_elsewhere(self, bench: Bench) -> None:
        other = bench.iommufd.allocate_ioas()
        copy = other.copy(bench.ioas, IOVA + PAGE, 2 * PAGE, IOVA)
        assert other.mappings == (copy,)
        with pytest.raises(KernelRejected) as caught:
            other.copy(bench.ioas, IOVA, LENGTH + PAGE, 0)
        assert caught.value.code == "range_has_holes"
        with pytest.raises(KernelRejected) as caught:
            other.copy(bench.ioas, IOVA, PAGE, IOVA + PAGE)
        assert caught.value.code == "iova_taken"
        bench.ioas.unmap(bench.mapping)
        with pytest.raises(BufferError):  # the copy still shows it
            bench.memory.close()
        other.destroy()
        bench.memory.close()

    # ---- dirty pages

    def test_a_clearing_read_finds_each_written_page_once(self, bench: Bench) -> None:
        bench.hwpt.set_tracking(True)
        assert bench.read_and_clear() == []
        bench.write(0, 5, 63)
        assert bench.read_and_clear() == [0, 5, 63]
        assert bench.read_and_clear() == []

    def test_a_peek_changes_nothing(self, bench: Bench) -> None:
        bench.hwpt.set_tracking(True)
        bench.write(1, 2)
        for _ in range(2):
            assert numbers(bench.hwpt.peek(IOVA, LENGTH, PAGE)) == [1, 2]
        assert bench.read_and_clear() == [1, 2]

    def test_bit_0_is_the_first_page_of_the_range_asked_for(self, bench: Bench) -> None:
        bench.hwpt.set_tracking(True)
        bench.write(3, 60)
        assert bench.read_and_clear(IOVA + 3 * PAGE, 8 * PAGE) == [0]
        assert bench.read_and_clear() == [60]  # clearing touched only what was read

    def test_larger_pages_are_dirty_when_any_part_is(self, bench: Bench) -> None:
        bench.hwpt.set_tracking(True)
        bench.write(3, 4, 63)
        assert numbers(bench.hwpt.peek(IOVA, LENGTH, 4 * PAGE)) == [0, 1, 15]
        assert numbers(bench.hwpt.peek(IOVA, LENGTH, LENGTH)) == [0]

    def test_adjacent_mappings_are_read_in_one(self, bench: Bench) -> None:
        bench.ioas.map(mmap.mmap(-1, LENGTH), IOVA + LENGTH)
        bench.hwpt.set_tracking(True)
        bench.write(2)
        bench.write(7, iova=IOVA + LENGTH)
        assert bench.read_and_clear(length=2 * LENGTH) == [2, PAGES + 7]

    def test_memory_mapped_while_tracking_is_on_is_tracked(self, bench: Bench) -> None:
        bench.hwpt.set_tracking(True)
        bench.ioas.map(mmap.mmap(-1, LENGTH), IOVA + LENGTH)
        bench.write(7, iova=IOVA + LENGTH)
        assert bench.read_and_clear(length=2 * LENGTH) == [PAGES + 7]

    def test_switching_tracking_on_twice_loses_no_page(self, bench: Bench) -> None:
        bench.hwpt.set_tracking(True)
        bench.write(5)
        bench.hwpt.set_tracking(True)
        assert bench.read_and_clear() == [5]

    def test_nothing_is_read_while_tracking_is_off(self, bench: Bench) -> None:
        for switch in ([], [True, False]):
            for on in switch:
                bench.hwpt.set_tracking(on)
            for read in (bench.read_and_clear, lambda: bench.hwpt.peek(IOVA, LENGTH, PAGE)):
                with pytest.raises(KernelRejected, match="seem all clean") as caught:
                    read()
                assert caught.value.code == "tracking_is_off"

    def test_no_range_with_a_hole_is_read(self, bench: Bench) -> None:
        bench.ioas.map(mmap.mmap(-1, LENGTH), IOVA + 2 * LENGTH)
        bench.hwpt.set_tracking(True)
        bench.write(1)
        for iova, length in (
            (IOVA, 3 * LENGTH),
            (IOVA + LENGTH, 2 * LENGTH),
            (IOVA + LENGTH, LENGTH),
            (IOVA - PAGE, LENGTH),
            (IOVA + 2 * LENGTH, LENGTH + PAGE),
        ):
            with pytest.raises(KernelRejected, match="not wholly mapped") as caught:
                bench.read_and_clear(iova, length)
            assert caught.value.code == "range_has_holes"
        assert bench.merged == []
        assert bench.read_and_clear() == [1]

    def test_unmapping_loses_no_dirty_page_unasked(self, bench: Bench) -> None:
        bench.hwpt.set_tracking(True)
        bench.write(1)
        with pytest.raises(KernelRejected) as caught:
            bench.ioas.unmap(bench.mapping)
        assert caught.value.code == "dirty_bits_would_be_lost"
        assert bench.read_and_clear() == [1]
        bench.ioas.unmap(bench.mapping, drop_dirty=True)
        with pytest.raises(KernelRejected, match="not wholly mapped"):
            bench.read_and_clear()

    # ---- the ends of things

    def test_what_is_in_use_is_not_destroyed(self, bench: Bench) -> None:
        for used in (bench.hwpt, bench.ioas):
            with pytest.raises(KernelBusy) as caught:
                used.destroy()
            assert caught.value.errno == errno.EBUSY
        bench.hwpt.set_tracking(True)
        assert bench.read_and_clear() == []  # and is as it was

    def test_a_destroyed_page_table_is_never_asked_again(self, bench: Bench) -> None:
        hwpt = bench.iommufd.allocate_hwpt(bench.device.dev_id, bench.ioas, dirty_tracking=True)
        hwpt.set_tracking(True)
        hwpt.destroy()
        hwpt.destroy()
        reused = bench.iommufd.allocate_hwpt(bench.device.dev_id, bench.ioas, dirty_tracking=True)
        assert reused.id == hwpt.id  # so a call with the old id would meet another page table
        with pytest.raises(KernelGone, match="destroyed"):
            hwpt.set_tracking(True)
        with pytest.raises(KernelGone, match="destroyed"):
            hwpt.peek(IOVA, LENGTH, PAGE)
        bench.ioas.unmap(bench.mapping)  # its tracking went with it

    # ---- sharing with a VMM; here `bench` is the VMM

    def test_a_vmms_objects_are_found_and_left_alone(self, bench: Bench) -> None:
        plain = bench.iommufd.allocate_hwpt(bench.device.dev_id, bench.ioas)
        with bench.shared() as shared:
            found = shared.find_objects()
            assert found.ioases == (bench.ioas.id,)
            assert found.devices == (bench.device.dev_id,)
            assert found.tracking_hwpts == (bench.hwpt.id,)
            assert plain.id in found.plain_hwpts
            assert found.is_complete
            assert shared.find_objects() == found
            assert shared.foreign_ioas(bench.ioas.id).iova_ranges() == bench.ioas.iova_ranges()

    def test_a_vmms_dirty_pages_are_peeked_at_and_stay_its_own(self, bench: Bench) -> None:
        bench.hwpt.set_tracking(True)
        bench.write(4, 9)
        with bench.shared() as shared:
            hwpt = shared.foreign_hwpt(bench.hwpt.id, (bench.ioas.id,))
            before = shared.find_objects()
            for _ in range(2):
                peeked = hwpt.peek(IOVA, LENGTH, PAGE)
                assert peeked is not None
                assert numbers(peeked) == [4, 9]
            assert shared.find_objects() == before  # no scratch IOAS is left
        assert bench.read_and_clear() == [4, 9]

    def test_a_range_that_a_vmm_has_not_wholly_mapped_is_not_taken_for_clean(
        self, bench: Bench
    ) -> None:
        bench.hwpt.set_tracking(True)
        empty = bench.iommufd.allocate_ioas()
        with bench.shared() as shared:
            hwpt = shared.foreign_hwpt(bench.hwpt.id, (bench.ioas.id,))
            for iova, length in ((IOVA, 2 * LENGTH), (IOVA - PAGE, LENGTH), (0, PAGE)):
                assert hwpt.peek(iova, length, PAGE) is None
            unsure = shared.foreign_hwpt(bench.hwpt.id, (bench.ioas.id, empty.id))
            assert unsure.peek(IOVA, LENGTH, PAGE) is None
            bench.ioas.unmap(bench.mapping, drop_dirty=True)
            assert hwpt.peek(IOVA, LENGTH, PAGE) is None

    def test_a_vmms_page_table_or_ioas_that_is_gone_is_said_to_be_gone(self, bench: Bench) -> None:
        with bench.shared() as shared:
            with pytest.raises(KernelGone) as caught:
                shared.foreign_hwpt(UNKNOWN_ID, (bench.ioas.id,)).peek(IOVA, LENGTH, PAGE)
            assert caught.value.code == "hwpt_gone"
            with pytest.raises(KernelGone) as caught:
                shared.foreign_hwpt(bench.hwpt.id, (UNKNOWN_ID,)).peek(IOVA, LENGTH, PAGE)
            assert caught.value.code == "ioas_gone"

    def test_the_objects_live_until_the_last_descriptor_is_closed(self, bench: Bench) -> None:
        bench.hwpt.set_tracking(True)
        bench.write(8)
        with bench.shared() as shared:
            bench.iommufd.close()
            peeked = shared.foreign_hwpt(bench.hwpt.id, (bench.ioas.id,)).peek(IOVA, LENGTH, PAGE)
            assert peeked is not None
            assert numbers(peeked) == [8]
        with pytest.raises(KernelGone) as caught:
            bench.read_and_clear()
        assert caught.value.code == "descriptor_closed"

    def test_only_an_iommufd_is_adopted(self, rig: Rig) -> None:
        other = os.open("/dev/null", os.O_RDWR)
        with pytest.raises(KernelRejected) as caught:
            Iommufd.adopt(other, rig.ioctl)
        assert caught.value.code == "not_an_iommufd"
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(other)
