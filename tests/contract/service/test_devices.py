"""What the API relies on about passthrough devices, of the engine and of its simulator alike."""

import pytest

from migrd.core.facts import SpecDevice, VmSpec
from migrd.core.tracking import Migratability
from migrd.engine.service import PlugRequest, WhatIf
from migrd.errors import Conflict, NotFound, Refused
from tests.contract.service.conftest import Stage, begin

NIC, DISK = "0000:41:00.1", "0000:81:00.0"
"""Of both hosts: one that can be moved and tracked, one that can neither."""


def spec(stage: Stage, *addresses: str) -> VmSpec:
    devices = tuple(
        SpecDevice(f"hostdev{n}", address, "pcie.0", f"0{n + 5}.0")
        for n, address in enumerate(addresses)
    )
    return VmSpec("vm2", stage.profile, devices=devices)


async def test_a_definition_with_devices_comes_with_a_decision(stage: Stage) -> None:
    view, created = await stage.service.define_vm(spec(stage, NIC), dry_run=True)
    assert created
    assert view.decision is not None
    assert view.decision.plan.migratability is Migratability.LIVE
    with pytest.raises(NotFound):
        stage.service.vm("vm2")
    await stage.service.define_vm(spec(stage, NIC), dry_run=False)
    view = await stage.service.start_vm("vm2")
    assert view.decision is not None
    assert view.iommufds_held


async def test_a_device_that_is_not_there_is_refused_by_field(stage: Stage) -> None:
    with pytest.raises(Refused) as refused:
        await stage.service.define_vm(spec(stage, NIC, "0000:99:00.0"), dry_run=False)
    ((field, code),) = [(v.field, v.code) for v in refused.value.violations]
    assert (field, code) == ("devices[1].address", "unknown_device")
    assert refused.value.code == "decision_refused"


async def test_what_if_changes_nothing(stage: Stage) -> None:
    service = stage.service
    before = service.vm("vm1")
    view = await service.what_if(WhatIf("vm1", devices=spec(stage, NIC, DISK).devices))
    assert (view.possible, view.destination) == (True, None)
    assert view.decision is not None
    assert view.decision.plan.migratability is Migratability.NEEDS_UNPLUG
    assert service.vm("vm1").spec == before.spec
    with pytest.raises(NotFound):
        await service.what_if(WhatIf("nobody"))


async def test_a_plug_is_judged_done_and_undone(stage: Stage) -> None:
    service = stage.service
    view = await service.plug_device("vm1", PlugRequest(NIC), by="me")
    assert [(d.id, d.address) for d in view.spec.devices] == [("hostdev0", NIC)]
    with pytest.raises(Refused) as lower:
        await service.plug_device("vm1", PlugRequest(DISK), by="me")
    assert lower.value.code == "lowers_migratability"
    view = await service.unplug_device("vm1", "hostdev0", by="me")
    assert (view.spec.devices, view.decision) == ((), None)
    with pytest.raises(NotFound) as unknown:
        await service.unplug_device("vm1", "hostdev0", by="me")
    assert unknown.value.code == "unknown_device"


async def test_nothing_is_plugged_during_a_migration(stage: Stage) -> None:
    await begin(stage)
    with pytest.raises(Conflict) as busy:
        await stage.service.plug_device("vm1", PlugRequest(NIC), by="me")
    assert busy.value.code == "already_migrating"
