"""The main job, with nothing going wrong."""

from __future__ import annotations

from migrd.core.phases import Phase
from migrd.engine.service import Whereabouts
from tests.fakes.world import running_pair


async def test_a_guest_moves_and_goes_on_at_the_destination() -> None:
    async with running_pair() as pair:
        view = await pair.migrate()
        assert view.phase == Phase.SUCCEEDED, (view.cause, view.refusals)
        assert view.guest_runs_on is Whereabouts.DESTINATION
        assert pair.running_on() == "beta"
        assert not pair.hosts["alpha"].living("vm1")
        assert [run.host for run in pair.guest().runs] == ["alpha", "beta"]
