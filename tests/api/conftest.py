"""Every test of the API runs under blockbuster: a blocking call on the event loop fails it."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from blockbuster import blockbuster_ctx

from tests.api.running import Api, running


@pytest.fixture(autouse=True)
def _no_blocking_call() -> Iterator[None]:
    with blockbuster_ctx("migrd"):
        yield


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    """A running API; one VM runs, one is stopped."""
    async with running(tmp_path) as running_api:
        running_api.service.add_vm("web-1")
        running_api.service.add_vm("idle-1", running=False)
        yield running_api
