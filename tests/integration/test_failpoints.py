"""A daemon that kills or stops itself at a named place of the handover: the guest moves on.

    alpha > beta    the source's daemon dies at one of its points      (armed when it was started)
    beta > alpha    the destination's daemon dies at one of its        (armed by its restart)
    alpha > beta    ...

One guest goes there and back, and it is always alpha's daemon that fails, so each restart arms the
next point. All points, by their names: `python -m tests.long --every-failpoint`.
"""

import asyncio
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.integration.fleet import SMALL, Fleet
from tests.integration.scenarios import is_stopped, running

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]


@dataclass(frozen=True)
class Failure:
    """Of alpha's daemon: the source's at every other one, beginning with the first."""

    point: str
    action: str = "kill"

    def __str__(self) -> str:
        return f"{self.point}={self.action}"


FAILURES = [
    Failure("source.transfer_completed.journalled"),  # granted, and GRANT not sent
    Failure("destination.grant_received.journalled"),  # owned
    Failure("source.grant.done"),  # OWNED has come, and is not journalled
    Failure("destination.cont.deciding"),  # starting is journalled
    Failure("source.continue.done"),  # the guest stands still
    Failure("destination.cont.done"),  # the guest runs, and nobody has written it down
    Failure("source.quit.deciding"),
    Failure("destination.guest_loaded.journalled"),
    Failure("source.migrate.done"),
    Failure("destination.guest_ran.journalled"),  # running, and OWNED not sent
    Failure("source.transfer_completed.journalled", "stop"),
    Failure("destination.cont.deciding", "stop"),
]
"""What is stopped at comes last: no restart follows it, so it is armed together with what it
follows, whose recovery must not come by it."""
STANDS_S = 0.7
REACHED_S = 30.0


async def killed_itself(two: Fleet, host: str) -> None:
    """The daemon has come to its failpoint."""
    process = two.hosts[host].process
    assert process is not None
    async with asyncio.timeout(REACHED_S):
        assert await process.wait() == -signal.SIGKILL


async def stopped_itself(two: Fleet, host: str) -> None:
    """The daemon has come to its failpoint, and stands still there."""
    process = two.hosts[host].process
    assert process is not None
    async with asyncio.timeout(REACHED_S):
        while not await asyncio.to_thread(is_stopped, process.pid):  # noqa: ASYNC110 - no event
            await asyncio.sleep(0.01)


async def fails_and_comes_back(two: Fleet, failure: Failure, then: str) -> None:
    """`then`: what the next life of its daemon is armed with."""
    if failure.action == "kill":
        await killed_itself(two, "alpha")
        two.armed["alpha"] = then
        await two.start_daemon("alpha")
    else:
        await stopped_itself(two, "alpha")
        await asyncio.sleep(STANDS_S)
        two.signal_daemon("alpha", signal.SIGCONT)


async def both_say_that_it_moved(two: Fleet, source: str, migration: str) -> list[dict[str, Any]]:
    """Each host from its own journal and its own QEMU."""
    destination = "beta" if source == "alpha" else "alpha"
    seen = await two.ended(source, migration)
    assert seen["phase"] == "succeeded", (seen["phase"], seen["cause"])
    there = await two.phase(destination, migration, "running")
    assert seen["guest_runs_on"] == there["guest_runs_on"] == "destination"
    assert seen["epoch"] == there["epoch"]
    await two.only_qemus(1)
    assert (await two.vm(destination))["state"] == "running"
    assert (await two.vm(source))["state"] == "departed"
    return [seen, there]


def armed_for(failures: list[Failure]) -> str:
    """All up to the next kill: only a restart can arm more."""
    kills = [number for number, failure in enumerate(failures) if failure.action == "kill"]
    return ",".join(map(str, failures[: kills[0] + 1] if kills else failures))


async def test_a_daemon_that_fails_at_any_step_of_the_handover_moves_the_guest_all_the_same(
    short_tmp_path: Path, newer: Path
) -> None:
    async with running(short_tmp_path, newer, image=SMALL) as two:
        await two.kill_daemon("alpha")
        two.armed["alpha"] = armed_for(FAILURES)
        await two.start_daemon("alpha")
        source, destination, told = "alpha", "beta", []
        for number, failure in enumerate(FAILURES, 1):
            migration = await two.migrate(source, destination)
            await fails_and_comes_back(two, failure, armed_for(FAILURES[number:]))
            told += await both_say_that_it_moved(two, source, migration)
            await two.prove(number, on=destination)
            source, destination = destination, source
        migration = await two.migrate(source, destination)  # and once more as if nothing had been
        told += await both_say_that_it_moved(two, source, migration)
        await two.prove(len(FAILURES) + 1, on=destination)
        await answers_outlive_a_restart(two, told)


async def answers_outlive_a_restart(two: Fleet, told: list[dict[str, Any]]) -> None:
    """What was said once is in the journals."""
    for name in two.hosts:
        await two.kill_daemon(name)
        await two.start_daemon(name)
    for seen in told:
        now = await two.migration(seen[seen["role"]], seen["id"])
        same = ("phase", "guest_runs_on", "epoch", "cause")
        assert {key: now[key] for key in same} == {key: seen[key] for key in same}
