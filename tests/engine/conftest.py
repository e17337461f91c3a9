"""The engine's tests own the time: see `tests.fakes.virtual_time`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.fakes.virtual_time import VirtualTimeLoop


def pytest_asyncio_loop_factories(config: Any, item: Any) -> Mapping[str, Any]:
    return {"virtual": VirtualTimeLoop}
