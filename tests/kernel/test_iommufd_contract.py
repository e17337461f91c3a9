"""The iommufd contracts on the simulator."""

from __future__ import annotations

import pytest

from tests.contract.iommufd import IommufdContract
from tests.contract.iommufd_bench import Rig
from tests.contract.iommufd_raw import IommufdRawContract
from tests.fakes.iommufd import IommufdKernel


class OnTheSimulator:
    @pytest.fixture
    def rig(self) -> Rig:
        return IommufdKernel()


class TestVerbs(OnTheSimulator, IommufdContract):
    pass


class TestAnswers(OnTheSimulator, IommufdRawContract):
    pass
