"""QEMU's arguments from a launch: exact, in order, and no value can smuggle a property in."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migrd.core.vfio_launch import GivenBy, VfioLaunch, VfioLaunchDevice, arguments
from migrd.errors import Invalid
from tests.core.tracking_cases import YES, by_iommu, by_log, device, plan

NIC = VfioLaunchDevice("nic", "0000:41:00.2", "iommufd0", GivenBy.FD)
PATH = "/sys/bus/mdev/devices/0d0d0d0d-0000-4000-8000-000000000001"
GPU = VfioLaunchDevice("gpu", "0d0d", "iommufd1", GivenBy.SYSFSDEV, PATH)


def test_objects_come_first_then_devices_in_attach_order() -> None:
    launch = VfioLaunch(("iommufd0", "iommufd1"), iommufds_by_fd=True, devices=(NIC, GPU))
    assert arguments(launch, [7, 8], {"0000:41:00.2": 9}) == [
        *("-object", "iommufd,id=iommufd0,fd=7"),
        *("-object", "iommufd,id=iommufd1,fd=8"),
        *("-device", "vfio-pci,id=nic,fd=9,iommufd=iommufd0"),
        *("-device", f"vfio-pci,id=gpu,sysfsdev={PATH},iommufd=iommufd1"),
    ]


def test_what_the_plan_says_is_what_qemu_is_told() -> None:
    found = plan(by_log("a"), by_iommu("b"), device("m", log=YES, mdev=True))
    assert found.launch is not None
    fds = {one.device.address: 20 + n for n, one in enumerate((by_log("a"), by_iommu("b")))}
    assert arguments(found.launch, [7, 8], fds) == [
        *("-object", "iommufd,id=iommufd0,fd=7"),
        *("-object", "iommufd,id=iommufd1,fd=8"),
        *("-device", "vfio-pci,id=b,fd=21,iommufd=iommufd0,addr=0b.0,migration-events=on"),
        *("-device", "vfio-pci,id=a,fd=20,iommufd=iommufd1,addr=0a.0,migration-events=on"),
        "-device",
        "vfio-pci,id=m,sysfsdev=/sys/bus/mdev/devices/uuid-m,iommufd=iommufd1,addr=16.0,"
        "migration-events=on",
    ]


def test_a_device_may_have_a_place_and_further_properties() -> None:
    placed = replace(
        NIC, guest_bus="pcie.1", guest_address="05.0", properties={"enable-migration": "on"}
    )
    launch = VfioLaunch(("iommufd0",), devices=(placed,))
    assert arguments(launch, [], {"0000:41:00.2": 9})[-1] == (
        "vfio-pci,id=nic,fd=9,iommufd=iommufd0,bus=pcie.1,addr=05.0,enable-migration=on"
    )


def test_without_iommufd_a_device_comes_by_its_host_address() -> None:
    legacy = replace(NIC, iommufd=None, given_by=GivenBy.SYSFSDEV)
    assert arguments(VfioLaunch(devices=(legacy,)), [], {}) == [
        "-device",
        "vfio-pci,id=nic,host=0000:41:00.2",
    ]


@pytest.mark.parametrize(
    ("launch", "iommufds", "devices"),
    [
        (VfioLaunch(("iommufd0",), iommufds_by_fd=True), [], {}),
        (VfioLaunch(("iommufd0",), iommufds_by_fd=True), [7, 8], {}),
        (VfioLaunch(("iommufd0",)), [7], {}),
        (VfioLaunch(devices=(NIC,)), [], {"0000:41:00.3": 9}),
    ],
)
def test_a_missing_or_spare_descriptor_is_refused(
    launch: VfioLaunch, iommufds: list[int], devices: dict[str, int]
) -> None:
    with pytest.raises(Invalid) as refused:
        arguments(launch, iommufds, devices)
    assert refused.value.code == "wrong_descriptors"


@pytest.mark.parametrize("bad", ["a,b", "a\nb", "a\0b", "", "a\x1bb", "a\u2028b", "x" * 1025])
@pytest.mark.parametrize(
    "field",
    ["id", "address", "iommufd", "sysfs_path", "guest_bus", "guest_address", "property"],
)
def test_a_value_that_could_be_more_than_a_value_is_refused(field: str, bad: str) -> None:
    facts: dict[str, Any] = {field: bad} if field != "property" else {"properties": {"x": bad}}
    by = GivenBy.SYSFSDEV if field in ("address", "sysfs_path") else GivenBy.FD
    changed = replace(NIC, given_by=by, **facts)
    with pytest.raises(Invalid) as refused:
        arguments(VfioLaunch(devices=(changed,)), [], {"0000:41:00.2": 9})
    assert refused.value.code == "unsafe_argument"


@pytest.mark.parametrize("name", ["fd", "id", "iommufd", "x,y", "X", "x=y", ""])
def test_a_property_can_neither_repeat_what_is_said_nor_hide_another(name: str) -> None:
    changed = replace(NIC, properties={name: "on"})
    with pytest.raises(Invalid):
        arguments(VfioLaunch(devices=(changed,)), [], {"0000:41:00.2": 9})


@pytest.mark.parametrize("bad", ["0abc", "a b", "a=b", "a,b", "-a", "ä"])
def test_ids_keep_qemus_own_rule(bad: str) -> None:
    with pytest.raises(Invalid):
        arguments(VfioLaunch((bad,)), [], {})
    with pytest.raises(Invalid):
        arguments(VfioLaunch(devices=(replace(NIC, id=bad),)), [], {"0000:41:00.2": 9})


@settings(deadline=None)
@given(st.text(), st.text(), st.text())
def test_whatever_is_put_in_no_argument_has_more_properties_than_it_should(
    id_: str, address: str, place: str
) -> None:
    changed = VfioLaunchDevice(id_, address, None, GivenBy.SYSFSDEV, address, guest_address=place)
    try:
        said = arguments(VfioLaunch(devices=(changed,)), [], {})
    except Invalid:
        return
    assert said[1].split(",") == ["vfio-pci", f"id={id_}", f"sysfsdev={address}", f"addr={place}"]
