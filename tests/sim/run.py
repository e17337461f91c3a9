"""One schedule from its beginning to the end, and what must be true then.

    boot -> ask -> blows ... -> faults stop, daemons are back -> an end, or a person is needed
         -> a person looks at the ground and says the truth -> an end -> the VM is moved again

Checked: the ground truth after every start of a guest (`fakes.guest.Guest`: never twice, never an
old copy, never the last copy destroyed), each answer against it, terminal phases that stay what
they are, epochs that only grow, and no leak of devices, tasks or processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from uuid import UUID

import structlog
from structlog.typing import EventDict

from migrd.core.admission import Admission
from migrd.core.facts import VmSpec
from migrd.core.handover import DestinationPhase
from migrd.core.phases import Phase
from migrd.core.vfio_launch import VfioLaunch
from migrd.engine import boot, registry
from migrd.engine.ports import StoredVm
from migrd.engine.service import MigrationView, Resolution
from migrd.errors import JournalError, MigrdError
from tests.engine.passthrough import DISK, NIC, NIC2, nic
from tests.engine.passthrough import hardware as hardware_with
from tests.fakes.journal import FakeJournal
from tests.fakes.virtual_time import Deadlock, now_s, until
from tests.fakes.world import VM, Pair
from tests.sim.arbiter_blows import Arbiter
from tests.sim.blows import Calls, Messages, Trouble
from tests.sim.loop import SimLoop
from tests.sim.schedule import HOSTS, Schedule, Timed
from tests.sim.tempo import WATCHERS, Tempo, nothing
from tests.sim.watching import Watch, keep_looking
from tests.sweep.scripts import BEFORE, DEVICES
from tests.sweep.sweeping import BROKEN, STAYED

TRUTH = hardware_with(nic(NIC), nic(NIC2), nic(DISK))
WRONG = (AssertionError, MigrdError, KeyError, AttributeError, TypeError, ValueError)


class Names:
    """What the product asks of `uuid` and `secrets`: the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._count = 0

    def _next(self) -> int:
        self._count += 1
        return (self._seed << 32) + self._count

    def uuid4(self) -> UUID:
        return UUID(int=self._next() % (1 << 128))

    def token_hex(self, nbytes: int) -> str:
        return f"{self._next() % (1 << 8 * nbytes):0{2 * nbytes}x}"


class Wrong(AssertionError):
    """A schedule after which something is not as it must be."""


@dataclass
class Ended:
    """What came of a schedule."""

    phase: str | None
    cause: str | None = None
    resolved: list[str] = field(default_factory=list)
    """What a person had to say."""
    struck: list[str] = field(default_factory=list)


def play(schedule: Schedule) -> Ended:
    """Raises Wrong, with everything needed to understand it."""
    ended = Ended(None)
    with _heard(schedule.tempo) as logs:
        try:
            SimLoop().run(_play(schedule, ended))
        except (Exception, asyncio.CancelledError, Deadlock) as exc:
            struck = "\n    ".join(ended.struck)
            raise Wrong(f"{schedule}\n  struck:\n    {struck}\n  {exc!r}") from exc
    broken = [entry for entry in logs if entry["event"] in BROKEN]
    if broken:
        raise Wrong(f"{schedule}\n  {broken[0]}")
    return ended


@contextlib.contextmanager
def _heard(tempo: Tempo) -> Iterator[list[EventDict]]:
    """What is logged: errors alone, unless all of it is kept."""
    told: list[EventDict] = []

    def hear(_: object, __: str, event: EventDict) -> EventDict:
        told.append(event)
        raise structlog.DropEvent

    before, level = structlog.get_config(), logging.DEBUG if tempo.is_watchful else logging.ERROR
    wrapper = structlog.make_filtering_bound_logger(level)
    structlog.configure(processors=[hear], wrapper_class=wrapper)
    try:
        yield told
    finally:
        structlog.configure(**before)


def _paired(schedule: Schedule, arbiter: Arbiter | None) -> Pair:
    """Both hosts, at the schedule's pace."""
    tempo = schedule.tempo
    pair = Pair(arbiter=None if arbiter is None else arbiter.store, **tempo.options)
    names = Names(schedule.seed)
    for module, name, value in tempo.constants:
        pair.replace(module, name, value)
    pair.replace(registry, "uuid", names)
    pair.replace(boot, "secrets", names)
    if not tempo.is_watchful and schedule.script not in DEVICES:
        for owner, watcher in WATCHERS:
            pair.replace(owner, watcher, nothing)
    for disk in pair.disks.values():
        disk.is_sealed = tempo.is_sealed
    if schedule.script in DEVICES:
        for hardware in pair.hardware.values():
            hardware.show(TRUTH)
    return pair


