"""The doctor on the direct engine: what it says is tried on this very kernel."""

from __future__ import annotations

from pathlib import Path

import pytest

from migrd.config import Settings
from migrd.direct.guest_memory import WriteTracking
from migrd.doctor import direct
from migrd.doctor.direct import look_at_bitmaps, look_at_tracking
from migrd.doctor.finding import Status
from migrd.doctor.software import look_at_profiles


def test_this_kernel_tells_what_a_process_wrote() -> None:
    found = look_at_tracking(is_wanted=True)
    assert found.status is Status.OK, found


def test_a_kernel_that_cannot_is_a_failure_only_where_a_profile_needs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuses(_: WriteTracking) -> None:
        raise OSError(22, "userfaultfd has no WP_ASYNC")

    monkeypatch.setattr(WriteTracking, "__init__", refuses)
    wanted, unwanted = look_at_tracking(is_wanted=True), look_at_tracking(is_wanted=False)
    assert (wanted.status, unwanted.status) == (Status.FAIL, Status.OK)
    assert "WP_ASYNC" in wanted.message
    assert "WP_ASYNC" in unwanted.message
    assert "6.7" in wanted.cure


def test_a_kernel_that_tells_of_the_wrong_pages_is_never_trusted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(direct, "_try", lambda: [0, 2])
    found = look_at_tracking(is_wanted=False)
    assert found.status is Status.FAIL
    assert "[0, 2]" in found.message


def test_bitmaps_without_the_extension_are_told_of_with_the_cure() -> None:
    assert look_at_bitmaps("c").status is Status.OK
    slow = look_at_bitmaps("numpy")
    assert slow.status is Status.WARN
    assert "gcc" in slow.cure


def test_a_host_with_processes_alone_needs_no_qemu(tmp_path: Path) -> None:
    """Profiles of the direct engine count, and what they name is looked at."""
    settings = Settings.model_validate({"host": {"profiles_dir": tmp_path}})
    text = 'engine = "direct"\ndescription = "a guest"\nkind = "k-1"\nmemory_mib = 1\n'
    (tmp_path / "thing.toml").write_text(text + 'command = ["/bin/sh"]\n')
    found = list(look_at_profiles(settings))
    assert [finding.status for finding in found] == [Status.OK, Status.OK]
    (tmp_path / "thing.toml").write_text(text + 'command = ["/no/such/program"]\n')
    _, program = look_at_profiles(settings)
    assert (program.status, program.name) == (Status.FAIL, "program /no/such/program")
