"""People who start, stop, forget, define and give up a VM while it moves: never two, nor stuck."""

from __future__ import annotations

from typing import Any

import pytest

from migrd.engine import lifecycle
from migrd.engine.arbiter_port import Arbiter, Ownership
from migrd.engine.ownership import claim_to_start
from tests.sim.meddling import play
from tests.sim.run import Wrong

PER_COMMIT = 400
PARTS = 2
CROSSED = 7371
"""A removal that is not answered, a start on the same host, and one on the other."""


@pytest.mark.parametrize("part", range(PARTS))
def test_nothing_that_people_do_runs_a_guest_twice_or_strands_it(part: int) -> None:
    each = PER_COMMIT // PARTS
    done = [deed for seed in range(part * each, (part + 1) * each) for deed in play(seed)]
    for deed in ("move on alpha", "forget on alpha", "define_and_start on beta", "kill on beta"):
        assert deed in done, "the deeds have an effect"


@pytest.mark.parametrize("seed", [121_390, 123_228])
def test_a_claim_that_comes_late_does_not_send_a_person_round_in_circles(seed: int) -> None:
    """Found by these seeds: each host named the other one as the guest's."""
    assert play(seed)


def test_a_removal_that_crosses_a_start_does_not_run_it_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before, a start wrote nothing where the record named this host already."""
    play(CROSSED)

    async def lazy(
        arbiter: Arbiter, vm: str, host: str, epoch: int, proves: Any, disproves: Any
    ) -> Ownership:
        found = await arbiter.read(vm)
        if found is not None and found.owner == host and found.started and found.epoch >= epoch:
            return found
        return await claim_to_start(arbiter, vm, host, epoch, proves, disproves)

    monkeypatch.setattr(lifecycle, "claim_to_start", lazy)
    with pytest.raises(Wrong, match="I1: runs on"):
        play(CROSSED)
