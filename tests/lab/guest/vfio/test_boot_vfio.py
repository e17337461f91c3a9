"""The vfio tier is what it says, before anything of migrd is tested in it."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from tests.lab.guest.raw import CAN_TRACK, Iommufd, Vfio, bound_to_vfio, mtty, nics


def group(device: Path) -> str:
    return os.path.basename(os.path.realpath(device / "iommu_group"))


def test_there_is_an_emulated_vt_d_with_its_registers_in_sysfs() -> None:
    units = {unit.name: unit for unit in Path("/sys/class/iommu").iterdir()}
    assert set(units) == {"dmar0", "iommufd_selftest_iommu.0"}, "and the mock one, of no use here"
    assert int((units["dmar0"] / "intel-iommu" / "ecap").read_text(), 16)


def test_there_are_four_nics_two_of_them_in_one_group() -> None:
    models = [(nic / "device").read_text().strip() for nic in nics()]
    assert sorted(models) == ["0x10c9", "0x10d3", "0x10d3", "0x10d3"]
    assert sorted(Counter(map(group, nics())).values()) == [1, 1, 2]


def test_a_nic_given_to_vfio_binds_and_its_iommu_cannot_track_dirty_pages() -> None:
    with bound_to_vfio(nics()[0]) as node:
        iommufd, device = Iommufd(), Vfio(node)
        assert not iommufd.capabilities(device.bind(iommufd)) & CAN_TRACK
        device.close()
        iommufd.close()


def test_the_igb_has_virtual_functions() -> None:
    [physical] = [nic for nic in nics() if (nic / "sriov_totalvfs").exists()]
    assert (physical / "sriov_totalvfs").read_text().strip() == "8"
    before = set(nics())
    with bound_to_vfio(physical):
        (physical / "sriov_numvfs").write_text("2")
        virtual = set(nics()) - before
        assert len(virtual) == 2
        assert {(function / "physfn").resolve() for function in virtual} == {physical.resolve()}
        (physical / "sriov_numvfs").write_text("0")
    assert set(nics()) == before


def test_an_mtty_is_emulated_it_has_no_page_table() -> None:
    with mtty() as mdev:
        iommufd, device = Iommufd(), Vfio(mdev.node)
        dev_id = device.bind(iommufd)
        with pytest.raises(FileNotFoundError):
            iommufd.capabilities(dev_id)
        device.close()
        iommufd.close()


def test_its_timers_come_again_by_themselves() -> None:
    """One that is lost on a busy machine does not leave the guest asleep (tests.lab.boot)."""
    handlers = [
        line.split()[1]
        for line in Path("/proc/timer_list").read_text().splitlines()
        if line.strip().startswith("event_handler:")
    ]
    assert handlers.count("tick_handle_periodic") == os.cpu_count()
