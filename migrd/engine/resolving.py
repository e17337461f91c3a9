"""An operator's word on a migration: judged, written down, carried out; in this order.

    word -> both sides are asked: does either prove it wrong? --yes--> denied, nothing is written
         -> journal: who, when, the evidence, what could be seen of both sides       (durable)
         -> handed to the migration's task -> its event `by_operator` (durable) -> the act

Rules
1. A word is for what nobody can prove. Where a side answers, its answer counts, and a word against
   it is denied: two copies of a guest are worse than a guest that stands still.
2. The record comes first. A daemon that dies between record and act hands the word on when it is
   back, after the same look at both sides; what has been settled meanwhile is left alone.
3. The same word again is `already_so`, in whatever phase it has led to.

The words and where they have their place: `service.Resolution`, `misplaced` of each side.
"""

import asyncio
from dataclasses import dataclass
from typing import Final, Protocol

from migrd.core.admission import Admission
from migrd.core.handover import DestinationPhase
from migrd.core.phases import Phase, Trigger
from migrd.engine.incoming import Incoming
from migrd.engine.operator_words import OperatorWords, Word
from migrd.engine.outgoing import Outgoing
from migrd.engine.ports import KnownThen, StoredResolution, Vmm
from migrd.engine.service import Resolution, Role
from migrd.engine.world import World
from migrd.errors import MigrdError, Unavailable, VmmDied

ASK_S: Final = 2.0
"""So long each side may take to answer before a word is judged without it."""
MOST_WORDS: Final = 64
"""Of one migration."""
LONG_S: Final = 60.0
DEAD: Final = "dead"

TRIGGER_OF: Final = {
    Resolution.DESTINATION_FENCED: Trigger.DESTINATION_REFUSED,
    Resolution.DESTINATION_RUNS: Trigger.DESTINATION_RAN,
    Resolution.USE_DESTINATION_COPY: Trigger.TRANSFER_COMPLETED,
    Resolution.GUEST_LOST: Trigger.GUEST_DIED,
}

Denial = tuple[str, str]
"""A stable code, and a sentence that says what stands against the word."""


@dataclass(frozen=True)
class Judged:
    """What became of a word."""

    admission: Admission
    reason: str
    message: str


class Side(Protocol):
    """This host's side of a migration, as far as a word is concerned."""

    @property
    def role(self) -> Role: ...

    @property
    def id(self) -> str: ...

    @property
    def phase(self) -> str: ...

    @property
    def world(self) -> World: ...

    @property
    def words(self) -> OperatorWords: ...

    def misplaced(self, said: Resolution) -> Denial | None:
        """Why the word has no place now, from what is known here."""

    async def stands_still(self) -> bool:
        """After a restart, as soon as it can be told: does it still wait for a person?"""

    async def look(self) -> KnownThen:
        """Both sides, as they answer now."""

    def disproven(self, said: Resolution, known: KnownThen) -> Denial | None:
        """Why the word cannot be true."""

    def tell(self, kind: str, **body: object) -> None:
        """Publish a change, and log it."""

    async def hand_on(self, word: Word) -> None:
        """Have the migration's task carry it out; safe to repeat. Raises Unavailable (`busy`)."""


async def resolve(side: Side, said: Resolution, *, evidence: str, by: str) -> Judged:
    """Raises JournalError when the record could not be written (nothing is done then)."""
    words = side.words
    async with words.lock:
        before = words.last
        if before is not None and before.stored.resolution == said and not before.overtaken:
            if before.is_pending and side.misplaced(said) is None:
                await side.hand_on(before)
                return _judged(side, Admission.ALREADY_SO)
            if not before.is_pending and side.misplaced(said) is not None:
                return _judged(side, Admission.ALREADY_SO)
        found = await _judge(side, said)
        if not isinstance(found, KnownThen):
            side.tell("migration.resolution_denied", resolution=said.value, by=by, why=found[0])
            return Judged(Admission.DENIED, *found)
        word = await _write_down(side, said, evidence, by, found)
        side.tell("migration.resolution", resolution=said.value, by=by, evidence=evidence)
        await side.hand_on(word)
        return _judged(side, Admission.QUEUED)


async def _judge(side: Side, said: Resolution) -> Denial | KnownThen:
    """What stands against the word; else what could be seen when it was given."""
    denial = side.misplaced(said)
    if denial is None and len(side.words.given) >= MOST_WORDS:
        denial = "too_many_words", f"{MOST_WORDS} words on this migration were written down"
    if denial is not None:
        return denial
    known = await side.look()
    return side.misplaced(said) or side.disproven(said, known) or known


