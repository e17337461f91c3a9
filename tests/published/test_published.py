"""Each published failure of the table is replanted, and the check that guards against it says so.

    .venv/bin/python -m pytest tests/published -k cloudstack-11286

First the check is played on the code as it is: with the fault, and the right end asserted. Then the
published failure is planted, and the same check has to fail, with the words of its row.
"""

from __future__ import annotations

import re

import pytest

from tests.published.row import Area, Row
from tests.published.table import ROWS

REFERENCE = re.compile(r"[\w.-]+/[\w.-]+(#\d+|@[0-9a-f]{12})")


@pytest.mark.parametrize("row", ROWS, ids=[row.id for row in ROWS])
def test_a_published_failure_is_caught(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    row.check()
    row.plant(monkeypatch)
    with pytest.raises(AssertionError, match=row.caught_as):
        row.check()


def test_the_table_names_where_each_was_published_and_nothing_twice() -> None:
    assert len(ROWS) >= 20
    for row in ROWS:
        assert REFERENCE.fullmatch(row.reference), row.reference
        assert all(text.endswith(".") for text in (row.failed, row.replanted, row.near)), row.id
    for found in ("reference", "id", "failed", "plant", "check"):
        values = [getattr(row, found) for row in ROWS]
        assert len(set(values)) == len(values), f"two rows with the same {found}"
    assert {row.area for row in ROWS} == set(Area), "each promise has a failure to guard against"
