"""Makes each test below guest/ a test of the run outside: boots its tier, takes its result.

    collected outside:  guest/vfio/test_x.py::test_a, test_b     replaced by GuestTest items
    the first one runs: boot.run_pytest("vfio", [all selected])  one boot for the tier
    each one:           its reports from inside -> passed, or failed with its traceback

Selecting by path, `-k` or `-m` works as ever: only what is selected runs in the guest. Counts are
honest: what was skipped, never reported, or ran in a guest that died, failed.

Rules:
1. A GuestTest has none of its function's fixtures: they belong into the guest.
2. Guests come last and one after the other, in the group of the tests with a QEMU: two emulated
   processors keep the machine busy, and the kernel may still be building meanwhile.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from typing import Any, TypeAlias

import pytest

from tests.lab.boot import GUEST, RUN_LIMIT_S, TIERS, Outcome, run_pytest
from tests.lab.kernel.build import LIMIT_S as BUILD_LIMIT_S
from tests.setup.debian import SetUpError

Report: TypeAlias = pytest.TestReport | pytest.CollectReport
BOOTS_A_GUEST = (
    pytest.mark.guest,
    pytest.mark.real,
    pytest.mark.timeout(BUILD_LIMIT_S + RUN_LIMIT_S),  # the first one waits for the kernel
)
_BOOTS = pytest.StashKey[dict[str, "Results"]]()


class FailedInGuest(Exception):
    """What a test in the guest failed with; the text is shown as it is."""


class Results:
    """What one boot brought back, by the id of the test inside."""

    def __init__(self, config: pytest.Config, outcome: Outcome) -> None:
        self.outcome = outcome
        self._reports: dict[str, list[Report]] = {}
        for line in outcome.reports.splitlines():
            report = config.hook.pytest_report_from_serializable(
                config=config, data=json.loads(line)
            )
            self._reports.setdefault(report.nodeid, []).append(report)
        self._has_told = False

    def failure(self, guest_id: str) -> str | None:
        """Why the test did not pass, or None if it did."""
        reports = self._reports.get(guest_id, [])
        bad = [report for report in reports if report.outcome != "passed"]
        if bad:
            return "\n".join(map(_text, bad))
        if [report.when for report in reports] == ["setup", "call", "teardown"]:
            return None
        told, self._has_told = self._has_told, True
        why = "see the first of this tier" if told else self.outcome.story()
        return f"the guest did not report the end of this test: {why}"

    def sections(self, guest_id: str) -> Iterable[tuple[str, str]]:
        for report in self._reports.get(guest_id, [])[-1:]:
            yield from report.sections


class GuestTest(pytest.Item):
    """A test that runs in a guest; here it takes its result."""

    def __init__(self, *, tier: str | None, original: pytest.Item, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.tier = tier
        self.guest_id = original.nodeid
        self._where = original.reportinfo()

    def reportinfo(self) -> tuple[os.PathLike[str] | str, int | None, str]:
        return self._where

    def runtest(self) -> None:
        if self.tier is None:
            raise FailedInGuest(f"in which guest? Move the file into one of {', '.join(TIERS)}")
        results = self._results(self.tier)
        for title, text in results.sections(self.guest_id):
            self.add_report_section("call", f"{title} in the guest", text)
        failure = results.failure(self.guest_id)
        if failure is not None:
            raise FailedInGuest(failure)

    def _results(self, tier: str) -> Results:
        boots = self.config.stash.setdefault(_BOOTS, {})
        if tier not in boots:
            ids = [
                item.guest_id
                for item in self.session.items
                if isinstance(item, GuestTest) and item.tier == tier
            ]
            try:
                outcome = run_pytest(tier, ids)
            except SetUpError as error:
                raise FailedInGuest(f"there is no lab on this machine: {error}") from error
            boots[tier] = Results(self.config, outcome)
        return boots[tier]

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        if isinstance(excinfo.value, FailedInGuest):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)


def hand_over(items: list[pytest.Item]) -> None:
    """Put GuestTests, last, in the place of the functions below guest/."""
    own = [item for item in items if not item.path.is_relative_to(GUEST)]
    own.sort(key=lambda item: any(item.iter_markers("guest")))  # these boot one by themselves
    guests = [_stand_in(item) for item in items if item.path.is_relative_to(GUEST)]
    order = {tier: number for number, tier in enumerate(TIERS)}
    guests.sort(key=lambda guest: order.get(guest.tier or "", -1))
    items[:] = [*own, *guests]


def _stand_in(item: pytest.Item) -> GuestTest:
    assert item.parent is not None
    directory = item.path.relative_to(GUEST).parts[0]
    tier = directory if directory in TIERS else None
    guest: GuestTest = GuestTest.from_parent(item.parent, name=item.name, tier=tier, original=item)
    guest.own_markers = [mark for mark in item.own_markers if mark.name != "timeout"]
    for mark in BOOTS_A_GUEST:
        guest.add_marker(mark)
    return guest


def _text(report: Report) -> str:
    if report.outcome == "skipped":
        return f"skipped in the guest, where nothing may be: {report.longrepr}"
    return f"in the guest, {report.when}:\n{report.longreprtext}"
