"""The QEMUs of the integration tests."""

from pathlib import Path

import pytest


@pytest.fixture(params=["7.2", "10"])
def binary(request: pytest.FixtureRequest, qemu_binaries: dict[str, Path]) -> Path:
    """Each of the two: where versions differ in what they do."""
    return qemu_binaries[request.param]


@pytest.fixture
def newer(qemu_binaries: dict[str, Path]) -> Path:
    return qemu_binaries["10"]


@pytest.fixture
def older(qemu_binaries: dict[str, Path]) -> Path:
    return qemu_binaries["7.2"]
