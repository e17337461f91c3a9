"""What hosts tell each other about passthrough devices: bounded, and read by older and newer."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from migrd.core.facts import SpecDevice, VmSpec
from migrd.core.tracking import Migratability, Plan, Reason, ReasonCode, TrackingPolicy
from migrd.engine.ports import HostProfile
from migrd.peer.messages import MAX_ANSWER_BYTES, PreflightRequest, WireHostProfile, WireVmSpec
from migrd.peer.plan_messages import MOST_REASONS
from tests.fakes.peer import FakePeerService
from tests.journal.test_decisions import SPEC, decision
from tests.peer.fleet import SETTINGS, Fleet, host, peer_at


def profile(plan: Plan | None) -> HostProfile:
    return HostProfile(
        host="host-b",
        migrd_version="9.8.7",
        protocol=1,
        qemu_version="10.0.2",
        features=frozenset({"multifd"}),
        launch_digest="d",
        incoming_slots_free=2,
        memory_available_bytes=1 << 30,
        vm_present=False,
        last_epoch=0,
        tls=True,
        plan=plan,
    )


def sent(plan: Plan) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(WireHostProfile.of(profile(plan)).model_dump_json())
    return told


def received(message: dict[str, Any]) -> Plan:
    found = WireHostProfile.model_validate_json(json.dumps(message)).value().plan
    assert found is not None
    return found


def test_what_a_judgement_needs_of_a_plan_comes_across() -> None:
    plan = decision().plan
    found = received(sent(plan))
    for name in (
        "policy", "migratability", "migratability_at_best", "reasons", "refused", "trackers",
        "attach_order", "downtime_floor_s", "expected_blackout_s",
    ):  # fmt: skip
        assert getattr(found, name) == getattr(plan, name), name
    assert plan.launch is not None
    assert found.launch is not None
    assert [d.id for d in found.launch.devices] == [d.id for d in plan.launch.devices]


def test_a_reason_of_a_newer_daemon_is_still_a_reason() -> None:
    message = sent(decision().plan)
    newer = {**message["plan"]["reasons"][0], "code": "sva_present", "message": "words"}
    message["plan"]["reasons"] = [newer]
    (reason,) = received(message).reasons
    assert reason.message == "sva_present: words"
    assert reason.code is ReasonCode.UNKNOWN_CAPABILITY


def test_a_verdict_that_is_not_known_is_never_guessed() -> None:
    message = sent(decision().plan)
    message["plan"]["migratability"] = "teleportable"
    with pytest.raises(ValidationError):
        received(message)


def test_fields_of_a_newer_daemon_are_passed_over() -> None:
    message = sent(decision().plan)
    message["plan"]["colour"] = "blue"
    assert received(message) == received(sent(decision().plan))


def test_an_answer_of_a_thousand_long_reasons_keeps_within_its_bound() -> None:
    long = Reason(ReasonCode.DEVICE_NO_MIGRATION, "d" * 9, "x\udcff" * 9000, "y" * 9000)
    plan = Plan(
        TrackingPolicy.AUTO, Migratability.BLOCKED, Migratability.BLOCKED, (long,) * 1000,
        refused=(long,) * 1000,
    )  # fmt: skip
    told = WireHostProfile.of(profile(plan)).model_dump_json().encode()
    assert len(told) < MAX_ANSWER_BYTES
    assert len(received(json.loads(told)).reasons) == MOST_REASONS


def test_a_driver_that_lies_about_its_size_takes_no_answer_away() -> None:
    """2^64 - 1 bytes of state: six centuries at 1 GB/s."""
    centuries_s = ((1 << 64) - 1) / 1e9
    plan = replace(
        decision().plan, downtime_floor_s=centuries_s, expected_blackout_s=centuries_s + 1
    )
    found = received(sent(plan))
    assert found.downtime_floor_s > 1e8
    assert found.expected_blackout_s is not None


def test_a_source_from_before_devices_is_understood() -> None:
    old = {"vm": {"name": "web-1", "profile": "small", "parameters": {}}}
    asked = PreflightRequest.model_validate_json(json.dumps(old))
    assert asked.vm.value() == VmSpec("web-1", "small", {})
    assert WireVmSpec.of(SPEC).value() == SPEC


def test_a_list_of_devices_is_bounded() -> None:
    many = tuple(SpecDevice(f"hostdev{n}", f"0000:00:00.{n}") for n in range(1000))
    with pytest.raises(ValidationError):
        WireVmSpec.of(VmSpec("web-1", "small", devices=many))


async def test_the_plan_and_what_was_agreed_cross_the_wire(tmp_path: Path) -> None:
    fleet, service = Fleet(tmp_path), FakePeerService()
    service.plan = decision().plan
    tls = await fleet.tls("host-a")
    async with host(fleet, service) as listener, peer_at(listener.port, tls) as peer:
        told = await peer.preflight(SPEC)
        assert told.plan is not None
        assert told.plan.migratability is service.plan.migratability
        await peer.prepare("m1", 1, SPEC, SETTINGS, least=Migratability.LIVE)
        assert service.least is Migratability.LIVE
        assert service.incoming["m1"].vm == SPEC
        await peer.prepare("m2", 2, SPEC, SETTINGS)
        assert service.least is None
