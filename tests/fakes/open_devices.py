"""A simulator of port OpenDevices: one page table whose devices write, and a VMM that clears.

Time is the loop's: what devices write between two peeks follows from the rate and the time passed.
A peek changes nothing; only `vmm_syncs` clears, as QEMU does at each dirty sync.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from migrd.engine.device_ports import DirtyPeek, HwptRef
from migrd.errors import KernelGone

PAGE = 4096
MIB = 1 << 20


class FakeOpenDevices:
    """Memory at `areas` (iova, length), written round and round at `pages_per_s`."""

    def __init__(
        self,
        areas: Sequence[tuple[int, int]],
        *,
        pages_per_s: float = 0.0,
        entry_bytes: int = PAGE,
        page_cost_s: float = 0.0,
    ) -> None:
        self.areas = list(areas)
        self.pages_per_s = pages_per_s
        self.entry_bytes = entry_bytes
        """Size of the IOMMU's page-table entries: what one write marks dirty."""
        self.page_cost_s = page_cost_s
        self.is_tracking = True
        self.is_gone = False
        self.peeks: list[tuple[int, int]] = []
        self.questions = 0
        self._dirty: set[int] = set()
        self._written_at_s: float | None = None
        self._next = 0
        self._owed = 0.0
        self._exited = asyncio.Event()

    iommufds: Sequence[int] = ()
    device_fds: Mapping[str, int] = {}

    async def hand_over(self) -> None: ...

    async def find_hwpts(self) -> Sequence[HwptRef]:
        if self.is_gone:
            raise KernelGone("the iommufd is closed")
        return [HwptRef(0, 3)]

    async def is_mapped(self, hwpt: HwptRef, iova: int, length_bytes: int) -> bool:
        self.questions += 1
        return self._is_mapped(iova, length_bytes)

    async def peek(
        self, hwpt: HwptRef, iova: int, length_bytes: int, page_size_bytes: int
    ) -> DirtyPeek | None:
        assert iova % page_size_bytes == length_bytes % page_size_bytes == 0
        self._write()
        self.peeks.append((iova, length_bytes))
        if not self._is_mapped(iova, length_bytes):
            return None
        inside = {
            entry * self.entry_bytes + offset
            for entry in self._dirty
            for offset in range(0, self.entry_bytes, min(page_size_bytes, self.entry_bytes))
            if iova <= entry * self.entry_bytes + offset < iova + length_bytes
        }
        dirty = len({address // page_size_bytes for address in inside})
        took_s = length_bytes / PAGE * self.page_cost_s
        return DirtyPeek(hwpt, iova, length_bytes, page_size_bytes, dirty, took_s)

    def let_go_of(self, address: str) -> None: ...

    async def close_at_exit(self, pidfd: int) -> None:
        """A test that needs the end of the process calls `exit`."""
        await self._exited.wait()
        await self.close()

    def exit(self) -> None:
        self._exited.set()

    async def close(self) -> None:
        self.is_gone = True

    def vmm_syncs(self) -> None:
        """QEMU reads and clears."""
        self._write()
        self._dirty.clear()

    def _is_mapped(self, iova: int, length_bytes: int) -> bool:
        return any(a <= iova and iova + length_bytes <= a + n for a, n in self.areas)

    def _write(self) -> None:
        now_s = asyncio.get_running_loop().time()
        last_s, self._written_at_s = self._written_at_s, now_s
        if last_s is None or not self.is_tracking:
            return
        self._owed += (now_s - last_s) * self.pages_per_s
        total_pages = sum(length for _, length in self.areas) // PAGE
        while self._owed >= 1:
            self._owed -= 1
            # 7919 is a prime: neighbours in time are far apart, and no page is left out.
            self._next = (self._next + 7919) % total_pages
            self._dirty.add(self._address(self._next * PAGE) // self.entry_bytes)

    def _address(self, offset: int) -> int:
        for iova, length in self.areas:
            if offset < length:
                return iova + offset
            offset -= length
        raise AssertionError("outside")
