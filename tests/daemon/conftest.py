"""Fixtures of the daemon's own tests."""

from pathlib import Path

import pytest

from tests.daemon.hosts import Host


@pytest.fixture
def host(short_tmp_path: Path) -> Host:
    return Host(short_tmp_path)
