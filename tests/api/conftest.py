"""Every test of the API runs under blockbuster: a blocking call on the event loop fails it."""

from collections.abc import AsyncIterator, Iterator, MutableMapping
from pathlib import Path
from typing import Any

import pytest
from blockbuster import blockbuster_ctx
from structlog.testing import capture_logs

from tests.api.running import Api, running


@pytest.fixture(autouse=True)
def _no_blocking_call() -> Iterator[None]:
    with blockbuster_ctx("migrd"):
        yield


@pytest.fixture(autouse=True)
def logs() -> Iterator[list[MutableMapping[str, Any]]]:
    """What is logged, as values: rendering tracebacks is not the API's part."""
    with capture_logs() as captured:
        yield captured


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    """A running API; one VM runs, one is stopped."""
    async with running(tmp_path) as running_api:
        running_api.service.add_vm("web-1")
        running_api.service.add_vm("idle-1", running=False)
        yield running_api
