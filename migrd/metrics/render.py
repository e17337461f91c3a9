"""Text exposition of the series that come and go with VMs and migrations.

prometheus_client spends 11 to 18 µs of CPU per series, which at thousands of series stalls the
whole process. Here a line is the family's name, a label part that is built once per label set and
kept, and a number. The bytes are the same as generate_latest's (a test compares them).

    families + rows --render()--> bytes        in a worker thread, never on the event loop

Trap: a worker that only runs Python holds the interpreter for 5 ms at a time (see
sys.setswitchinterval), and the event loop waits for it at each wake-up. So it lets go every few
hundred lines.
"""

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

LINES_AT_A_TIME: Final = 200

LabelValues = tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """One metric: its name, and what `# HELP` and `# TYPE` say of it."""

    name: str
    kind: Literal["gauge", "counter"]
    text: str
    labels: tuple[str, ...] = ()

    @property
    def header(self) -> str:
        text = self.text.replace("\\", r"\\").replace("\n", r"\n")
        return f"# HELP {self.name} {text}\n# TYPE {self.name} {self.kind}\n"


Rows = Mapping[LabelValues, float]
"""Label values, in the order of Family.labels -> value. A mapping: no series twice."""


class Renderer:
    """Renders again and again, keeping what it built for label sets that are still there."""

    def __init__(self) -> None:
        self._prefixes: dict[str, dict[LabelValues, str]] = {}

    def render(self, families: Iterable[tuple[Family, Rows]]) -> bytes:
        """The exposition; series of a family in the order of its rows."""
        parts: list[str] = []
        lines = 0
        for family, rows in families:
            parts.append(family.header)
            kept = self._prefixes.get(family.name, {})
            used: dict[LabelValues, str] = {}
            for values, number in rows.items():
                prefix = kept.get(values) or _prefix(family, values)
                used[values] = prefix
                parts.append(f"{prefix} {go_float(number)}\n")
                lines += 1
                if lines % LINES_AT_A_TIME == 0:
                    time.sleep(0)  # lets the event loop's thread have the interpreter
            self._prefixes[family.name] = used
        return "".join(parts).encode()


def _prefix(family: Family, values: LabelValues) -> str:
    if len(values) != len(family.labels):
        raise ValueError(f"{family.name}: {len(values)} values for labels {family.labels}")
    if not values:
        return family.name
    pairs = sorted(zip(family.labels, values, strict=True))
    inside = ",".join(f'{label}="{_escaped(value)}"' for label, value in pairs)
    return f"{family.name}{{{inside}}}"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def go_float(number: float) -> str:
    """A number as Go prints it, which is what Prometheus' own libraries agree on."""
    number = float(number)
    if math.isnan(number):
        return "NaN"
    if math.isinf(number):
        return "+Inf" if number > 0 else "-Inf"
    if not 1e6 <= number < 1e16:
        return repr(number)  # from 1e16 on Python turns to an exponent by itself
    whole, _, fraction = repr(number).partition(".")
    mantissa = f"{whole[0]}.{whole[1:]}{fraction}".rstrip("0").rstrip(".")
    return f"{mantissa}e+{len(whole) - 1:02d}"