def _judged(side: Side, admission: Admission) -> Judged:
    return Judged(admission, "resolved", f"migration {side.id} is {side.phase}")


async def _write_down(
    side: Side, said: Resolution, evidence: str, by: str, known: KnownThen
) -> Word:
    world = side.world
    stored = StoredResolution(
        migration_id=side.id,
        role=side.role.value,
        resolution=said.value,
        evidence=evidence,
        by=by,
        host=world.options.host,
        wall_s=world.clock.wall_s(),
        monotonic_s=world.clock.monotonic_s(),
        known=known,
    )
    await world.journal.add_resolution(stored)
    return side.words.add(stored)


async def take_up(side: Side) -> None:
    """After a restart: a word that was written down and not carried out is handed on, unless what
    can be seen now speaks against it."""
    word = side.words.pending
    if word is None:
        return
    stands_still = await side.stands_still()
    async with side.words.lock:
        said = Resolution(word.stored.resolution)
        denial: Denial | None = ("not_needs_operator", "it was settled otherwise")
        if stands_still:
            denial = side.disproven(said, await side.look())
        if side.words.pending is not word:
            return
        if denial is None:
            await side.hand_on(word)
            return
        word.overtaken = True
        side.tell("migration.resolution_overtaken", resolution=said.value, why=denial[0])


async def _run_state(vmm: Vmm | None) -> str | None:
    if vmm is None:
        return None
    if vmm.is_dead:
        return DEAD
    try:
        async with asyncio.timeout(ASK_S):
            return (await vmm.run_state()).value
    except VmmDied:
        return DEAD
    except (MigrdError, TimeoutError):
        return None


_ARRIVING: Final = frozenset({DestinationPhase.PREPARING, DestinationPhase.RECEIVING})
_NO_COPY: Final = _ARRIVING | {DestinationPhase.REFUSED}

# The source ---------------------------------------------------------------------------------------

_END_THAT: Final = (
    "end that first, or power the host off. A process that migrd there cannot find: prove that it "
    "is gone, and stop that migrd"
)
_RUNS_HERE: Final = "source_runs", "the guest runs on this host: nothing of the kind is true"


class SourceSide:
    """`m`, a migration away from this host."""

    role = Role.SOURCE

    def __init__(self, m: Outgoing) -> None:
        self._m = m
        self.id = m.id
        self.world = m.world
        self.words = m.words

    @property
    def phase(self) -> str:
        return self._m.state.phase.value

    def misplaced(self, said: Resolution) -> Denial | None:
        m = self._m
        stands = f"migration {m.id} is {self.phase}"
        if m.state.phase is not Phase.NEEDS_OPERATOR:
            return "not_needs_operator", stands
        if said is Resolution.GUEST_LOST:
            return None
        if said is Resolution.USE_DESTINATION_COPY:
            if m.state.granted or not m.vmm.is_dead:
                return "source_not_dead", f"{stands}, and the VMM here is not dead"
            return None
        if not m.state.granted:
            return "not_granted", f"{stands}: {m.peer.name} was never allowed to run the guest"
        if said is Resolution.DESTINATION_FENCED and m.vmm.is_dead:
            text = f"{stands}, and the VMM here is dead: say guest_lost if it runs nowhere"
            return "source_dead", text
        return None

    async def stands_still(self) -> bool:
        word = self.words.pending
        return word is not None and self.misplaced(Resolution(word.stored.resolution)) is None

    async def look(self) -> KnownThen:
        m = self._m
        view, problem = None, None
        run_state = asyncio.create_task(_run_state(m.vmm))
        try:
            async with asyncio.timeout(ASK_S):
                view = await m.peer.view(m.id)
        except (MigrdError, TimeoutError) as exc:
            problem = str(exc) or f"no answer within {ASK_S:g} s"
        return KnownThen(
            phase=self.phase,
            cause=None if m.state.cause is None else m.state.cause.code,
            run_state=await run_state,
            pid=m.vmm.pid,
            peer=m.peer.name,
            peer_phase=None if view is None else view.phase.value,
            peer_vmm_died=None if view is None else view.vmm_died,
            peer_guest_running=None if view is None else view.guest_running,
            peer_problem=problem if view is None else view.reason,
        )

    def disproven(self, said: Resolution, known: KnownThen) -> Denial | None:
        if known.run_state == "running" and said is not Resolution.USE_DESTINATION_COPY:
            return _RUNS_HERE
        if known.peer_phase is None:
            return None
        there, died = DestinationPhase(known.peer_phase), bool(known.peer_vmm_died)
        answers = f"migrd on {known.peer} answers: {there.value}"
        answers += ", its VMM is dead" if died else ""
        ran, granted = there is DestinationPhase.RUNNING, self._m.state.granted
        match said:
            case Resolution.DESTINATION_FENCED if ran:
                return "destination_ran", f"{answers}: what is here is old"
            case Resolution.DESTINATION_FENCED if not died and there not in _NO_COPY:
                return "destination_lives", f"{answers}, and may run its copy: {_END_THAT}"
            case Resolution.DESTINATION_RUNS if died or not ran:
                return "destination_not_running", answers
            case Resolution.USE_DESTINATION_COPY if died or there in _NO_COPY:
                return "no_copy_there", answers
            case Resolution.GUEST_LOST if ran and not died:
                return "destination_runs", answers
            case Resolution.GUEST_LOST if granted and not died and there not in _NO_COPY:
                return "destination_lives", f"{answers}, and may run it: {_END_THAT}"
            case _:
                return None

    def tell(self, kind: str, **body: object) -> None:
        self._m.log.warning(kind, **body)
        self._m.changed(kind, **body)

    async def hand_on(self, word: Word) -> None:
        m, said = self._m, Resolution(word.stored.resolution)
        event = m.event(
            TRIGGER_OF[said],
            cause=word.cause,
            source_died=said is Resolution.USE_DESTINATION_COPY,
            by_operator=True,
        )
        if not m.wish(event):
            raise Unavailable(f"migration {m.id} has too many wishes waiting", code="busy")


