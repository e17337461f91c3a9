"""What a benchmark comes to: figures, each a ratio in one run, with its bound and its reference.

    Figure   what, ours, the reference's, bound on the ratio (or on the difference, or on ours)
    Table    figures and what else there is to say; as text, as JSON, as Markdown

Only ratios and differences of one run are judged. The absolute value of the reference stands beside
each, to read them by.
"""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Self


@dataclass(frozen=True)
class Move:
    """One migration as its driver saw it; monotonic times."""

    began_s: float
    ended_s: float
    source_pid: int
    destination_pid: int

    @property
    def total_s(self) -> float:
        return self.ended_s - self.began_s


class Judge(StrEnum):
    """What the bound is on."""

    RATIO = "ratio"
    """ours / reference, at most."""
    MORE = "more"
    """ours - reference, at most, in the figure's unit."""
    VALUE = "value"
    """ours itself, at most."""
    FASTER = "faster"
    """reference / ours, at least."""


@dataclass(frozen=True)
class Figure:
    """One line of the table. All values are in `unit`."""

    name: str
    unit: str
    ours: float
    reference: float | None
    reference_name: str
    judge: Judge
    bound: float
    runs: int = 0
    command: str = ""
    """The benchmark it comes from, as `python -m tests.bench` knows it."""

    @property
    def measured(self) -> float:
        """What the bound is on."""
        if self.judge is Judge.VALUE or self.reference is None:
            return self.ours
        if self.judge is Judge.RATIO:
            return self.ours / self.reference
        if self.judge is Judge.FASTER:
            return self.reference / self.ours
        return self.ours - self.reference

    def holds(self, slack: float = 0.0) -> bool:
        """Within its bound, give or take `slack` (0.2: a fifth)."""
        if self.judge is Judge.FASTER:
            return self.measured >= self.bound * (1 - slack)
        return self.measured <= self.bound * (1 + slack)

    @property
    def bound_text(self) -> str:
        match self.judge:
            case Judge.RATIO:
                return f"≤ {self.bound:g} x"
            case Judge.MORE:
                return f"≤ + {self.bound:g} {self.unit}"
            case Judge.VALUE:
                return f"≤ {self.bound:g} {self.unit}"
            case Judge.FASTER:
                return f"≥ {self.bound:g} x cheaper"

    @property
    def measured_text(self) -> str:
        match self.judge:
            case Judge.RATIO:
                return f"{self.measured:.2f} x"
            case Judge.MORE:
                return f"{self.measured:+.1f} {self.unit}"
            case Judge.VALUE:
                return f"{self.measured:.3g} {self.unit}"
            case Judge.FASTER:
                return f"{self.measured:.1f} x cheaper"

    @property
    def reference_text(self) -> str:
        if self.reference is None:
            return self.reference_name or "-"
        return f"{self.reference_name}: {self.reference:.4g} {self.unit}"


@dataclass
class Table:
    """All that a run of benchmarks has to say."""

    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Paragraphs: where the time goes, and, loudly, what could not be measured here."""

    @classmethod
    def of(cls, command: str, runs: int, figures: Sequence[Figure], notes: Sequence[str]) -> Self:
        """Figures of one benchmark."""
        return cls([replace(one, runs=runs, command=command) for one in figures], list(notes))

    def missed(self, slack: float = 0.0) -> list[Figure]:
        return [figure for figure in self.figures if not figure.holds(slack)]

    def add(self, other: "Table") -> None:
        self.figures += other.figures
        self.notes += other.notes

    def text(self) -> str:
        head = ("figure", "bound", "measured", "ours", "reference", "runs", "")
        rows = [head, *(self._row(figure) for figure in self.figures)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        return "\n".join([*lines, *(f"\n{note}" for note in self.notes)])

    def markdown(self) -> str:
        head = (
            "| figure | bound | measured | the reference's own | command |\n|---|---|---|---|---|"
        )
        rows = [
            f"| {f.name} | {f.bound_text} | {f.measured_text} | {f.reference_text} | "
            f"`python -m tests.bench {f.command}` |"
            for f in self.figures
        ]
        return "\n".join([head, *rows])

    def as_json(self) -> dict[str, object]:
        told = [
            {**asdict(figure), "measured": figure.measured, "holds": figure.holds()}
            for figure in self.figures
        ]
        return {"figures": told, "notes": self.notes}

    @staticmethod
    def _row(figure: Figure) -> tuple[str, ...]:
        return (
            figure.name,
            figure.bound_text,
            figure.measured_text,
            f"{figure.ours:.4g} {figure.unit}",
            figure.reference_text,
            str(figure.runs),
            "" if figure.holds() else "MISSED",
        )


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of all do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
