"""Processes seen from outside, through /proc: who runs, their memory, and standing still.

The proof asks neither QEMU nor migrd: the kernel says how many QEMUs there are, and hands out the
memory of the one that runs the guest (its `memory-backend-memfd`, through /proc/<pid>/fd).
"""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from migrd.demo.errors import DemoFailed, ProofFailed
from migrd.demo.image import GuestImage
from migrd.demo.memory import compare_range

PROC: Final = Path("/proc")
MEMFD: Final = "memory-backend-memfd"
STAND_STILL_S: Final = 5.0
END_S: Final = 5.0


def qemus_of(directory: Path) -> list[int]:
    """Pids of the QEMUs that were started with files below `directory`. Blocking."""
    found = []
    for entry in PROC.iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            command = (entry / "cmdline").read_bytes()
            if b"qemu" in command.split(b"\0")[0] and os.fsencode(directory) in command:
                found.append(int(entry.name))
    return sorted(found)


def verify_memory_of(pid: int, image: GuestImage, memory_bytes: int) -> int:
    """Compare all of the guest's RAM with the prediction; returns the visits it has made.

    The process is stopped (SIGSTOP) meanwhile. Blocking. Raises ProofFailed.
    """
    with standing_still(pid):
        progress = compare_range(image, _memory_of(pid), 0, memory_bytes)
    return sum(progress.visits)


def _memory_of(pid: int) -> Path:
    for link in (PROC / str(pid) / "fd").iterdir():
        with contextlib.suppress(OSError):
            if MEMFD in os.readlink(link):
                return link
    raise ProofFailed(f"the memory of process {pid} was not found")


@contextlib.contextmanager
def standing_still(pid: int) -> Iterator[None]:
    """All threads of the process are stopped inside, and go on afterwards."""
    pidfd = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGSTOP)
        _until_stopped(pid)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGCONT)
        os.close(pidfd)


def _until_stopped(pid: int) -> None:
    give_up_at = time.monotonic() + STAND_STILL_S
    while time.monotonic() < give_up_at:
        states = [_state(task) for task in (PROC / str(pid) / "task").iterdir()]
        if all(state in "Tt" for state in states):
            return
        time.sleep(0.002)
    raise DemoFailed(f"process {pid} does not stand still")


def _state(task: Path) -> str:
    """The state letter of proc_pid_stat(5): what follows the name in brackets."""
    return (task / "stat").read_text().rpartition(")")[2].split()[0]


def end(pids: list[int]) -> None:
    """Kill processes we started, and see them gone. Blocking."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, OSError):
            pidfd = os.pidfd_open(pid)
            try:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            finally:
                os.close(pidfd)
    give_up_at = time.monotonic() + END_S
    while time.monotonic() < give_up_at and any(_lives(pid) for pid in pids):
        time.sleep(0.01)


def _lives(pid: int) -> bool:
    try:
        return _state(PROC / str(pid)) != "Z"
    except OSError:
        return False


def is_daemon_of(pid: int, directory: Path) -> bool:
    """Is it (still) a migrd that serves from below `directory`? Pids are reused."""
    try:
        command = (PROC / str(pid) / "cmdline").read_bytes()
    except OSError:
        return False
    return b"migrd" in command and os.fsencode(directory) in command
