"""The two daemons that the tests of migrd itself share."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from tests.lab.guest.e2e_fleet import Lab, e2e_fleet


@pytest.fixture(scope="session")
def _both_daemons() -> Iterator[Lab]:
    with e2e_fleet() as made:
        yield made


@pytest.fixture
def two(_both_daemons: Lab) -> Iterator[Lab]:
    """Ready, and without a VM. What they log meanwhile is shown with a test that fails."""
    begin = {host: at.log.stat().st_size for host, at in _both_daemons.hosts.items()}
    yield _both_daemons
    for host, at in _both_daemons.hosts.items():
        with at.log.open("rb") as log:
            log.seek(begin[host])
            sys.stdout.write(f"--- {host} ---\n{log.read().decode(errors='replace')}\n")
