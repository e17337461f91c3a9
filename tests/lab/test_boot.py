"""The lab's own safety net: what goes wrong in a guest is seen outside, and every boot ends."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.lab import boot
from tests.lab.boot import ROOT, run_command, run_pytest
from tests.lab.guest.outside import BOOTS_A_GUEST, Results
from tests.lab.leaks import processes_naming
from tests.setup.debian import SetUpError

PLANTED = """
import ctypes, pathlib
import pytest

def test_passes(tmp_path):
    print("printed inside")

def test_fails():
    assert "seen" == "expected"

def test_is_skipped():
    pytest.skip("no device")

def test_makes_the_kernel_complain():
    pathlib.Path("/dev/kmsg").write_text("<4>WARNING: CPU: 0 planted\\n")

def test_ends_the_guest():
    ctypes.CDLL(None).reboot(0x01234567)

def test_comes_too_late(): ...
"""


class TestAGuest:
    pytestmark = list(BOOTS_A_GUEST)

    def test_what_is_planted_in_a_guest_is_caught_outside(
        self, tmp_path: Path, pytestconfig: pytest.Config
    ) -> None:
        planted = tmp_path / "test_planted.py"
        planted.write_text(PLANTED)
        started_s = time.monotonic()
        outcome = run_pytest(
            "mock", ["-c", f"{ROOT}/pyproject.toml", "--rootdir", str(tmp_path), str(planted)]
        )
        assert time.monotonic() - started_s < boot.RUN_LIMIT_S / 2, "its end was seen"
        assert outcome.status is None
        results = Results(pytestconfig, outcome)

        def failure(test: str) -> str:
            return results.failure(f"test_planted.py::{test}") or ""

        assert failure("test_passes") == ""
        assert "assert 'seen' == 'expected'" in failure("test_fails")
        assert "no device" in failure("test_is_skipped")
        assert "WARNING: CPU: 0 planted" in failure("test_makes_the_kernel_complain")
        assert "the guest did not finish" in failure("test_ends_the_guest")
        assert "did not report the end" in failure("test_comes_too_late")

    def test_a_guest_that_does_not_end_is_ended(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        outcome = run_command("mock", "sleep 3600", limit_s=3)
        assert outcome.status is None
        assert not processes_naming(tmp_path)


def test_without_root_the_lab_fails_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(SetUpError, match="as root"):
        run_command("mock", "true")


def test_a_usage_mistake_shows_the_tiers(capsys: pytest.CaptureFixture[str]) -> None:
    assert boot.main(["nonesuch"]) == 2
    assert "mock|vfio|e2e" in capsys.readouterr().err
