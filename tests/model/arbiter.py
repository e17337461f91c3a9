"""The handover with an arbiter as a model: ownership is one record, changed by compare-and-swap.

    record (owner, started, revision)      a write names the revision that it was decided on

    source                                 record                      destination
    journal granted
    write: owner = destination  ---------> (destination, no,  n+1)
    GRANT -----------------------------------------------------------> journal owned
                                           (destination, yes, n+2) <-- write: started
                                                                       read: started; cont
    no answer, and not started:
    write: owner = source  --------------> (source, yes, n+3)          its write fails: refused

Rules
1. The destination starts only when it has read `owner = destination, started` with its own eyes. It
   reads the record by itself, too: GRANT only hastens things.
2. The source runs its guest again only when it has read `owner = source` at a revision newer than
   the one on which it decided its own grant (a grant that is still under way can then never apply),
   or when the destination has durably refused: that is final, whatever the record says, and the
   record is put right afterwards.
3. A destination that may have started never refuses. A record that says `started` is taken back on
   proof alone (a fence), which is written before the source runs; DISCARD is no fence.
4. A source whose process is dead takes nothing back, and gives the guest away for good.

Writes are messages: lost, late, repeated; each applies at most once, for its revision is gone then.
So a host that is gone before `started` needs no person; one gone after it needs a proof.

The events carry the names of the core's; `test_arbiter_conformance` replays paths of this model
through the real core and the engine's reading of the record. The copy that a source leaves behind
in postcopy is not in it: that handover does not wait for the record.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

SOURCE, DESTINATION = "source", "destination"


class Write(NamedTuple):
    """One compare-and-swap on its way."""

    owner: str
    started: bool
    expects: int | None
    """The revision it was decided on; None: whatever it is (only in a mutant)."""


class State(NamedTuple):
    """Both hosts, the record, and what is between them."""

    phase: str = "switchover"
    """Of the source; the daemons' journals are durable, and the model needs no more of them."""
    granted_on: int = -1
    """Durable: the revision on which the grant was decided; -1: none, or of a dead source."""
    source_died: bool = False
    fenced: bool = False
    source_up: bool = True
    there: str = "loaded"
    there_up: bool = True
    owner: str = SOURCE
    started: bool = True
    revision: int = 0
    writes: frozenset[Write] = frozenset()
    messages: frozenset[str] = frozenset()
    source: str = "done"
    copy: str = "load"
    host_gone: bool = False
    ran_there: bool = False
    stale: bool = False
    """The source has run since the copy was taken."""
    overruled: bool = False
    crashes_left: int = 2
    deaths_left: int = 1

    @property
    def died(self) -> bool:
        return self.source == "dead" or self.copy == "dead" or self.host_gone

    @property
    def is_started_there(self) -> bool:
        return self.owner == DESTINATION and self.started


@dataclass(frozen=True)
class Rules:
    """The protocol; each field that is not as here is a mutant that must be caught."""

    writes_compare: bool = True
    start_is_recorded: bool = True
    fence_needs_proof: bool = True
    late_grant_is_ruled_out: bool = True
    started_is_read_back: bool = True
    refuses_only_before_start: bool = True
    discard_is_no_fence: bool = True


class Step(NamedTuple):
    name: str
    state: State
    event: str | None = None
    """`source:<trigger>` or `destination:<trigger>` of the journal it goes into, if any."""


LAST_REVISION = 5
"""No sensible path needs more; a model that could go on for ever would never be searched."""
TERMINAL = frozenset({"succeeded", "rolled_back", "guest_lost"})
KEPT = frozenset({"rolled_back", "guest_lost"})


def steps(state: State, rules: Rules) -> Iterator[Step]:
    """Everything that may happen next."""
    yield from _faults(state)
    yield from _record(state)
    if state.source_up:
        yield from _source(state, rules)
        yield from _person(state, rules)
    if state.there_up:
        yield from _destination(state, rules)


def _record(state: State) -> Iterator[Step]:
    for write in state.writes:
        applies = write.expects in (None, state.revision)
        if applies and state.revision < LAST_REVISION:
            left = frozenset(w for w in state.writes if w.expects in (None, state.revision + 1))
            after = state._replace(
                owner=write.owner, started=write.started, revision=state.revision + 1, writes=left
            )
            yield Step(f"the write applies: {write.owner}, started={write.started}", after)


