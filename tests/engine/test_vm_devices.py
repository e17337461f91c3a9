"""A VM with passthrough devices: decided when it is defined, and anew, from the kernel's own
answers, before its QEMU starts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from migrd.core.devices import Capability, DeviceMigration, Unknown
from migrd.core.facts import SpecDevice, VmSpec
from migrd.core.tracking import Migratability, Plan, ReasonCode, Tracker, TrackingPolicy
from migrd.core.vfio_launch import GivenBy, VfioLaunch, VfioLaunchDevice
from migrd.errors import Conflict, Refused, VmmDied
from tests.engine.passthrough import (
    DISK,
    GPU,
    NIC,
    NIC2,
    hardware,
    hosts,
    immovable,
    kinds,
    nic,
    spec_of,
    start,
    stop,
    told,
    untouched,
    untracked,
)
from tests.fakes.inventory import CAN, CANNOT, LIVE
from tests.fakes.virtual_time import until
from tests.fakes.world import VM, Pair

ALWAYS, NEVER, REQUIRE = TrackingPolicy.ALWAYS, TrackingPolicy.NEVER, TrackingPolicy.REQUIRE
NOT_ASKED = Capability.unknown(Unknown.NOT_PROBED)


def plan_of(pair: Pair, on: str = "alpha") -> Plan:
    decision = pair.daemons[on].service.vm(VM).decision
    assert decision is not None
    return decision.plan


# The rows of the thread -----------------------------------------------------------------------


async def test_t1_if_all_devices_can_be_tracked_it_is_requested_otherwise_not() -> None:
    async with hosts(hardware(nic(NIC), nic(NIC2), untracked())) as pair:
        await start(pair, NIC, NIC2)
        plan = plan_of(pair)
        assert plan.requests_tracking
        assert plan.migratability is Migratability.LIVE
        await stop(pair)
        await start(pair, NIC, DISK)
        assert not plan_of(pair).requests_tracking


async def test_t2_always_requests_it_wherever_the_iommu_can() -> None:
    async with hosts(hardware(nic(NIC), untracked())) as pair:
        await start(pair, NIC, DISK, policy=ALWAYS)
        plan = plan_of(pair)
        asked = {d: domain.dirty_tracking for domain in plan.domains for d in domain.devices}
        assert asked == {"hostdev0": True, "hostdev1": False}
        assert plan.migratability is not Migratability.LIVE, "and the VM is marked"


async def test_t4_each_device_is_asked_at_the_start_and_a_wrong_estimate_changes_the_plan() -> None:
    async with hosts(hardware(nic())) as pair:
        service = pair.alpha.service
        view, _ = await service.define_vm(spec_of(NIC), dry_run=False)
        assert view.decision is not None
        assert view.decision.plan.migratability is Migratability.LIVE, "by the registers"
        assert not view.decision.probed
        pair.hardware["alpha"].iommu_tracks[CAN.name] = False
        await service.start_vm(VM)
        decision = service.vm(VM).decision
        assert decision is not None
        assert decision.probed
        assert decision.plan.migratability is not Migratability.LIVE
        assert pair.alpha.observer.wrong_estimates == 1
        (event,) = kinds(pair, "vm.verdict_changed")
        after = decision.plan.migratability.value
        assert (event["before"], event["after"]) == ("live", after)
        codes = [reason["code"] for reason in event["appeared"]]
        assert ReasonCode.IOMMU_NO_DIRTY_TRACKING in codes


async def test_t6_iommus_of_different_features_get_page_tables_of_their_own() -> None:
    async with hosts(hardware(nic(NIC), untracked(DISK, dma_logging=Capability.probed(True)))) as p:
        await start(p, NIC, DISK)
        plan = plan_of(p)
        assert {d.iommu for d in plan.domains} == {CAN.name, CANNOT.name}
        assert plan.trackers == {"hostdev0": Tracker.IOMMU, "hostdev1": Tracker.DEVICE}
        qemu = p.hosts["alpha"].qemu(VM)
        objects = {device.iommufd for device in qemu.devices.values()}
        assert len(objects) == 2, "who is watched in another way never shares a container (H2)"


async def test_t7_require_refuses_naming_every_device_and_nothing_is_touched() -> None:
    async with hosts(hardware(nic(NIC), untracked(DISK), immovable(GPU))) as pair:
        with pytest.raises(Refused) as refused:
            await start(pair, NIC, DISK, GPU, policy=REQUIRE)
        said = told(refused.value)
        assert ("devices[1].address", "iommu_no_dirty_tracking") in said
        assert ("devices[2].address", "device_no_migration") in said
        assert ("tracking_policy", "policy_not_met") in said
        assert untouched(pair)
        assert pair.hardware["alpha"].probes == [], "nobody was even asked"
        _, vms = pair.alpha.service.vms()
        assert vms == [], "nothing was defined"


async def test_t7_require_refuses_a_start_whose_answers_are_worse_than_the_estimate() -> None:
    async with hosts(hardware(nic())) as pair:
        await pair.alpha.service.define_vm(spec_of(NIC, policy=REQUIRE), dry_run=False)
        pair.hardware["alpha"].iommu_tracks[CAN.name] = False
        with pytest.raises(Refused) as refused:
            await pair.alpha.service.start_vm(VM)
        assert ("devices[0].address", "iommu_no_dirty_tracking") in told(refused.value)
        assert untouched(pair)
        assert pair.alpha.service.vm(VM).state == "stopped"


async def test_t9_a_refused_page_table_is_recognised_and_the_vm_starts_without_never_silently(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with hosts(hardware(nic(NIC), nic(NIC2))) as pair:
        launcher, real = pair.alpha.launcher, pair.alpha.launcher.launch
        asked: list[VfioLaunch] = []

        async def refusing(spec: VmSpec, instance: str, *, incoming: bool, devices: Any) -> Any:
            asked.append(devices.launch)
            first = devices.launch.devices[0]
            if len(asked) == 1:
                raise VmmDied(
                    f"QEMU did not start (exit 1): -device vfio-pci,id={first.id},fd=9: vfio "
                    "VFIO_FD9: Failed to allocate hwpt: Operation not supported"
                )
            return await real(spec, instance, incoming=incoming, devices=devices)

        monkeypatch.setattr(launcher, "launch", refusing)
        await start(pair, NIC, NIC2)
        decision = pair.alpha.service.vm(VM).decision
        assert decision is not None
        assert decision.downgraded == (asked[0].devices[0].id,)
        assert decision.plan.migratability is not Migratability.LIVE
        assert ReasonCode.DOWNGRADED in {reason.code for reason in decision.plan.reasons}
        assert len(asked) == 2
        assert asked[0] != asked[1], "the same arguments are never tried twice"
        await pair.restart("alpha")
        assert pair.alpha.service.vm(VM).decision == decision, "and it is durable"


@pytest.mark.parametrize(
    "words",
    [
        "Failed to allocate hwpt: Cannot allocate memory",
        "error attach VFIO_FD9 (9) to id=2: Device or resource busy",
        "could not open disk image: No such file or directory",
    ],
)
async def test_t9_any_other_errno_is_an_error_and_is_not_retried(
    monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    async with hosts(hardware(nic())) as pair:
        tries: list[str] = []

        async def refusing(spec: VmSpec, instance: str, **_: Any) -> Any:
            tries.append(instance)
            raise VmmDied(f"QEMU did not start: -device vfio-pci,id=hostdev0: vfio x: {words}")

        monkeypatch.setattr(pair.alpha.launcher, "launch", refusing)
        with pytest.raises(Conflict, match="did not start") as failed:
            await start(pair, NIC)
        assert failed.value.code == "launch_failed"
        assert len(tries) == 1
        assert untouched(pair), "everything was closed"


async def test_t9_under_require_a_refused_page_table_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with hosts(hardware(nic())) as pair:

        async def refusing(spec: VmSpec, instance: str, **_: Any) -> Any:
            raise VmmDied(
                "-device vfio-pci,id=hostdev0: Failed to allocate hwpt: Operation not supported"
            )

        monkeypatch.setattr(pair.alpha.launcher, "launch", refusing)
        with pytest.raises(Conflict):
            await start(pair, NIC, policy=REQUIRE)
        assert untouched(pair)


async def test_t10_flags_and_bits_never_seen_before_are_kept_and_are_no_error() -> None:
    odd = replace(LIVE, unknown_flags=1 << 40)
    async with hosts(hardware(nic(migration=odd))) as pair:
        await start(pair, NIC)
        plan = plan_of(pair)
        assert plan.migratability is Migratability.LIVE
        assert ReasonCode.UNKNOWN_BITS in {reason.code for reason in plan.reasons}


# What stands ------------------------------------------------------------------------------------


async def test_the_decision_is_durable_before_qemu_is_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with hosts(hardware(nic())) as pair:
        seen: list[Any] = []

        async def looking(spec: VmSpec, instance: str, **_: Any) -> Any:
            (stored,) = (await pair.alpha.journal.replay()).vms
            seen.append(stored.decision)
            raise VmmDied("not this time")

        monkeypatch.setattr(pair.alpha.launcher, "launch", looking)
        with pytest.raises(Conflict):
            await start(pair, NIC)
        assert seen[0] is not None
        assert seen[0].probed


async def test_a_dry_run_carries_the_decision_and_keeps_nothing() -> None:
    async with hosts(hardware(nic())) as pair:
        view, created = await pair.alpha.service.define_vm(spec_of(NIC), dry_run=True)
        assert created
        assert view.decision is not None
        assert view.decision.plan.launch is not None
        assert pair.alpha.service.vms()[1] == []
        assert pair.hardware["alpha"].probes == []


async def test_what_the_kernel_answered_is_remembered_over_a_restart() -> None:
    unasked = nic(dma_logging=NOT_ASKED, migration=DeviceMigration(NOT_ASKED))
    async with hosts(hardware(unasked)) as pair:
        pair.hardware["alpha"].answers[NIC] = nic()
        await start(pair, NIC)
        assert plan_of(pair).migratability is Migratability.LIVE
        assert pair.alpha.service.vm(VM).iommufds_held
        await pair.restart("alpha")
        await pair.alpha.engine.host.devices.first_look()
        await until(lambda: pair.alpha.service.vm(VM).state == "running")
        for _ in range(5):
            await until(lambda: True)
        view = pair.alpha.service.vm(VM)
        assert view.decision is not None
        assert view.decision.plan.migratability is Migratability.LIVE, (
            "the device answers nobody else now, and cannot change while the VM has it"
        )
        assert not view.iommufds_held, "and it is shown that nothing is held any more"


async def test_each_decision_that_came_to_stand_is_counted() -> None:
    async with hosts(hardware(nic(), untracked())) as pair:
        await start(pair, NIC)
        assert ("auto", "live", "none") in pair.alpha.observer.decisions
        with pytest.raises(Refused):
            await start(pair, DISK, name="vm2", policy=REQUIRE)
        assert all(verdict == "live" for _, verdict, _ in pair.alpha.observer.decisions)


async def test_a_change_of_the_hardware_is_judged_again_and_told() -> None:
    async with hosts(hardware(nic())) as pair:
        await pair.alpha.service.define_vm(spec_of(NIC), dry_run=False)
        pair.hardware["alpha"].inventory.plug(
            nic(driver="mlx5_core", vfio_cdev=None, migration=DeviceMigration(NOT_ASKED))
        )
        await until(lambda: kinds(pair, "vm.verdict_changed") != [])
        before = len(kinds(pair, "vm.verdict_changed"))
        pair.hardware["alpha"].inventory.plug(nic())
        await until(lambda: len(kinds(pair, "vm.verdict_changed")) > before)
        assert plan_of(pair).migratability is Migratability.LIVE, "it may rise again"
        (stored,) = (await pair.alpha.journal.replay()).vms
        assert stored.decision == pair.alpha.service.vm(VM).decision


async def test_the_devices_of_an_adopted_vm_are_decided_about_when_they_are_named() -> None:
    async with hosts(hardware(nic())) as pair:
        host = pair.hosts["alpha"]
        qemu = host.boot("guest9", profile=None)
        host.adopted.add(qemu.instance)
        told_ = VfioLaunchDevice("net0", NIC, "iommufd7", GivenBy.SYSFSDEV)
        qemu.devices["net0"], qemu.iommufds = told_, ["iommufd7"]
        await until(lambda: pair.alpha.service.vms()[1] != [], within_s=10.0)
        await until(lambda: pair.alpha.service.vm("guest9").facts is not None, within_s=10.0)
        spec = VmSpec("guest9", "tiny", devices=(SpecDevice("net0", NIC),))
        view, _ = await pair.alpha.service.define_vm(spec, dry_run=False)
        assert view.decision is not None
        assert view.decision.plan.trackers == {"net0": Tracker.IOMMU}
        assert [one.id for one in view.decision.plan.iommufds] == ["iommufd7"]


# Holding and letting go -------------------------------------------------------------------------


async def test_qemu_is_given_descriptors_and_migrd_keeps_only_its_iommufd() -> None:
    async with hosts(hardware(nic())) as pair:
        await start(pair, NIC)
        (held,) = pair.hardware["alpha"].opened
        assert held.device_fds == {}
        assert len(held.iommufds) == 1


@pytest.mark.parametrize("how", ["stop", "dies"])
async def test_all_is_let_go_of_when_the_qemu_has_gone(how: str) -> None:
    async with hosts(hardware(nic())) as pair:
        await start(pair, NIC)
        if how == "stop":
            await stop(pair)
        else:
            pair.hosts["alpha"].qemu(VM).die("killed")
        await until(lambda: not pair.hardware["alpha"].opened)
        await pair.alpha.service.start_vm(VM)
        assert pair.hosts["alpha"].qemu(VM).devices, "and the device can be given again"


async def test_a_daemon_that_stops_holds_nothing_and_the_vm_runs_on() -> None:
    async with hosts(hardware(nic())) as pair:
        await start(pair, NIC)
        await pair.daemons.pop("alpha").stop()
        assert pair.hardware["alpha"].opened == []
        assert pair.running_on() == "alpha"
        await pair.start("alpha")
