"""What tests do to a journal behind its back."""

import contextlib
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

NAME = "journal.db"


def as_after_a_crash(directory: Path, copy: Path) -> Path:
    """The files of an open journal, as the death of its process would leave them; the path."""
    copy.mkdir()
    for file in directory.glob(f"{NAME}*"):
        shutil.copy2(file, copy / file.name)
    return copy / NAME


@contextlib.contextmanager
def altered(path: Path) -> Iterator[sqlite3.Connection]:
    """A closed journal, open to any statement."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        yield connection


def flip(path: Path, at: int) -> None:
    """One bit."""
    octets = bytearray(path.read_bytes())
    octets[at] ^= 0x40
    path.write_bytes(octets)


def contents(directory: Path) -> dict[str, bytes]:
    """All files but the lock, which every attempt to open takes."""
    return {
        file.name: file.read_bytes()
        for file in sorted(directory.iterdir())
        if not file.name.endswith(".lock")
    }
