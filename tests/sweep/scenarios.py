"""Runs that take more than one failure to go wrong: the corners of the handover.

Each is a coroutine over a Pair whose guest runs on alpha. It checks what it is about, and the
ground truth is checked around it.
"""

from __future__ import annotations

import asyncio

from migrd.core.phases import Phase
from tests.fakes.gate import Fault
from tests.fakes.road import LATE_S, Loss
from tests.fakes.virtual_time import now_s, until
from tests.fakes.world import VM, Pair

KILLED_BEFORE = Fault(after_effect=False)


class OnCall:
    """A plan: strike the first call of that name."""

    def __init__(self, name: str, fault: Fault) -> None:
        self.name = name
        self.fault = fault
        self.struck = False

    def __call__(self, call: str, _: int) -> Fault | None:
        if self.struck or call != self.name:
            return None
        self.struck = True
        return self.fault


async def a_late_grant_after_a_refusal(pair: Pair) -> str:
    """GRANT is under way for long; beta refuses, says so, and is restarted; then GRANT arrives."""
    sent: list[float] = []

    def first_grant_is_late(caller: str, callee: str, call: str) -> Loss | None:
        if call == "grant" and not sent:
            sent.append(now_s())
            return Loss.REQUEST_LATE
        return None

    pair.road.faults = first_grant_is_late
    migration_id = await pair.ask()
    await pair.until_phase(migration_id, Phase.GRANTED)
    copy = pair.hosts["beta"].qemu(VM)
    copy.ignores_quit = True
    await until(lambda: sent, what="the first GRANT is sent")
    pair.beta.engine.migrations.incoming[migration_id].want_refusal("no memory after all")
    await until(lambda: pair.running_on() == "alpha", what="the refusal is heard")
    await pair.kill("beta")
    copy.ignores_quit = False
    await asyncio.sleep(sent[0] + LATE_S - 1.0 - now_s())
    pair.road.down.add(("beta", "alpha"))  # or alpha would say that it has ended
    await pair.start("beta")
    await asyncio.sleep(5.0)
    assert pair.running_on() == "alpha"
    pair.road.down.clear()
    assert (await pair.until_over(migration_id)).phase == Phase.ROLLED_BACK
    return migration_id


async def the_destination_dies_as_it_starts(pair: Pair) -> str:
    """Its QEMU dies right after `cont`: nobody but the ground knows that the guest ran."""
    migration_id = await pair.ask()
    await pair.until_phase(migration_id, Phase.PRECOPY)
    there = pair.hosts["beta"].qemu(VM)

    def dies(event: str) -> None:
        if event == "RESUME":
            there.die("qemu-system-x86_64: abort() called")

    there.listeners.append(dies)
    await _until_nobody_guesses(pair, migration_id)
    return migration_id


async def the_destination_dies_as_it_starts_unwatched(pair: Pair) -> str:
    """The same while beta's daemon is down: it was killed as its `cont` took effect."""
    pair.plans["beta"] = OnCall("vmm.run_guest", Fault(after_effect=True))
    await pair.restart("beta")
    migration_id = await pair.ask()
    await until(lambda: pair.beta.gate.is_dead, what="beta's daemon is killed at cont")
    there = pair.hosts["beta"].qemu(VM)
    assert there.is_running
    there.die("killed")
    await pair.restart("beta")
    await _until_nobody_guesses(pair, migration_id)
    return migration_id


async def _until_nobody_guesses(pair: Pair, migration_id: str) -> None:
    """It ran there, so the copy here is dead data; migrd cannot know, and must not guess."""
    await pair.until_phase(migration_id, Phase.NEEDS_OPERATOR, Phase.ROLLED_BACK)
    await asyncio.sleep(30.0)
    assert pair.stands(migration_id)[0] == Phase.NEEDS_OPERATOR
    assert pair.running_on() is None
