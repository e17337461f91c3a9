"""What the API relies on, of the engine and of its simulator alike."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from migrd.core.admission import Admission
from migrd.core.facts import VmSpec
from migrd.core.migration import Policy
from migrd.core.phases import Phase
from migrd.engine.service import Resolution, Whereabouts
from migrd.errors import Conflict, Invalid, NotFound
from tests.contract.service.conftest import SLOW, Stage, begin, request


async def test_what_is_not_known_is_not_found_by_name(stage: Stage) -> None:
    service = stage.service
    with pytest.raises(NotFound) as unknown_vm:
        service.vm("nobody")
    assert unknown_vm.value.code == "unknown_vm"
    calls: list[Callable[[], Awaitable[Any]]] = [
        lambda: service.rounds("nothing"),
        lambda: service.decisions("nothing"),
        lambda: service.cancel("nothing", by="me"),
        lambda: service.switch_over("nothing", by="me"),
        lambda: service.change_policy("nothing", Policy(), by="me"),
        lambda: service.resolve("nothing", Resolution.GUEST_LOST, evidence="e", by="me"),
    ]
    for call in calls:
        with pytest.raises(NotFound) as unknown:
            await call()
        assert unknown.value.code == "unknown_migration"


async def test_what_cannot_be_migrated_is_refused_by_name(stage: Stage) -> None:
    with pytest.raises(NotFound) as vm:
        await begin(stage, vm="nobody")
    with pytest.raises(NotFound) as destination:
        await begin(stage, destination="nowhere")
    with pytest.raises(Invalid) as here:
        await begin(stage, destination=stage.here)
    assert (vm.value.code, destination.value.code) == ("unknown_vm", "unknown_destination")
    assert [v.code for v in here.value.violations] == ["destination_is_source"]
    await begin(stage)
    with pytest.raises(Conflict) as again:
        await begin(stage)
    assert again.value.code == "already_migrating"


async def test_a_key_finds_its_migration_also_when_that_has_ended(stage: Stage) -> None:
    id_ = await begin(stage, key="k", digest="d")
    view, created = await stage.service.create_migration(
        request(stage), idempotency_key="k", body_digest="d"
    )
    assert (view.id, created) == (id_, False)
    with pytest.raises(Invalid) as reused:
        await begin(stage, key="k", digest="other")
    assert reused.value.code == "idempotency_key_reused"
    await stage.service.cancel(id_, by="me")
    await stage.until(id_, Phase.CANCELLED)
    assert await begin(stage, key="k", digest="d") == id_


async def test_every_change_has_a_newer_version_and_wakes_a_watcher(stage: Stage) -> None:
    service = stage.service
    id_ = await begin(stage)
    first = service.migration(id_)
    watcher = asyncio.create_task(service.wait_newer(first.resource_version, within_s=100.0))
    await stage.until(id_, Phase.PRECOPY)
    later = service.migration(id_)
    assert await watcher > first.resource_version
    assert later.generation > first.generation
    assert later.resource_version > first.resource_version
    assert service.migrations()[0] >= later.resource_version


async def test_waiting_ends_with_its_time(stage: Stage) -> None:
    far = 2**52
    version = await stage.service.wait_newer(far, within_s=0.05)
    assert version < far
    assert version == stage.service.vms()[0]


async def test_events_are_replayed_from_where_a_reader_was(stage: Stage) -> None:
    service = stage.service
    async with service.events(after_id=None) as live:
        id_ = await begin(stage)
        await stage.until(id_, Phase.PRECOPY)
        seen = [await anext(live) for _ in range(4)]
    ids = [event.id for event in seen]
    assert ids == sorted(set(ids))
    async with service.events(after_id=ids[1]) as again:
        assert [(await anext(again)).id for _ in range(2)] == ids[2:]
    phases = [e for e in seen if e.kind == "migration.phase"]
    assert {e.migration_id for e in phases} == {id_}
    assert {e.vm for e in phases} == {"vm1"}
    assert all("phase" in e.body and "generation" in e.body for e in phases)


async def test_what_the_history_never_had_is_said_to_be_lost(stage: Stage) -> None:
    await begin(stage)
    async with stage.service.events(after_id=1) as reader:
        assert (await anext(reader)).kind == "events.lost"


async def test_cancel_is_queued_then_already_so_then_too_late(stage: Stage) -> None:
    service = stage.service
    id_ = await begin(stage)
    await stage.until(id_, Phase.PRECOPY)
    first = await service.cancel(id_, by="me")
    again = await service.cancel(id_, by="me")
    assert (first.admission, again.admission) == (Admission.QUEUED, Admission.ALREADY_SO)
    await stage.until(id_, Phase.CANCELLED)
    ended = await service.cancel(id_, by="me")
    assert ended.admission is Admission.ALREADY_SO
    view = service.migration(id_)
    assert view.is_terminal
    assert view.guest_runs_on is Whereabouts.SOURCE
    assert view.cause is not None
    switch = await service.switch_over(id_, by="me")
    assert (switch.admission, switch.reason) == (Admission.DENIED, "already_ended")
    policy = await service.change_policy(id_, Policy(), by="me")
    assert (policy.admission, policy.reason) == (Admission.DENIED, "already_ended")


async def test_a_policy_that_is_in_force_is_already_so(stage: Stage) -> None:
    id_ = await begin(stage)
    await stage.until(id_, Phase.PRECOPY)
    same = await stage.service.change_policy(id_, SLOW, by="me")
    assert same.admission is Admission.ALREADY_SO
    other = await stage.service.change_policy(id_, Policy(downtime_limit_s=0.5), by="me")
    assert other.admission is Admission.QUEUED


async def test_only_a_migration_that_needs_an_operator_is_resolved(stage: Stage) -> None:
    id_ = await begin(stage)
    answer = await stage.service.resolve(id_, Resolution.DESTINATION_RUNS, evidence="e", by="me")
    assert (answer.admission, answer.reason) == (Admission.DENIED, "not_needs_operator")


async def test_a_vm_that_runs_or_moves_is_neither_forgotten_nor_stopped(stage: Stage) -> None:
    service = stage.service
    with pytest.raises(Conflict) as running:
        await service.forget_vm("vm1")
    assert running.value.code == "vm_running"
    await begin(stage)
    for call in (service.forget_vm, service.stop_vm):
        with pytest.raises(Conflict) as moving:
            await call("vm1")
        assert moving.value.code == "already_migrating"


async def test_a_vm_is_defined_once_and_a_dry_run_keeps_nothing(stage: Stage) -> None:
    service, spec = stage.service, VmSpec("vm2", stage.profile)
    _, would_create = await service.define_vm(spec, dry_run=True)
    assert would_create
    assert [vm.name for vm in service.vms()[1]] == ["vm1"]
    _, created = await service.define_vm(spec, dry_run=False)
    _, created_again = await service.define_vm(spec, dry_run=False)
    assert (created, created_again) == (True, False)
    assert [vm.name for vm in service.vms()[1]] == ["vm1", "vm2"]
    await service.forget_vm("vm2")
    assert [vm.name for vm in service.vms()[1]] == ["vm1"]
    with pytest.raises(NotFound) as profile:
        await service.define_vm(VmSpec("vm3", "nothing-like-it"), dry_run=False)
    assert profile.value.code == "unknown_profile"


async def test_starting_twice_and_stopping_twice_is_no_error(stage: Stage) -> None:
    service = stage.service
    assert (await service.start_vm("vm1")).state == "running"
    assert (await service.stop_vm("vm1")).state == "stopped"
    stage.was_ended_on_purpose()
    assert (await service.stop_vm("vm1")).state == "stopped"
    with pytest.raises(Conflict) as stopped:
        await begin(stage)
    assert stopped.value.code == "vm_stopped"


async def test_a_plan_changes_nothing_and_lists_what_is_in_the_way(stage: Stage) -> None:
    service = stage.service
    assert (await service.plan(request(stage))).possible
    assert not service.migrations()[1]
    await begin(stage)
    plan = await service.plan(request(stage))
    assert not plan.possible
    assert "already_migrating" in [refusal.code for refusal in plan.refusals]
