"""The sampler among many VMs: nobody waits for another, nothing odd breaks it, the past is kept."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import pytest

from migrd.core.migration import Policy, Request
from migrd.core.rate_history import BYTES
from migrd.core.rate_reading import (
    MIB,
    MeasuredRate,
    Tracker,
)
from migrd.engine.rate_views import SamplingState
from migrd.engine.source_sampling import PATIENCE_S
from migrd.errors import Conflict, VmmRefused
from tests.engine.rates import (
    INTERVAL_S,
    ON,
    RATE,
    cpu,
    observe,
    pair_of,
    qemu_of,
    rates,
    sampled,
    troubled,
)
from tests.fakes.virtual_time import WALL_S, now_s, until
from tests.fakes.world import VM, Pair

# ----------------------------------------------------------------------------- one among many


async def test_a_vm_that_never_answers_delays_nobody_and_is_tried_again() -> None:
    async with pair_of("slow", "quick") as pair:
        qemu_of(pair, "slow").meter.is_stuck = True
        await sampled(pair, "quick", sets=5)
        assert cpu(pair, "quick").interval_s == pytest.approx(INTERVAL_S, abs=0.2)
        slow = cpu(pair, "slow")
        assert slow.readings == ()
        assert slow.trouble is not None
        assert slow.trouble.code == "too_slow"
        assert slow.failures >= 2
        qemu_of(pair, "slow").meter.is_stuck = False
        await sampled(pair, "slow")
        assert cpu(pair, "slow").trouble is None


async def test_a_qemu_that_is_blocked_delays_nobody() -> None:
    async with pair_of("blocked", "quick") as pair:
        qemu_of(pair, "blocked").block()
        await sampled(pair, "quick", sets=4)
        assert rates(pair, "blocked").state is SamplingState.UNREACHABLE
        with pytest.raises(Conflict) as denied:
            await pair.alpha.service.measure_dirty_rate("blocked", by="test")
        assert denied.value.code == "vm_unreachable"
        qemu_of(pair, "blocked").unblock()
        await sampled(pair, "blocked")


async def test_a_qemu_that_dies_takes_its_rates_along_and_nobody_else() -> None:
    async with pair_of("dying", "quick") as pair:
        seen = observe(pair)
        await sampled(pair, "dying")
        qemu_of(pair, "dying").die("killed by a test")
        await until(lambda: seen.ended == ["dying"])
        assert rates(pair, "dying").trackers == ()
        assert rates(pair, "dying").state is SamplingState.NOT_RUNNING
        await sampled(pair, "quick", sets=4)


async def test_two_hundred_vms_fit_the_budget_and_all_get_their_turn() -> None:
    """Each costs 6 ms a set: together 40 times the budget, if the interval were kept."""
    async with Pair(sampling=ON) as pair:
        for number in range(200):
            await pair.boot(f"vm{number}")
        seen = observe(pair)
        began_s = now_s()
        await asyncio.sleep(300)
        cost_s = sum(each.cost_s for each in seen.rates)
        assert cost_s <= 0.01 * (now_s() - began_s + 5)
        assert {each.vm for each in seen.rates} == {f"vm{number}" for number in range(200)}
        most = max(sum(each.vm == f"vm{n}" for each in seen.rates) for n in range(200))
        least = min(sum(each.vm == f"vm{n}" for each in seen.rates) for n in range(200))
        assert most - least <= 2, "nobody is served twice while others wait"


async def test_reads_of_two_hundred_vms_are_quick() -> None:
    """A ratio: reading all of them costs less than measuring one would take."""
    async with Pair(sampling=ON) as pair:
        for number in range(200):
            await pair.boot(f"vm{number}")
        await asyncio.sleep(2 * INTERVAL_S)
        began_s = time.perf_counter()
        for number in range(200):
            rates(pair, f"vm{number}")
        assert time.perf_counter() - began_s < 0.25


# ----------------------------------------------------------------------------- hostile answers


@pytest.mark.parametrize(
    "odd",
    [
        MeasuredRate(1 << 39, 1.0, 512, 0.0),
        MeasuredRate(5, 1.0, 0, 0.0),
        MeasuredRate(5, 0.0, 512, 0.0),
        MeasuredRate(5, 1.0, 512, 1e9),
        MeasuredRate(0, 1.0, None, -5.0),
    ],
)
async def test_an_odd_figure_breaks_nothing_and_books_no_absurd_cost(odd: MeasuredRate) -> None:
    async with pair_of("odd", "quick") as pair:
        qemu_of(pair, "odd").meter.odd = odd
        await sampled(pair, "odd", sets=2)
        await sampled(pair, "quick", sets=4)
        assert (cpu(pair, "odd").cost_s or 0) <= 3
        for reading in cpu(pair, "odd").readings:
            assert reading.dirty_bytes is not None
            assert (reading.dirty_bytes.value or 0) <= 1 << 60


async def test_a_refusal_shows_as_trouble_and_the_last_sample_stays() -> None:
    async with pair_of() as pair:
        seen = observe(pair)
        before = await sampled(pair)
        text = "the dirty rate is already being measured."
        qemu_of(pair).meter.error = VmmRefused(text, code="rate_busy")
        trouble = await troubled(pair)
        assert (trouble.code, trouble.message) == ("rate_busy", text)
        assert cpu(pair).readings == before.readings
        assert [each.outcome for each in seen.rates] == ["ok", "failed"]


async def test_a_defect_in_a_source_is_no_end_of_the_daemon() -> None:
    async with pair_of() as pair:
        qemu_of(pair).meter.error = ZeroDivisionError("a bug")  # type: ignore[assignment]  # planted
        trouble = await troubled(pair)
        assert trouble.code == "unexpected"
        qemu_of(pair).meter.error = None
        await sampled(pair)


# ------------------------------------------------------------------------------------ history


async def test_the_past_is_kept_in_steps_and_lost_with_the_daemon() -> None:
    async with pair_of() as pair:
        await asyncio.sleep(7200)
        service = pair.alpha.service
        whole = service.dirty_rate_history(VM, since_wall_s=WALL_S, step_s=None)
        points = whole.points[Tracker.QEMU]
        assert whole.step_s == 60
        assert 110 <= len(points) <= 121
        assert points[0].start_s >= WALL_S - 60
        assert points[-1].start_s <= pair.alpha.engine._world.clock.wall_s()
        assert all(0.3 * RATE < point.mean <= RATE for point in points)
        fine = service.dirty_rate_history(VM, since_wall_s=points[-1].start_s - 120, step_s=None)
        assert fine.step_s == 10
        coarse = service.dirty_rate_history(VM, since_wall_s=WALL_S, step_s=600)
        assert len(coarse.points[Tracker.QEMU]) <= 13
        later = service.dirty_rate_history(VM, since_wall_s=WALL_S + 1e9, step_s=None)
        assert later.points[Tracker.QEMU] == []
        await pair.restart("alpha")
        again = pair.alpha.service.dirty_rate_history(VM, since_wall_s=WALL_S, step_s=None)
        assert not any(again.points.values())


async def test_the_history_of_a_vm_outlives_its_qemu_but_not_the_vm() -> None:
    async with pair_of() as pair:
        await sampled(pair)
        service, sampler = pair.alpha.service, pair.alpha.engine.sampler
        qemu_of(pair).die("killed by a test")
        await asyncio.sleep(5)
        kept = service.dirty_rate_history(VM, since_wall_s=WALL_S, step_s=None)
        assert len(kept.points[Tracker.QEMU]) == 1
        assert sum(each.bytes_held for each in sampler._histories.values()) == BYTES
        await service.forget_vm(VM)
        await asyncio.sleep(5)
        assert sampler._histories == {}


async def test_a_source_that_hangs_ends_with_the_daemon() -> None:
    async with pair_of() as pair:
        qemu_of(pair).meter.is_stuck = True
        await asyncio.sleep(INTERVAL_S + PATIENCE_S / 2)
        assert len(qemu_of(pair).meter.begun) >= 1


# ---------------------------------------------------------------------------------- foresight


async def test_a_plan_foretells_what_the_last_measurement_says() -> None:
    """Memory of 512 MiB by a link of 200 MiB/s, 64 MiB/s written over 96 MiB."""
    async with pair_of(pages=1 << 18) as pair:
        policy = Policy(downtime_limit_s=0.3, max_bandwidth_bytes_per_s=200 * MIB)
        request = Request(VM, "beta", policy=policy)
        before = await pair.alpha.service.plan(request)
        assert (before.dirty_bytes_per_s, before.predicted_total_s) == (None, None)
        await sampled(pair)
        plan = await pair.alpha.service.plan(request)
        assert plan.dirty_bytes_per_s == pytest.approx(46 * MIB, rel=0.1)
        assert plan.dirty_rate_age_s is not None
        assert plan.dirty_rate_age_s < 5
        assert plan.predicted_converges is True
        assert plan.predicted_blackout_s is not None
        assert plan.predicted_blackout_s <= 0.3
        assert plan.predicted_total_s is not None
        assert 512 / 200 < plan.predicted_total_s < 2 * 512 / 200
        slow = Policy(downtime_limit_s=0.1, max_bandwidth_bytes_per_s=20 * MIB)
        never = await pair.alpha.service.plan(replace(request, policy=slow))
        assert never.predicted_converges is False
        assert never.predicted_total_s is None
