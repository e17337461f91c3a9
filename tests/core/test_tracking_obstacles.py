"""Every reason not to give a device to a VM: named device, reason and cure, and no launch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from migrd.core.devices import (
    Capability,
    Device,
    DeviceKind,
    DeviceMigration,
    KernelFacts,
    Unknown,
)
from migrd.core.tracking import TrackingPolicy
from migrd.core.vfio_launch import QemuVfioFeature
from tests.core.tracking_cases import QEMU, YES, asked, by_iommu, codes, device, plan


def told(reason: Unknown) -> Capability:
    return Capability.unknown(reason, "detail")


@pytest.mark.parametrize(
    ("facts", "code"),
    [
        ({"driver": "e1000e", "vfio_cdev": None}, "driver_not_bound"),
        ({"driver": None, "vfio_cdev": None}, "driver_not_bound"),
        ({"dma_logging": told(Unknown.IN_USE)}, "in_use"),
        ({"migration": DeviceMigration(told(Unknown.IN_USE))}, "in_use"),
        ({"dma_logging": told(Unknown.NO_PERMISSION)}, "no_permission"),
        ({"iommu_dirty_tracking": told(Unknown.NO_IOMMU)}, "no_iommu"),
        ({"iommu_group": 3, "group_devices": ("0000:01:00.1",)}, "in_group_with_others"),
    ],
)
def test_a_device_that_cannot_be_given_is_refused_by_name_with_a_cure(
    facts: dict[str, Any], code: str
) -> None:
    one = by_iommu("nic0")
    found = plan(replace(one, device=replace(one.device, **facts)), by_iommu("b"))
    (reason,) = found.refused
    assert (reason.code.value, reason.device) == (code, "nic0")
    assert one.device.address in reason.message
    assert reason.cure
    assert found.launch is None


def test_what_the_vm_has_already_is_not_asked_again() -> None:
    one = by_iommu("a", attached=True, driver=None, vfio_cdev=None)
    assert plan(one).refused == ()


def test_a_group_given_whole_or_with_nothing_active_beside_is_fine() -> None:
    pair = [
        by_iommu("a", iommu_group=3, group_devices=(by_iommu("b").device.address,)),
        by_iommu("b", iommu_group=3, group_devices=(by_iommu("a").device.address,)),
    ]
    assert plan(*pair).refused == ()
    bridge = Device("0000:00:1c.0", DeviceKind.VFIO_PCI, driver="pcieport", class_code=0x060400)
    idle = Device("0000:00:1d.0", DeviceKind.VFIO_PCI, class_code=0x020000)
    busy = replace(idle, address="0000:00:1e.0", driver="e1000e")
    near = {one.address: one for one in (bridge, idle, busy)}
    beside = by_iommu("a", iommu_group=3, group_devices=(bridge.address, idle.address))
    assert plan(beside, neighbours=near).refused == ()
    (reason,) = plan(
        by_iommu("a", iommu_group=3, group_devices=tuple(near)), neighbours=near
    ).refused
    assert busy.address in reason.message
    assert bridge.address not in reason.message


def test_one_device_twice_and_one_id_twice_are_refused() -> None:
    one = by_iommu("a")
    assert codes(plan(one, replace(one, id="b")).refused) == {"given_twice"}
    assert codes(plan(one, replace(by_iommu("b"), id="a")).refused) == {"given_twice"}


def kernel(iommufd: Capability = YES, vfio_cdev: Capability = YES) -> KernelFacts:
    return KernelFacts("6.12", iommufd, vfio_cdev)


def test_a_kernel_without_iommufd_or_cdev_leads_to_the_legacy_interface() -> None:
    for facts in (
        kernel(iommufd=Capability.probed(False)),
        kernel(vfio_cdev=Capability.unknown(Unknown.KERNEL_TOO_OLD)),
    ):
        found = plan(by_iommu("a"), kernel=facts)
        assert found.refused == ()
        assert found.launch is not None
        assert found.launch.devices[0].iommufd is None
    bound = by_iommu("a", vfio_cdev=None, driver="mlx5_vfio_pci")
    assert "legacy_interface" in codes(plan(bound).reasons)


def test_an_iommufd_that_may_not_be_opened_is_refused() -> None:
    facts = kernel(iommufd=Capability.unknown(Unknown.NO_PERMISSION, "0600 root"))
    (reason,) = plan(by_iommu("a"), kernel=facts).refused
    assert reason.code.value == "no_permission"
    assert "0600 root" in reason.message
    assert plan(kernel=facts).refused == ()


def test_all_refusals_come_at_once() -> None:
    bad = by_iommu("a", driver=None, vfio_cdev=None, iommu_group=1, group_devices=("x",))
    found = plan(
        bad,
        device("b", migration=DeviceMigration(told(Unknown.IN_USE))),
        policy=TrackingPolicy.REQUIRE,
        forbidden=frozenset({TrackingPolicy.REQUIRE}),
        downtime_limit_s=0.001,
    )
    assert codes(found.refused) >= {
        "policy_forbidden",
        "policy_not_met",
        "downtime_below_floor",
        "driver_not_bound",
        "in_group_with_others",
        "in_use",
    }


def test_a_thousand_devices_are_judged() -> None:
    devices = [by_iommu(f"d{n:03}", iommu=f"iommu{n % 8}") for n in range(1000)]
    devices = [
        replace(one, device=replace(one.device, address=f"0000:{n:03x}:00.0"))
        for n, one in enumerate(devices)
    ]
    found = plan(*devices)
    assert found.refused == ()
    assert len(found.domains) == 8


def test_facts_that_make_no_sense_never_raise() -> None:
    odd = Device("", DeviceKind.VFIO_PCI, iommu="nobody's", group_devices=("",), iommu_group=-1)
    request = asked(replace(by_iommu("a"), device=odd), qemu=frozenset())
    assert plan(*request.devices, qemu=frozenset()).refused
    assert plan(*request.devices, qemu=QEMU - {QemuVfioFeature.IOMMUFD}).refused
