"""What a guest says of its tests, or fails to say, is what the run outside says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lab.boot import GUEST, TIERS, Outcome
from tests.lab.guest.outside import Results

ROOT = Path(__file__).parent.parent.parent
# In the place of a boot: one test passes, one fails, one is skipped, of one nothing is heard.
MADE_UP = """
import json
from pathlib import Path

import pytest

from tests.lab import boot
from tests.lab.guest import outside

OUTCOMES = ["passed", "failed", "skipped"]

def report(guest_id, outcome, when):
    found = {"failed": "it broke here", "skipped": ["file", 1, "Skipped: no device"]}
    return json.dumps({
        "$report_type": "TestReport", "nodeid": guest_id, "location": ["file", 1, "name"],
        "keywords": {}, "outcome": outcome, "longrepr": found.get(outcome), "when": when,
        "sections": [["Captured stdout call", "printed inside"]], "user_properties": [],
    })

def run_pytest(tier, ids):
    lines = []
    for guest_id, outcome in zip(ids, OUTCOMES):
        assert "@" not in guest_id
        for when in ("setup", "call", "teardown"):
            lines.append(report(guest_id, outcome if when == "call" else "passed", when))
    return boot.Outcome(0, 1.0, "its output", "its console", "its log", "\\n".join(lines))

outside.run_pytest = run_pytest
outside.GUEST = Path(__file__).parent / "guest"

@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    outside.hand_over(items)
"""
TESTS = """
import pytest

def test_passes(fixture_of_the_guest): ...
def test_fails(): ...
def test_is_skipped(): ...
def test_is_not_heard_of(): ...
def test_nor_is_this(): ...
"""


def test_counts_are_honest_and_failures_readable(tmp_path: Path) -> None:
    (tmp_path / "made_up.py").write_text(MADE_UP)
    planted = tmp_path / "guest" / "mock" / "test_planted.py"
    planted.parent.mkdir(parents=True)
    planted.write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-p", "made_up", "-p", "no:cacheprovider"]
    command += ["-c", f"{ROOT}/pyproject.toml", "--rootdir", str(tmp_path)]
    done = subprocess.run(
        [*command, "-n1", "--dist=loadgroup", "-v", "-rN", str(planted)],  # the summary repeats
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    out = done.stdout
    assert "4 failed, 1 passed" in out, out + done.stderr
    assert "in the guest, call:\nit broke here" in out
    assert "printed inside" in out
    assert "skipped in the guest, where nothing may be" in out
    assert out.count("--- its console ---\nits console") == 1, "told once, not for each test"


def test_a_test_that_ended_half_way_has_failed(pytestconfig: pytest.Config) -> None:
    def reports(*phases: str) -> str:
        common: dict[str, object] = {
            "$report_type": "TestReport",
            "nodeid": "a",
            "location": ["file", 1, "a"],
        }
        more: dict[str, object] = {"keywords": {}, "outcome": "passed", "longrepr": None}
        return "\n".join(json.dumps({**common, **more, "when": phase}) for phase in phases)

    def failure(text: str) -> str | None:
        outcome = Outcome(None, 2.0, "", "Kernel panic - not syncing", "", text)
        return Results(pytestconfig, outcome).failure("a")

    assert failure(reports("setup", "call", "teardown")) is None
    assert "Kernel panic" in str(failure(reports("setup", "call")))
    assert "Kernel panic" in str(failure(""))


def test_every_test_for_a_guest_says_in_which() -> None:
    astray = [path for path in GUEST.rglob("test_*.py") if path.parent.name not in TIERS]
    assert not astray, f"move them into one of {', '.join(TIERS)}"
