"""The doctor on dirty rates: what could never be measured as configured is said, with the cure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from migrd.config import SamplingSettings, Settings
from migrd.doctor.finding import Status
from migrd.doctor.sampling import look_at_sampling


def look(kvm: Path, **given: Any) -> tuple[Status, str, str]:
    settings = Settings(sampling=SamplingSettings(**given))
    found = look_at_sampling(settings, kvm)
    return found.status, found.message, found.cure


@pytest.fixture
def kvm(tmp_path: Path) -> Path:
    path = tmp_path / "kvm"
    path.touch()
    return path


def test_the_defaults_are_fine_with_and_without_kvm(kvm: Path, tmp_path: Path) -> None:
    for device in (kvm, tmp_path / "none"):
        status, message, _ = look(device)
        assert status is Status.OK
        assert message == "page-sampling every 30 s, at most 1 % of a core"


def test_a_dirty_bitmap_without_kvm_is_never_measured(kvm: Path, tmp_path: Path) -> None:
    assert look(kvm, qemu_mode="dirty-bitmap")[0] is Status.OK
    status, _, cure = look(tmp_path / "none", qemu_mode="dirty-bitmap")
    assert status is Status.WARN
    assert "page-sampling" in cure


def test_windows_of_one_length_tell_no_working_set(kvm: Path) -> None:
    status, message, _ = look(kvm, windows_ms=(1000, 1200))
    assert status is Status.WARN
    assert "working set" in message


def test_what_is_switched_off_is_no_trouble(kvm: Path) -> None:
    status, message, _ = look(kvm, qemu_mode="off")
    assert status is Status.OK
    assert "off" in message
