"""A guest that was lost is started again, also by a daemon that was restarted meanwhile."""

from __future__ import annotations

import asyncio

import pytest

from migrd.core.phases import Phase
from tests.fakes.gate import Fault
from tests.fakes.world import VM, Pair, running_pair
from tests.sweep.scenarios import OnCall


async def lost_in_precopy(pair: Pair) -> None:
    pair.ground.load.dirty_bytes_per_s = 1 << 40
    migration_id = await pair.ask()
    await pair.until_phase(migration_id, Phase.PRECOPY)
    pair.guest().may_end = True
    pair.hosts["alpha"].qemu(VM).die("killed")
    assert (await pair.until_over(migration_id)).phase == Phase.GUEST_LOST
    await pair.settle()
    pair.ground.calm()


@pytest.mark.parametrize("restarted", [False, True])
async def test_a_guest_lost_in_a_migration_is_started_again_where_it_was(restarted: bool) -> None:
    async with running_pair() as pair:
        await lost_in_precopy(pair)
        await asyncio.sleep(10.0)
        if restarted:
            await pair.restart("alpha")
        await pair.alpha.service.start_vm(VM)
        assert pair.running_on() == "alpha"
        await pair.migrates_again()


async def test_a_daemon_killed_as_it_starts_a_dead_guest_anew_can_start_it_afterwards() -> None:
    async with running_pair() as pair:
        pair.guest().may_end = True
        pair.hosts["alpha"].qemu(VM).die("killed")
        await asyncio.sleep(10.0)
        pair.plans["alpha"] = OnCall("launcher.launch", Fault(after_effect=False))
        await pair.restart("alpha")
        with pytest.raises(asyncio.CancelledError):
            await pair.alpha.service.start_vm(VM)
        await pair.restart("alpha")
        await pair.alpha.service.start_vm(VM)
        assert pair.running_on() == "alpha"