async def _play(schedule: Schedule, ended: Ended) -> None:
    arbiter = Arbiter.of(schedule.arbiter)
    pair = _paired(schedule, arbiter)
    calls = {host: Calls(schedule.blows, host) for host in HOSTS}
    messages = Messages(schedule.blows)
    pair.plans.update(calls)
    if schedule.script not in DEVICES:
        await _placed(pair)
    async with pair:
        if schedule.script in DEVICES:
            await pair.boot(devices=DEVICES[schedule.script])
        await pair.settle()
        before = BEFORE.get(schedule.script)
        if before is not None:
            await before(pair)
        watch = Watch(pair)
        watch.begin()
        trouble = Trouble(pair, watch, arbiter)
        messages.note = watch.struck
        for each in calls.values():
            each.note = watch.struck
        known = {view.id for view in pair.alpha.service.migrations()[1]}
        pair.road.faults = messages
        trouble.arm_arbiter()
        for each in calls.values():
            each.is_armed = True
        keeper = asyncio.create_task(_keep_alive(pair, calls))
        looker = asyncio.create_task(keep_looking(watch, schedule.looks))
        try:
            await _under_fire(pair, schedule, calls, trouble, known, ended)
            await _check(pair, schedule, trouble, ended)
            watch.look()
            assert not watch.wrong, watch.wrong
        finally:
            for task in (keeper, looker):
                task.cancel()
            await asyncio.wait([keeper, looker])
            by_calls = [f"{host}: {what}" for host in HOSTS for what in calls[host].struck]
            ended.struck = [*by_calls, *messages.struck, *trouble.all_struck]


async def _placed(pair: Pair) -> None:
    """A guest that runs on alpha since long, and the daemons are started beside it."""
    spec, instance = VmSpec(VM, "tiny"), boot.new_instance()
    qemu = pair.hosts["alpha"].add(spec, instance, incoming=False)
    pair.hosts["alpha"].noted[instance] = VfioLaunch()
    qemu.cont()
    await FakeJournal(pair.disks["alpha"]).put_vm(StoredVm(spec, 0, here=True, instance=instance))


async def _under_fire(
    pair: Pair,
    schedule: Schedule,
    calls: dict[str, Calls],
    trouble: Trouble,
    known: set[str],
    ended: Ended,
) -> None:
    timed = [blow for blow in schedule.blows if isinstance(blow, Timed)]
    blows = [asyncio.create_task(trouble.strike(blow)) for blow in timed]
    if trouble.arbiter is not None:
        blows += [asyncio.create_task(strike) for strike in trouble.arbiter.strikes()]
    calm = asyncio.create_task(_calm(pair, schedule.tempo, calls, trouble, blows))
    try:
        ids = await _asked(pair, schedule, known)
        await calm
        for task in blows:
            if not task.cancelled():
                task.result()
        ids |= {view.id for host in HOSTS for view in pair.daemons[host].service.migrations()[1]}
        for id_ in sorted(ids - known):
            await _to_its_end(pair, id_, schedule.tempo, trouble, ended)
    finally:
        for task in (*blows, calm):
            task.cancel()
        await asyncio.wait([*blows, calm])


async def _calm(
    pair: Pair,
    tempo: Tempo,
    calls: dict[str, Calls],
    trouble: Trouble,
    blows: list[asyncio.Task[None]],
) -> None:
    """Wait until all faults are over; from then on everything works."""
    if blows:
        await asyncio.wait(blows, timeout=tempo.faults_s)
    await asyncio.sleep(1.0)
    for each in calls.values():
        each.is_armed = False
    for daemon in pair.daemons.values():
        daemon.gate.is_calm = True
    for task in blows:
        task.cancel()
    for undo in trouble.undo:
        undo()
    pair.road.heal()
    pair.ground.calm()
    await until(lambda: _all_live(pair), within_s=300.0, what="both daemons are back")


def _all_live(pair: Pair) -> bool:
    """They serve: one that is still looking at what it finds does not."""
    daemons = [pair.daemons.get(host) for host in HOSTS]
    serve = pair.road.doors.keys() >= set(HOSTS)
    return serve and all(daemon is not None and not daemon.gate.is_dead for daemon in daemons)


async def _keep_alive(pair: Pair, calls: dict[str, Calls]) -> None:
    """Whoever was killed is started again, after its time."""
    async with asyncio.TaskGroup() as group:
        for name in HOSTS:
            group.create_task(_keep_one_alive(pair, name, calls[name]))


async def _keep_one_alive(pair: Pair, name: str, calls: Calls) -> None:
    while True:
        await pair.daemons[name].gate.crashed.wait()
        await pair.kill(name)
        away_s, calls.away_s = calls.away_s, 0.0
        await asyncio.sleep(away_s)
        await _started(pair, name)


