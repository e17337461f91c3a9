"""Simulated devices: of the source's process, and of the destination's."""

from collections.abc import Iterator

import pytest

from tests.direct.device_rig import Rig


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()


@pytest.fixture
def other(rig: Rig) -> Iterator[Rig]:
    other = Rig(rig.kernel)
    yield other
    other.close()
