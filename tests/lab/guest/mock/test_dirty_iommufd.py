"""Sources of dirty pages and harvest rounds on the real kernel, with its mock devices.

Dirt is injected by the kernel's own test interface and compared bit for bit with what a harvest
told. What a scan of a process costs and does on this older kernel is looked at, too.
"""

from __future__ import annotations

import asyncio
import mmap
import sys
import time
from collections.abc import Iterator

import numpy as np
import pytest

from migrd.core.bitmap import PAGE_BYTES, DirtyBitmap
from migrd.core.harvest_round import ReadOutcome
from migrd.core.memory_map import MemoryMap
from migrd.engine.dirty_ports import IovaPiece, OnLoss
from migrd.engine.harvest import Harvest
from migrd.kernel.dirty_iommufd import HwptSource
from migrd.kernel.iommufd import Iommufd
from migrd.kernel.pagemap import tells_of_holes
from tests.contract.dirty_hwpt import FIRST_IOVA, HwptContract, HwptRig, hwpt_rig
from tests.contract.dirty_source import DirtySourceContract, dirty_pages
from tests.contract.dirty_writer import Writer
from tests.fakes.iommufd import MOCK_PAGE_BYTES
from tests.kernel.test_dirty_process import LENGTHS, ProcessRig
from tests.lab.iommufd_test import SelftestKernel

MIB = 1 << 20
MEASURED_BYTES = 64 * MIB


class TestHwpt(HwptContract):
    @pytest.fixture(params=[PAGE_BYTES, 2 * MIB])
    def rig(self, request: pytest.FixtureRequest) -> Iterator[HwptRig]:
        yield from hwpt_rig(SelftestKernel(), request.param)


class TestProcess(DirtySourceContract):
    """On Linux 6.12."""

    @pytest.fixture
    def rig(self) -> Iterator[ProcessRig]:
        with Writer("memfd", LENGTHS) as writer:
            rig = ProcessRig(writer)
            yield rig
            rig.source.close()


def test_discarded_page_tables_are_told_of() -> None:
    sys.stdout.write(f"\nholes told of by the kernel: {tells_of_holes()}\n")
    with Writer("huge", LENGTHS) as writer:
        rig = ProcessRig(writer)
        rig.write(*range(0, 1536, 100))
        rig.source.start_tracking()
        into = DirtyBitmap(rig.memory.pages)
        rig.source.read_and_clear(into)
        into.clear()
        writer.ask("discard", 0, 512, 512)
        rig.source.read_and_clear(into)
        assert set(dirty_pages(into)) >= set(range(512, 1024))
        into.clear()
        rig.source.read_and_clear(into)
        assert dirty_pages(into) == []
        rig.source.close()


@pytest.mark.parametrize("on_loss", [OnLoss.MARK_ALL, OnLoss.RESTART])
def test_rounds_over_two_page_tables_miss_nothing(on_loss: OnLoss) -> None:
    """Random dirt under both, round after round; then one of them is unmapped."""
    chance = np.random.default_rng(5)
    for rig in hwpt_rig(SelftestKernel(), PAGE_BYTES):
        asyncio.run(_rounds(rig, on_loss, chance))


async def _rounds(rig: HwptRig, on_loss: OnLoss, chance: np.random.Generator) -> None:
    harvest = Harvest(rig.memory, [rig.source], on_loss=on_loss)
    await harvest.start()
    harvest.pending.clear()
    for _ in range(5):
        written = sorted({int(page) for page in chance.integers(0, 512, 40)})
        mock = [page * PAGE_BYTES // MOCK_PAGE_BYTES for page in written]
        rig.kernel.make_dirty(rig.vmm.fileno(), rig.hwpt_id, FIRST_IOVA, mock)
        await harvest.round()
        assert dirty_pages(harvest.pending) == written
        harvest.pending.clear()
    rig.lose()
    round_ = await harvest.round()
    assert round_.sources[0].outcome in (ReadOutcome.MARKED_ALL, ReadOutcome.RESTARTED)
    assert harvest.pending.count() == rig.memory.full().count()
    await harvest.stop()


@pytest.mark.parametrize("share", [0.0, 0.01, 1.0])
def test_what_a_harvest_of_a_page_table_costs(share: float) -> None:
    """Printed, for README: the mock's walk says nothing about hardware, and is the bulk of it."""
    kernel = SelftestKernel()
    with Iommufd.adopt(kernel.open(), kernel.ioctl) as vmm:
        ioas = vmm.allocate_ioas()
        device = kernel.mock_device(vmm.fileno(), ioas.id)
        hwpt = vmm.allocate_hwpt(device.dev_id, ioas, dirty_tracking=True)
        kernel.attach(vmm.fileno(), device.stdev_id, hwpt.id)
        ioas.map(mmap.mmap(-1, MEASURED_BYTES), FIRST_IOVA)
        memory = MemoryMap.of([(0, 0, MEASURED_BYTES)])
        source = HwptSource.handed_over(
            vmm.fileno(), hwpt.id, [IovaPiece(FIRST_IOVA, MEASURED_BYTES, 0)], PAGE_BYTES, "iommu"
        )
        source.start_tracking()
        pages = int(memory.pages * share)
        if pages:
            step = memory.pages // pages
            mock = [page * PAGE_BYTES // MOCK_PAGE_BYTES for page in range(0, memory.pages, step)]
            kernel.make_dirty(vmm.fileno(), hwpt.id, FIRST_IOVA, mock)
        into = DirtyBitmap(memory.pages)
        began_s = time.perf_counter()
        told = source.read_and_clear(into)
        took_ms = (time.perf_counter() - began_s) * 1e3
        assert told.dirty_pages >= pages
        per_gib = took_ms * (1 << 30) / MEASURED_BYTES
        sys.stdout.write(f"\n{share:.0%} dirty: {per_gib:.0f} ms per GiB\n")
        source.close()
