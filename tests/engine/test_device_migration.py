"""VMs with passthrough devices between two hosts: judged from the facts of both, both ways, and
nothing is held that is not needed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from migrd.core.devices import Capability, DeviceMigration, Unknown
from migrd.core.migration import Policy, WhenNotConverging
from migrd.core.phases import Phase
from migrd.core.tracking import Migratability, TrackingPolicy
from migrd.engine import reception
from migrd.engine.ports import HostProfile
from migrd.engine.service import MigrationView
from migrd.errors import Invalid, VmmDied
from tests.engine.passthrough import (
    DISK,
    NIC,
    NIC2,
    hardware,
    hosts,
    immovable,
    nic,
    spec_of,
    start,
    untracked,
)
from tests.fakes.virtual_time import until
from tests.fakes.world import VM, Pair

THERE = "0000:81:00.2"
NOT_ASKED = Capability.unknown(Unknown.NOT_PROBED)


def codes(view: MigrationView) -> set[str]:
    return {refusal.code for refusal in view.refusals}


async def test_a_vm_moves_with_its_devices_to_other_addresses_and_back() -> None:
    async with hosts(hardware(nic(NIC)), hardware(nic(THERE))) as pair:
        await start(pair, NIC)
        view = await pair.migrate(destination_devices={"hostdev0": THERE})
        assert view.phase == Phase.SUCCEEDED, (view.cause, view.refusals)
        await pair.settle()
        arrived = pair.beta.service.vm(VM)
        assert [(d.id, d.address) for d in arrived.spec.devices] == [("hostdev0", THERE)]
        assert arrived.decision is not None
        assert arrived.decision.plan.migratability is Migratability.LIVE
        assert arrived.iommufds_held, "its devices can be looked at here now"
        assert pair.alpha.service.vm(VM).decision is None
        await until(lambda: not pair.hardware["alpha"].opened)
        assert pair.beta.service.device(THERE).in_use_by == VM
        assert pair.alpha.service.device(NIC).in_use_by is None
        back = await pair.migrate(source="beta", destination_devices={"hostdev0": NIC})
        assert back.phase == Phase.SUCCEEDED, (back.cause, back.refusals)
        await pair.settle()
        await until(lambda: not pair.hardware["beta"].opened)


async def test_the_decision_of_an_arrived_vm_outlives_its_daemon() -> None:
    async with hosts(hardware(nic())) as pair:
        await start(pair, NIC)
        await pair.migrate()
        await pair.settle()
        before = pair.beta.service.vm(VM).decision
        await pair.restart("beta")
        assert pair.beta.service.vm(VM).decision == before


async def test_the_destination_asks_its_devices_before_it_answers() -> None:
    unasked = nic(dma_logging=NOT_ASKED, migration=DeviceMigration(NOT_ASKED))
    async with hosts(hardware(nic()), hardware(unasked)) as pair:
        pair.hardware["beta"].answers[NIC] = nic()
        await start(pair, NIC)
        view = await pair.migrate()
        assert view.phase == Phase.SUCCEEDED, view.refusals


async def test_a_vm_that_could_not_come_back_is_refused_unless_someone_has_agreed() -> None:
    async with hosts(hardware(nic()), hardware(untracked(NIC))) as pair:
        await start(pair, NIC)
        view = await pair.migrate()
        assert view.phase == Phase.REFUSED
        assert codes(view) == {"less_migratable_there"}
        (refusal,) = view.refusals
        assert "you may go there, but to come back" in refusal.message
        plan = await pair.alpha.service.plan(pair.engine_state(view.id).request)
        assert plan.plan_there is not None
        assert plan.plan_there.migratability is not Migratability.LIVE
        view = await pair.migrate(accept_less_migratable=True)
        assert view.phase == Phase.SUCCEEDED, (view.cause, view.refusals)
        await pair.settle()
        arrived = pair.beta.service.vm(VM).decision
        assert arrived is not None
        assert arrived.plan.migratability is not Migratability.LIVE


async def test_a_destination_that_finds_less_when_it_prepares_refuses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with hosts(hardware(nic())) as pair:
        await start(pair, NIC)
        real = reception.Reception.preflight

        async def then_worse(self: Any, source: str, vm: Any) -> HostProfile:
            found = await real(self, source, vm)
            pair.hardware["beta"].show(hardware(untracked(NIC, driver="mlx5_vfio_pci")))
            await pair.hardware["beta"].inventory.rescan()
            return found

        monkeypatch.setattr(reception.Reception, "preflight", then_worse)
        view = await pair.migrate()
        assert view.phase == Phase.ROLLED_BACK
        assert view.cause is not None
        assert view.cause.code == "less_migratable_there"
        assert pair.running_on() == "alpha"
        assert pair.hardware["beta"].opened == []
        monkeypatch.undo()
        pair.hardware["beta"].show(hardware(nic()))
        await pair.hardware["beta"].inventory.rescan()
        view = await pair.migrate()
        assert view.phase == Phase.SUCCEEDED, (view.cause, view.refusals)


async def test_a_vm_that_is_not_migratable_here_is_refused_with_the_reasons() -> None:
    async with hosts(hardware(immovable(NIC))) as pair:
        await start(pair, NIC)
        view = await pair.migrate()
        assert view.phase == Phase.REFUSED
        assert {"source_not_migratable", "device_no_migration"} <= codes(view)
        assert all(refusal.message for refusal in view.refusals)
        assert not pair.hosts["beta"].living(VM)
        assert pair.hardware["beta"].opened == []


async def test_a_limit_below_the_floor_is_refused_with_the_figure() -> None:
    heavy = nic(migration=replace(nic().migration, stop_copy_bytes=4 << 30))
    async with hosts(hardware(heavy)) as pair:
        await start(pair, NIC)
        decision = pair.alpha.service.vm(VM).decision
        assert decision is not None
        floor_s = decision.plan.downtime_floor_s
        view = await pair.migrate(policy=Policy(downtime_limit_s=floor_s / 2))
        assert view.phase == Phase.REFUSED
        (refusal,) = [r for r in view.refusals if r.code == "downtime_below_floor"]
        assert f"{floor_s * 1000:.0f}" in refusal.message


async def test_postcopy_and_passthrough_devices_do_not_go_together() -> None:
    async with hosts(hardware(nic())) as pair:
        await start(pair, NIC)
        policy = Policy(when_not_converging=WhenNotConverging.POSTCOPY)
        view = await pair.migrate(policy=policy)
        assert "postcopy_with_passthrough" in codes(view)


@pytest.mark.parametrize(
    ("beta", "code"),
    [
        (hardware(), "unknown_device"),
        (hardware(immovable(NIC)), "destination_cannot_load"),
        (hardware(nic(driver="mlx5_core", vfio_cdev=None)), "driver_not_bound"),
    ],
)
async def test_what_the_destination_lacks_is_refused_there_by_name(beta: Any, code: str) -> None:
    async with hosts(hardware(nic()), beta) as pair:
        await start(pair, NIC)
        view = await pair.migrate()
        assert view.phase == Phase.REFUSED
        assert code in codes(view), view.refusals
        assert not pair.hosts["beta"].living(VM)


async def test_a_device_that_another_vm_has_there_is_refused() -> None:
    async with hosts(hardware(nic())) as pair:
        await start(pair, NIC)
        service = pair.beta.service
        await service.define_vm(spec_of(NIC, name="other"), dry_run=False)
        await service.start_vm("other")
        view = await pair.migrate()
        assert view.phase == Phase.REFUSED
        assert "in_use" in codes(view)
        assert any("other" in refusal.message for refusal in view.refusals)


async def test_a_policy_that_the_destination_forbids_is_refused_there() -> None:
    async with hosts(hardware(nic())) as pair:
        pair.options["beta"] = replace(
            pair.options["beta"], forbidden_tracking_policies=frozenset({TrackingPolicy.ALWAYS})
        )
        await pair.restart("beta")
        await start(pair, NIC, policy=TrackingPolicy.ALWAYS)
        view = await pair.migrate()
        assert view.phase == Phase.REFUSED
        assert "policy_forbidden" in codes(view)


async def test_devices_at_the_destination_for_nobody_are_a_mistake() -> None:
    async with hosts(hardware(nic())) as pair:
        await start(pair, NIC)
        with pytest.raises(Invalid) as refused:
            await pair.ask(destination_devices={"hostdev9": NIC2})
        (violation,) = refused.value.violations
        assert violation.field == "destination_devices.hostdev9"


async def test_a_destination_that_decides_nothing_is_too_old(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with hosts(hardware(nic())) as pair:
        await start(pair, NIC)
        real = reception.Reception.preflight

        async def older(self: Any, source: str, vm: Any) -> HostProfile:
            found = await real(self, source, vm)
            return replace(found, plan=None)

        monkeypatch.setattr(reception.Reception, "preflight", older)
        view = await pair.migrate()
        assert "destination_decides_nothing" in codes(view)


async def test_a_destination_qemu_that_does_not_start_gives_its_devices_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with hosts(hardware(nic())) as pair:
        await start(pair, NIC)

        async def refusing(spec: Any, instance: str, **_: Any) -> Any:
            raise VmmDied(
                "-device vfio-pci,id=hostdev0: Failed to allocate hwpt: Operation not supported"
            )

        with monkeypatch.context() as patched:
            patched.setattr(pair.beta.launcher, "launch", refusing)
            view = await pair.migrate()
        assert view.phase == Phase.ROLLED_BACK, "nobody has agreed to less there"
        assert pair.hardware["beta"].opened == []
        assert pair.running_on() == "alpha"
        view = await pair.migrate()
        assert view.phase == Phase.SUCCEEDED, (view.cause, view.refusals)


async def test_a_cancelled_migration_lets_go_at_the_destination_and_can_be_asked_again() -> None:
    async with hosts(hardware(nic())) as pair:
        await start(pair, NIC)
        pair.ground.wire.freeze()
        migration_id = await pair.ask()
        await pair.until_phase(migration_id, "precopy")
        assert pair.hardware["beta"].opened, "the waiting QEMU has the device"
        await pair.alpha.service.cancel(migration_id, by="test")
        await pair.until_over(migration_id)
        await pair.settle()
        await until(lambda: not pair.hardware["beta"].opened)
        assert pair.hardware["alpha"].opened, "and the guest's own stay"
        await pair.migrates_again()


@pytest.mark.parametrize("who", ["alpha", "beta"])
async def test_after_a_daemon_was_killed_on_the_way_nothing_is_left_behind(who: str) -> None:
    async with hosts(hardware(nic())) as pair:
        await start(pair, NIC)
        pair.ground.wire.freeze()
        migration_id = await pair.ask()
        await pair.until_phase(migration_id, "precopy")
        await pair.restart(who)
        pair.ground.wire.heal()
        view = await pair.until_over(migration_id)
        assert view.phase in (Phase.SUCCEEDED, Phase.ROLLED_BACK), (view.cause, view.refusals)
        await pair.migrates_again()
        on = pair.running_on()
        assert on is not None
        decision = pair.daemons[on].service.vm(VM).decision
        assert decision is not None
        assert decision.plan.migratability is Migratability.LIVE


async def test_a_device_that_nobody_named_is_moved_only_when_someone_accepts_that() -> None:
    async with Pair() as pair:
        make = pair.hosts["alpha"].make
        make.passthrough_devices = ("hostdev0",)
        pair.hosts["beta"].make.passthrough_devices = ("hostdev0",)
        await pair.boot()
        refused = await pair.migrate()
        assert refused.phase == Phase.REFUSED
        assert codes(refused) == {"devices_not_named"}
        migration_id = await pair.ask(accept_less_migratable=True)
        plan = await pair.alpha.service.plan(pair.engine_state(migration_id).request)
        assert "devices_not_named" in {warning.code for warning in plan.warnings}
        assert (await pair.until_over(migration_id)).phase == Phase.SUCCEEDED


async def test_two_devices_arrive_in_the_slots_that_they_had() -> None:
    async with hosts(hardware(nic(NIC), nic(NIC2), nic(DISK))) as pair:
        await start(pair, NIC, NIC2)
        view = await pair.migrate(destination_devices={"hostdev0": DISK, "hostdev1": NIC})
        assert view.phase == Phase.SUCCEEDED, (view.cause, view.refusals)
        await pair.settle()
        qemu = pair.hosts["beta"].qemu(VM)
        found = {d.id: (d.address, d.guest_address) for d in qemu.devices.values()}
        assert found == {"hostdev0": (DISK, "05.0"), "hostdev1": (NIC, "06.0")}
