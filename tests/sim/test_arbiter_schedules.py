"""Random schedules of hosts that have an arbiter; and each rule of its use, broken, is seen."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from migrd.core.phases import Phase
from migrd.engine import arbitrated, ownership
from migrd.engine.arbiter_port import Ownership
from migrd.engine.arbitrated import _Settling
from migrd.engine.incoming_ownership import RecordKeeping
from migrd.engine.ownership import Standing
from tests.sim.arbiter_blows import FIRST_ARBITRATED
from tests.sim.run import Wrong, play
from tests.sim.schedule import from_seed

PER_COMMIT = 600
PARTS = 6
ENOUGH = 600
Patch = pytest.MonkeyPatch


@pytest.mark.parametrize("part", range(PARTS))
def test_no_schedule_with_an_arbiter_doubles_loses_or_strands_a_guest(part: int) -> None:
    each = PER_COMMIT // PARTS
    first = FIRST_ARBITRATED + 1_000_000 + part * each
    ends = {play(from_seed(seed)).phase for seed in range(first, first + each)}
    assert {Phase.SUCCEEDED, Phase.ROLLED_BACK} <= ends, "the schedules reach both ends"


def test_a_guest_given_back_is_not_said_to_be_nowhere() -> None:
    """Found by this seed: its destination, whose VMM had died, went on saying so."""
    assert play(from_seed(FIRST_ARBITRATED + 44782)).phase is not None


@pytest.mark.parametrize("seed", [2_146_520, 2_191_828])
def test_a_late_write_of_this_host_does_not_refuse_its_next_migration(seed: int) -> None:
    """Found by these seeds: the record was claimed on a look that such a write had overtaken."""
    assert play(from_seed(FIRST_ARBITRATED + seed, 8)).phase is not None


@pytest.mark.parametrize(
    "seed",
    [
        # The record was removed with a VM that its destination still held a copy of, for ever.
        3_112_179,
        # Held until the arbiter was seen, and QEMU refused to be let go: it was never asked again.
        3_222_914,
        # Killed while it looked at everything at once: one of the looks went on without an owner.
        4_069_389,
        # Of the simulator: a daemon was killed for a call begun before all faults were over.
        5_050_313,
        # Of the watching: what the source had taken back, and then died with, counts as killed.
        3_105_457,
        3_228_240,
    ],
)
def test_found_with_an_arbiter(seed: int) -> None:
    assert play(from_seed(FIRST_ARBITRATED + seed, 8)).phase is not None


def started_is_taken_back_without_a_fence(patch: Patch) -> None:
    as_it_is = ownership.as_source

    def says(record: Ownership | None, *args: Any) -> Standing:
        standing = as_it_is(record, *args)
        return Standing.GIVEN if standing is Standing.STARTED else standing

    patch.setattr(arbitrated, "as_source", says)


def a_time_out_is_taken_for_a_return(patch: Patch) -> None:
    """What has been asked for, and is not known, is taken for done."""
    look: Callable[..., Coroutine[Any, Any, None]] = _Settling._look

    async def looks(self: _Settling, *, gives: bool) -> None:
        await look(self, gives=gives)
        if not gives and self._standing is Standing.UNKNOWN:
            self._standing = Standing.BACK

    patch.setattr(_Settling, "_look", looks)


def started_is_not_written(patch: Patch) -> None:
    async def starts(self: RecordKeeping) -> None:
        return None

    patch.setattr(RecordKeeping, "mark_started", starts)


@pytest.mark.parametrize(
    "mutant",
    [
        started_is_taken_back_without_a_fence,
        a_time_out_is_taken_for_a_return,
        started_is_not_written,
    ],
)
def test_random_schedules_catch_a_broken_rule(
    mutant: Callable[[Patch], None], monkeypatch: Patch
) -> None:
    mutant(monkeypatch)
    for seed in range(FIRST_ARBITRATED, FIRST_ARBITRATED + ENOUGH):
        try:
            play(from_seed(seed))
        except Wrong:
            return
    raise AssertionError(f"{ENOUGH} schedules saw nothing wrong")
