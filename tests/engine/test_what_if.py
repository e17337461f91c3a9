"""What if: other devices, another policy, a limit, a destination. Nothing is changed by asking."""

from __future__ import annotations

from typing import Any

import pytest

from migrd.core.facts import SpecDevice
from migrd.core.migration import Policy, Request
from migrd.core.tracking import Migratability, TrackingPolicy
from migrd.engine.service import PlanView, WhatIf
from migrd.errors import NotFound
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
from tests.fakes.world import VM, Pair

TO_BETA = Request(VM, "beta")


async def ask(pair: Pair, *addresses: str, **question: Any) -> PlanView:
    if addresses:
        question["devices"] = tuple(
            SpecDevice(f"hostdev{n}", address, "pcie.0", f"{5 + n:02x}.0")
            for n, address in enumerate(addresses)
        )
    before = (pair.alpha.service.vm(VM).spec, pair.alpha.service.vm(VM).decision)
    probes = len(pair.hardware["alpha"].probes)
    view = await pair.alpha.service.what_if(WhatIf(VM, **question))
    assert (pair.alpha.service.vm(VM).spec, pair.alpha.service.vm(VM).decision) == before
    assert len(pair.hardware["alpha"].probes) == probes, "nobody was asked for it"
    return view


def verdict(view: PlanView) -> Migratability:
    assert view.decision is not None
    return view.decision.plan.migratability


async def test_as_it_is() -> None:
    async with hosts(hardware(nic())) as pair:
        await start(pair, NIC)
        view = await ask(pair)
        assert (view.possible, view.destination) == (True, None)
        assert verdict(view) is Migratability.LIVE
        assert view.decision is not None
        assert view.decision.probed, "what the kernel answered at the start still counts"


async def test_with_other_devices() -> None:
    async with hosts(hardware(nic(NIC), immovable(DISK))) as pair:
        await start(pair, NIC)
        view = await ask(pair, NIC, DISK)
        assert view.possible, "it could be started like this"
        assert verdict(view) is Migratability.NEEDS_UNPLUG
        assert (await ask(pair, NIC, DISK, tracking_policy=TrackingPolicy.REQUIRE)).refusals


async def test_with_another_policy_every_refusal_is_told() -> None:
    async with hosts(hardware(nic(NIC), untracked(DISK))) as pair:
        await start(pair, NIC, DISK)
        view = await ask(pair, tracking_policy=TrackingPolicy.REQUIRE)
        assert not view.possible
        assert {"policy_not_met", "iommu_no_dirty_tracking"} <= {r.code for r in view.refusals}
        assert all(r.message for r in view.refusals)


async def test_with_devices_that_are_not_there() -> None:
    async with hosts(hardware(nic())) as pair:
        await start(pair, NIC)
        view = await ask(pair, NIC, "0000:99:00.0")
        assert not view.possible
        assert [r.code for r in view.refusals] == ["unknown_device"]


async def test_with_a_limit_below_the_floor() -> None:
    async with hosts(hardware(nic())) as pair:
        await start(pair, NIC)
        view = await ask(pair, downtime_limit_s=0.001)
        assert view.decision is not None
        said = {r.code.value for r in (*view.decision.plan.reasons, *view.decision.plan.refused)}
        assert "downtime_below_floor" in said


async def test_with_a_destination_both_hosts_decide() -> None:
    async with hosts(hardware(nic(NIC), nic(NIC2)), hardware(untracked(NIC), nic(NIC2))) as pair:
        await start(pair, NIC)
        view = await ask(pair, move=TO_BETA)
        assert not view.possible
        assert view.plan_there is not None
        assert view.plan_there.migratability is not Migratability.LIVE
        elsewhere = Request(VM, "beta", destination_devices={"hostdev0": NIC2})
        view = await ask(pair, move=elsewhere)
        assert view.possible, view.refusals
        assert not pair.hosts["beta"].living(VM)


async def test_other_devices_and_a_destination_together() -> None:
    async with hosts(hardware(nic(NIC), nic(NIC2))) as pair:
        await start(pair, NIC)
        view = await ask(pair, NIC, NIC2, move=TO_BETA)
        assert view.possible, view.refusals
        assert view.plan_there is not None
        assert set(view.plan_there.attach_order) == {"hostdev0", "hostdev1"}


async def test_of_a_vm_that_does_not_run() -> None:
    async with hosts(hardware(nic())) as pair:
        await pair.alpha.service.define_vm(spec_of(NIC), dry_run=False)
        view = await ask(pair)
        assert view.possible
        assert verdict(view) is Migratability.LIVE


async def test_of_a_vm_without_devices_nothing_is_decided() -> None:
    async with Pair() as pair:
        await pair.boot()
        view = await ask(pair)
        assert (view.possible, view.decision) == (True, None)


async def test_of_a_vm_that_nobody_knows() -> None:
    async with Pair() as pair:
        with pytest.raises(NotFound):
            await pair.alpha.service.what_if(WhatIf("nobody"))


async def test_what_a_migration_got_lately_is_the_bandwidth_of_the_floor() -> None:
    async with hosts(hardware(nic())) as pair:
        await start(pair, NIC)
        pair.ground.load.dirty_bytes_per_s = 600 << 20
        pair.ground.load.working_set_bytes = 200 << 20
        await pair.migrate(policy=Policy(downtime_limit_s=0.2))
        await pair.settle()
        back = pair.running_on()
        if back == "beta":
            pair.ground.calm()
            await pair.migrate(source="beta")
            await pair.settle()
        view = await ask(pair)
        assert view.decision is not None
        codes = {reason.code.value for reason in view.decision.plan.reasons}
        assert "bandwidth_unknown" not in codes
