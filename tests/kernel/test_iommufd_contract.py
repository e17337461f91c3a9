"""The iommufd contracts on the simulator."""

from __future__ import annotations

from tests.contract.iommufd import IommufdContract
from tests.contract.iommufd_raw import IommufdRawContract
from tests.kernel.simulated_iommufd import OnTheSimulator


class TestVerbs(OnTheSimulator, IommufdContract):
    pass


class TestAnswers(OnTheSimulator, IommufdRawContract):
    pass
