"""A VMM of the lab that hands its memory over: CPU writes are real, a mock device plays the DMA.

    CPU     writes through the mapping that its userfaultfd watches; PAGEMAP_SCAN tells of it
    DMA     changes the file behind the CPU's back, then marks the pages in the mock IOMMU's page
            table by the selftest's ioctl; GET_DIRTY_BITMAP tells of it

So each source is blind to the other's writes, as on real hardware. Guest physical addresses are
IOVAs.
"""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable

from migrd.core.memory_map import PAGE_BYTES, MemoryMap
from migrd.direct.gate import Gate
from migrd.direct.guest_memory import GuestRegion, WriteTracking
from migrd.direct.offer import OfferedHwpt, OfferedProcess, OfferedRange, OfferedSource
from migrd.kernel.iommufd import Iommufd
from tests.fakes.iommufd import MOCK_PAGE_BYTES
from tests.lab.iommufd_test import SelftestKernel

MIB = 1 << 20
PIECES = ((0, 16 * MIB, 24 * MIB), (7, 1 << 30, 3 * MIB + 5 * PAGE_BYTES))
"""(id, address, length): two regions far apart, the second one no multiple of 64 pages long."""
PATIENCE_S = 60.0
_MOCK_PAGES = PAGE_BYTES // MOCK_PAGE_BYTES


class Machine:
    """Its memory, its page table, and who writes. Close it."""

    def __init__(self) -> None:
        self.memory = MemoryMap.of(PIECES)
        self.regions = [
            GuestRegion.create(id=id_, gpa=gpa, length_bytes=length) for id_, gpa, length in PIECES
        ]
        self.fds = {one.id: one.fd for one in self.regions}
        self.tracking = WriteTracking()
        self._kernel = SelftestKernel()
        self.iommufd = Iommufd(self._kernel.open())
        self._ioas = self.iommufd.allocate_ioas()
        device = self._kernel.mock_device(self.iommufd.fileno(), self._ioas.id)
        self.hwpt = self.iommufd.allocate_hwpt(device.dev_id, self._ioas, dirty_tracking=True)
        self._kernel.attach(self.iommufd.fileno(), device.stdev_id, self.hwpt.id)
        for one in self.regions:
            self.tracking.watch(one)
            self._ioas.map(memoryview(one.memory), one.gpa)
        self.gate = Gate(is_open=True)
        self._is_over = threading.Event()
        self._threads: list[threading.Thread] = []
        self.written = {"cpu": 0, "dma": 0}

    def close(self) -> None:
        self._is_over.set()
        self.gate.open()
        for thread in self._threads:
            thread.join()
        self.iommufd.close()
        self.tracking.close()
        for one in self.regions:
            os.close(one.fd)

    def sources(self) -> list[OfferedSource]:
        """As its hand-over would have them."""
        places = list(zip(self.memory.regions, self.regions, strict=True))
        by_cpu = [OfferedRange(ours.hva, one.length_bytes, one.first_page) for one, ours in places]
        by_dma = [OfferedRange(one.gpa, one.length_bytes, one.first_page) for one, _ in places]
        iommufd = self.iommufd.fileno()
        return [
            OfferedProcess(self.tracking.pagemap_fd, tuple(by_cpu)),
            OfferedHwpt(iommufd, self.hwpt.id, tuple(by_dma), PAGE_BYTES),
        ]

    def cpu(self, pages: Iterable[int]) -> None:
        """Pages of the merged page space."""
        for page in pages:
            [(region, offset, _)] = self.memory.pieces(page, 1)
            memory = self.regions[self.memory.regions.index(region)].memory
            memory[offset : offset + 8] = random.randbytes(8)
            self.written["cpu"] += 1

    def dma(self, pages: Iterable[int]) -> None:
        """All of them first written, then marked: as a device's write is never seen before."""
        marks = defaultdict(list)
        for page in pages:
            [(region, offset, _)] = self.memory.pieces(page, 1)
            half = random.randrange(_MOCK_PAGES)
            os.pwrite(
                self.fds[region.id], random.randbytes(8), offset + half * MOCK_PAGE_BYTES + 64
            )
            marks[region].append(offset // MOCK_PAGE_BYTES + half)
            self.written["dma"] += 1
        for region, mock_pages in marks.items():
            try:
                fd, hwpt_id = self.iommufd.fileno(), self.hwpt.id
                self._kernel.make_dirty(fd, hwpt_id, region.gpa, mock_pages)
            except OSError as error:
                if error.errno != errno.EINVAL:  # nobody tracks: the write is not noted
                    raise

    def some_pages(self, chance: random.Random, most: int) -> set[int]:
        """Single ones, a run, and now and then the edges."""
        found = set()
        for region in self.memory.regions:
            count = chance.randrange(most)
            found |= {chance.randrange(region.first_page, region.end_page) for _ in range(count)}
            first = chance.randrange(region.first_page, region.end_page)
            found |= set(range(first, min(first + chance.randrange(80), region.end_page)))
            if chance.random() < 0.3:
                found |= {region.first_page, region.end_page - 1}
        return found

    def start_writing(self, seed: int) -> None:
        """A thread of each kind, until `gate` is closed."""
        for number, write in enumerate((self.cpu, self.dma)):
            chance = random.Random(seed + number)
            self._threads.append(
                threading.Thread(target=self._write_on, args=(write, chance), daemon=True)
            )
            self._threads[-1].start()

    def stop_writing(self) -> None:
        """Every write has ended, and is marked, when this returns."""
        self.gate.close(within_s=PATIENCE_S)
        assert all(thread.is_alive() for thread in self._threads), "a writer broke"

    def let_write(self) -> None:
        """Both kinds have written something when this returns."""
        before, until_s = dict(self.written), time.monotonic() + PATIENCE_S
        while any(self.written[kind] <= before[kind] for kind in before):
            assert time.monotonic() < until_s, "nothing is written"
            time.sleep(0.005)

    def _write_on(self, write: Callable[[Iterable[int]], None], chance: random.Random) -> None:
        with self.gate.entered():
            while not self._is_over.is_set():
                write(self.some_pages(chance, 8))
                self._is_over.wait(0.002)
                self.gate.checkpoint()

    def differences(self, region_fds: dict[int, int]) -> list[int]:
        """Pages of the merged page space in which another copy of the memory is not the same."""
        found = []
        for region in self.memory.regions:
            ours = os.pread(self.fds[region.id], region.length_bytes, 0)
            theirs = os.pread(region_fds[region.id], region.length_bytes, 0)
            assert len(ours) == len(theirs) == region.length_bytes
            found += [
                region.first_page + at // PAGE_BYTES
                for at in range(0, region.length_bytes, PAGE_BYTES)
                if ours[at : at + PAGE_BYTES] != theirs[at : at + PAGE_BYTES]
            ]
        return found
