"""Processes of the benchmarks: started with a sign that they are ready, and what they cost."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

Child: TypeAlias = "subprocess.Popen[str]"


@contextlib.contextmanager
def helper(module: str, *arguments: str) -> Iterator[Child]:
    """`python -m tests.bench.<module>`, inside once it has printed "ready"; its stdin ends it."""
    command = [sys.executable, "-m", f"tests.bench.{module}", *arguments]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n", f"{module} did not start"
            yield child
        finally:
            assert child.stdin is not None
            child.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(10)
            child.kill()


def ask(child: Child, question: str = "") -> str:
    """One line for one line. Blocking."""
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(question + "\n")
    child.stdin.flush()
    return child.stdout.readline()


def cpu_s(pid: int) -> float:
    """Processor time of all its threads, to the nanosecond; those that have ended are left out."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


def rss_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
