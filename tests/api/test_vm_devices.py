"""Passthrough devices of VMs over HTTP: what is decided, asked, refused, plugged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from migrd.api.models import Plan, Vm
from migrd.core.tracking import TrackingPolicy
from tests.api.running import Api, Got, running
from tests.fakes.service import FakeService

NIC, NIC2, DISK, GPU = "0000:41:00.1", "0000:41:00.2", "0000:81:00.0", "0000:c1:00.0"


def body(*addresses: str, **more: Any) -> dict[str, Any]:
    return {"profile": "small", "devices": [{"address": a} for a in addresses], **more}


async def put(api: Api, *addresses: str, **more: Any) -> Got:
    return await api("PUT", "/v1/vms/vm-1", body(*addresses, **more))


def fields(got: Got, status: int, code: str) -> list[tuple[str, str]]:
    return [(v.field, v.code) for v in got.problem(status, code).violations]


async def test_the_answer_to_a_definition_carries_the_decision(api: Api) -> None:
    got = await put(api, NIC, NIC2)
    assert got.status == 201
    vm = Vm.model_validate_json(got.body)
    assert [(d.id, d.address) for d in vm.devices] == [("hostdev0", NIC), ("hostdev1", NIC2)]
    decision = vm.decision
    assert decision is not None
    assert (decision.migratability, decision.policy) == ("live", "auto")
    assert decision.attach_order
    assert decision.trackers
    assert decision.ladders
    assert decision.domains[0].dirty_tracking
    assert decision.downtime_floor_ms > 0
    assert {one.address for one in decision.evidence} == {NIC, NIC2}
    assert decision.decided_at is not None
    assert decision.launch is not None
    assert decision.launch.arguments[0] == "-object"
    assert "fd=<iommufd0>" in decision.launch.arguments[1]
    assert any("fd=<hostdev0>" in argument for argument in decision.launch.arguments)
    shown = Vm.model_validate_json((await api("GET", "/v1/vms/vm-1")).body)
    assert shown.decision == decision


async def test_a_dry_run_decides_and_keeps_nothing(api: Api) -> None:
    got = await api("PUT", "/v1/vms/vm-1?dry_run", body(NIC))
    assert got.status == 200
    assert got.json["decision"]["migratability"] == "live"
    assert (await api("GET", "/v1/vms/vm-1")).status == 404


async def test_ids_are_given_where_none_was_said(api: Api) -> None:
    devices = [{"address": NIC}, {"address": NIC2, "id": "hostdev0"}, {"address": DISK}]
    got = await api("PUT", "/v1/vms/vm-1", {"profile": "small", "devices": devices})
    assert [d["id"] for d in got.json["devices"]] == ["hostdev1", "hostdev0", "hostdev2"]


@pytest.mark.parametrize(
    ("address", "right"),
    [
        ("41:00.1", "0000:41:00.1"),
        ("0000:41:00.A", "0000:41:00.2"),
        ("0000:41:00.1; rm -rf /", "0000:41:00.2"),
        ("../../etc/passwd", "0000:41:00.2"),
        ("", "0000:41:00.2"),
        (7, "0000:41:00.2"),
    ],
)
async def test_a_malformed_address_is_told_with_what_would_be_right(
    api: Api, address: object, right: str
) -> None:
    given = {"profile": "small", "devices": [{"address": NIC}, {"address": address}]}
    got = await api("PUT", "/v1/vms/vm-1", given)
    (violation,) = got.problem(422, "invalid").violations
    assert violation.field == "devices[1].address"
    assert right in violation.message
    assert (await api("GET", "/v1/vms/vm-1")).status == 404


async def test_all_that_is_in_the_way_is_told_at_once_and_nothing_is_kept(api: Api) -> None:
    api.service.devices_in_use[NIC2] = "db-1"
    got = await put(api, "0000:99:00.0", NIC2, GPU)
    said = fields(got, 409, "decision_refused")
    assert {
        ("devices[0].address", "unknown_device"),
        ("devices[1].address", "in_use"),
        ("devices[2].address", "driver_not_bound"),
        ("devices[2].address", "in_group_with_others"),
    } <= set(said)
    problem = got.problem(409, "decision_refused")
    assert "db-1" in next(v.message for v in problem.violations if v.code == "in_use")
    assert (await api("GET", "/v1/vms/vm-1")).status == 404


async def test_require_that_is_not_met_names_the_offending_device(api: Api) -> None:
    got = await put(api, NIC, DISK, tracking_policy="require")
    said = fields(got, 409, "decision_refused")
    assert ("tracking_policy", "policy_not_met") in said
    assert ("devices[1].address", "device_no_migration") in said


async def test_a_policy_that_the_host_forbids_or_nobody_knows(api: Api) -> None:
    api.service.forbidden_policies = frozenset({TrackingPolicy.NEVER})
    got = await put(api, NIC, tracking_policy="never")
    assert ("tracking_policy", "policy_forbidden") in fields(got, 409, "decision_refused")
    got = await put(api, NIC, tracking_policy="perhaps")
    assert fields(got, 422, "invalid") == [("tracking_policy", "unknown_word")]


async def test_a_thousand_devices_are_refused(api: Api) -> None:
    many = [f"0000:{n >> 8:02x}:{n >> 3 & 31:02x}.{n & 7}" for n in range(1000)]
    (await put(api, *many)).problem(413, "too_many_fields")
    got = await put(api, *many[:65])
    assert fields(got, 422, "invalid") == [("devices", "too_long")]
    assert (await api("GET", "/v1/vms/vm-1")).status == 404


async def test_what_if_answers_without_a_destination(api: Api) -> None:
    await put(api, NIC)
    got = await api("POST", "/v1/vms/vm-1:plan", {})
    plan = Plan.model_validate_json(got.body)
    assert (plan.possible, plan.destination) == (True, None)
    assert plan.decision is not None
    asked = {"devices": [{"address": NIC}, {"address": DISK}]}
    got = await api("POST", "/v1/vms/vm-1:plan", asked)
    assert got.json["possible"]
    assert got.json["decision"]["migratability"] == "needs_unplug"
    got = await api("POST", "/v1/vms/vm-1:plan", {**asked, "tracking_policy": "require"})
    assert not got.json["possible"]
    assert {"policy_not_met"} <= {r["code"] for r in got.json["refusals"]}
    got = await api("POST", "/v1/vms/vm-1:plan", {"policy": {"downtime_limit_ms": 1}})
    reasons = got.json["decision"]["reasons"] + got.json["decision"]["refused"]
    assert "downtime_below_floor" in {r["code"] for r in reasons}
    shown = await api("GET", "/v1/vms/vm-1")
    assert [d["address"] for d in shown.json["devices"]] == [NIC], "nothing was changed"


async def test_what_if_answers_with_a_destination(api: Api) -> None:
    await put(api, NIC)
    await api("POST", "/v1/vms/vm-1:start")
    got = await api("POST", "/v1/vms/vm-1:plan", {"destination": "host-b"})
    assert got.json["destination"] == "host-b"
    assert got.json["decision"]["migratability"] == "live"


async def test_a_migration_takes_no_other_devices_than_the_vm_has(api: Api) -> None:
    api.service.add_vm("vm-1")
    asked = {"vm": "vm-1", "destination": "host-b"}
    wrong = {**asked, "devices": [{"address": NIC}], "tracking_policy": "always"}
    got = await api("POST", "/v1/migrations", wrong)
    assert set(fields(got, 422, "invalid")) == {
        ("devices", "unknown_field"),
        ("tracking_policy", "unknown_field"),
    }
    right = {**asked, "destination_devices": {"hostdev0": DISK}, "accept_less_migratable": True}
    got = await api("POST", "/v1/migrations", right)
    request = api.service.known[got.json["id"]].state.request
    assert dict(request.destination_devices) == {"hostdev0": DISK}
    assert request.accept_less_migratable


async def test_the_address_at_the_destination_is_checked_as_any(api: Api) -> None:
    api.service.add_vm("vm-1")
    asked = {"vm": "vm-1", "destination": "host-b", "destination_devices": {"hostdev0": "x"}}
    got = await api("POST", "/v1/migrations", asked)
    assert fields(got, 422, "invalid") == [("destination_devices.hostdev0", "invalid")]


async def test_a_device_is_plugged_and_unplugged(api: Api) -> None:
    await put(api, NIC)
    await api("POST", "/v1/vms/vm-1:start")
    got = await api("POST", "/v1/vms/vm-1/devices", {"address": NIC2})
    assert got.status == 200
    assert got.headers["ETag"]
    assert [d["address"] for d in got.json["devices"]] == [NIC, NIC2]
    got = await api("DELETE", "/v1/vms/vm-1/devices/hostdev1")
    assert [d["address"] for d in got.json["devices"]] == [NIC]
    (await api("DELETE", "/v1/vms/vm-1/devices/hostdev1")).problem(404, "unknown_device")


async def test_what_would_lower_the_vm_is_refused_unless_it_is_accepted(api: Api) -> None:
    await put(api, NIC)
    got = await api("POST", "/v1/vms/vm-1/devices", {"address": DISK})
    problem = got.problem(409, "lowers_migratability")
    assert {"device_no_migration"} <= {v.code for v in problem.violations}
    shown = await api("GET", "/v1/vms/vm-1")
    assert [d["address"] for d in shown.json["devices"]] == [NIC]
    accepted = {"address": DISK, "accept_lower_migratability": True}
    got = await api("POST", "/v1/vms/vm-1/devices", accepted)
    assert got.json["decision"]["migratability"] == "needs_unplug"


async def test_a_vm_without_devices_has_no_decision(api: Api) -> None:
    got = await put(api)
    assert (got.json["devices"], got.json["decision"]) == ([], None)
    assert got.json["iommufds_held"] is False


async def test_a_plug_that_names_no_vm_or_no_device_is_told(tmp_path: Path) -> None:
    async with running(tmp_path, service=FakeService()) as api:
        (await api("POST", "/v1/vms/nobody/devices", {"address": NIC})).problem(404, "unknown_vm")
        (await api("POST", "/v1/vms/nobody/devices", {})).problem(422, "invalid")
        (await api("DELETE", "/v1/vms/nobody/devices/..")).problem(404, "no_such_route")
