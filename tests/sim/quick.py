"""`dataclasses.replace` for long runs: the same, without its questions.

Most of the values of a run are made by it. Imported before anything that takes `replace` by name.
"""

from __future__ import annotations

import dataclasses
from typing import Any

_replace = dataclasses.replace
_plain: dict[type, int] = {}
"""Type -> how many fields a plain one has; 0: it is not."""


def _fields_of(of: type) -> int:
    """Their count, where each is given to `__init__`, which does nothing else; else 0."""
    fields = dataclasses.fields(of)
    is_plain = (
        not hasattr(of, "__post_init__")
        and not hasattr(of, "__slots__")
        and all(field.init for field in fields)
    )
    _plain[of] = len(fields) if is_plain else 0
    return _plain[of]


def replace(obj: Any, /, **changes: Any) -> Any:
    of = type(obj)
    count = _plain.get(of)
    if count is None:
        count = _fields_of(of)
    have = obj.__dict__ if count else changes
    if not count or len(have) != count or not changes.keys() <= have.keys():
        return _replace(obj, **changes)
    new = object.__new__(of)
    new.__dict__.update(have)
    new.__dict__.update(changes)
    return new


dataclasses.replace = replace
