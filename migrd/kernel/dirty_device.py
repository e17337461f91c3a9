"""Which pages a device wrote, by its own log (VFIO DMA logging).

Rules
1. The device chooses the page size, no larger than was asked for; it is known once tracking is on,
   and is what each bit is told of as.
2. A report reads and clears, and there is no way to look without: `peek` is KernelUnsupported.
3. After a report that failed the log is not to be trusted: LogLost.
4. A reset of the device ends its log, and some drivers then answer "nothing dirty": whoever passes
   a device promises not to reset it while it is tracked.
5. Ranges that touch are given as one: devices take few (256 for the kernel, some fewer).
"""

import time
from collections.abc import Sequence
from typing import Final

from migrd.core.bitmap import PAGE_BYTES, DirtyBitmap
from migrd.engine.dirty_ports import IovaPiece, PageRun, SourceRead, Tracker
from migrd.errors import KernelError, KernelGone, KernelRejected, KernelUnsupported, LogLost
from migrd.kernel.dirty_pieces import Told, check_pieces, covered, parts_of
from migrd.kernel.vfio import DmaRange, VfioDevice
from migrd.kernel.vfio_calls import LINUX, SystemCalls

AT_ONCE_BYTES: Final = 64 << 30


class DeviceLogSource:
    """A device's log that migrd harvests. A DirtySource."""

    tracker = Tracker.DEVICE

    def __init__(
        self,
        device_fd: int,
        pieces: Sequence[IovaPiece],
        page_size_bytes: int,
        name: str,
        system: SystemCalls = LINUX,
    ) -> None:
        """Of a passed device, which stays its owner's: a duplicate is kept until `close`.
        `page_size_bytes`: wished for. Raises KernelRejected (`bad_ranges`), KernelGone."""
        check_pieces(name, pieces, page_size_bytes)
        self.name = name
        self.page_size_bytes = page_size_bytes
        self.covers: tuple[PageRun, ...] = covered(pieces)
        self._pieces = tuple(pieces)
        self._wished_bytes = page_size_bytes
        self._device = VfioDevice.adopt(device_fd, system)
        self._is_tracking = False

    def start_tracking(self) -> None:
        """Raises KernelUnsupported: it has no log; KernelRejected: not these ranges."""
        ranges = _joined(self._pieces)
        finest = min(_alignment(one.iova | one.length_bytes) for one in ranges)
        self.page_size_bytes = self._device.start_dma_log(ranges, min(self._wished_bytes, finest))
        self._is_tracking = True

    def stop_tracking(self) -> None:
        self._is_tracking = False
        self._device.stop_dma_log()

    def read_and_clear(self, into: DirtyBitmap) -> SourceRead:
        if not self._is_tracking:
            raise KernelRejected(
                f"the DMA log of {self.name} is not on: it would seem all clean",
                code="tracking_is_off",
            )
        began_s, told = time.perf_counter(), Told(into)
        for part, page_size in parts_of(self._pieces, self.page_size_bytes, AT_ONCE_BYTES):
            self._read_part(part, page_size, told, into)
        took_s = time.perf_counter() - began_s
        return SourceRead(self.name, self.tracker, told.dirty_pages, self.page_size_bytes, took_s)

    def _read_part(self, part: IovaPiece, page_size: int, told: Told, into: DirtyBitmap) -> None:
        is_told = False
        try:
            told.of(part)(self._device.read_dma_log(part.iova, part.length_bytes, page_size))
            is_told = True
        except KernelGone:
            raise
        except KernelError as error:
            raise LogLost(
                f"the DMA log of {self.name} is lost: {error.message}", errno=error.errno
            ) from error
        finally:
            if not is_told:  # what the device forgot before it failed, it does not say
                into.mark(part.first_page, part.length_bytes // PAGE_BYTES)

    def peek(self, into: DirtyBitmap) -> SourceRead:
        raise KernelUnsupported(
            f"the DMA log of {self.name} cannot be read without clearing it", code="no_peek"
        )

    def close(self) -> None:
        try:
            self.stop_tracking()
        except KernelError:
            self._is_tracking = False  # it ends with the last descriptor
        finally:
            self._device.close()


def _joined(pieces: Sequence[IovaPiece]) -> list[DmaRange]:
    """By address, those that touch as one."""
    joined: list[DmaRange] = []
    for piece in sorted(pieces, key=lambda piece: piece.iova):
        last = joined[-1] if joined else None
        if last is not None and last.iova + last.length_bytes == piece.iova:
            joined[-1] = DmaRange(last.iova, last.length_bytes + piece.length_bytes)
        else:
            joined.append(DmaRange(piece.iova, piece.length_bytes))
    return joined


def _alignment(value: int) -> int:
    """The largest power of two that divides it, pages at least."""
    return max(PAGE_BYTES, value & -value)
