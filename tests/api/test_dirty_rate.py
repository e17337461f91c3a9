"""Dirty rates over HTTP: read at once, measured when asked, refused by name."""

from __future__ import annotations

from datetime import datetime

import pytest

from migrd.api.models import DirtyRate, MeasurementAsked, RateHistory
from migrd.core.rate_reading import MIB
from migrd.engine.rate_views import SamplingState, Trouble
from migrd.errors import NotFound
from tests.api.running import Api
from tests.fakes.rates import SAMPLED_WALL_S

RATES = "/v1/vms/web-1/dirty-rate"


async def test_the_last_sample_has_windows_intervals_age_and_the_working_set(api: Api) -> None:
    got = await api("GET", RATES)
    assert got.status == 200
    seen = DirtyRate.model_validate_json(got.body)
    assert (seen.vm, seen.state) == ("web-1", "on")
    cpu = next(each for each in seen.trackers if each.tracker == "qemu")
    assert [window.window_ms for window in cpu.windows] == [250, 1000, 4000]
    assert cpu.dirty_bytes_per_s == cpu.windows[1].dirty_bytes_per_s
    assert cpu.low_bytes_per_s is not None
    assert cpu.dirty_bytes_per_s is not None
    assert cpu.low_bytes_per_s < cpu.dirty_bytes_per_s
    assert (cpu.age_ms, cpu.cost_ms, cpu.interval_ms) == (12_500, 6, 30_000)
    found = cpu.working_set
    assert found is not None
    assert found.quality == "fitted"
    assert found.set_bytes == pytest.approx(300 * MIB, rel=0.05)
    assert found.first_bytes_per_s == pytest.approx(200 * MIB, rel=0.05)


async def test_what_is_not_known_is_null_with_the_reason(api: Api) -> None:
    seen = DirtyRate.model_validate_json((await api("GET", RATES)).body)
    dma = next(each for each in seen.trackers if each.tracker == "iommu")
    assert dma.dirty_bytes_per_s is None
    assert dma.windows[0].reason == "unproven"
    assert dma.working_set is not None
    assert dma.working_set.quality == "too_few_windows"
    assert dma.working_set.set_bytes is None


async def test_trouble_is_told_beside_the_last_sample(api: Api) -> None:
    api.service.rate_trouble = Trouble("rate_busy", "already being measured", SAMPLED_WALL_S)
    seen = DirtyRate.model_validate_json((await api("GET", RATES)).body)
    cpu = next(each for each in seen.trackers if each.tracker == "qemu")
    assert cpu.trouble is not None
    assert cpu.trouble.code == "rate_busy"
    assert cpu.dirty_bytes_per_s is not None


async def test_the_history_is_asked_for_by_time_and_step(api: Api) -> None:
    since = datetime.fromtimestamp(SAMPLED_WALL_S - 100).astimezone().isoformat()
    got = await api("GET", f"{RATES}/history?from={since.replace('+', '%2B')}&step_s=30")
    seen = RateHistory.model_validate_json(got.body)
    assert seen.step_s == 30
    assert [point.at.timestamp() for point in seen.items] == [SAMPLED_WALL_S - 60]
    assert seen.items[0].lowest_bytes_per_s < seen.items[0].highest_bytes_per_s
    whole = RateHistory.model_validate_json((await api("GET", f"{RATES}/history")).body)
    assert len(whole.items) == 2


@pytest.mark.parametrize(
    "query", ["from=yesterday", "from=2026-11-23T10:00:00", "step_s=1", "step_s=1e9", "since=3"]
)
async def test_a_bad_question_names_its_field(api: Api, query: str) -> None:
    got = await api("GET", f"{RATES}/history?{query}")
    (violation,) = got.problem(422, "invalid").violations
    assert violation.field.endswith(query.split("=")[0])


async def test_many_wishes_are_one_measurement(api: Api) -> None:
    first = await api("POST", f"{RATES}:measure")
    assert (first.status, first.headers["Retry-After"]) == (202, "6")
    assert MeasurementAsked.model_validate_json(first.body).is_new
    again = await api("POST", f"{RATES}:measure")
    assert again.status == 200
    assert not MeasurementAsked.model_validate_json(again.body).is_new


async def test_what_cannot_be_measured_is_a_conflict_with_its_reason(api: Api) -> None:
    (await api("POST", "/v1/vms/idle-1/dirty-rate:measure")).problem(409, "vm_stopped")
    api.service.sampling_state = {"web-1": SamplingState.OFF}
    (await api("POST", f"{RATES}:measure")).problem(409, "sampling_off")
    seen = DirtyRate.model_validate_json((await api("GET", RATES)).body)
    assert (seen.state, seen.trackers) == ("off", ())


async def test_an_unknown_vm_is_not_found(api: Api) -> None:
    assert isinstance(api.service.failures, dict)
    for method, where in (("GET", ""), ("GET", "/history"), ("POST", ":measure")):
        got = await api(method, f"/v1/vms/nobody/dirty-rate{where}")
        got.problem(404, NotFound("", code="unknown_vm").code)
