"""A guest that was given back to its source while its destination's VMM died starting it."""

from __future__ import annotations

import asyncio

from migrd import failpoints
from migrd.core.phases import Phase
from migrd.engine.service import Resolution
from tests.fakes.road import Loss
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
        epoch = pair.engine_state(migration_id).epoch
        reception = pair.beta.engine.reception
        told = [reception.discard("alpha", migration_id, epoch, "fenced") for _ in range(3)]
        answers = await asyncio.gather(*told)
        assert {answer.phase for answer in answers} == {"refused"}
        await pair.restart("beta")  # whose journal still makes sense
        assert pair.stands(migration_id, "beta")[0] == "refused"
        await given_back(pair, migration_id)
        await pair.migrates_again()


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
