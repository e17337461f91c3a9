"""A fleet of its own, and a simulated host, for each test."""

from pathlib import Path

import pytest

from tests.fakes.peer import FakePeerService
from tests.peer.fleet import Fleet


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path / "pki")


@pytest.fixture
def service() -> FakePeerService:
    return FakePeerService()
