"""The handover with an arbiter as a model: ownership is one record, changed by compare-and-swap.

    record (owner, started, revision)      a write names the revision that it was decided on

    source                                 record                      destination
    journal granted
    write: owner = destination  ---------> (destination, no,  n+1)
    GRANT -----------------------------------------------------------> journal owned
                                           (destination, yes, n+2) <-- write: started
                                                                       read: started; cont
    no answer, and not started:
    write: owner = source  --------------> (source, no, n+3)           its write fails

Rules
1. The destination starts only when it has read `owner = destination, started` with its own eyes.
2. The source runs its guest again only when it has read `owner = source` at a revision newer than
   the one on which it decided its own grant: a grant that is still under way can then never apply.
3. A record that says `started` is taken back on proof alone (a fence).

Writes are messages: lost, late, repeated; each applies at most once, for its revision is gone then.
So a host that is gone before `started` needs no person; one gone after it needs a proof. GRANT only
hastens things: the destination reads the record by itself too.
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
    """Durable: the revision on which the grant was decided."""
    source_up: bool = True
    there: str = "loaded"
    there_up: bool = True
    owner: str = SOURCE
    started: bool = False
    revision: int = 0
    writes: frozenset[Write] = frozenset()
    messages: frozenset[str] = frozenset()
    source: str = "done"
    copy: str = "load"
    host_gone: bool = False
    ran_there: bool = False
    overruled: bool = False
    crashes_left: int = 2
    deaths_left: int = 1

    @property
    def died(self) -> bool:
        return self.source == "dead" or self.copy == "dead" or self.host_gone


@dataclass(frozen=True)
class Rules:
    """The protocol; each field that is not as here is a mutant that must be caught."""

    writes_compare: bool = True
    start_is_recorded: bool = True
    fence_needs_proof: bool = True
    late_grant_is_ruled_out: bool = True
    started_is_read_back: bool = True


class Step(NamedTuple):
    name: str
    state: State


LAST_REVISION = 6
"""No sensible path needs more; a model that could go on for ever would never be searched."""
TERMINAL = frozenset({"succeeded", "rolled_back", "guest_lost"})


def steps(state: State, rules: Rules) -> Iterator[Step]:
    """Everything that may happen next."""
    yield from _faults(state)
    yield from _record(state)
    if state.source_up:
        yield from _source(state, rules)
        yield from _fence(state, rules)
    if state.there_up:
        yield from _destination(state, rules)


def _record(state: State) -> Iterator[Step]:
    for write in state.writes:
        applies = write.expects in (None, state.revision)
        if applies and state.revision < LAST_REVISION:
            after = state._replace(
                owner=write.owner, started=write.started, revision=state.revision + 1
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


def _written(state: State, owner: str, started: bool, rules: Rules, name: str) -> Step:
    write = Write(owner, started, state.revision if rules.writes_compare else None)
    return Step(name, state._replace(writes=state.writes | {write}))


def _source(state: State, rules: Rules) -> Iterator[Step]:
    match state.phase:
        case "switchover":
            granted = state._replace(phase="granted", granted_on=state.revision)
            yield Step("transfer_completed", granted)
            yield Step("step_failed", state._replace(phase="rolling_back"))
        case "granted" | "needs_operator":
            yield from _granted(state, rules)
        case "completing":
            yield Step("source_released", state._replace(phase="succeeded", source="dead"))
        case "rolling_back" if state.source == "dead":
            yield Step("guest_died", state._replace(phase="guest_lost"))
        case "rolling_back" if state.source == "done":
            yield Step("cont at the source", state._replace(source="run"))
        case "rolling_back":
            yield Step("source_kept", state._replace(phase="rolled_back"))
        case _:
            pass  # it is over


def _granted(state: State, rules: Rules) -> Iterator[Step]:
    if state.owner == SOURCE and state.revision == state.granted_on:
        yield _written(state, DESTINATION, False, rules, "write: owner = destination")
    if state.owner == DESTINATION:
        yield Step("GRANT", state._replace(messages=state.messages | {"grant"}))
    if "view:running" in state.messages:
        yield Step("destination_ran", state._replace(phase="completing"))
    if not state.started:  # no answer: take it back, whoever has it now
        yield _written(state, SOURCE, False, rules, "write: owner = source")
    ruled_out = state.revision > state.granted_on or not rules.late_grant_is_ruled_out
    if state.owner == SOURCE and ruled_out:
        yield Step("destination_refused (read: mine)", state._replace(phase="rolling_back"))
    yield Step("outcome_unknown", state._replace(phase="needs_operator"))


def _destination(state: State, rules: Rules) -> Iterator[Step]:
    match state.there:
        case "loaded" if state.copy == "load":
            if "grant" in state.messages or state.owner == DESTINATION:
                yield Step("grant_received", state._replace(there="owned"))
        case "owned" if state.copy == "load":
            yield from _start(state, rules)
        case "starting" if state.copy == "load":
            yield Step("cont", state._replace(copy="run", ran_there=True))
        case "starting" if state.copy == "run":
            yield Step("guest_ran", state._replace(there="running"))
        case "running":
            told = state._replace(messages=state.messages | {"view:running"})
            yield Step("says running", told)
        case _:
            pass  # nothing to do, or its copy is dead


def _start(state: State, rules: Rules) -> Iterator[Step]:
    starting = state._replace(there="starting")
    if not rules.start_is_recorded:
        if state.owner == DESTINATION:
            yield Step("start_ordered, without a record", starting)
        return
    if state.owner == DESTINATION and not state.started:
        write = _written(state, DESTINATION, True, rules, "write: started")
        yield write
        if not rules.started_is_read_back:
            yield Step("start_ordered, unread", write.state._replace(there="starting"))
    if state.owner == DESTINATION and state.started:
        yield Step("start_ordered (read: started)", starting)


def _fence(state: State, rules: Rules) -> Iterator[Step]:
    """The control plane takes back what had started, on proof that it never runs (again)."""
    proven = state.copy == "dead"
    if state.phase != "needs_operator" or not (proven or not rules.fence_needs_proof):
        return
    if state.owner == DESTINATION and state.started and state.revision < LAST_REVISION:
        taken = state._replace(
            owner=SOURCE, started=False, revision=state.revision + 1, overruled=True
        )
        yield Step("fenced, and taken back", taken)


def violation(state: State) -> str | None:
    """The first invariant that is broken here; None: all hold."""
    if state.source == "run" and state.copy == "run":
        return "I1: the guest runs twice"
    if state.ran_there and state.source == "run" and not state.overruled:
        return "I4: the source runs after the destination ran"
    if state.phase == "succeeded" and not state.ran_there:
        return "I3: succeeded, and the destination never ran"
    if state.phase == "rolled_back" and state.ran_there and not state.overruled:
        return "I3: rolled back, and the destination ran"
    if state.phase == "guest_lost" and "run" in (state.source, state.copy):
        return "I3: guest_lost, and it runs"
    if state.source == "dead" and state.copy == "dead" and not state.died:
        return "I2: no copy is left, and nobody died"
    return None
