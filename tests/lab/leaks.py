"""Finding what a test left behind, by the one mark all its things bear: its directory."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def processes_naming(directory: Path) -> list[str]:
    """Processes, other than this one, whose command line names `directory`; not zombies."""
    needle = os.fsencode(directory)
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):  # it may end while we look
            command = (entry / "cmdline").read_bytes()
            if needle in command:
                words = command.decode(errors="replace").split("\0")
                found.append(f"{entry.name}: {' '.join(words)}")
    return found


def sockets_below(directory: Path) -> list[str]:
    """Unix sockets that are still open and bound to a path below `directory`."""
    with open("/proc/net/unix") as table:
        names = [line.split()[-1] for line in table if "/" in line]
    return sorted({name for name in names if name.startswith(f"{directory}/")})


def open_files() -> dict[int, str]:
    """What this process holds open now, by file descriptor."""
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the descriptor of this very listing
            found[int(entry.name)] = str(entry.readlink())
    return found
