"""One daemon per journal, and a note of how the last one left it.

Beside the journal lies `<journal>.lock`. Whoever holds its flock owns the journal; the kernel lets
go of it when the process ends, however it ends. Its one line is a note for the next owner:

    {"pid": 4711, "state": "open" | "closed"}

    closed  the journal was checkpointed into its one file: that file must be there
    open    the owner did not close it: the write-ahead log must be there too
    (none)  no journal has been made here yet

So a journal that was deleted, or restored without its log, is noticed, instead of being replaced by
an empty one that knows of no guest.
"""

import fcntl
import json
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from migrd.errors import JournalError


@dataclass(frozen=True)
class LastOwner:
    """What the note says; None where there is none."""

    pid: int | None = None
    state: str | None = None


class Ownership:
    """Holds the flock. Blocking; taken and let go in the journal's own thread."""

    def __init__(self, journal: Path) -> None:
        self._path = journal.with_name(journal.name + ".lock")
        self._journal = journal
        try:
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as failure:
            raise JournalError(
                f"{self._path}: {failure.strerror}: the directory of the journal must exist and be"
                " writable for migrd",
                code="journal_no_directory",
            ) from failure
        try:
            self._take()
        except BaseException:
            os.close(self._fd)
            raise
        self.last = self._read()

    def _take(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = self._read().pid
            who = "another process" if pid is None else f"process {pid}"
            raise JournalError(
                f"{self._journal}: in use by {who}: two daemons must not share a journal;"
                " stop that one, or give this one another state directory",
                code="journal_in_use",
            ) from None

    def _read(self) -> LastOwner:
        note = os.pread(self._fd, 4096, 0)
        try:
            said = json.loads(note)
            return LastOwner(int(said["pid"]), str(said["state"]))
        except (ValueError, KeyError, TypeError):
            return LastOwner()  # new, or torn by a power cut while it was made

    def note(self, state: str) -> None:
        """Leave a note for the next owner, durable on return."""
        line = json.dumps({"pid": os.getpid(), "state": state})
        # always as long, so that no old character stays behind a shorter line
        os.pwrite(self._fd, f"{line:<254}\n".encode(), 0)
        os.fsync(self._fd)

    def release(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()
