"""VFIO devices of the e2e tests, and what a test does in their place.

mttys     fresh ones; their IOMMU tracks, or it does not
opened    one that nobody has: its state is set, or it is reset
QemuFds   copies of the descriptors of a running QEMU: through its iommufd a test plays the
          device that writes to memory (Dma), through the device's own it reads and writes the
          device's registers
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from migrd.kernel.iommufd import Iommufd, pidfd_getfd
from migrd.kernel.vfio import VfioDevice
from tests.lab.guest import raw
from tests.lab.guest.raw import MIB, Mtty

DMA_IOVA, DMA_BYTES, DMA_BYTES_PER_S = 16 * MIB, 6 * MIB, 2 * MIB
"""Where the devices of the tests write: memory full of what cannot be compressed, and that the
guest leaves alone."""
IOMMUFD = Path("/dev/iommu")
SCRATCH_REGISTER = 7
"""Of the first port of an mtty, in its BAR 0: a byte that is kept and does nothing."""


class QemuFds:
    """Copies of a QEMU's descriptors; see the module. Let go of by `with`, or with the test."""

    def __init__(self, pid: int) -> None:
        self._pidfd = os.pidfd_open(pid)
        self._pid = pid
        self._held = contextlib.ExitStack()
        self._held.callback(os.close, self._pidfd)

    def __enter__(self) -> QemuFds:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._held.close()

    def of(self, node: Path) -> list[int]:
        """Copies of those that are open on a character device, by QEMU's own numbers."""
        found = []
        for entry in sorted(Path(f"/proc/{self._pid}/fd").iterdir(), key=lambda one: int(one.name)):
            if _target(entry) == str(node):
                found.append(pidfd_getfd(self._pidfd, int(entry.name)))
                self._held.callback(os.close, found[-1])
        return found

    def iommufd(self) -> raw.Iommufd:
        """The first one. Not to be closed by itself."""
        return raw.Iommufd(self.of(IOMMUFD)[0])

    def register(self, mtty: Mtty) -> int:
        return os.pread(self.of(mtty.node)[0], 1, SCRATCH_REGISTER)[0]

    def set_register(self, mtty: Mtty, value: int) -> None:
        os.pwrite(self.of(mtty.node)[0], bytes([value]), SCRATCH_REGISTER)


class Dma:
    """A device that writes DMA_BYTES_PER_S, round and round: `async with Dma(iommufd, hwpt)`."""

    def __init__(self, iommufd: raw.Iommufd, hwpt: int) -> None:
        self._iommufd = iommufd
        self._hwpt = hwpt
        self._task: asyncio.Task[None] | None = None
        self._at = 0

    async def _write(self) -> None:
        before_s = time.monotonic()
        while True:
            await asyncio.sleep(0.1)
            now_s = time.monotonic()
            pages = int((now_s - before_s) * DMA_BYTES_PER_S) // mmap.PAGESIZE
            before_s = now_s
            with contextlib.suppress(OSError):  # EINVAL while tracking is off
                await asyncio.to_thread(self._write_pages, pages)

    def _write_pages(self, pages: int) -> None:
        left = min(pages * mmap.PAGESIZE, DMA_BYTES)
        while left:
            piece = min(left, DMA_BYTES - self._at)
            self._iommufd.make_dirty(self._hwpt, DMA_IOVA + self._at, piece)
            self._at = (self._at + piece) % DMA_BYTES
            left -= piece

    async def __aenter__(self) -> Dma:
        self._task = asyncio.create_task(self._write())
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.wait([self._task])


@contextlib.contextmanager
def opened(mtty: Mtty) -> Iterator[VfioDevice]:
    """A device that nobody else has."""
    with Iommufd.open() as iommufd, VfioDevice.open(str(mtty.node), mtty.sysfs.name) as device:
        device.bind(iommufd.fileno())
        yield device


@contextlib.contextmanager
def mttys(*tracked: bool) -> Iterator[Sequence[Mtty]]:
    """Fresh devices, one for each answer to: can its IOMMU track?"""
    with contextlib.ExitStack() as held:
        yield [held.enter_context(raw.mtty(tracked=one)) for one in tracked]


def held_by(pid: int, node: Path) -> int:
    """How many descriptors a process has open on a character device."""
    return sum(_target(entry) == str(node) for entry in Path(f"/proc/{pid}/fd").iterdir())


def _target(link: Path) -> str:
    with contextlib.suppress(FileNotFoundError):
        return os.readlink(link)
    return ""
