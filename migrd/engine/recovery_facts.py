"""What recovery asks the world for, each with a short deadline; no answer in time is unknown.

    own process ---+
    other side  ---+--> SourceFound | DestinationFound | Stray      (core.recovery_facts)
    arbiter     ---+    all at once, for all migrations at once

Readiness waits for this, and a guest may stand still meanwhile, so nobody is waited for longer
than PATIENCE_S, and in the phases in which a guest stands still not longer than HURRY_S. What was
not learned is found out by the step, which looks again before it acts.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final, TypeVar

from migrd.core.handover import DestinationPhase
from migrd.core.migration import MigrationState, Mode
from migrd.core.phases import Phase
from migrd.core.recovery_facts import (
    Aim,
    DestinationFound,
    DiedStarting,
    Fate,
    Granted,
    NoWord,
    Own,
    Record,
    SaidByDestination,
    SaidBySource,
    SourceFound,
    as_seen,
    guest_of,
)
from migrd.engine.absent import AbsentVmm
from migrd.engine.arbiter_port import Ownership
from migrd.engine.boot import is_of_earlier_boot
from migrd.engine.incoming import Incoming
from migrd.engine.outgoing import Outgoing
from migrd.engine.ownership import Standing, as_source, as_target, present
from migrd.engine.ports import DestinationView, Vmm
from migrd.engine.world import World
from migrd.errors import ArbiterError, MigrdError, PeerError, PeerRefused, VmmDied, VmmError

T = TypeVar("T")
U = TypeVar("U")
V = TypeVar("V")

PATIENCE_S: Final = 0.8
HURRY_S: Final = 0.3
LOOK_S: Final = 0.02
"""A monitor that is only being connected is asked again so soon."""

STANDS_STILL: Final = frozenset({Phase.SWITCHOVER, Phase.GRANTED, Phase.ROLLING_BACK})
STANDS_STILL_THERE: Final = frozenset(
    {DestinationPhase.LOADED, DestinationPhase.OWNED, DestinationPhase.STARTING}
)


async def look_at_source(m: Outgoing) -> SourceFound:
    """Everything about a migration away that can be learned soon. Raises nothing."""
    state = m.state
    within_s = HURRY_S if state.phase in STANDS_STILL else PATIENCE_S
    own, there, record = await _together(
        look_at_process(m.vmm, m.vmm.instance, within_s, at_source=True),
        _said_by_destination(m, within_s),
        _record_at_source(m, within_s),
    )
    return SourceFound(state.phase, state.mode, _aim(state), _granted(state), own, there, record)


async def look_at_destination(i: Incoming) -> DestinationFound:
    """Everything about a migration to this host that can be learned soon. Raises nothing."""
    state = i.state
    within_s = HURRY_S if state.phase in STANDS_STILL_THERE else PATIENCE_S
    own, source, record = await _together(
        look_at_process(i.vmm, i.stored.instance, within_s, at_source=False),
        _said_by_source(i, within_s),
        _record_at_destination(i, within_s),
    )
    return DestinationFound(state.phase, state.mode, own, source, record)


def _aim(state: MigrationState) -> Aim:
    if not state.undoing:
        return Aim.AWAY
    return Aim.BACK_BY_CANCEL if state.cancelled else Aim.BACK


def _granted(state: MigrationState) -> Granted:
    if not state.granted:
        return Granted.FENCED if state.arbitrated and state.fenced else Granted.NO
    return Granted.YES_SOURCE_DIED if state.source_died else Granted.YES


async def within(work: Callable[[], Awaitable[T]], within_s: float) -> T | None:
    """What it comes to; None when that takes longer."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(within_s):
            return await work()
    return None


async def _together(
    first: Coroutine[Any, Any, T], second: Coroutine[Any, Any, U], third: Coroutine[Any, Any, V]
) -> tuple[T, U, V]:
    """All at once; when one is cut off, the others are not left behind."""
    async with asyncio.TaskGroup() as group:
        tasks = group.create_task(first), group.create_task(second), group.create_task(third)
    return tasks[0].result(), tasks[1].result(), tasks[2].result()


# The own process ----------------------------------------------------------------------------------


