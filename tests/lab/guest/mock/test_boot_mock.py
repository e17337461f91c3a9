"""The mock tier is what it says, before anything of migrd is tested in it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tests.lab.guest.raw import CAN_TRACK, DIRTY_TRACKING, MIB, NO_DIRTY, Iommufd

MOCK = "iommufd_selftest_iommu.0"


def test_this_is_the_labs_own_kernel() -> None:
    release = os.uname().release
    assert release.startswith("6.12.")
    assert release.endswith("-migrdlab")


def test_no_iommu_but_the_mock_one_is_there() -> None:
    assert [unit.name for unit in Path("/sys/class/iommu").iterdir()] == [MOCK]


def test_a_mock_device_tracks_dirty_pages_and_another_does_not() -> None:
    iommufd = Iommufd()
    ioas = iommufd.ioas()
    _, _, able = iommufd.mock_device(ioas)
    _, _, unable = iommufd.mock_device(ioas, NO_DIRTY)
    assert iommufd.capabilities(able) & CAN_TRACK
    assert not iommufd.capabilities(unable) & CAN_TRACK
    with pytest.raises(OSError, match="not supported") as refused:
        iommufd.hwpt(unable, ioas, DIRTY_TRACKING)
    assert refused.value.errno == errno.EOPNOTSUPP
    hwpt = iommufd.hwpt(able, ioas, DIRTY_TRACKING)
    assert iommufd.peek(hwpt, 0, MIB) == 0
    iommufd.close()


def test_what_tests_write_stays_in_the_guest(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept in memory")
    with pytest.raises(OSError, match="Read-only") as refused:
        Path("/written-by-a-guest").write_text("")
    assert refused.value.errno == errno.EROFS
