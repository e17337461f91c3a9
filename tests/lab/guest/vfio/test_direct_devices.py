"""migrd itself moves the state of the kernel's sample devices (mtty), without any VMM.

The same contract on the simulator: tests/direct/test_device_moving_contract.py.
"""

import contextlib
from collections.abc import Iterator

import pytest

from tests.contract.device_moving import DeviceMovingContract
from tests.lab.guest.vfio.test_mtty import MttyWorld


class TestMtty(DeviceMovingContract):
    @pytest.fixture
    def world(self) -> Iterator[MttyWorld]:
        with contextlib.ExitStack() as mdevs:
            yield MttyWorld(mdevs)
