"""Tests of the simulated arbiter own the time; a real etcd takes its own."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.arbiter.etcd_server import Cluster
from tests.fakes.virtual_time import VirtualTimeLoop


def pytest_asyncio_loop_factories(config: Any, item: Any) -> Mapping[str, Any]:
    if item.path.name in ("test_fake.py", "test_mutants.py", "test_writes.py"):
        return {"virtual": VirtualTimeLoop}
    return {"real": asyncio.new_event_loop}


@pytest.fixture(scope="module")
def single(etcd_binary: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One etcd for a module's tests, which must leave it running and use a prefix each."""
    with Cluster(etcd_binary, tmp_path_factory.mktemp("etcd")).serving() as cluster:
        yield cluster


@pytest.fixture
def trio(etcd_binary: Path, tmp_path: Path) -> Iterator[Cluster]:
    """Three members, for one test, which may do to them what it likes."""
    with Cluster(etcd_binary, tmp_path, members=3).serving() as cluster:
        yield cluster
