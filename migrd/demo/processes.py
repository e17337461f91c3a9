"""Processes seen from outside, through /proc: who runs, their memory, and standing still.

The proof asks neither QEMU nor migrd: the kernel says how many QEMUs there are, and hands out the
memory of the one that runs the guest (/proc/<pid>/mem, where /proc/<pid>/maps says that as much
memory lies and the guest's own mark stands in it).
"""

import contextlib
import os
import select
import signal
import time
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Final

from migrd.demo.errors import DemoFailed, ProofFailed
from migrd.demo.image import GuestImage
from migrd.demo.memory import compare_range

PROC: Final = Path("/proc")
MARK: Final = b"MIGRDSTA"
MARK_ADDRESS: Final = 0x6000
"""Where guest.S keeps its statistics."""
CHUNK_BYTES: Final = 1 << 20
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


def guests_of(directory: Path) -> list[int]:
    """Pids of the processes that were launched to hand over below `directory`. Blocking."""
    mark = b"MIGRD_SOCKET=" + os.fsencode(directory) + b"/"
    found = []
    for entry in PROC.iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and any(
                word.startswith(mark) for word in (entry / "environ").read_bytes().split(b"\0")
            ):
                found.append(int(entry.name))
    return sorted(found)


def verify_memory_of(pid: int, image: GuestImage, memory_bytes: int, directory: Path) -> int:
    """Compare all of the guest's RAM with the prediction; returns the visits it has made.

    The process is stopped (SIGSTOP) while its memory is copied into a sparse file in `directory`.
    Blocking. Raises ProofFailed.
    """
    copy = directory / f"memory.{pid}"
    try:
        with standing_still(pid):
            _copy_memory(pid, memory_bytes, copy)
        progress = compare_range(image, copy, 0, memory_bytes)
    finally:
        copy.unlink(missing_ok=True)
    return sum(progress.visits)


def _copy_memory(pid: int, memory_bytes: int, copy: Path) -> None:
    with (PROC / str(pid) / "mem").open("rb", buffering=0) as memory, copy.open("wb") as out:
        start = _start_of_ram(pid, memory_bytes, memory)
        memory.seek(start)
        for at in range(0, memory_bytes, CHUNK_BYTES):
            chunk = memory.read(min(CHUNK_BYTES, memory_bytes - at))
            if chunk.count(0) != len(chunk):
                out.seek(at)
                out.write(chunk)
        out.truncate(memory_bytes)


def _start_of_ram(pid: int, memory_bytes: int, memory: FileIO) -> int:
    """Where the guest's RAM lies in the process: as large, and with the guest's mark in it."""
    for line in (PROC / str(pid) / "maps").read_text().splitlines():
        start, _, end = line.split()[0].partition("-")
        first = int(start, 16)
        if int(end, 16) - first < memory_bytes:
            continue
        with contextlib.suppress(OSError):
            memory.seek(first + MARK_ADDRESS)
            if memory.read(len(MARK)) == MARK:
                return first
    raise ProofFailed(f"the guest's memory was not found in process {pid}")


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
    """Kill processes we started, and see them gone with all they held open. Blocking.

    A pidfd tells that the last thread has gone; /proc shows a zombie as soon as the first has, when
    sockets may still be open.
    """
    with contextlib.ExitStack() as stack:
        dying = select.poll()
        left = set()
        for pid in pids:
            with contextlib.suppress(OSError):
                pidfd = os.pidfd_open(pid)
                stack.callback(os.close, pidfd)
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                dying.register(pidfd, select.POLLIN)
                left.add(pidfd)
        give_up_at = time.monotonic() + END_S
        while left and (rest_s := give_up_at - time.monotonic()) > 0:
            for pidfd, _ in dying.poll(rest_s * 1000):
                dying.unregister(pidfd)
                left.discard(pidfd)


def is_daemon_of(pid: int, directory: Path) -> bool:
    """Is it (still) a migrd that serves from below `directory`? Pids are reused."""
    try:
        command = (PROC / str(pid) / "cmdline").read_bytes()
    except OSError:
        return False
    return b"migrd" in command and os.fsencode(directory) in command
