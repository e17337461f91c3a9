"""Reading an answer that may be newer or older than this program.

The daemon and the command line are upgraded at different times, and a watch lives through an
upgrade. So an answer is not parsed into a closed model here: a field that is missing, of another
type or unknown reads as None, and everything else is still shown. `-o json` passes the answer on
unchanged.
"""

import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Final, TypeAlias

from migrd.cli.text import UNKNOWN, printable

Json: TypeAlias = Mapping[str, "Json"] | Sequence["Json"] | str | int | float | bool | None

_NOTHING: Final[Mapping[str, Json]] = {}


class Seen:
    """One JSON object of an answer. Strings come out harmless (see `text.printable`)."""

    def __init__(self, body: object) -> None:
        self.body: Mapping[str, Json] = body if isinstance(body, Mapping) else _NOTHING

    def __bool__(self) -> bool:
        return bool(self.body)

    def raw(self, key: str) -> str | None:
        """The string itself: for sending back to the daemon, never for printing."""
        value = self.body.get(key)
        return value if isinstance(value, str) else None

    def text(self, key: str, default: str = UNKNOWN) -> str:
        value = self.body.get(key)
        if value is None or value == "":
            return default
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, str | int | float):
            return printable(str(value))
        return default

    def number(self, key: str) -> float | None:
        value = self.body.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        try:
            return float(value) if math.isfinite(value) else None
        except OverflowError:
            return None

    def whole(self, key: str) -> int | None:
        value = self.number(key)
        return None if value is None else int(value)

    def seconds(self, name: str) -> float | None:
        """A duration, whether the API says it in `name_s` or in `name_ms`."""
        in_ms = self.number(f"{name}_ms")
        return in_ms / 1000 if in_ms is not None else self.number(f"{name}_s")

    def moment(self, key: str) -> float | None:
        """An RFC 3339 time as seconds since 1970."""
        try:
            return datetime.fromisoformat(self.raw(key) or "").timestamp()
        except (ValueError, OverflowError, OSError):
            return None

    def flag(self, key: str) -> bool | None:
        value = self.body.get(key)
        return value if isinstance(value, bool) else None

    def part(self, key: str) -> "Seen":
        return Seen(self.body.get(key))

    def parts(self, key: str) -> list["Seen"]:
        value = self.body.get(key)
        if not isinstance(value, Sequence) or isinstance(value, str):
            return []
        return [Seen(item) for item in value if isinstance(item, Mapping)]

    def words(self, key: str) -> list[str]:
        value = self.body.get(key)
        if not isinstance(value, Sequence) or isinstance(value, str):
            return []
        return [printable(str(item)) for item in value if isinstance(item, str | int | float)]

    def pairs(self, key: str) -> dict[str, str]:
        """A mapping of small values, as text."""
        inner = self.part(key)
        return {printable(str(name)): inner.text(name) for name in inner.body}
