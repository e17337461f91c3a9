"""Ways past what is promised about passthrough devices, each tried: a profile that forbids one, a
device that sysfs does not show for a while, devices that QEMU and the definition do not share, a
daemon that ends in the middle.
"""

from __future__ import annotations

import asyncio
import errno
from typing import Any

import pytest

from migrd.core.devices import Capability, DeviceMigration, Inventory, Unknown
from migrd.core.phases import Phase
from migrd.core.tracking import (
    Migratability,
    StandingObject,
    TrackingPolicy,
    TrackingRequest,
    VmDevice,
    decide,
)
from migrd.core.vfio_launch import QemuVfioFeature
from migrd.engine.service import PlugRequest
from migrd.errors import JournalError, Refused, Unavailable
from tests.engine.passthrough import (
    DISK,
    NIC,
    NIC2,
    hardware,
    hosts,
    nic,
    spec_of,
    start,
    stop,
    told,
    untracked,
)
from tests.fakes.hardware import SimOpenDevices
from tests.fakes.inventory import CAN
from tests.fakes.virtual_time import until
from tests.fakes.world import VM, Pair

NOT_ASKED = Capability.unknown(Unknown.NOT_PROBED)
REEVALUATED_S = 5.0
"""Of virtual time: longer than decisions are looked at again."""
_UNASKED: dict[str, Any] = {"dma_logging": NOT_ASKED, "migration": DeviceMigration(NOT_ASKED)}


async def plug(pair: Pair, address: str) -> None:
    request = PlugRequest(address, None, "rp0", "00.0", accept_lower=True)
    await pair.alpha.service.plug_device(VM, request, by="test")


def verdict(pair: Pair, on: str = "alpha") -> Migratability:
    decision = pair.daemons[on].service.vm(VM).decision
    assert decision is not None
    return decision.plan.migratability


# What the profile forbids


@pytest.mark.parametrize("policy", [None, TrackingPolicy.REQUIRE])
async def test_no_policy_lets_a_device_be_plugged_that_the_profile_forbids(
    policy: TrackingPolicy | None,
) -> None:
    async with hosts(hardware(nic(NIC), nic(NIC2))) as pair:
        pair.hosts["alpha"].allowed_devices["tiny"] = frozenset({NIC})
        await start(pair, NIC, policy=policy)
        with pytest.raises(Refused) as refused:
            await plug(pair, NIC2)
        assert "device_not_allowed" in {code for _, code in told(refused.value)}
        assert set(pair.hosts["alpha"].qemu(VM).devices) == {"hostdev0"}


async def test_a_device_that_the_profile_forbids_is_not_even_asked() -> None:
    async with hosts(hardware(nic(NIC), nic(NIC2, **_UNASKED))) as pair:
        pair.hosts["alpha"].allowed_devices["tiny"] = frozenset({NIC})
        await start(pair, NIC)
        with pytest.raises(Refused):
            await plug(pair, NIC2)
        assert NIC2 not in pair.hardware["alpha"].probes


async def test_a_source_cannot_have_a_device_touched_that_the_profile_here_forbids() -> None:
    async with hosts(hardware(nic(NIC)), hardware(nic(NIC), nic(NIC2, **_UNASKED))) as pair:
        pair.hosts["beta"].allowed_devices["tiny"] = frozenset({NIC})
        await start(pair, NIC)
        view = await pair.migrate(destination_devices={"hostdev0": NIC2})
        assert view.phase == Phase.REFUSED
        assert "device_not_allowed" in {refusal.code for refusal in view.refusals}
        assert NIC2 not in pair.hardware["beta"].probes
        assert pair.hardware["beta"].opened == []


async def test_what_the_profile_forbids_is_told_with_all_else_that_is_in_the_way() -> None:
    async with hosts(hardware(nic(NIC), nic(NIC2, driver="mlx5_core", vfio_cdev=None))) as pair:
        pair.hosts["alpha"].allowed_devices["tiny"] = frozenset({NIC})
        with pytest.raises(Refused) as refused:
            await pair.alpha.service.define_vm(spec_of(NIC, NIC2), dry_run=False)
        assert {code for _, code in told(refused.value)} >= {
            "driver_not_bound",
            "device_not_allowed",
        }


