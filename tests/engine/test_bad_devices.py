"""Every kind of device that cannot be given to a VM: refused when the VM is defined, and when it is
plugged into one that runs, by the device's name, with the reason and the cure; nothing is touched.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

from migrd.core.devices import Capability, DeviceMigration, Inventory, Unknown
from migrd.core.tracking import TrackingPolicy
from migrd.engine.ports import StoredVm
from migrd.engine.service import PlugRequest
from migrd.errors import Refused
from tests.engine.passthrough import (
    GPU,
    NIC,
    NIC2,
    hardware,
    hosts,
    immovable,
    nic,
    spec_of,
    start,
    untouched,
    untracked,
    with_kernel,
)
from tests.fakes.virtual_time import until
from tests.fakes.world import VM, Pair

NOWHERE = "0000:99:00.0"
TOGETHER: dict[str, Any] = {"iommu_group": 50}


@dataclass(frozen=True)
class Case:
    """What is wrong with one device, and the words that say it."""

    host: Inventory
    code: str
    why: str
    cure: str
    address: str = NIC
    names: str = NIC
    policy: TrackingPolicy | None = None


def unknown(reason: Unknown, detail: str = "") -> Capability:
    return Capability.unknown(reason, detail)


NO_DRIVER: dict[str, Any] = {
    "vfio_cdev": None,
    "migration": DeviceMigration(unknown(Unknown.DRIVER_NOT_BOUND)),
}
CASES = {
    "unknown": Case(
        hardware(),
        "unknown_device",
        "no device of this host",
        "migrd devices",
        address=NOWHERE,
        names=NOWHERE,
    ),
    "another driver": Case(
        hardware(nic(driver="mlx5_core", **NO_DRIVER)),
        "driver_not_bound",
        "is bound to mlx5_core",
        "driver_override to vfio-pci",
    ),
    "no driver": Case(
        hardware(nic(driver=None, **NO_DRIVER)),
        "driver_not_bound",
        "has no driver",
        "driver_override to vfio-pci",
    ),
    "others have it": Case(
        hardware(nic(dma_logging=unknown(Unknown.IN_USE, "another process has it open"))),
        "in_use",
        "another process has it open",
        "take it away from whoever has it open",
    ),
    "part of a group": Case(
        hardware(
            nic(NIC, **TOGETHER, group_devices=(NIC2,)),
            nic(NIC2, **TOGETHER, group_devices=(NIC,), driver="mlx5_core", vfio_cdev=None),
        ),
        "in_group_with_others",
        f"IOMMU group 50 together with {NIC2}",
        "give the VM all of the group",
    ),
    "its node is not permitted": Case(
        hardware(nic(dma_logging=unknown(Unknown.NO_PERMISSION, "EACCES"))),
        "no_permission",
        "may not be opened (EACCES)",
        "group and mode of the device node",
    ),
    "/dev/iommu is not permitted": Case(
        with_kernel(hardware(nic()), iommufd=unknown(Unknown.NO_PERMISSION, "0600 root")),
        "no_permission",
        "may not be opened (0600 root)",
        "group and mode of the device node",
        names="/dev/iommu",
    ),
    "/dev/iommu is not there": Case(
        with_kernel(hardware(nic()), iommufd=Capability.probed(False, "no /dev/iommu")),
        "iommu_no_dirty_tracking",
        "cannot request dirty tracking of an IOMMU",
        "a kernel with iommufd",
        policy=TrackingPolicy.REQUIRE,
    ),
    "behind no IOMMU": Case(
        hardware(nic(iommu_dirty_tracking=unknown(Unknown.NO_IOMMU))),
        "no_iommu",
        "behind no IOMMU",
        "switch the IOMMU on",
    ),
    "untracked under require": Case(
        hardware(untracked(NIC)),
        "iommu_no_dirty_tracking",
        "cannot track dirty pages",
        "use a device behind an IOMMU that can",
        policy=TrackingPolicy.REQUIRE,
    ),
    "immovable under require": Case(
        hardware(immovable(NIC)),
        "device_no_migration",
        "does not support VFIO migration",
        "bind a driver of its vendor that supports migration",
        policy=TrackingPolicy.REQUIRE,
    ),
}
ASKED_ANEW = {
    "others have it",
    "its node is not permitted",
    "/dev/iommu is not there",
    "behind no IOMMU",
}
"""What a plug asks the kernel for, and the kernel here says otherwise."""


def check(refused: Refused, case: Case) -> None:
    said = [one.message for one in refused.violations if one.code == case.code]
    assert said, [(one.code, one.message) for one in refused.violations]
    assert case.names in said[0]
    assert case.why in said[0]
    assert case.cure in said[0]


@pytest.mark.parametrize("name", CASES)
async def test_a_vm_with_it_is_not_defined(name: str) -> None:
    case = CASES[name]
    async with hosts(case.host) as pair:
        with pytest.raises(Refused) as refused:
            await start(pair, case.address, policy=case.policy)
        check(refused.value, case)
        assert untouched(pair)
        assert pair.hardware["alpha"].probes in ([], [case.address]), "asked at most"
        assert pair.alpha.service.vms()[1] == []


@contextlib.asynccontextmanager
async def running(more: Inventory, policy: TrackingPolicy | None = None) -> AsyncIterator[Pair]:
    """A VM with a device, on a host that has `more`; it is untouched at the end."""
    device = nic(GPU, iommu_group=60, vfio_cdev="/dev/vfio/devices/vfio60")
    async with hosts(hardware(device)) as pair:
        await start(pair, GPU, policy=policy)
        before = pair.alpha.service.vm(VM)
        pair.hardware["alpha"].show(replace(more, devices={**more.devices, GPU: device}))
        yield pair
        now = pair.alpha.service.vm(VM)
        assert (now.spec, now.decision) == (before.spec, before.decision)
        assert set(pair.hosts["alpha"].qemu(VM).devices) == {"hostdev0"}
        assert len(pair.hardware["alpha"].opened) == 1, "nothing more was opened"


@pytest.mark.parametrize("name", [name for name in CASES if name not in ASKED_ANEW])
async def test_it_is_not_plugged_into_a_vm_that_runs(name: str) -> None:
    case = CASES[name]
    async with running(case.host, case.policy) as pair:
        with pytest.raises(Refused) as refused:
            await pair.alpha.service.plug_device(VM, PlugRequest(case.address), by="test")
        check(refused.value, case)


@pytest.mark.parametrize("how", ["others have it", "its node is not permitted"])
async def test_what_the_kernel_says_no_to_is_not_plugged(how: str) -> None:
    unasked = unknown(Unknown.NOT_PROBED)
    async with running(hardware(nic(dma_logging=unasked))) as pair:
        if how == "others have it":
            pair.hardware["alpha"].foreign[NIC] = "QEMU 4711 of somebody else"
        else:
            pair.hardware["alpha"].denied = True
        with pytest.raises(Refused) as refused:
            await pair.alpha.service.plug_device(VM, PlugRequest(NIC), by="test")
        case = CASES[how]
        (said,) = [one.message for one in refused.value.violations if one.code == case.code]
        assert NIC in said
        assert case.cure in said


async def test_a_device_that_goes_away_after_it_was_decided_about_is_named_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with hosts(hardware(nic(), nic(NIC2))) as pair:
        service, journal = pair.alpha.service, pair.alpha.journal
        inventory, put = pair.hardware["alpha"].inventory, pair.alpha.journal.put_vm
        await service.define_vm(spec_of(NIC, NIC2), dry_run=False)

        async def and_then_it_goes(vm: StoredVm) -> None:
            await put(vm)
            inventory.unplug(NIC2)
            await until(lambda: NIC2 not in inventory.current.devices)

        monkeypatch.setattr(journal, "put_vm", and_then_it_goes)
        with pytest.raises(Refused) as refused:
            await service.start_vm(VM)
        (said,) = refused.value.violations
        assert said.code == "unknown_device"
        assert NIC2 in said.message
        assert "migrd devices" in said.message
        assert untouched(pair)