async def _started(pair: Pair, name: str) -> None:
    """A daemon that cannot read its journal ends, and is started again, as systemd does."""
    while True:
        try:
            await pair.start(name)
        except JournalError:
            await pair.kill(name)
            await asyncio.sleep(0.1)
        else:
            return


async def _asked(pair: Pair, schedule: Schedule, known: set[str]) -> set[str]:
    """Ids of what was accepted; a client whose request was cut off looks for it later."""
    try:
        return {await schedule.script(pair)}
    except (MigrdError, asyncio.CancelledError, KeyError):
        return set()


async def _to_its_end(pair: Pair, id_: str, tempo: Tempo, trouble: Trouble, ended: Ended) -> None:
    host = "alpha" if id_ in pair.alpha.engine.migrations.outgoing else "beta"
    view = await _until_over(pair, id_, host, tempo, trouble, ended)
    if host == "alpha" and ended.phase in (None, Phase.REFUSED):
        ended.phase = view.phase
        ended.cause = None if view.cause is None else view.cause.code


async def _until_over(
    pair: Pair, id_: str, host: str, tempo: Tempo, trouble: Trouble, ended: Ended
) -> MigrationView:
    deadline_s, doubted_s = now_s() + tempo.end_s, None
    while now_s() < deadline_s:
        phase, is_over = pair.stands(id_, host)
        if is_over:
            return pair.view(id_, host)
        if phase != Phase.NEEDS_OPERATOR:
            doubted_s = None
        elif doubted_s is None:
            doubted_s = now_s()
        elif now_s() - doubted_s > tempo.patience_s:
            ended.resolved.append(await _say_the_truth(pair, id_, host, trouble))
            doubted_s = now_s()
        await asyncio.sleep(0.1)
    raise AssertionError(f"no end: {pair.view(id_, host)}")


async def _say_the_truth(pair: Pair, id_: str, host: str, trouble: Trouble) -> str:
    """A person looks at both hosts. Nobody is called unless a process that mattered has died."""
    view = pair.view(id_, host)
    assert trouble.died, f"a person is called for, and nothing has died: {view.cause}"
    if trouble.arbiter is not None:
        trouble.arbiter.check_person(pair, id_, host)
    other = "beta" if host == "alpha" else "alpha"
    guest, there = pair.guest(), pair.hosts[other].living(VM)
    here = pair.hosts[host].living(VM)
    if any(qemu.is_running for qemu in there):
        word = Resolution.DESTINATION_RUNS
    elif not here and any(qemu.copy == guest.version for qemu in there):
        word = Resolution.USE_DESTINATION_COPY
    elif not there and any(qemu.copy == guest.version for qemu in here):
        word = Resolution.DESTINATION_FENCED
    else:
        word = Resolution.GUEST_LOST
    service = pair.daemons[host].service
    answer = await service.resolve(id_, word, evidence="the ground", by="schedule")
    assert answer.admission is Admission.QUEUED, (word, view.cause, answer)
    return f"{view.cause.code if view.cause else None}: {word.value}"


def _end_what_was_left(pair: Pair) -> None:
    """A person does what the answer of a migration asks for, and nothing else."""
    for name in HOSTS:
        for view in pair.daemons[name].service.migrations()[1]:
            if view.cause is not None and view.cause.code == "source_left_behind":
                for qemu in pair.hosts[name].living(VM):
                    assert not qemu.is_running, "what a person was asked to end is the guest"
                    qemu.die("ended by hand")


async def _check(pair: Pair, schedule: Schedule, trouble: Trouble, ended: Ended) -> None:
    """Each answer is the ground truth, on both hosts."""
    await until(lambda: _all_live(pair), within_s=300.0, what="both daemons are back")
    await pair.settle()
    pair.check_truth()
    guest, runs_on = pair.guest(), pair.running_on()
    lives = bool(guest.whole_copies)
    if not trouble.died and not trouble.ended_itself:
        assert runs_on is not None, "nothing died, and the guest runs nowhere"
    for name in HOSTS:
        for view in pair.daemons[name].service.migrations()[1]:
            # one that died as it was started is for a person; `_to_its_end` has asked the source's
            assert view.is_terminal or view.phase == DestinationPhase.STARTING, view
    if trouble.died or trouble.ended_itself:
        return  # where it is depends on when; `Guest` has judged every step
    if ended.phase == Phase.SUCCEEDED:
        assert lives
    else:
        assert ended.phase is None or ended.phase in STAYED, ended.phase
    _end_what_was_left(pair)
    await until(lambda: len(pair.all_living()) == 1, what="one QEMU is left", within_s=200.0)
    pair.check_truth()
    if not schedule.seed % schedule.tempo.again_each:
        await pair.migrates_again(times=1)
        if trouble.arbiter is not None:
            await trouble.arbiter.check(pair)
