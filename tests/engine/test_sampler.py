"""Dirty rates measured outside of migrations: right, in time for everybody, and within a budget."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import pytest

from migrd.core.migration import Policy, Request
from migrd.core.phases import Phase
from migrd.core.rate_history import BYTES
from migrd.core.rate_reading import (
    MIB,
    MeasuredRate,
    RateMode,
    RateOffer,
    Tracker,
    headline,
)
from migrd.core.working_set import FitQuality
from migrd.engine.options import SamplingOptions
from migrd.engine.rate_views import DirtyRatesView, RateSeen, SamplingState, TrackerRates, Trouble
from migrd.engine.source_sampling import LEAST_GAP_S, PATIENCE_S
from migrd.errors import Conflict, NotFound, VmmRefused
from tests.engine.test_steering import never_converges
from tests.fakes.meter import OLD
from tests.fakes.qemu_process import FakeQemu, Load
from tests.fakes.virtual_time import WALL_S, now_s, until
from tests.fakes.world import VM, Pair

INTERVAL_S = 30.0
ON = SamplingOptions(RateMode.PAGE_SAMPLING, interval_s=INTERVAL_S)
RATE, SET_BYTES = 64 * MIB, 96 * MIB


@dataclass
class Seen:
    """Notes what the metrics would be told."""

    rates: list[RateSeen] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)


@contextlib.asynccontextmanager
async def pair_of(*vms: str, **changes: Any) -> AsyncIterator[Pair]:
    """VMs that run on alpha, each writing 64 MiB/s over 96 MiB."""
    async with Pair(sampling=replace(ON, **changes)) as pair:
        pair.ground.load = Load(512 * MIB, RATE, SET_BYTES)
        for name in vms or (VM,):
            await pair.boot(name)
        yield pair


def rates(pair: Pair, vm: str = VM) -> DirtyRatesView:
    return pair.alpha.service.dirty_rates(vm)


def cpu(pair: Pair, vm: str = VM) -> TrackerRates:
    (found,) = [each for each in rates(pair, vm).trackers if each.tracker is Tracker.QEMU]
    return found


def qemu_of(pair: Pair, vm: str = VM) -> FakeQemu:
    return pair.hosts["alpha"].qemu(vm)


async def sampled(pair: Pair, vm: str = VM, *, sets: int = 1) -> TrackerRates:
    """Until so many sets of windows were measured."""

    def is_there() -> bool:
        return any(each.sets >= sets for each in rates(pair, vm).trackers)

    await until(is_there, within_s=600.0, what=f"{sets} sets of {vm}")
    return cpu(pair, vm)


async def troubled(pair: Pair) -> Trouble:
    """Until a measurement has failed."""

    def found() -> list[Trouble]:
        return [each.trouble for each in rates(pair).trackers if each.trouble is not None]

    await until(found, within_s=100)
    return found()[0]


def observe(pair: Pair) -> Seen:
    seen = Seen()
    observer: Any = pair.alpha.observer
    observer.rate_sampled, observer.rates_ended = seen.rates.append, seen.ended.append
    return seen


# ----------------------------------------------------------------------------- what is measured


async def test_a_running_vm_is_measured_in_several_windows_and_its_working_set_found() -> None:
    async with pair_of(pages=1 << 18) as pair:
        found = await sampled(pair)
        assert [reading.window_s for reading in found.readings] == [0.25, 1.0, 4.0]
        assert found.working_set is not None
        assert found.working_set.quality is FitQuality.FITTED
        first, whole = found.working_set.first_bytes_per_s, found.working_set.set_bytes
        assert first is not None
        assert whole is not None
        assert first.high is not None
        assert whole.high is not None
        assert first.low <= RATE <= first.high
        assert whole.low <= SET_BYTES <= whole.high
        assert whole.high < 2 * whole.low
        best = headline(found.readings)
        assert best is not None
        assert best.window_s == 1.0


async def test_a_qemu_that_takes_whole_seconds_is_asked_for_whole_seconds() -> None:
    async with pair_of() as pair:
        qemu_of(pair).meter.offer = OLD
        found = await sampled(pair)
        assert [reading.window_s for reading in found.readings] == [1.0, 2.0, 4.0]


async def test_measurements_come_at_the_interval_one_at_a_time() -> None:
    async with pair_of() as pair:
        meter = qemu_of(pair).meter
        await sampled(pair, sets=4)
        firsts = [at_s for at_s, window_s, _ in meter.begun if window_s == 0.25]
        gaps = [later - at_s for at_s, later in pairwise(firsts)]
        assert gaps == pytest.approx([INTERVAL_S] * len(gaps), abs=0.1)
        assert meter.most_at_once == 1
        assert cpu(pair).interval_s == pytest.approx(INTERVAL_S, abs=0.1)


async def test_reading_never_measures_anything() -> None:
    async with pair_of() as pair:
        await sampled(pair)
        meter = qemu_of(pair).meter
        begun, at_s = len(meter.begun), now_s()
        for _ in range(1000):
            rates(pair)
            pair.alpha.service.dirty_rate_history(VM, since_wall_s=None, step_s=None)
            await asyncio.sleep(0.01)
        assert len(meter.begun) == begun
        assert cpu(pair).age_s == pytest.approx(now_s() - at_s, abs=0.5)
        wall_s = cpu(pair).sampled_wall_s
        assert wall_s is not None
        assert wall_s > WALL_S


async def test_without_sampling_nothing_is_asked_and_that_is_said() -> None:
    async with pair_of(mode=None) as pair:
        await asyncio.sleep(100)
        assert qemu_of(pair).meter.begun == []
        assert rates(pair) == DirtyRatesView(VM, SamplingState.OFF, ())
        with pytest.raises(Conflict) as denied:
            await pair.alpha.service.measure_dirty_rate(VM, by="test")
        assert denied.value.code == "sampling_off"


async def test_a_vmm_that_measures_nothing_is_no_trouble() -> None:
    async with pair_of() as pair:
        seen = observe(pair)
        qemu_of(pair).meter.offer = RateOffer()
        await asyncio.sleep(3 * INTERVAL_S)
        assert rates(pair) == DirtyRatesView(VM, SamplingState.OFF, ())
        assert seen.rates == []
        qemu_of(pair).meter.offer = OLD
        await sampled(pair)


async def test_an_unknown_vm_has_no_rates() -> None:
    async with pair_of() as pair:
        with pytest.raises(NotFound):
            rates(pair, "nobody")
        with pytest.raises(NotFound):
            pair.alpha.service.dirty_rate_history("nobody", since_wall_s=None, step_s=None)
        with pytest.raises(NotFound):
            await pair.alpha.service.measure_dirty_rate("nobody", by="test")


async def test_a_guest_that_stands_still_is_not_measured() -> None:
    async with pair_of() as pair:
        vmm = pair.alpha.engine.vms.require(VM).vmm
        assert vmm is not None
        await vmm.pause_guest()
        await until(lambda: rates(pair).state is SamplingState.NOT_RUNNING)
        begun = len(qemu_of(pair).meter.begun)
        await asyncio.sleep(3 * INTERVAL_S)
        assert len(qemu_of(pair).meter.begun) <= begun + 3
        await vmm.run_guest()
        await sampled(pair)
        assert rates(pair).state is SamplingState.ON


# --------------------------------------------------------------------------------- on request


async def test_whoever_asks_gets_a_measurement_soon_and_many_get_one() -> None:
    async with pair_of() as pair:
        await sampled(pair)
        await asyncio.sleep(LEAST_GAP_S + 1)
        begun = len(qemu_of(pair).meter.begun)
        ask = pair.alpha.service.measure_dirty_rate
        answers = [await ask(VM, by=f"client {n}") for n in range(20)]
        assert [answer.is_new for answer in answers] == [True] + [False] * 19
        assert 5.0 < answers[0].within_s < 10.0
        await asyncio.sleep(answers[0].within_s + 0.5)
        assert cpu(pair).age_s is not None
        assert cpu(pair).age_s < 2  # type: ignore[operator]  # not None
        assert len(qemu_of(pair).meter.begun) == begun + 3


async def test_who_asks_all_the_time_does_not_get_all_of_the_host() -> None:
    async with pair_of() as pair:
        meter = qemu_of(pair).meter
        meter.overrun_s = 0.01
        await sampled(pair)
        began_s, begun = now_s(), len(meter.begun)
        while now_s() < began_s + 600:
            await pair.alpha.service.measure_dirty_rate(VM, by="test")
            await asyncio.sleep(0.5)
        cost_s = 0.01 * (len(meter.begun) - begun)
        assert cost_s <= 0.01 * 602 * 1.05
        assert len(meter.begun) - begun > 3 * 600 / INTERVAL_S, "more often than without"


async def test_a_cheap_vm_is_left_alone_between_two_measurements_too() -> None:
    async with pair_of() as pair:
        meter = qemu_of(pair).meter
        meter.overrun_s = 0.0
        await sampled(pair)
        began_s = now_s()
        while now_s() < began_s + 300:
            await pair.alpha.service.measure_dirty_rate(VM, by="test")
            await asyncio.sleep(0.5)
        firsts = [at_s for at_s, window_s, _ in meter.begun if window_s == 0.25]
        assert min(later - at_s for at_s, later in pairwise(firsts)) >= 5.25 + LEAST_GAP_S - 0.01
        assert len(firsts) > 20


# --------------------------------------------------------------------------------- migrations


async def test_a_migration_stops_the_measuring_and_its_end_brings_it_back() -> None:
    async with pair_of() as pair:
        await sampled(pair)
        never_converges(pair)
        migration_id = await pair.ask()
        await pair.until_phase(migration_id, Phase.PRECOPY)
        meter = qemu_of(pair).meter
        begun = len(meter.begun)
        await asyncio.sleep(2 * INTERVAL_S)
        assert len(meter.begun) <= begun, "at most what was under way"
        assert rates(pair).state is SamplingState.MIGRATING
        with pytest.raises(Conflict) as denied:
            await pair.alpha.service.measure_dirty_rate(VM, by="test")
        assert denied.value.code == "vm_migrating"
        sets = cpu(pair).sets
        await pair.alpha.service.cancel(migration_id, by="test")
        await pair.until_over(migration_id)
        await sampled(pair, sets=sets + 1)


async def test_what_was_measured_when_a_migration_began_is_thrown_away() -> None:
    async with pair_of() as pair:
        seen = observe(pair)
        meter = qemu_of(pair).meter
        await until(lambda: len(meter.begun) == 3, within_s=60)  # the window of 4 s has begun
        never_converges(pair)
        migration_id = await pair.ask()
        await pair.until_phase(migration_id, Phase.PRECOPY)
        await until(lambda: seen.rates)
        assert seen.rates[0].outcome == "interrupted"
        assert cpu(pair).sets == 0
        assert cpu(pair).trouble is None


async def test_the_sampler_follows_the_vm_to_the_other_host() -> None:
    async with pair_of() as pair:
        seen = observe(pair)
        await sampled(pair)
        assert (await pair.migrate()).phase == Phase.SUCCEEDED
        await until(lambda: seen.ended == [VM])
        assert rates(pair).trackers == ()

        def there() -> bool:
            return any(each.sets for each in pair.beta.service.dirty_rates(VM).trackers)

        await until(there, within_s=3 * INTERVAL_S)


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
