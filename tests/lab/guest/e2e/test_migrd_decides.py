"""A device whose IOMMU cannot track: what migrd says of it, does about it, and QEMU agrees with."""

from __future__ import annotations

from typing import Any

import pytest

from migrd.cli.client import path
from migrd.cli.seen import Json
from tests.lab.guest.e2e_fleet import VM, Lab, given

MIGRATES = {"live", "stop_and_copy"}
UNTRACKED = {("bad", "iommu_no_dirty_tracking"), ("bad", "device_no_dma_logging")}


def reasons(decision: dict[str, Any]) -> set[tuple[str, str]]:
    return {(reason["device"], reason["code"]) for reason in decision["reasons"]}


@pytest.mark.parametrize(("policy", "asked_for"), [("auto", False), ("always", True)])
async def test_t1_t2_t6_of_a_device_that_can_be_tracked_and_one_that_cannot_the_policy_decides(
    two: Lab, policy: str, asked_for: bool
) -> None:
    async with given(two, False, True) as (unable, able):
        await two.define({"bad": unable, "good": able}, tracking_policy=policy)
        started = await two.start()
        decision, facts = started["decision"], started["facts"]
        assert decision["migratability"] != "live", "the VM is marked for the one that cannot"
        assert reasons(decision) >= UNTRACKED
        tracked = {id_: it["dirty_tracking"] for it in decision["domains"] for id_ in it["devices"]}
        assert tracked == {"good": asked_for, "bad": False}
        assert decision["attach_order"] == ["good", "bad"], "no plain page table for the able one"
        parts = {id_: part["id"] for part in decision["iommufds"] for id_ in part["devices"]}
        assert {device["id"]: device["iommufd"] for device in facts["devices"]} == parts
        assert two.page_tables(started["pid"]) == [True, False], (
            "in the order planned; QEMU asks wherever it can, whatever the policy says"
        )
        assert (facts["blocked_reasons"] == []) is (decision["migratability"] in MIGRATES)


async def test_t7_a_vm_that_requires_tracking_is_refused_with_all_reasons_and_nothing_is_started(
    two: Lab,
) -> None:
    async with given(two, True, False, False) as (able, one, other):
        await two.sees(able, one, other)
        for device in (able, one, other):
            await two.probe(device)
        devices = {"good": able, "bad": one, "worse": other}
        problem = await two.refused_definition(devices, tracking_policy="require")
        assert problem.details.text("code") == "decision_refused"
        violations = problem.details.body["violations"]
        assert isinstance(violations, list)
        said = {(violation["field"], violation["code"]) for violation in violations}
        assert ("devices[1].address", "iommu_no_dirty_tracking") in said
        assert ("devices[2].address", "iommu_no_dirty_tracking") in said
        assert await two.qemus() == []
        defined = await two.define({"good": able}, tracking_policy="require")
        assert defined["decision"]["migratability"] == "live"


async def test_t8_a_plug_that_lowers_the_verdict_is_refused_unless_accepted_and_an_unplug_raises_it(
    two: Lab,
) -> None:
    async with given(two, True, False) as (able, unable):
        await two.define({"good": able})
        pid = (await two.start())["pid"]
        await two.sees(unable)
        where = path("vms", VM, "devices")
        body: dict[str, Json] = {"id": "bad", "address": unable.sysfs.name, "guest_bus": "port2"}
        problem = await two.denied("alpha", "POST", where, body=body)
        assert (problem.status, problem.code) == (409, "lowers_migratability")
        assert "iommu_no_dirty_tracking" in str(problem.details.body["violations"])
        assert two.page_tables(pid) == [True], "QEMU was told nothing"
        assert two.holds("alpha", unable.node) == 0
        await two.probe(unable)
        accepted: dict[str, Json] = {**body, "accept_lower_migratability": True}
        plugged = await two.said("alpha", "POST", where, accepted)
        assert plugged["decision"]["migratability"] != "live"
        assert reasons(plugged["decision"]) >= UNTRACKED
        assert two.page_tables(pid) == [True, False]
        unplugged = await two.said("alpha", "DELETE", path("vms", VM, "devices", "bad"))
        assert unplugged["decision"]["migratability"] == "live"
        assert [device["id"] for device in unplugged["facts"]["devices"]] == ["good"]
        await two.probe(unable)