async def look_at_process(
    vmm: Vmm | None, instance: str, within_s: float, *, at_source: bool
) -> Own:
    """What became of it, in its own words if it has any."""
    if vmm is None:
        return Own(Fate.NEVER)
    if vmm.is_dead:
        return Own(Fate.EARLIER_BOOT if is_of_earlier_boot(instance) else Fate.DEAD)
    if isinstance(vmm, AbsentVmm):
        return Own(Fate.NOT_FOUND)
    seen = await within(lambda: _asked(vmm, at_source=at_source), within_s)
    return seen or Own(Fate.SILENT)


async def _asked(vmm: Vmm, *, at_source: bool) -> Own:
    """Asked until it answers: its monitor may only be being connected."""
    while True:
        try:
            return as_seen(await vmm.sample(), at_source=at_source)
        except VmmDied:
            return Own(Fate.DEAD)
        except VmmError:
            await asyncio.sleep(LOOK_S)


async def look_at_stray(vmm: Vmm, *, ask: bool) -> Own:
    """A process of which nothing is known but that it is here."""
    if vmm.is_dead:
        return Own(Fate.DEAD)
    if not ask:
        return Own(Fate.SILENT)

    async def says() -> Own:
        while True:
            try:
                return Own(Fate.ANSWERS, guest=guest_of(await vmm.run_state()))
            except VmmDied:
                return Own(Fate.DEAD)
            except (MigrdError, OSError):
                await asyncio.sleep(LOOK_S)

    return await within(says, PATIENCE_S) or Own(Fate.SILENT)


# The other side -----------------------------------------------------------------------------------


async def _said_by_destination(m: Outgoing, within_s: float) -> SaidByDestination:
    try:
        view = await within(lambda: m.peer.view(m.id), within_s)
    except PeerRefused as exc:
        return NoWord.KNOWS_NOTHING if exc.code == "not_found" else NoWord.REFUSES
    except PeerError:
        return NoWord.SILENT
    return NoWord.SILENT if view is None else _as_said(view)


def _as_said(view: DestinationView) -> SaidByDestination:
    if view.phase is DestinationPhase.STARTING and view.vmm_died:
        return DiedStarting.DIED_STARTING
    return view.phase


async def _said_by_source(i: Incoming, within_s: float) -> SaidBySource:
    source = i.source
    if source is None:
        return NoWord.SILENT
    try:
        view = await within(lambda: source.source_view(i.id), within_s)
    except PeerRefused as exc:
        return NoWord.KNOWS_NOTHING if exc.code == "not_found" else NoWord.REFUSES
    except PeerError:
        return NoWord.SILENT
    if view is None:
        return NoWord.SILENT
    try:
        return Phase(view.phase)
    except ValueError:
        return NoWord.REFUSES  # of a newer migrd


# The arbiter --------------------------------------------------------------------------------------


async def _record_at_source(m: Outgoing, within_s: float) -> Record:
    state, here = m.state, m.world.options.host
    if not state.arbitrated or state.mode is Mode.POSTCOPY:
        return Record.JOURNALS
    try:
        found = await _read(m.world, m.stored.request.vm, within_s)
    except (ArbiterError, TimeoutError):
        return Record.UNREACHABLE
    match as_source(found, here, m.peer.name, state.epoch, state.decided_on_revision):
        case Standing.OURS:
            return Record.MINE_STARTED if found is not None and found.started else Record.MINE
        case Standing.BACK:
            return Record.TAKEN_BACK
        case Standing.GIVEN:
            return Record.THEIRS
        case Standing.STARTED:
            return Record.THEIRS_STARTED
        case _:
            return Record.ABSENT


async def _record_at_destination(i: Incoming, within_s: float) -> Record:
    if not i.stored.settings.arbitrated or i.state.mode is Mode.POSTCOPY:
        return Record.JOURNALS
    try:
        found = await _read(i.world, i.stored.spec.name, within_s)
    except (ArbiterError, TimeoutError):
        return Record.UNREACHABLE
    match as_target(found, i.world.options.host, i.state.epoch):
        case Standing.GIVEN:
            return Record.MINE
        case Standing.STARTED:
            return Record.MINE_STARTED
        case Standing.OURS:  # the source's, from here
            return Record.THEIRS_STARTED if found is not None and found.started else Record.THEIRS
        case _:
            return Record.ABSENT


async def _read(world: World, vm: str, within_s: float) -> Ownership | None:
    """Raises ArbiterError, TimeoutError: nothing is known."""
    async with asyncio.timeout(within_s):
        return await present(world).read(vm)
