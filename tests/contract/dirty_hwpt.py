"""What holds of a page table that was handed over, on the simulator and on the kernel's mock."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from migrd.core.bitmap import PAGE_BYTES, DirtyBitmap
from migrd.core.harvest_round import Tracker
from migrd.core.memory_map import MemoryMap
from migrd.engine.dirty_ports import IovaPiece
from migrd.errors import KernelError, LogLost
from migrd.kernel.dirty_iommufd import HwptPeeks, HwptSource
from migrd.kernel.io_address_space import Ioas, Mapping
from migrd.kernel.iommufd import Iommufd
from tests.contract.dirty_source import DirtySourceContract, dirty_pages, granules
from tests.contract.iommufd_bench import Rig
from tests.fakes.iommufd import MOCK_PAGE_BYTES

FIRST_IOVA = 0x1000_0000
LENGTHS = (512 * PAGE_BYTES, 512 * PAGE_BYTES)
APART_BYTES = 64 << 20


@dataclass
class HwptRig:
    """A VMM with a device that writes, and migrd, to whom it has handed its page table over."""

    kernel: Rig
    vmm: Iommufd
    ioas: Ioas
    hwpt_id: int
    mappings: list[Mapping]
    memory: MemoryMap
    source: HwptSource
    pieces: list[IovaPiece]
    tracker = Tracker.IOMMU
    can_peek = True

    def write(self, *pages: int) -> None:
        for page in pages:
            for region, offset, _ in self.memory.pieces(page, 1):
                where = self.pieces[region.id].iova + offset
                self.kernel.make_dirty(self.vmm.fileno(), self.hwpt_id, where, [0])

    def lose(self) -> None:
        """The VMM breaks its promise."""
        self.ioas.unmap(self.mappings[1], drop_dirty=True)


def hwpt_rig(kernel: Rig, page_size_bytes: int) -> Iterator[HwptRig]:
    memory = MemoryMap.of([(n, n << 32, length) for n, length in enumerate(LENGTHS)])
    with Iommufd.adopt(kernel.open(), kernel.ioctl) as vmm, contextlib.ExitStack() as undo:
        ioas = vmm.allocate_ioas()
        device = kernel.mock_device(vmm.fileno(), ioas.id)
        hwpt = vmm.allocate_hwpt(device.dev_id, ioas, dirty_tracking=True)
        kernel.attach(vmm.fileno(), device.stdev_id, hwpt.id)
        pieces, mappings = [], []
        for region in memory.regions:
            iova = FIRST_IOVA + region.id * APART_BYTES
            mappings.append(ioas.map(mmap.mmap(-1, region.length_bytes), iova))
            pieces.append(IovaPiece(iova, region.length_bytes, region.first_page))
        source = HwptSource.handed_over(
            vmm.fileno(), hwpt.id, pieces, page_size_bytes, "iommu", ioctl=kernel.ioctl
        )
        undo.callback(source.close)
        yield HwptRig(kernel, vmm, ioas, hwpt.id, mappings, memory, source, pieces)


class HwptContract(DirtySourceContract):
    """Give it a fixture `rig`: an HwptRig."""

    def test_every_page_that_devices_wrote_and_no_other_is_told_of(self, rig: HwptRig) -> None:
        """Injected below, compared bit for bit."""
        rig.source.start_tracking()
        written = [page for page in range(512) if page * page % 7 < 2] + list(range(512, 1024, 9))
        for piece, region in zip(rig.pieces, rig.memory.regions, strict=True):
            own = [page - region.first_page for page in written if page >= region.first_page]
            mock = [page * PAGE_BYTES // MOCK_PAGE_BYTES for page in own if page < region.pages]
            rig.kernel.make_dirty(rig.vmm.fileno(), rig.hwpt_id, piece.iova, mock)
        into = DirtyBitmap(rig.memory.pages)
        rig.source.read_and_clear(into)
        assert dirty_pages(into) == granules(rig, *written)

    def test_a_piece_that_is_unmapped_is_not_taken_for_clean(self, rig: HwptRig) -> None:
        rig.source.start_tracking()
        rig.write(5)
        rig.lose()
        into = DirtyBitmap(rig.memory.pages)
        with pytest.raises(LogLost, match="not wholly mapped"):
            rig.source.read_and_clear(into)
        assert set(dirty_pages(into)) >= {5}  # what was cleared before is there

    def test_it_outlives_the_vmms_descriptor_and_lets_go_when_closed(self, rig: HwptRig) -> None:
        rig.source.start_tracking()
        rig.write(9)
        rig.vmm.close()
        into = DirtyBitmap(rig.memory.pages)
        rig.source.read_and_clear(into)
        assert dirty_pages(into) == granules(rig, 9)
        rig.source.close()
        with pytest.raises(KernelError):
            rig.source.read_and_clear(into)

    def test_what_a_vmm_harvests_itself_is_looked_at_and_stays(self, rig: HwptRig) -> None:
        rig.source.start_tracking()
        rig.write(9, 520)
        hwpt = rig.vmm.foreign_hwpt(rig.hwpt_id, (rig.ioas.id,))
        peeks = HwptPeeks(hwpt, rig.pieces, rig.source.page_size_bytes, "vmm")
        into = DirtyBitmap(rig.memory.pages)
        for _ in range(2):
            into.clear()
            assert peeks.peek(into).dirty_pages == into.count()
            assert dirty_pages(into) == granules(rig, 9, 520)
        into.clear()
        rig.source.read_and_clear(into)
        assert dirty_pages(into) == granules(rig, 9, 520)
        rig.lose()
        with pytest.raises(LogLost):
            peeks.peek(into)
