"""Dirty rates measured outside of migrations: right, in time for everybody, and within a budget."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest

from migrd.core.phases import Phase
from migrd.core.rate_reading import (
    RateOffer,
    headline,
)
from migrd.core.working_set import FitQuality
from migrd.engine.rate_views import DirtyRatesView, SamplingState
from migrd.engine.source_sampling import LEAST_GAP_S
from migrd.errors import Conflict, NotFound
from tests.engine.rates import (
    INTERVAL_S,
    RATE,
    SET_BYTES,
    cpu,
    observe,
    pair_of,
    qemu_of,
    rates,
    sampled,
)
from tests.engine.test_steering import never_converges
from tests.fakes.meter import OLD
from tests.fakes.virtual_time import WALL_S, now_s, until
from tests.fakes.world import VM

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
