"""What a third party must offer to be the arbiter: one key at a time, by compare-and-swap.

    key -> (value, revision)      the revision of a key grows with each change of it, also when it
                                  was removed in between; 0 stands for "there is no such key"

Every call has one of three outcomes: it says what happened, it says that nothing was changed
(`Swapped.is_applied` false), or it raises ArbiterUnavailable, and then nothing is known: a write
may take effect later still.
"""

from dataclasses import dataclass
from typing import Final, Protocol

ABSENT: Final = 0
"""Revision of a key that is not there."""


@dataclass(frozen=True)
class Entry:
    """A key's value, and the revision of the store at its last change."""

    value: bytes
    revision: int


@dataclass(frozen=True)
class Swapped:
    """What came of a compare-and-swap."""

    is_applied: bool
    entry: Entry | None
    """What the key is now; None: it is not there."""


def revision_of(entry: Entry | None) -> int:
    return ABSENT if entry is None else entry.revision


class Store(Protocol):
    """All calls: ArbiterUnavailable."""

    async def get(self, key: str) -> Entry | None:
        """The key now: linearizable, whichever member answers."""

    async def swap(self, key: str, expected: int, value: bytes | None) -> Swapped:
        """Set the key, or remove it (None), if its revision is `expected`. Sent once: never
        repeated by itself when it may have been delivered."""
