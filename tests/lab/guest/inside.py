"""pytest's plugin within a lab guest: brings each report out, and watches the kernel's log.

Loaded by tests/lab/boot.py (`-p`), never outside. outside.py reads the reports.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator

import pytest

from tests.lab.boot import SHARE_IN_GUEST

_ALARM = re.compile(r"WARNING: |BUG: |Oops|general protection|UBSAN|refcount_t|hung task")
# The mock IOMMU's own: writes played with it while QEMU reads and clears meet without a lock, and
# it warns once when one of them finds the entry changed. No bit is lost by that.
_OF_THE_MOCK = re.compile(r"at .*(selftest\.c|iommufd_test\+|mock_domain_\w+\+)")
_RECORD_BYTES = 8192


class Reports:
    """Writes every report of this run into the share, as it comes."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        text = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        with (SHARE_IN_GUEST / "reports").open("a") as reports:
            reports.write(json.dumps(text, default=str) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Reports(config))


@pytest.fixture(autouse=True)
def _kernel_does_not_complain() -> Iterator[None]:
    """A warning or an oops fails the test that brought it about."""
    log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    try:
        os.lseek(log, 0, os.SEEK_END)
        yield
        new = list(_records(log))
    finally:
        os.close(log)
    alarms = [line for line in new if _ALARM.search(line) and not _OF_THE_MOCK.search(line)]
    assert not alarms, "the kernel says:\n" + "\n".join(new)


def _records(log: int) -> Iterator[str]:
    while True:
        try:
            record = os.read(log, _RECORD_BYTES)
        except BlockingIOError:
            return
        except BrokenPipeError:  # so many that the oldest were overwritten: go on with the rest
            continue
        yield record.decode(errors="replace").partition(";")[2].strip()
