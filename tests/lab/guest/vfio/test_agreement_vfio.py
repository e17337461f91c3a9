"""QEMU, launched as planned, is blocked exactly when the plan says so: NICs and emulated mdevs."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from migrd.core.tracking import Migratability, ReasonCode, Tracker
from tests.lab.guest.planned import launched, plan_for
from tests.lab.guest.raw import bound_to_vfio, mtty, nics


@pytest.mark.parametrize("mix", [("nic",), ("tty",), ("nic", "tty")], ids="+".join)
async def test_qemu_launched_as_planned_is_blocked_exactly_when_the_plan_says_so(
    mix: tuple[str, ...], tmp_path: Path
) -> None:
    addresses, nodes = {}, {}
    with contextlib.ExitStack() as held:
        if "nic" in mix:
            nic = nics()[0]
            addresses["nic"] = nic.name
            nodes[nic.name] = held.enter_context(bound_to_vfio(nic))
        if "tty" in mix:
            mdev = held.enter_context(mtty())
            addresses["tty"] = mdev.sysfs.name
            nodes[mdev.sysfs.name] = mdev.node
        plan = await plan_for(addresses)
        async with launched(tmp_path, plan, nodes) as qemu:
            reasons = await qemu.blocked_reasons()
    blocking = {(reason.code, reason.device) for reason in plan.limits}
    if "nic" in mix:
        assert plan.migratability is Migratability.NEEDS_UNPLUG
        assert (ReasonCode.DEVICE_NO_MIGRATION, "nic") in blocking
        assert len(reasons) == 1, "QEMU too has nothing against the mtty"
        assert "VFIO migration is not supported in kernel" in reasons[0]
        assert {device for _, device in blocking} == {"nic"}
    else:
        assert plan.migratability is Migratability.LIVE
        assert reasons == []
    if "tty" in mix:
        assert plan.trackers["tty"] is Tracker.DEVICE
