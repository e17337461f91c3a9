"""The iommufd simulator, where a contract or a bench wants a kernel."""

from __future__ import annotations

import pytest

from tests.fakes.iommufd import IommufdKernel


class OnTheSimulator:
    @pytest.fixture
    def kernel(self) -> IommufdKernel:
        return IommufdKernel()

    @pytest.fixture
    def rig(self, kernel: IommufdKernel) -> IommufdKernel:
        return kernel
