"""What migrations of two whole engines show, as a scrape of each host would find it."""

import asyncio
from collections.abc import Coroutine

from migrd.core.phases import Phase
from migrd.metrics.migrations import CONDITION, CONDITIONS, migration_families
from tests.engine.test_postcopy import moving
from tests.engine.test_silent_sources import until_silent
from tests.fakes.virtual_time import VirtualTimeLoop, until
from tests.fakes.world import Daemon, running_pair
from tests.metrics.test_rules import conditions


def in_virtual_time(story: Coroutine[None, None, None]) -> None:
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(story)


def scraped(daemon: Daemon) -> dict[tuple[str, ...], float]:
    """(role, condition) -> count, of what is not at zero."""
    families = dict(migration_families(daemon.service.migrations()[1], {}))
    return {key: count for key, count in families[CONDITION].items() if count}


def test_the_metric_knows_every_condition_of_the_engine_and_no_other() -> None:
    assert set(CONDITIONS) == conditions()


def test_a_postcopy_that_pauses_is_scraped_at_its_source_until_it_goes_on() -> None:
    async def story() -> None:
        async with running_pair() as pair:
            migration_id = await moving(pair)
            assert scraped(pair.alpha) == {}
            pair.ground.wire.freeze()
            await until(lambda: scraped(pair.alpha) == {("source", "PostcopyPaused"): 1})
            pair.ground.wire.heal()
            await until(lambda: scraped(pair.alpha) == {})
            assert (await pair.until_over(migration_id)).phase == Phase.SUCCEEDED

    in_virtual_time(story())


def test_a_destination_whose_source_is_silent_is_scraped_until_its_source_is_back() -> None:
    async def story() -> None:
        async with running_pair(receive_idle_s=5.0) as pair:
            migration_id = await until_silent(pair)
            assert scraped(pair.beta) == {}
            await until(lambda: scraped(pair.beta) == {("destination", "NotGoingOn"): 1})
            await pair.start("alpha")
            pair.ground.calm()
            await until(lambda: scraped(pair.beta) == {})
            await pair.until_over(migration_id)

    in_virtual_time(story())


def test_a_destination_whose_disk_is_full_is_scraped_and_not_ready_until_there_is_room() -> None:
    async def story() -> None:
        async with running_pair() as pair:
            pair.ground.load.device_s = 0.05
            migration_id = await pair.ask()
            await pair.until_phase(migration_id, Phase.SWITCHOVER)
            pair.beta.journal.is_full = True
            await until(lambda: scraped(pair.beta) == {("destination", "JournalFailing"): 1})
            checks = {check.name: check for check in pair.beta.service.readiness()}
            assert not checks["journal"].ok
            assert migration_id in checks["journal"].message
            pair.beta.journal.is_full = False
            await until(lambda: scraped(pair.beta) == {})
            assert all(check.ok for check in pair.beta.service.readiness())
            await pair.until_over(migration_id)

    in_virtual_time(story())
