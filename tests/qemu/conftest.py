"""Fixtures for the QEMU adapter: a fake QEMU that speaks QMP, and sockets with short paths."""

import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.fakes.qmp_server import FakeQmp


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """A directory whose sockets fit into a sun_path."""
    with tempfile.TemporaryDirectory(prefix="migrd-qmp-") as name:
        yield Path(name)


@dataclass(frozen=True)
class Served:
    """A fake QEMU and the paths of its two monitors."""

    qemu: FakeQmp
    path: Path
    second: Path


@pytest.fixture
async def served(run_dir: Path) -> AsyncIterator[Served]:
    path, second = run_dir / "qmp", run_dir / "oob"
    async with FakeQmp().serving(path, second) as qemu:
        yield Served(qemu, path, second)
