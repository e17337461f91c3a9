"""Tests of the simulated arbiter own the time; a real etcd takes its own."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from tests.fakes.virtual_time import VirtualTimeLoop


def pytest_asyncio_loop_factories(config: Any, item: Any) -> Mapping[str, Any]:
    if item.path.name == "test_fake.py":
        return {"virtual": VirtualTimeLoop}
    return {"real": asyncio.new_event_loop}
