"""What a row of the table is made of, and how a check is played.

    check   fails with AssertionError when the right end is missed; the code as it is passes it
    plant   the published failure, as a patch of one function, table or rule of ours

A check that needs hosts is a scenario over a `Pair` in virtual time: the fault is injected there
(VMM, peer, journal, network, device), and its right end asserted.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from enum import StrEnum

import pytest
import structlog

from tests.fakes.road import Faults, Loss
from tests.fakes.virtual_time import VirtualTimeLoop
from tests.fakes.world import VM, Pair, running_pair

Check = Callable[[], None]
Plant = Callable[[pytest.MonkeyPatch], None]
Scenario = Callable[[Pair], Awaitable[None]]


class Area(StrEnum):
    """Which promise the failure is about."""

    OWNERSHIP = "who may run the guest"
    RESTART = "a daemon that begins anew"
    JOURNAL = "what is written down, and when"
    ROLLBACK = "a guest that stays"
    CANCEL = "cancelling"
    DEADLINE = "no phase without an exit"
    CONVERGENCE = "rounds, limits, throttle"
    POSTCOPY = "postcopy"
    INCOMING = "what a destination leaves behind"
    DIRTY_PAGES = "no dirty page is lost"
    DEVICES = "passthrough devices"
    ADMISSION = "how many at once"
    PEERS = "who may speak"
    ANSWERS = "true answers"
    METRICS = "metrics"


@dataclass(frozen=True)
class Row:
    """One published failure."""

    reference: str
    """owner/repository#number (of an issue or a pull request), or project@commit, or lp#number."""
    area: Area
    failed: str
    """What failed there."""
    replanted: str
    """What the patch makes of our code, and under which fault."""
    near: str
    """How near that is to what was published."""
    check: Check
    plant: Plant
    caught_as: str
    """Regular expression: what the check says of it, so that no other accident counts."""

    @property
    def id(self) -> str:
        """For `pytest -k`, which takes no # and no /."""
        project, _, number = self.reference.rpartition("/")[2].replace("@", "#").partition("#")
        return f"{project}-{number}"


def on_hosts(
    hosts: Callable[[], AbstractAsyncContextManager[Pair]],
) -> Callable[[Scenario], Check]:
    """Make a check of a scenario over these hosts."""

    def checking(scenario: Scenario) -> Check:
        async def play() -> None:
            async with hosts() as pair:
                await scenario(pair)

        @functools.wraps(scenario)
        def check() -> None:
            with (
                structlog.testing.capture_logs(),
                asyncio.Runner(loop_factory=VirtualTimeLoop) as runner,
            ):
                runner.run(play())

        return check

    return checking


def on_a_pair(**options: object) -> Callable[[Scenario], Check]:
    """The same over alpha, where the guest runs, and beta."""
    return on_hosts(lambda: running_pair(**options))


def losing(call: str, loss: Loss, times: int = 10**6) -> Faults:
    """So many messages of that kind are lost in that way."""
    left = [times]

    def faults(caller: str, callee: str, name: str) -> Loss | None:
        if name != call or left[0] <= 0:
            return None
        left[0] -= 1
        return loss

    return faults


def alone(pair: Pair, name: str = VM) -> None:
    """The ground truth so far: never twice, never an old copy, never the last one destroyed."""
    assert not pair.guest(name).violations, pair.guest(name).violations
