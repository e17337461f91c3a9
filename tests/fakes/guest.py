"""Ground truth: the guest itself, of which at most one copy may ever run.

Each QEMU that holds the guest's memory holds it as of some version; running makes a new version,
and every other copy is dead data from then on. Whoever runs an old copy, or a second one, or part
of one, or throws the last complete one away, is written down in `violations` at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol


class Holder(Protocol):
    """A QEMU, as its guest sees it."""

    name: str
    """host/pid"""
    host_name: str
    is_dead: bool
    copy: int | None
    """The version of memory it holds; None: not all of any version."""
    missing_from: Holder | None
    """Postcopy: who holds the pages that are still missing here."""


@dataclass
class Run:
    """One stretch of time in which the vCPUs ran on one QEMU."""

    on: str
    host: str
    from_s: float
    until_s: float | None = None


class Guest:
    """One virtual machine's only life."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.version = 0
        self.runs: list[Run] = []
        self.violations: list[str] = []
        self.may_end = False
        """Somebody wants it stopped."""
        self.running_on: Holder | None = None
        self.holders: list[Holder] = []
        self.asked_to_end: Callable[[Holder], None] | None = None
        """Told before a daemon ends the process of one."""

    def violate(self, what: str) -> None:
        """Write down what must never happen."""
        self.violations.append(what)

    def started(self, holder: Holder, at_s: float) -> None:
        """The vCPUs of one QEMU begin to run."""
        other = self.running_on
        if other is not None:
            self.violate(f"I1: runs on {other.name} and now on {holder.name} too")
        if holder.copy != self.version:
            self.violate(
                f"I4: {holder.name} runs version {holder.copy}, the guest is at {self.version}"
            )
        self.running_on = holder
        self.version += 1
        holder.copy = self.version
        self.runs.append(Run(holder.name, holder.host_name, at_s))

    def stopped(self, holder: Holder, at_s: float) -> None:
        """The vCPUs of one QEMU stop; what they wrote last is in this copy alone."""
        if self.running_on is not holder:
            return
        self.running_on = None
        self.version += 1
        holder.copy = self.version
        self.runs[-1].until_s = at_s

    @property
    def whole_copies(self) -> Sequence[Holder]:
        """Living QEMUs from which the guest can go on, as it was last."""
        return [h for h in self.holders if self._is_whole(h)]

    def _is_whole(self, holder: Holder) -> bool:
        rest = holder.missing_from
        is_lost = rest is not None and rest.is_dead
        return not holder.is_dead and holder.copy == self.version and not is_lost

    def check_kept(self, by: str) -> None:
        """After migrd ended a process: the guest must still be somewhere (I2)."""
        if not self.whole_copies and not self.may_end:
            self.violate(f"I2: the last whole copy was destroyed: {by}")

    @property
    def blackouts_s(self) -> list[float]:
        """The gaps between runs."""
        pairs = zip(self.runs, self.runs[1:], strict=False)
        return [b.from_s - a.until_s for a, b in pairs if a.until_s is not None]
