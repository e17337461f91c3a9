"""Dirty rates, of the engine and of its simulator alike."""

from __future__ import annotations

import pytest

from migrd.core.phases import Phase
from migrd.core.rate_history import KEPT_S
from migrd.engine.rate_views import SamplingState
from migrd.errors import Conflict, NotFound
from tests.contract.service.conftest import Stage, begin

VM = "vm1"


async def denied(stage: Stage) -> str:
    with pytest.raises(Conflict) as conflict:
        await stage.service.measure_dirty_rate(VM, by="me")
    return conflict.value.code


async def test_an_unknown_vm_is_not_found(stage: Stage) -> None:
    service = stage.service
    with pytest.raises(NotFound):
        service.dirty_rates("nobody")
    with pytest.raises(NotFound):
        service.dirty_rate_history("nobody", since_wall_s=None, step_s=None)
    with pytest.raises(NotFound):
        await service.measure_dirty_rate("nobody", by="me")


async def test_a_vm_in_a_migration_is_not_measured_and_says_so(stage: Stage) -> None:
    id_ = await begin(stage)
    await stage.until(id_, Phase.PRECOPY)
    assert stage.service.dirty_rates(VM).state is SamplingState.MIGRATING
    assert await denied(stage) == "vm_migrating"


async def test_a_stopped_vm_is_not_measured_and_says_so(stage: Stage) -> None:
    await stage.service.stop_vm(VM)
    stage.was_ended_on_purpose()
    assert stage.service.dirty_rates(VM).state is SamplingState.NOT_RUNNING
    assert await denied(stage) == "vm_stopped"


async def test_a_history_says_from_when_and_in_what_steps(stage: Stage) -> None:
    view = stage.service.dirty_rate_history(VM, since_wall_s=1.0, step_s=3600)
    assert (view.vm, view.since_wall_s, view.step_s) == (VM, 1.0, 3600)
    points = [point for each in view.points.values() for point in each]
    assert len(points) <= KEPT_S
    assert all(point.least <= point.mean <= point.most for point in points)
