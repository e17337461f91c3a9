"""A guest that was given back to its source while its destination's VMM died starting it."""

from __future__ import annotations

import asyncio

from migrd import failpoints
from migrd.core.phases import Phase
from migrd.engine.service import Resolution
from tests.fakes.road import LATE_S, Loss
from tests.fakes.virtual_time import until
from tests.fakes.world import VM, Pair, running_pair


async def died_starting(pair: Pair) -> str:
    """A migration that a person is called for."""

    def dies(point: str) -> None:
        if point == "destination.cont.deciding":
            pair.hosts["beta"].qemu(VM).die("killed")

    with failpoints.observing(dies):
        migration_id = await pair.ask()
        await pair.until_phase(migration_id, Phase.NEEDS_OPERATOR)
    return migration_id


async def given_back(pair: Pair, migration_id: str) -> None:
    await pair.alpha.service.resolve(
        migration_id, Resolution.DESTINATION_FENCED, evidence="it is off", by="op"
    )
    assert (await pair.until_over(migration_id)).phase == Phase.ROLLED_BACK


async def test_to_be_told_twice_at_once_that_it_was_taken_back_is_journalled_once() -> None:
    async with running_pair() as pair:
        migration_id = await died_starting(pair)
        pair.road.faults = lambda caller, callee, call: (
            Loss.REPEATED_AT_ONCE if call == "discard" else None
        )
        await given_back(pair, migration_id)
        pair.road.heal()
        assert pair.stands(migration_id, "beta")[0] == "refused"
        await pair.restart("beta")  # whose journal still makes sense
        assert pair.stands(migration_id, "beta")[0] == "refused"
        await pair.migrates_again()


async def test_a_discard_from_before_the_grant_that_comes_late_takes_nothing_back() -> None:
    """The grant's fsync failed, so the source asked for a refusal; it was on the disk after all,
    and a restarted daemon grants. Then the destination's VMM dies just after the start."""
    async with running_pair() as pair:
        pair.road.faults = lambda caller, callee, call: (
            Loss.REQUEST_LATE if call == "discard" else None
        )

        def fails(point: str) -> None:
            if point == "source.transfer_completed.deciding":
                pair.alpha.journal.fsync_fails = True

        with failpoints.observing(fails):
            migration_id = await pair.ask()
            await until(lambda: ("alpha", "beta", "discard") in pair.road.log, what="it asks")
            await asyncio.sleep(1.0)

        def dies(point: str) -> None:
            if point == "destination.cont.done":
                pair.hosts["beta"].qemu(VM).die("killed")

        with failpoints.observing(dies):
            await pair.restart("alpha")
            await pair.until_phase(migration_id, Phase.NEEDS_OPERATOR)
        await asyncio.sleep(2 * LATE_S)
        assert pair.stands(migration_id)[0] == Phase.NEEDS_OPERATOR
        assert pair.running_on() is None, "it has run over there"


async def test_a_destination_that_was_not_told_so_finds_out_when_asked_again() -> None:
    async with running_pair() as pair:
        migration_id = await died_starting(pair)
        pair.road.faults = lambda caller, callee, call: (
            Loss.UNREACHABLE if call == "discard" else None
        )
        await given_back(pair, migration_id)
        pair.road.heal()
        await pair.migrates_again()
        assert pair.stands(migration_id, "beta")[0] == "refused"
