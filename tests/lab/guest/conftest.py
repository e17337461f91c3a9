"""Outside, the tests below run in a guest (outside.py). Inside, they are ordinary tests."""

from __future__ import annotations

import os

import pytest

from tests.lab.boot import TIER_VARIABLE
from tests.lab.guest import outside


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if TIER_VARIABLE not in os.environ:
        outside.hand_over(items)
