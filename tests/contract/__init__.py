"""One body per port: it runs on the fake, and on the real thing where there is one."""

import pytest

# Bodies that others import as classes: their assertions too are to say what they compared.
pytest.register_assert_rewrite(
    "tests.contract.iommufd", "tests.contract.iommufd_raw", "tests.contract.vfio"
)
