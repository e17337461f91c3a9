"""The e2e tier is what it says, before anything of migrd is tested in it."""

from __future__ import annotations

import errno
import mmap

import pytest

from tests.lab.guest.raw import CAN_TRACK, DIRTY_TRACKING, Iommufd, Vfio, mtty


def test_an_mtty_has_a_page_table_that_tracks_dirty_pages() -> None:
    with mtty() as mdev:
        iommufd, device = Iommufd(), Vfio(mdev.node)
        dev_id = device.bind(iommufd)
        assert iommufd.capabilities(dev_id) & CAN_TRACK
        ioas = iommufd.ioas()
        hwpt = iommufd.hwpt(dev_id, ioas, DIRTY_TRACKING)
        assert device.attach(hwpt) == hwpt
        memory = iommufd.map(ioas, 0, 64 * mmap.PAGESIZE)
        iommufd.set_tracking(hwpt, True)
        iommufd.make_dirty(hwpt, 0, 3 * mmap.PAGESIZE)
        assert iommufd.peek(hwpt, 0, 64 * mmap.PAGESIZE) == 3
        device.close()
        iommufd.close()
        memory.close()


def test_an_mtty_with_the_agreed_uuid_has_one_that_cannot() -> None:
    with mtty(tracked=False) as mdev:
        iommufd, device = Iommufd(), Vfio(mdev.node)
        dev_id = device.bind(iommufd)
        assert not iommufd.capabilities(dev_id) & CAN_TRACK
        with pytest.raises(OSError, match="not supported") as refused:
            iommufd.hwpt(dev_id, iommufd.ioas(), DIRTY_TRACKING)
        assert refused.value.errno == errno.EOPNOTSUPP
        device.close()
        iommufd.close()
