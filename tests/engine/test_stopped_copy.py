"""VMs with a device that nothing watches: the guest is stopped before anything of it is copied."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from migrd.core.migration import Policy
from migrd.core.phases import Phase
from migrd.core.tracking import Migratability
from migrd.engine.service import MigrationView
from tests.engine.passthrough import DISK, NIC, hardware, hosts, nic, start, untracked
from tests.engine.test_steering import never_converges
from tests.fakes.virtual_time import until
from tests.fakes.world import VM, Pair

PATIENT = Policy(downtime_limit_s=20.0)
SLOW = 4 << 20
"""Bytes/s: all of the memory takes longer than the guest may stand still."""


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    async with hosts(hardware(untracked())) as pair:
        await start(pair, DISK)
        decision = pair.alpha.service.vm(VM).decision
        assert decision is not None
        assert decision.plan.migratability is Migratability.STOP_AND_COPY
        yield pair


def conditions(view: MigrationView) -> set[str]:
    return {condition.type for condition in view.conditions}


async def test_nothing_is_copied_before_the_guest_stands_still(pair: Pair) -> None:
    view = await pair.migrate(policy=PATIENT)
    assert view.phase == Phase.SUCCEEDED, (view.cause, view.refusals)
    assert pair.running_on() == "beta"
    assert not pair.guest(VM).violations, "the simulated QEMU tells of a running guest"


async def test_the_time_it_stood_still_is_counted_from_the_stop(pair: Pair) -> None:
    migration_id = await pair.ask(policy=PATIENT)
    await pair.until_phase(migration_id, Phase.PRECOPY)
    await until(lambda: "GuestStopped" in conditions(pair.view(migration_id)))
    began_s = asyncio.get_running_loop().time()
    view = await pair.until_over(migration_id)
    assert view.phase == Phase.SUCCEEDED
    assert view.blackout_s is not None
    stood_still_s = asyncio.get_running_loop().time() - began_s
    assert view.blackout_s == pytest.approx(stood_still_s, abs=0.5)
    assert "GuestStopped" not in conditions(view)


async def test_cancelled_meanwhile_the_guest_goes_on(pair: Pair) -> None:
    pair.ground.wire.bandwidth_bytes_per_s = SLOW
    migration_id = await pair.ask(policy=PATIENT)
    await until(lambda: "GuestStopped" in conditions(pair.view(migration_id)))
    assert pair.running_on() is None
    await pair.alpha.service.cancel(migration_id, by="test")
    view = await pair.until_over(migration_id)
    assert view.phase == Phase.CANCELLED
    assert pair.running_on() == "alpha"


async def test_a_guest_that_stands_still_for_too_long_goes_on_where_it_was(pair: Pair) -> None:
    pair.ground.wire.bandwidth_bytes_per_s = SLOW
    view = await pair.migrate(policy=PATIENT)
    assert view.phase == Phase.ROLLED_BACK
    assert view.cause is not None
    assert view.cause.code == "switchover_timed_out"
    assert pair.running_on() == "alpha"


async def test_a_restarted_daemon_keeps_it_stopped_and_goes_on(pair: Pair) -> None:
    pair.ground.wire.bandwidth_bytes_per_s = SLOW
    migration_id = await pair.ask(policy=PATIENT)
    await until(lambda: "GuestStopped" in conditions(pair.view(migration_id)))
    await pair.restart("alpha")
    assert pair.running_on() is None
    pair.ground.wire.bandwidth_bytes_per_s = 1 << 30
    view = await pair.until_over(migration_id)
    assert view.phase == Phase.SUCCEEDED, view.cause
    assert pair.running_on() == "beta"


async def test_a_vm_whose_devices_are_watched_is_not_stopped() -> None:
    async with hosts(hardware(nic())) as pair:
        await start(pair, NIC)
        never_converges(pair)
        migration_id = await pair.ask(policy=Policy(downtime_limit_s=0.3))
        await pair.until_phase(migration_id, Phase.PRECOPY)
        await asyncio.sleep(1.0)
        assert pair.running_on() == "alpha"
        await pair.alpha.service.cancel(migration_id, by="test")
        assert (await pair.until_over(migration_id)).phase == Phase.CANCELLED