def _faults(state: State) -> Iterator[Step]:
    if state.crashes_left:
        fewer = state._replace(crashes_left=state.crashes_left - 1)
        if state.source_up:
            yield Step("fault: source daemon killed", fewer._replace(source_up=False))
        if state.there_up:
            yield Step("fault: destination daemon killed", fewer._replace(there_up=False))
    if state.deaths_left:
        fewer = state._replace(deaths_left=state.deaths_left - 1)
        if state.source != "dead":
            yield Step("fault: source QEMU dies", fewer._replace(source="dead"))
        if state.copy != "dead":
            yield Step("fault: destination QEMU dies", fewer._replace(copy="dead"))
        if not state.host_gone:
            gone = fewer._replace(host_gone=True, there_up=False, copy="dead")
            yield Step("fault: destination host gone for good", gone)
    if not state.source_up:
        yield Step("source daemon starts", state._replace(source_up=True))
    if not state.there_up and not state.host_gone:
        yield Step("destination daemon starts", state._replace(there_up=True))


def _written(state: State, owner: str, started: bool, rules: Rules, name: str) -> Iterator[Step]:
    write = Write(owner, started, state.revision if rules.writes_compare else None)
    if state.revision < LAST_REVISION and write not in state.writes:
        yield Step(name, state._replace(writes=state.writes | {write}))


def _told(state: State, message: str, name: str = "") -> Iterator[Step]:
    if message not in state.messages:
        yield Step(name or message, state._replace(messages=state.messages | {message}))


# The source ---------------------------------------------------------------------------------------


def _to(state: State, phase: str, trigger: str, why: str = "", **changes: object) -> Step:
    after = state._replace(phase=phase, **changes)  # type: ignore[arg-type]  # fields of State
    return Step(f"{trigger}{f' ({why})' if why else ''}", after, f"source:{trigger}")


def _source(state: State, rules: Rules) -> Iterator[Step]:
    match state.phase:
        case "switchover" if state.source == "dead":
            yield from _after_death(state)
        case "switchover":
            yield _to(state, "granted", "transfer_completed", granted_on=state.revision)
            yield _to(state, "rolling_back", "step_failed")
        case "granted" | "needs_operator":
            yield from _granted(state, rules)
        case "completing":
            yield _to(state, "succeeded", "source_released", source="dead")
        case "rolling_back":
            yield from _roll_back(state, rules)
        case "rolled_back" if state.owner == DESTINATION:
            yield from _written(state, SOURCE, True, rules, "write: put right")
        case _:
            pass  # it is over


def _after_death(state: State) -> Iterator[Step]:
    """Its process is dead: the destination may have all of the guest."""
    if "view:refused" in state.messages:
        yield _to(state, "guest_lost", "guest_died")
    elif not state.stale:
        only = {"granted_on": -1, "source_died": True, "fenced": False}
        yield _to(state, "granted", "transfer_completed", "the source died", **only)


def _comes_back(state: State) -> bool:
    return state.granted_on >= 0 and not state.source_died and state.source != "dead"


def _granted(state: State, rules: Rules) -> Iterator[Step]:
    may_come_back = _comes_back(state)
    is_ours = state.owner == SOURCE
    if is_ours and (state.revision == state.granted_on or not may_come_back):
        yield from _written(state, DESTINATION, False, rules, "write: owner = destination")
    if state.owner == DESTINATION:
        yield from _told(state, "grant", "GRANT")
    if "view:running" in state.messages:
        yield _to(state, "completing", "destination_ran")
    if "view:refused" in state.messages and state.source_died:
        yield _to(state, "guest_lost", "guest_died")
    elif "view:refused" in state.messages:
        yield _to(state, "rolling_back", "destination_refused")
    if may_come_back:
        yield from _withdraw(state, rules)
    if state.phase == "granted":
        yield _to(state, "needs_operator", "outcome_unknown")


def _withdraw(state: State, rules: Rules) -> Iterator[Step]:
    is_back = state.owner == SOURCE and state.revision > state.granted_on
    if not state.is_started_there and not is_back:  # no answer: take it back, whoever has it now
        yield from _written(state, SOURCE, True, rules, "write: owner = source")
    yield from _told(state, "discard", "DISCARD")
    ruled_out = is_back or not rules.late_grant_is_ruled_out
    if state.owner == SOURCE and ruled_out:
        yield _to(state, "rolling_back", "destination_refused", "read: mine")


