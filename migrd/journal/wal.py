"""Looks at SQLite's write-ahead log before SQLite does, for what SQLite would drop in silence.

On opening, SQLite replays the log up to the first frame whose checksum is wrong and forgets the
rest: right for a tail torn by a power cut, fatal when one flipped bit in the middle takes every
later GRANT with it. So the log is read here first (format: sqlite.org/fileformat2.html, section 4):

    | header | frame | frame* | frame | frame* | frame ....      * ends a commit
      salts    same salts: of this run of the log; other salts: left over from the run before

- Commits after the first bad frame say what it was. There is one writer and it waits for each
  fsync, so a power cut can leave at most one (written, never acknowledged). So can the death of the
  process alone: SQLite writes a frame's header and its page in two calls, over what an older run of
  the log left there, and a kill between the two leaves a commit with another page's content.
- The last good image of page 1 tells the schema version without opening, thus altering, the file.

Costs about 0.2 ms a page; the log is a few hundred pages long as a rule.
"""

import sys
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from struct import Struct
from typing import BinaryIO, Final

_HEADER: Final = Struct(">8I")
_FRAME: Final = Struct(">6I")
_MAGIC_LITTLE: Final = 0x377F0682
_MAGIC_BIG: Final = 0x377F0683
_MASK: Final = 0xFFFFFFFF


class WalCorrupt(Exception):
    """The log is not what SQLite wrote; the message says where."""


@dataclass(frozen=True)
class WalFacts:
    """What replaying the log would give."""

    commits: int = 0
    lost_commits: int = 0
    """Commits that SQLite would drop, being after a bad frame."""
    page_one: bytes | None = None
    """The last committed image of page 1; None when the log holds none."""


@dataclass(frozen=True)
class _Frame:
    page: int
    is_commit: bool
    is_good: bool
    image: bytes


def read_wal(path: Path) -> WalFacts:
    """Blocking. Raises WalCorrupt for a header that SQLite would ignore together with the log."""
    try:
        with path.open("rb") as wal:
            return _scan(wal)
    except FileNotFoundError:
        return WalFacts()


def _scan(wal: BinaryIO) -> WalFacts:
    header = wal.read(_HEADER.size)
    if not header.strip(b"\0"):
        return WalFacts()  # empty, or made longer and never written: nothing was acknowledged
    commits = lost_commits = 0
    page_one = pending_page_one = None
    for frame in _frames(wal, header):
        if not frame.is_good:
            lost_commits += frame.is_commit
            continue
        if frame.page == 1:
            pending_page_one = frame.image
        if frame.is_commit:
            commits += 1
            page_one = pending_page_one
    return WalFacts(commits, lost_commits, page_one)


def _frames(wal: BinaryIO, header: bytes) -> Iterator[_Frame]:
    """All frames; none after the first bad one is good (each checksum builds on the one before).

    What an older run of the log left behind is bad, and no commit of this one.
    """
    if len(header) < _HEADER.size:
        raise WalCorrupt("the header of the log is cut short")
    magic, _, page_bytes, _, salt_1, salt_2, *stored = _HEADER.unpack(header)
    if magic not in (_MAGIC_LITTLE, _MAGIC_BIG):
        raise WalCorrupt("the header of the log is not SQLite's")
    swap = (magic == _MAGIC_BIG) != (sys.byteorder == "big")
    sums = _checksum((0, 0), header[:24], swap)
    if list(sums) != stored:
        raise WalCorrupt("the header of the log does not match its checksum")
    is_good = True
    while len(frame := wal.read(_FRAME.size + page_bytes)) == _FRAME.size + page_bytes:
        page, size_after, one, two, *stored = _FRAME.unpack_from(frame)
        image = frame[_FRAME.size :]
        same_run = (one, two) == (salt_1, salt_2)
        if is_good and same_run:
            sums = _checksum(_checksum(sums, frame[:8], swap), image, swap)
        is_good = is_good and same_run and list(sums) == stored
        yield _Frame(page, same_run and size_after != 0, is_good, image)


def _checksum(sums: tuple[int, int], octets: bytes, swap: bool) -> tuple[int, int]:
    words = array("I", octets)
    if swap:
        words.byteswap()
    first, second = sums
    for at in range(0, len(words), 2):
        first = (first + words[at] + second) & _MASK
        second = (second + words[at + 1] + first) & _MASK
    return first, second
