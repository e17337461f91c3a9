"""The iommufd contract on the simulator."""

from __future__ import annotations

import pytest

from tests.contract.iommufd import IommufdContract, Rig
from tests.fakes.iommufd import IommufdKernel


class TestOnTheSimulator(IommufdContract):
    @pytest.fixture
    def rig(self) -> Rig:
        return IommufdKernel()
