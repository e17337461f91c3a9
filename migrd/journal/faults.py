"""What SQLite's and the system's errors mean for a journal: one JournalError, with the cure."""

import contextlib
import errno
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from migrd.errors import JournalError

_CURES: Final[Mapping[str, tuple[str, str]]] = {
    "SQLITE_FULL": (
        "journal_disk_full",
        "the disk is full: make room; nothing was written, and it works again then",
    ),
    "SQLITE_READONLY": ("journal_read_only", "make the file system and the file writable"),
    "SQLITE_IOERR": ("journal_io_error", "the disk failed: look at the kernel's log"),
    "SQLITE_CORRUPT": ("journal_corrupt", "the file is damaged: restart migrd, it will say more"),
    "SQLITE_NOTADB": ("journal_corrupt", "the file is damaged: restart migrd, it will say more"),
    "SQLITE_BUSY": ("journal_in_use", "another program holds it open: close that"),
    "SQLITE_CANTOPEN": ("journal_no_access", "migrd must be able to read and write it"),
}
_ERRNOS: Final[Mapping[int, str]] = {
    errno.ENOSPC: "SQLITE_FULL",
    errno.EDQUOT: "SQLITE_FULL",
    errno.EROFS: "SQLITE_READONLY",
    errno.EIO: "SQLITE_IOERR",
    errno.EFBIG: "SQLITE_IOERR",
    errno.EACCES: "SQLITE_CANTOPEN",
    errno.EPERM: "SQLITE_CANTOPEN",
}


@contextlib.contextmanager
def journal_error(path: Path) -> Iterator[None]:
    """Turn sqlite3.Error and OSError into a JournalError that names the file."""
    try:
        yield
    except (sqlite3.Error, OSError) as failure:
        raise as_journal_error(path, failure) from failure


def as_journal_error(path: Path, failure: sqlite3.Error | OSError) -> JournalError:
    if isinstance(failure, OSError):
        name = _ERRNOS.get(failure.errno or 0, "")
        what = failure.strerror or str(failure)
    else:
        # extended names, as in SQLITE_IOERR_FSYNC, begin with the plain one
        name = getattr(failure, "sqlite_errorname", None) or ""
        what = f"{failure} ({name})" if name else str(failure)
    plain = "_".join(name.split("_")[:2])
    code, cure = _CURES.get(plain, ("journal_failed", "see the kernel's log and the disk"))
    return JournalError(f"{path}: {what}: {cure}", code=code)
