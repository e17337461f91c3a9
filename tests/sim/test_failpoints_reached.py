"""Each failpoint is reached: a name that nothing comes to would make a test wait for ever.

A new point needs a scenario here that comes to it: a coroutine over a Pair whose guest runs on
alpha, in SCENARIOS or in ARBITRATED.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from migrd import failpoints
from migrd.core.facts import QemuStatus
from migrd.core.migration import Policy
from migrd.core.phases import Phase
from migrd.engine.service import Resolution
from tests.fakes.arbiter import FakeArbiterStore
from tests.fakes.road import Loss
from tests.fakes.virtual_time import VirtualTimeLoop, until
from tests.fakes.wire import MIB
from tests.fakes.world import VM, Pair
from tests.sweep import scripts

Scenario = Callable[[Pair], Awaitable[object]]


async def _goes_on_for_long(pair: Pair) -> str:
    """In precopy, and QEMU is copying."""
    pair.ground.wire.bandwidth_bytes_per_s = 200 * MIB
    pair.ground.load.dirty_bytes_per_s = 1000 * MIB
    pair.ground.load.working_set_bytes = 200 * MIB
    migration_id = await pair.ask()
    await pair.until_phase(migration_id, Phase.PRECOPY)
    await until(lambda: pair.hosts["beta"].qemu(VM).status is QemuStatus.ACTIVE)
    await asyncio.sleep(2.0)
    return migration_id


async def refused_by_preflight(pair: Pair) -> None:
    """The destination takes nobody."""
    pair.options["beta"] = replace(pair.options["beta"], incoming_slots=0)
    await pair.restart("beta")
    assert (await pair.migrate()).phase == Phase.REFUSED


async def steered(pair: Pair) -> None:
    """Another policy, then at once."""
    migration_id = await _goes_on_for_long(pair)
    service = pair.alpha.service
    await service.change_policy(migration_id, Policy(max_throttle_percent=50), by="op")
    await service.switch_over(migration_id, by="op")
    assert (await pair.until_over(migration_id)).phase == Phase.SUCCEEDED


async def link_cut(pair: Pair) -> None:
    """In precopy: a step fails, the guest stays."""
    migration_id = await _goes_on_for_long(pair)
    pair.ground.wire.cut()
    assert (await pair.until_over(migration_id)).phase == Phase.ROLLED_BACK


async def source_dies(pair: Pair) -> None:
    """In precopy: the guest with it."""
    migration_id = await _goes_on_for_long(pair)
    pair.hosts["alpha"].qemu(VM).die("killed")
    pair.guest().may_end = True
    assert (await pair.until_over(migration_id)).phase == Phase.GUEST_LOST


async def refused_after_the_grant(pair: Pair) -> None:
    """The source resumes."""

    def no_grant(caller: str, callee: str, call: str) -> Loss | None:
        return Loss.UNREACHABLE if call == "grant" else None

    pair.road.faults = no_grant
    migration_id = await pair.ask()
    await pair.until_phase(migration_id, Phase.GRANTED)
    pair.beta.engine.migrations.incoming[migration_id].want_refusal("somebody said so")
    await until(lambda: pair.stands(migration_id, "beta")[0] == "refused")
    pair.road.heal()
    assert (await pair.until_over(migration_id)).phase == Phase.ROLLED_BACK


async def given_back_by_a_person(pair: Pair) -> None:
    """The destination died as it was started: nobody can know, and a person decides."""

    def dies(point: str) -> None:
        if point == "destination.cont.deciding":
            pair.hosts["beta"].qemu(VM).die("killed")

    with failpoints.observing(dies):
        migration_id = await pair.ask()
        await pair.until_phase(migration_id, Phase.NEEDS_OPERATOR)
    await pair.alpha.service.resolve(
        migration_id, Resolution.DESTINATION_FENCED, evidence="it is off", by="op"
    )
    assert (await pair.until_over(migration_id)).phase == Phase.ROLLED_BACK
    await pair.settle()


async def never_started(pair: Pair) -> None:
    """The destination's host died: what the arbiter has written for it is taken back."""

    def no_grant(caller: str, callee: str, call: str) -> Loss | None:
        return Loss.UNREACHABLE if call == "grant" else None

    pair.road.faults = no_grant
    migration_id = await pair.ask()
    await pair.until_phase(migration_id, Phase.GRANTED)
    await pair.kill("beta")
    for qemu in pair.hosts["beta"].living(VM):
        qemu.die("power off")
    assert (await pair.until_over(migration_id)).phase == Phase.ROLLED_BACK
    pair.road.heal()
    await pair.start("beta")


SCENARIOS: tuple[Scenario, ...] = (
    scripts.plain,
    scripts.postcopy,
    scripts.cancelled_in_precopy,
    refused_by_preflight,
    steered,
    link_cut,
    source_dies,
    refused_after_the_grant,
    given_back_by_a_person,
)
ARBITRATED: tuple[Scenario, ...] = (scripts.plain, never_started)
"""Played where an arbiter has the word."""


async def _played(scenario: Scenario, arbiter: FakeArbiterStore | None) -> None:
    async with Pair(arbiter=arbiter) as pair:
        await pair.boot()
        ended = await scenario(pair)
        if isinstance(ended, str):
            await pair.until_over(ended)
        await pair.settle()


def reached_by(*played: Scenario, arbitrated: bool = False) -> set[str]:
    reached: set[str] = set()
    with failpoints.observing(reached.add):
        for scenario in played:
            arbiter = FakeArbiterStore() if arbitrated else None
            with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
                runner.run(_played(scenario, arbiter))
    return reached


def test_every_failpoint_is_reached_and_none_is_without_a_name() -> None:
    reached = reached_by(*SCENARIOS) | reached_by(*ARBITRATED, arbitrated=True)
    assert reached == failpoints.POINTS, (
        f"never reached: {sorted(failpoints.POINTS - reached)}; "
        f"without a name: {sorted(reached - failpoints.POINTS)}"
    )


def test_a_point_that_the_code_loses_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = "source.grant.done"
    strike = failpoints._strike
    monkeypatch.setattr(failpoints, "_strike", lambda point: point == lost or strike(point))
    assert failpoints.POINTS - reached_by(scripts.plain) >= {lost}
