"""A harvest round, as a value: what each source told, what came of it, and what is left to move."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

PAGE_BYTES: Final = 4096
"""That of `core.bitmap`, said again: this module is for those that need no bitmap (nor numpy)."""


class Tracker(StrEnum):
    """Who told which pages were written."""

    IOMMU = "iommu"
    """An I/O page table (HWPT): DMA through the IOMMU."""
    DEVICE = "device"
    """A device's own log of its DMA."""
    PROCESS = "pagemap"
    """Write-protected pages of a process: writes by its threads."""
    VMM = "vmm"
    """The VMM's own dirty log, of which only the count is told."""


class ReadOutcome(StrEnum):
    """What a read came to."""

    READ = "read"
    MARKED_ALL = "marked_all"
    """Its log was lost: all its pages were taken for dirty."""
    RESTARTED = "restarted"
    """Its log was lost: tracking was switched off and on, all its pages were taken for dirty."""
    FAILED = "failed"
    """Its log was lost and the policy is to give up: all its pages were taken for dirty."""


@dataclass(frozen=True)
class SourceRead:
    """What one source told in one round."""

    source: str
    tracker: Tracker
    dirty_pages: int
    """Pages of 4 KiB that it told of, whether or not they were dirty already."""
    page_size_bytes: int
    """What one of its bits stands for."""
    took_s: float
    outcome: ReadOutcome = ReadOutcome.READ
    reason: str | None = None
    """Why its log was lost."""
    dirty_pages_per_s: float | None = None
    """`dirty_pages` over the time since its previous read; None: not read before, or lost."""

    @property
    def dirty_granules(self) -> int:
        """Its own bits that were set."""
        return self.dirty_pages * PAGE_BYTES // self.page_size_bytes

    @property
    def amplification(self) -> float:
        """At most so many times too many bytes are told of: one byte written makes a whole page of
        its size dirty."""
        return max(1.0, self.page_size_bytes / PAGE_BYTES)


@dataclass(frozen=True)
class HarvestRound:
    """All sources of a transfer, read once. Times are time.monotonic()."""

    number: int
    """1 is the first after tracking began."""
    started_s: float
    duration_s: float
    sources: tuple[SourceRead, ...]
    dirty_pages: int
    """Newly pending: told of by any source, and not pending before."""
    pending_pages: int
    """Dirty and not yet handed to the mover, after the round."""
    dirty_pages_per_s: float | None
    """Newly dirtied, over the time since the previous round; None: this is the first."""

    @property
    def bytes_to_move(self) -> int:
        return self.pending_pages * PAGE_BYTES

    @property
    def lost(self) -> tuple[SourceRead, ...]:
        """Sources whose log was lost."""
        return tuple(one for one in self.sources if one.outcome is not ReadOutcome.READ)
