"""QEMU's own trace of what it did, and when: the witness that belongs to neither driver.

Lines of its `log` back end with `-msg timestamp=on`: `<pid>@<seconds>.<microseconds>:<event> ...`,
on the wall clock of this machine, as are the API's times and the log's.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_LINE = re.compile(r"\d+@(\d+\.\d+):(\w+) ?(.*)")


@dataclass(frozen=True)
class Traced:
    """One event."""

    wall_s: float
    event: str
    rest: str


def read_trace(path: Path, since_wall_s: float) -> "Trace":
    """The trace of one QEMU from a moment on. Blocking."""
    return Trace([one for one in _lines(path.read_text()) if one.wall_s >= since_wall_s])


def _lines(text: str) -> Iterator[Traced]:
    for match in _LINE.finditer(text):
        yield Traced(float(match[1]), match[2], match[3])


class Trace:
    """Asked for the first time that something happened. Raises AssertionError if it did not."""

    def __init__(self, lines: list[Traced]) -> None:
        self.lines = lines

    def first(self, event: str, rest: str = "") -> float:
        for line in self.lines:
            if line.event == event and rest in line.rest:
                return line.wall_s
        raise AssertionError(f"no {event} {rest} in the trace")

    def status(self, status: str) -> float:
        """When the migration entered a status."""
        return self.first("migrate_set_state", f"new state {status}")

    def stopped(self) -> float:
        return self.first("vm_state_notify", "running 0")

    def resumed(self) -> float:
        return self.first("vm_state_notify", "running 1")