def _roll_back(state: State, rules: Rules) -> Iterator[Step]:
    if state.source == "dead":
        yield from _after_death(state)
    elif state.fenced and not (state.owner == SOURCE and state.revision > state.granted_on):
        yield from _written(state, SOURCE, True, rules, "write: fenced")
    elif state.source == "done":
        stale = state.stale or state.copy in ("load", "run")
        yield Step("cont at the source", state._replace(source="run", stale=stale))
    else:
        yield _to(state, "rolled_back", "source_kept")
        yield from _told(state, "discard", "DISCARD")


# The destination ----------------------------------------------------------------------------------


def _journal(state: State, there: str, trigger: str, why: str = "") -> Step:
    name = f"{trigger}{f' ({why})' if why else ''}"
    return Step(name, state._replace(there=there), f"destination:{trigger}")


def _destination(state: State, rules: Rules) -> Iterator[Step]:
    yield from _refusals(state, rules)
    match state.there:
        case "loaded" if state.copy == "load":
            if "grant" in state.messages or state.owner == DESTINATION:
                yield _journal(state, "owned", "grant_received")
        case "owned" if state.copy == "load":
            yield from _start(state, rules)
        case "starting" if state.copy == "load":
            yield Step("cont", state._replace(copy="run", ran_there=True))
        case "starting" if state.copy == "run":
            yield _journal(state, "running", "guest_ran")
        case "starting" if "discard" in state.messages:
            if state.owner == SOURCE or not rules.discard_is_no_fence:
                yield _journal(state, "refused", "taken_back")
        case "refused" if state.copy != "dead":
            yield Step("the discarded copy is ended", state._replace(copy="dead"))
        case _:
            pass  # nothing to do, or its copy is dead
    if state.there in ("running", "refused"):
        yield from _told(state, f"view:{state.there}", f"says {state.there}")


def _refusals(state: State, rules: Rules) -> Iterator[Step]:
    asked = "discard" in state.messages or (state.source_up and state.phase in KEPT)
    may = state.there in ("loaded", "owned") and (state.copy == "dead" or asked)
    taken_back = state.there == "owned" and state.owner == SOURCE
    too_late = state.there == "starting" and not rules.refuses_only_before_start
    if may or taken_back or too_late:
        yield _journal(state, "refused", "refusal_decided")


def _start(state: State, rules: Rules) -> Iterator[Step]:
    ordered = _journal(state, "starting", "start_ordered")
    if not rules.start_is_recorded:
        if state.owner == DESTINATION:
            yield ordered
        return
    if state.owner == DESTINATION and not state.started:
        for write in _written(state, DESTINATION, True, rules, "write: started"):
            yield write
            if not rules.started_is_read_back:
                yield _journal(write.state, "starting", "start_ordered", "unread")
    if state.is_started_there:
        yield ordered


# A person -----------------------------------------------------------------------------------------


def _person(state: State, rules: Rules) -> Iterator[Step]:
    """What had started is given up on proof that it never runs (again)."""
    proven = state.copy == "dead"
    if state.phase == "needs_operator" and (proven or not rules.fence_needs_proof):
        if state.source == "dead":
            yield _to(state, "guest_lost", "guest_died", "a person's word")
        else:
            by_word = {"fenced": True, "overruled": True}
            yield _to(state, "rolling_back", "destination_refused", "a person's word", **by_word)
    if state.phase == "rolling_back" and state.source == "dead" and state.stale:
        yield _to(state, "guest_lost", "guest_died", "a person gives it up")


def violation(state: State) -> str | None:
    """The first invariant that is broken here; None: all hold."""
    if state.source == "run" and state.copy == "run":
        return "I1: the guest runs twice"
    if state.ran_there and state.source == "run" and not state.overruled:
        return "I4: the source runs after the destination ran"
    if state.copy == "run" and state.stale:
        return "I4: the destination runs a copy older than the guest"
    if state.phase == "succeeded" and not state.ran_there:
        return "I3: succeeded, and the destination never ran"
    if state.phase == "rolled_back" and state.ran_there and not state.overruled:
        return "I3: rolled back, and the destination ran"
    if state.phase == "guest_lost" and "run" in (state.source, state.copy):
        return "I3: guest_lost, and it runs"
    if state.source == "dead" and state.copy == "dead" and not state.died:
        return "I2: no copy is left, and nobody died"
    return None
