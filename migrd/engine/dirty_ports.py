"""What the harvest asks of those who know which pages were written.

    DirtySource ── start_tracking ── read_and_clear ... read_and_clear ── stop_tracking ── close
                                     peek (changes nothing)

Rules
1. A clearing read destroys what it reads. Everything that `read_and_clear` has cleared in the
   kernel is in `into` when it returns **and when it raises**: merged in the thread that read it.
2. Never silently fewer bits. A source that cannot know what was written since its last read raises
   LogLost; what then happens is the transfer's policy (`OnLoss`), and stands in the record.
3. A source may tell of more than was written, in whole pages of its own size, never of less; and
   never of a page outside `covers`.
4. All calls block, run in a worker thread, and come one at a time for one source.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from migrd.core.bitmap import DirtyBitmap
from migrd.core.harvest_round import ReadOutcome, SourceRead, Tracker

__all__ = ["DirtySource", "OnLoss", "PageRun", "ReadOutcome", "SourceRead", "Tracker"]

PageRun = tuple[int, int]
"""(first page, pages) of the merged page space."""


class OnLoss(StrEnum):
    """What to do when a source's log is lost, or its read fails."""

    MARK_ALL = "mark_all"
    """Take all its pages for dirty and go on."""
    RESTART = "restart"
    """Switch its tracking off and on again, then take all its pages for dirty."""
    GIVE_UP = "give_up"
    """Take all its pages for dirty, and end the round with the error."""


@dataclass(frozen=True)
class IovaPiece:
    """Memory as devices see it, and where it stands in the merged page space."""

    iova: int
    length_bytes: int
    first_page: int


class DirtySource(Protocol):
    """One kernel object that knows which pages were written. Calls block."""

    @property
    def name(self) -> str:
        """For people and records; unique in one transfer."""

    @property
    def tracker(self) -> Tracker: ...

    @property
    def page_size_bytes(self) -> int:
        """What one bit of it stands for: a write of one byte makes as much dirty."""

    @property
    def covers(self) -> tuple[PageRun, ...]:
        """What it watches."""

    def start_tracking(self) -> None:
        """From now on, every write is told of by a later read; what was written before may be too.

        Raises KernelError: it is not tracking then, or may be; `stop_tracking` it.
        """

    def stop_tracking(self) -> None:
        """Idempotent. Raises KernelError."""

    def read_and_clear(self, into: DirtyBitmap) -> SourceRead:
        """OR into `into` what was written since the last read, and forget it.

        `into` has all that was cleared, also when this raises. Raises LogLost: what was written
        since the last read is not known. Raises other KernelErrors.
        """

    def peek(self, into: DirtyBitmap) -> SourceRead:
        """As `read_and_clear`, and nothing is cleared."""

    def close(self) -> None:
        """Gives its descriptors back; tracking is off afterwards. Idempotent."""