# What sysfs does not show any more


async def test_a_device_that_sysfs_does_not_show_makes_no_running_vm_live() -> None:
    async with hosts(hardware(nic(NIC), untracked(DISK))) as pair:
        await start(pair, NIC, DISK)
        before = pair.alpha.service.vm(VM).decision
        assert verdict(pair) is not Migratability.LIVE
        inventory = pair.hardware["alpha"].inventory
        inventory.unplug(DISK)
        await until(lambda: DISK not in inventory.current.devices)
        await asyncio.sleep(REEVALUATED_S)
        assert verdict(pair) is not Migratability.LIVE
        inventory.plug(untracked(DISK))
        await asyncio.sleep(REEVALUATED_S)
        after = pair.alpha.service.vm(VM).decision
        assert before is not None
        assert after is not None
        assert after.plan.iommufds == before.plan.iommufds
        assert after.plan.launched == before.plan.launched
        assert after.evidence == before.evidence


# What QEMU has, and what the definition names


async def test_a_vm_that_has_lost_a_named_device_is_not_moved_to_a_qemu_that_has_it() -> None:
    async with hosts(hardware(nic(NIC), nic(NIC2))) as pair:
        await start(pair, NIC, NIC2)
        del pair.hosts["alpha"].qemu(VM).devices["hostdev1"]  # the guest let go of it, late
        view = await pair.migrate()
        assert view.phase == Phase.REFUSED, (view.phase, view.cause)
        (refusal,) = view.refusals
        assert refusal.code == "devices_differ"
        assert "hostdev1" in refusal.message
        assert refusal.cure
        assert not pair.hosts["beta"].living(VM)


# Restarts


async def test_a_destination_that_restarts_while_it_prepares_goes_on_with_its_devices() -> None:
    async with hosts(hardware(nic(NIC))) as pair:
        await start(pair, NIC)
        migration_id = await pair.ask()
        await until(lambda: bool(pair.beta.engine.migrations.incoming))
        await pair.kill("beta")
        inventory = pair.hardware["beta"].inventory
        inventory._current = Inventory(inventory.truth.kernel, {}, {})  # a new daemon's
        await pair.start("beta")
        view = await pair.until_over(migration_id)
        assert view.phase == Phase.SUCCEEDED, (view.cause, view.refusals)
        await pair.settle()


# Letting go


async def test_a_qemu_is_not_lost_when_descriptors_cannot_be_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def broken(self: SimOpenDevices) -> None:
        raise OSError(errno.EIO, "close")

    monkeypatch.setattr(SimOpenDevices, "hand_over", broken)
    async with hosts(hardware(nic(NIC), nic(NIC2))) as pair:
        await start(pair, NIC)
        assert pair.alpha.service.vm(VM).state == "running"
        await plug(pair, NIC2)
        assert set(pair.hosts["alpha"].qemu(VM).devices) == {"hostdev0", "hostdev1"}
        assert len(pair.alpha.service.vm(VM).spec.devices) == 2
        await stop(pair)
        assert pair.hardware["alpha"].opened == []


async def _nothing(self: SimOpenDevices) -> None: ...


async def test_a_vm_whose_qemu_has_just_died_can_be_started_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Unpinning a large guest's memory takes seconds; until then its devices are held."""
    real = SimOpenDevices.close

    async def slow(self: SimOpenDevices) -> None:
        await asyncio.sleep(3.0)
        await real(self)

    monkeypatch.setattr(SimOpenDevices, "close", slow)
    monkeypatch.setattr(SimOpenDevices, "hand_over", _nothing)  # so the simulator sees it held
    async with hosts(hardware(nic(NIC))) as pair:
        await start(pair, NIC)
        pair.hosts["alpha"].qemu(VM).die("killed")
        pair.guest(VM).violations.clear()
        await pair.alpha.service.start_vm(VM)
        assert len(pair.hosts["alpha"].living(VM)) == 1
        await stop(pair)


