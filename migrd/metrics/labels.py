"""Label values from a bounded set, whatever comes in.

Each label set is a series that lives as long as the process, here and in every Prometheus that ever
scrapes us. A value from outside (a QMP command, a peer's reason code) may not add series at will.
"""

import re
from collections.abc import Collection
from typing import Final

OTHER: Final = "other"

_CODE: Final = re.compile(r"[a-z][a-z0-9_]{0,47}")


class OneOf:
    """A closed set: what is not in it is `other`."""

    def __init__(self, allowed: Collection[str]) -> None:
        self._allowed = frozenset(allowed)

    def __call__(self, value: object) -> str:
        text = str(value)
        return text if text in self._allowed else OTHER


class AtMost:
    """An open set of codes (snake_case) that is closed once it holds `limit` of them."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._seen: set[str] = set()

    def __call__(self, value: object) -> str:
        text = str(value)
        if text in self._seen:
            return text
        if len(self._seen) >= self._limit or not _CODE.fullmatch(text):
            return OTHER
        self._seen.add(text)
        return text