# The destination ----------------------------------------------------------------------------------


_WAITING: Final = frozenset({DestinationPhase.LOADED, DestinationPhase.OWNED})
"""Owned: its record was removed, so only the source could say what it is."""


class DestinationSide:
    """`i`, a migration to this host: a whole copy is here, and its source is silent for good."""

    role = Role.DESTINATION

    def __init__(self, i: Incoming) -> None:
        self._i = i
        self.id = i.id
        self.world = i.world
        self.words = i.words

    @property
    def phase(self) -> str:
        return self._i.state.phase.value

    def misplaced(self, said: Resolution) -> Denial | None:
        i = self._i
        stands = f"migration {i.id} is {self.phase} here"
        if i.state.phase not in _WAITING or i.note is None:
            return "not_needs_operator", stands
        if said not in (Resolution.USE_DESTINATION_COPY, Resolution.GUEST_LOST):
            return "not_the_source", f"{stands}: that word is for {i.stored.source}"
        return None

    async def stands_still(self) -> bool:
        i = self._i
        while i.state.phase in _ARRIVING and not i.is_over:
            await i.wait_newer(i.generation, LONG_S)
        return i.state.phase in _WAITING

    async def look(self) -> KnownThen:
        i = self._i
        view, problem = None, "it is not in the roster"
        run_state = asyncio.create_task(_run_state(i.vmm))
        if i.source is not None:
            try:
                async with asyncio.timeout(ASK_S):
                    view = await i.source.source_view(i.id)
            except (MigrdError, TimeoutError) as exc:
                problem = str(exc) or f"no answer within {ASK_S:g} s"
        return KnownThen(
            phase=self.phase,
            cause=None,
            run_state=await run_state,
            pid=None if i.vmm is None else i.vmm.pid,
            peer=i.stored.source,
            peer_phase=None if view is None else view.phase,
            peer_vmm_died=None if view is None else view.copy_gone,
            peer_problem=problem if view is None else None,
        )

    def disproven(self, said: Resolution, known: KnownThen) -> Denial | None:
        if known.peer_phase is not None:
            text = f"migrd on {known.peer} answers: {known.peer_phase}; it decides, say it there"
            return "source_answers", text
        if said is Resolution.USE_DESTINATION_COPY and known.run_state == DEAD:
            return "copy_dead", "the VMM with the copy is dead"
        return None

    def tell(self, kind: str, **body: object) -> None:
        self._i.log.warning(kind, **body)
        self._i.changed(kind, **body)

    async def hand_on(self, word: Word) -> None:
        if word.stored.resolution == Resolution.USE_DESTINATION_COPY:
            self._i.grant_on_word()
        else:
            self._i.want_refusal(word.cause.message)