async def test_a_waiting_qemu_is_not_left_behind_by_a_deadline_while_its_descriptors_are_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = SimOpenDevices.hand_over

    async def slow(self: SimOpenDevices) -> None:
        await asyncio.sleep(60.0)
        await real(self)

    monkeypatch.setattr(SimOpenDevices, "hand_over", slow)
    async with hosts(hardware(nic(NIC)), prepare_deadline_s=20.0) as pair:
        monkeypatch.undo()
        await start(pair, NIC)
        monkeypatch.setattr(SimOpenDevices, "hand_over", slow)
        view = await pair.migrate()
        await pair.settle()
        assert len(pair.all_living()) == 1
        assert view.phase == Phase.SUCCEEDED, view.cause


# A plug that was not recorded


@pytest.mark.parametrize("is_remembered", [True, False])
async def test_no_device_is_taken_for_another_that_was_plugged_and_not_recorded(
    monkeypatch: pytest.MonkeyPatch, is_remembered: bool
) -> None:
    async def full(*_: object) -> None:
        raise JournalError("no space left", code="journal_full")

    third = "0000:41:00.3"
    async with hosts(hardware(nic(NIC), nic(NIC2), nic(third))) as pair:
        await start(pair, NIC)
        with monkeypatch.context() as patched:
            patched.setattr(pair.alpha.journal, "put_vm", full)
            with pytest.raises(Unavailable):
                await plug(pair, NIC2)
        pair.hosts["alpha"].make.forgets_addresses = not is_remembered
        with pytest.raises(Refused) as refused:
            await plug(pair, third)
        assert refused.value.code == "given_twice"
        assert "unplug vm1 hostdev1" in refused.value.message
        await plug(pair, NIC2)
        assert [d.address for d in pair.alpha.service.vm(VM).spec.devices] == [NIC, NIC2]


async def test_a_source_cannot_have_a_device_touched_that_a_vm_here_has() -> None:
    """Bound for a question, it could not be bound by the QEMU that is just starting."""
    async with hosts(hardware(nic(NIC)), hardware(nic(NIC), nic(NIC2, **_UNASKED))) as pair:
        await start(pair, NIC)
        there = pair.beta.service
        await there.define_vm(spec_of(NIC2, name="other"), dry_run=False)
        await there.start_vm("other")
        hardware_there = pair.hardware["beta"]
        hardware_there.inventory._probed.clear()  # as after a restart of the daemon
        await hardware_there.inventory.rescan()
        hardware_there.probes.clear()
        view = await pair.migrate(destination_devices={"hostdev0": NIC2})
        assert view.phase == Phase.REFUSED
        assert "in_use" in {refusal.code for refusal in view.refusals}
        assert hardware_there.probes == []
        await stop(pair, "other", on="beta")


# What is in nobody's way


async def test_devices_that_are_gone_can_be_taken_out_of_a_stopped_vm_one_by_one() -> None:
    async with hosts(hardware(nic(NIC), nic(NIC2))) as pair:
        service = pair.alpha.service
        await service.define_vm(spec_of(NIC, NIC2), dry_run=False)
        pair.hardware["alpha"].inventory.unplug(NIC, NIC2)
        await until(lambda: not pair.hardware["alpha"].inventory.current.devices)
        for id_ in ("hostdev0", "hostdev1"):
            await service.unplug_device(VM, id_, by="test")
        assert service.vm(VM).spec.devices == ()
        assert service.vm(VM).decision is None


def test_a_device_that_a_running_qemu_has_outside_its_iommufd_objects_makes_no_vm_live() -> None:
    """As an adopted QEMU may have it: type1 tracks nothing, whatever the IOMMU could."""
    request = TrackingRequest(
        devices=(
            VmDevice("legacy", nic(NIC), attached=True),
            VmDevice("modern", nic(NIC2), attached=True),
        ),
        qemu=frozenset(QemuVfioFeature),
        iommus={CAN.name: CAN},
        standing=(StandingObject("iommufd0", ("modern",), saw_iommu_tracking=True),),
    )
    plan = decide(request)
    assert plan.migratability is not Migratability.LIVE
    assert {reason.device for reason in plan.limits} >= {"legacy"}
