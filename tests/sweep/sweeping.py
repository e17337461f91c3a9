"""One migration, run again and again; the n-th run is struck at the n-th call of a daemon.

strike    one call, before or after its effect: an error, a time-out, or the daemon's death
then      everything works; a daemon that died is started again at once
the end   what the daemons say is compared with the ground truth, and the VM is moved again
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import structlog

from migrd.core.admission import Admission
from migrd.core.phases import Phase
from migrd.engine.service import MigrationView, Resolution, Whereabouts
from migrd.errors import JournalError, MigrdError
from tests.engine.passthrough import DISK, NIC, NIC2, nic
from tests.engine.passthrough import hardware as hardware_with
from tests.fakes.arbiter import FakeArbiterStore
from tests.fakes.gate import Fault, errors_of
from tests.fakes.road import Faults, Loss
from tests.fakes.virtual_time import VirtualTimeLoop, now_s, until
from tests.fakes.world import VM, Pair
from tests.sweep.scripts import ARBITRATED, BEFORE, DEVICES

UNCOUNTED = frozenset({"peer.hello", "launcher.find", "launcher.versions"})
"""Calls of the background that no migration depends on."""
BROKEN = ("a step broke", "an event has no place", "a migration's task broke")
"""What the engine logs when it has met something it has no rule for: always a defect."""
PATIENCE_S = 60.0
"""A doubt that time settles is settled by then."""
STAYED = frozenset({Phase.ROLLED_BACK, Phase.CANCELLED, Phase.REFUSED})


class Strike:
    """The plan of one run: the n-th counted call of one daemon, from `arm` on."""

    def __init__(self, number: int, name: str, fault: Fault) -> None:
        self.number = number
        self.name = name
        self.fault = fault
        self.is_armed = False
        self.seen = 0
        self.struck: str | None = None

    def __call__(self, call: str, _: int) -> Fault | None:
        if not self.is_armed or call in UNCOUNTED or self.struck is not None:
            return None
        self.seen += 1
        if self.seen != self.number:
            return None
        self.struck = call
        return self.fault


class Limbo(Strike):
    """A journal write whose record gets to the disk although it failed, as at a failing fsync.

    The disk takes nothing more, and a few calls later the daemon dies: whatever it did meanwhile
    has to fit both beliefs.
    """

    def __init__(self, number: int, lives_on: int) -> None:
        full = JournalError("fsync failed", code="journal_io_error")
        super().__init__(number, "limbo", Fault(after_effect=True, error=full))
        self.lives_on = lives_on
        self._full = Fault(after_effect=False, error=full)

    def __call__(self, call: str, number: int) -> Fault | None:
        if self.struck is None or not self.is_armed:
            return super().__call__(call, number)
        if self.lives_on < 0 or call in UNCOUNTED:
            return None  # it has died, and its successor finds the disk mended
        self.lives_on -= 1
        if self.lives_on < 0:
            return Fault(after_effect=False)
        return self._full if call.startswith("journal.") else None


@dataclass
class Finished:
    """What came of one run."""

    phase: str | None
    """None: the migration was not even accepted."""
    cause: str | None


Script = Callable[[Pair], Awaitable[str]]
"""Asks for a migration and returns its id."""


def run(script: Script, strikes: Mapping[str, Strike], *, cut_off_s: float = 0.0) -> Finished:
    """One struck run, checked against the ground truth.

    `cut_off_s`: for so long the daemons do not reach each other after one was killed.
    """
    return _watched(lambda: _run(script, strikes, no_loss, cut_off_s))


def _watched(work: Callable[[], Coroutine[Any, Any, Finished]]) -> Finished:
    """In a loop of its own; what the engine has no rule for fails the run."""
    with (
        structlog.testing.capture_logs() as logs,
        asyncio.Runner(loop_factory=VirtualTimeLoop) as runner,
    ):
        finished = runner.run(work())
    broken = [entry for entry in logs if entry["event"] in BROKEN]
    assert not broken, _readable(broken)
    return finished


def _readable(entries: list[MutableMapping[str, Any]]) -> list[str]:
    return [f"{e['event']}: {e.get('exc_info')!r} {e.get('phase', '')}" for e in entries]


async def _run(
    script: Script, strikes: Mapping[str, Strike], losing: Faults, cut_off_s: float = 0.0
) -> Finished:
    arbiter = FakeArbiterStore() if script in ARBITRATED else None
    pair = Pair(arbiter=arbiter, watch_interval_s=7.0, peer_interval_s=31.0)  # a quiet background
    pair.plans.update(strikes)
    for hardware in pair.hardware.values():
        hardware.show(hardware_with(nic(NIC), nic(NIC2), nic(DISK)))
    async with pair:
        await pair.boot(devices=DEVICES.get(script))
        await BEFORE.get(script, _nothing)(pair)
        known = {view.id for view in pair.alpha.service.migrations()[1]}
        pair.road.faults = losing
        for strike in strikes.values():
            strike.is_armed = True
        keeper = asyncio.create_task(_restart_whoever_died(pair, cut_off_s))
        try:
            finished = await _to_the_end(pair, script, known)
            for strike in strikes.values():
                strike.is_armed = False
            pair.road.heal()
            await asyncio.sleep(0.1)  # who died at the very end is back
        finally:
            keeper.cancel()
            await asyncio.wait([keeper])
        await _check_truth(pair, finished)
        await pair.migrates_again(times=1)
    return finished


async def _nothing(pair: Pair) -> None:
    """Most guests have no past."""


async def _restart_whoever_died(pair: Pair, cut_off_s: float) -> None:
    loop = asyncio.get_running_loop()
    while True:
        deaths = [asyncio.create_task(d.gate.crashed.wait()) for d in pair.daemons.values()]
        try:
            await asyncio.wait(deaths, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in deaths:
                task.cancel()
        if cut_off_s:
            pair.road.part("alpha", "beta")
            loop.call_later(cut_off_s, pair.road.heal)
        for name, daemon in list(pair.daemons.items()):
            if daemon.gate.is_dead:
                await pair.restart(name)


async def _to_the_end(pair: Pair, script: Script, known: set[str]) -> Finished:
    try:
        migration_id: str | None = await script(pair)
    except (MigrdError, asyncio.CancelledError):
        await asyncio.sleep(0.1)  # a daemon that died in the middle of the request is back
        new = {view.id for view in pair.alpha.service.migrations()[1]} - known
        migration_id = next(iter(new), None)
    if migration_id is None:
        return Finished(None, None)
    view = await _until_over(pair, migration_id)
    cause = None if view.cause is None else f"{view.cause.code}: {view.cause.message}"
    return Finished(view.phase, cause)


async def _until_over(pair: Pair, migration_id: str) -> MigrationView:
    """Its end. Where it needs a person, one looks at the ground and tells it the truth."""
    deadline_s = now_s() + 400.0
    doubted_s: float | None = None
    while now_s() < deadline_s:
        phase, is_over = pair.stands(migration_id)
        if is_over:
            return pair.view(migration_id)
        if phase != Phase.NEEDS_OPERATOR:
            doubted_s = None
        elif doubted_s is None:
            doubted_s = now_s()
        elif now_s() - doubted_s > PATIENCE_S:
            await _tell_the_truth(pair, migration_id)
        await asyncio.sleep(0.05)
    raise AssertionError(f"not over: {pair.view(migration_id)}")


async def _tell_the_truth(pair: Pair, migration_id: str) -> None:
    """migrd was right to doubt: its source has died where it could not be watched."""
    view = pair.view(migration_id)
    assert view.cause is not None
    assert view.cause.code == "source_died_unwatched", view.cause
    assert view.guest_runs_on is Whereabouts.UNKNOWN
    assert pair.running_on() is None
    there = pair.hosts["beta"].qemu(VM)
    kept = there.copy == pair.guest().version
    word = Resolution.USE_DESTINATION_COPY if kept else Resolution.GUEST_LOST
    service = pair.alpha.service
    answer = await service.resolve(migration_id, word, evidence="the ground", by="test")
    assert answer.admission is Admission.QUEUED


async def _check_truth(pair: Pair, finished: Finished) -> None:
    """The answer is the ground truth, on both hosts."""
    pair.check_truth()
    await pair.settle()
    runs_on, said = pair.running_on(), (finished.phase, finished.cause)
    if pair.is_paused_guest:
        await _check_paused(pair, finished)
        return
    if finished.phase == Phase.SUCCEEDED:
        assert runs_on == "beta", said
        assert not pair.hosts["alpha"].living(VM), said
    else:
        assert finished.phase is None or finished.phase in STAYED, said
        assert runs_on == "alpha", said
        gone = lambda: not pair.hosts["beta"].living(VM)  # noqa: E731 - named for the message
        await until(gone, what=f"the copy on beta is discarded {said}")
    pair.check_truth()


async def _check_paused(pair: Pair, finished: Finished) -> None:
    """A guest that was not to run has not run; there is one copy, and it runs when told to."""
    assert [run.host for run in pair.guest().runs] == ["alpha"], "it ran"
    there = "beta" if finished.phase == Phase.SUCCEEDED else "alpha"
    await until(lambda: len(pair.all_living()) == 1, what="one copy is left")
    qemu = pair.hosts[there].qemu(VM)
    assert qemu.copy == pair.guest().version
    qemu.cont()


def strikes(call: str) -> Iterator[tuple[str, Fault]]:
    """All that may happen to one call."""
    yield "killed before", Fault(after_effect=False)
    yield "killed after", Fault(after_effect=True)
    for name, error, may_come_late in errors_of(call):
        yield name, Fault(after_effect=False, error=error)
        if may_come_late:
            yield f"{name} after its effect", Fault(after_effect=True, error=error)


def calls_of(script: Script, side: str) -> list[str]:
    """The counted calls of a run without any strike."""
    listed: list[str] = []

    class Listing(Strike):
        def __call__(self, call: str, number: int) -> Fault | None:
            if self.is_armed and call not in UNCOUNTED:
                listed.append(call)
            return None

    run(script, {side: Listing(0, "nothing", Fault(after_effect=False))})
    return listed


class BothStrikes:
    """Both daemons killed, each after one of its calls."""

    def __init__(self, numbers: Mapping[str, list[int]]) -> None:
        self._numbers = numbers

    def all(self) -> Iterator[dict[str, Strike]]:
        for a, b in itertools.product(self._numbers["alpha"], self._numbers["beta"]):
            killed = Fault(after_effect=True)
            yield {"alpha": Strike(a, "killed", killed), "beta": Strike(b, "killed", killed)}


# Messages -----------------------------------------------------------------------------------------


def no_loss(caller: str, callee: str, call: str) -> Loss | None:
    """The road on a good day."""
    return None


class Losing:
    """The n-th message, of whoever to whomever."""

    def __init__(self, number: int, loss: Loss | None) -> None:
        self.number = number
        self.loss = loss
        self.seen = 0
        self.struck: str | None = None

    def __call__(self, caller: str, callee: str, call: str) -> Loss | None:
        if call == "hello":
            return None
        self.seen += 1
        if self.seen != self.number:
            return None
        self.struck = f"{caller} > {callee}: {call}"
        return self.loss


def messages_of(script: Script) -> int:
    """How many messages a quiet run takes."""
    counting = Losing(0, None)
    _watched(lambda: _run(script, {}, counting))
    return counting.seen


def run_with_losses(
    script: Script, number: int
) -> Iterator[tuple[Finished | AssertionError, Loss, str | None]]:
    """The n-th message, lost in every way."""
    for loss in Loss:
        losing = Losing(number, loss)
        try:
            finished: Finished | AssertionError = _lossy(script, losing)
        except AssertionError as exc:
            finished = exc
        yield finished, loss, losing.struck


def _lossy(script: Script, losing: Losing) -> Finished:
    return _watched(lambda: _run(script, {}, losing))


# Scenarios ----------------------------------------------------------------------------------------


def run_scenario(scenario: Script) -> None:
    """A scenario over a fresh Pair, and the ground truth after it."""

    async def play() -> Finished:
        pair = Pair()
        async with pair:
            await pair.boot()
            await scenario(pair)
        return Finished(None, None)

    _watched(play)
