"""The embedded handover (no third party) as an explicit-state model: what each side may do next.

    State --steps(state, rules)--> [Step(name, State), ...]

The model is a second derivation of the protocol, written against `core.handover`'s rules and not
against its code; the events of both sides carry the names of `core.phases.Trigger` and
`core.handover.DestinationTrigger`, and `test_conformance` replays its paths through the real core.

What is modelled
- both daemons: what is durable, what only the process knows (and a crash forgets), that an
  observation (SWITCHOVER_REACHED, GUEST_LOADED) may be saved later than it is acted upon;
- both QEMUs, with what they do by themselves: a source whose stream breaks runs its guest on;
- messages as a set that only grows: each may be lost (never delivered), late, repeated, reordered;
- any wait may time out at any moment; the destination's host may be gone for good;
- a person's word in `needs_operator`, given only with its proof (what a fence is for).

`stale`: the source has run after the copy at the destination was taken; running that copy would
take the guest back in time. `overruled`: a person has said, with proof, that the destination's
guest is gone for good, so the source may run although the destination's may have.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from tests.model.explore import TERMINAL


class State(NamedTuple):
    """Everything, on both hosts and between them."""

    # the source's daemon: durable
    phase: str = "precopy"
    granted: bool = False
    undoing: bool = False
    cancelled: bool = False
    source_died: bool = False
    # ... and what only its process knows
    source_up: bool = True
    unsaved: bool = False
    """SWITCHOVER_REACHED is acted upon, and not yet in the journal."""
    watched: bool = False
    """This process has seen the source stand still from its stop on."""
    taken_over: bool = False
    # the destination's daemon: durable, and not
    there: str = "receiving"
    there_up: bool = True
    there_unsaved: bool = False
    volatile_refusal: bool = False
    """Only in a mutant: the refusal is not in the journal."""
    # the two QEMUs: run, frozen (pre-switchover), sending, done, dead; wait, bad, load, run, dead
    source: str = "run"
    copy: str = "wait"
    host_gone: bool = False
    messages: frozenset[str] = frozenset()
    # the truth, which nobody on either side can read
    ran_there: bool = False
    stale: bool = False
    overruled: bool = False
    died: bool = False
    """A process that held a copy, or its host, has died."""
    crashes_left: int = 2
    deaths_left: int = 1


@dataclass(frozen=True)
class Rules:
    """The protocol; each field that is not as here is a mutant that must be caught."""

    grant_waits_for_the_journal: bool = True
    time_out_is_no_answer: bool = True
    journal_survives: bool = True
    refusal_is_durable: bool = True
    owned_only_after_cont: bool = True
    no_refusal_after_starting: bool = True
    fence_needs_proof: bool = True
    completed_must_be_seen: bool = True
    unwatched_copy_is_kept: bool = True


class Step(NamedTuple):
    """One thing that happens; `event` is what the side's journal then holds of it, if anything."""

    name: str
    state: State
    event: str | None = None
    """`source:<trigger>` or `destination:<trigger>`."""


SOURCE_ENDED = frozenset({"rolled_back", "cancelled", "guest_lost"})
STOPPED = frozenset({"frozen", "sending", "done"})


def steps(state: State, rules: Rules) -> Iterator[Step]:
    """Everything that may happen next."""
    yield from _faults(state, rules)
    yield from _qemu(state)
    if state.source_up:
        yield from _source(state, rules)
    if state.there_up:
        yield from _destination(state, rules)
    if state.source_up and state.phase == "needs_operator":
        yield from _operator(state, rules)


def told(state: State, message: str) -> State:
    return state._replace(messages=state.messages | {message})


# The world ----------------------------------------------------------------------------------------


def _faults(state: State, rules: Rules) -> Iterator[Step]:
    if state.crashes_left and state.source_up:
        kept = state._replace(source_up=False, watched=False, crashes_left=state.crashes_left - 1)
        if state.unsaved:
            kept = kept._replace(phase="precopy", unsaved=False)
        if not rules.journal_survives and state.phase not in TERMINAL:
            kept = kept._replace(phase="precopy", granted=False, undoing=False)
        yield Step("fault: source daemon killed", kept)
    if state.crashes_left and state.there_up:
        kept = state._replace(there_up=False, crashes_left=state.crashes_left - 1)
        if state.there_unsaved:
            kept = kept._replace(there="receiving", there_unsaved=False)
        if state.volatile_refusal:
            kept = kept._replace(there="loaded", volatile_refusal=False)
        yield Step("fault: destination daemon killed", kept)
    if state.deaths_left:
        fewer = state._replace(deaths_left=state.deaths_left - 1, died=True)
        if state.source != "dead":
            yield Step("fault: source QEMU dies", fewer._replace(source="dead"))
        if state.copy != "dead":
            yield Step("fault: destination QEMU dies", fewer._replace(copy="dead"))
        if not state.host_gone:
            gone = fewer._replace(host_gone=True, there_up=False, copy="dead")
            yield Step("fault: destination host gone for good", gone)
    if not state.source_up:
        yield Step("source daemon starts", state._replace(source_up=True, taken_over=True))
    if not state.there_up and not state.host_gone:
        yield Step("destination daemon starts", state._replace(there_up=True))


def _qemu(state: State) -> Iterator[Step]:
    """What the QEMUs do by themselves."""
    if state.phase in ("precopy", "switchover") and state.source == "run" and state.copy == "wait":
        yield Step("source QEMU stops the guest", state._replace(source="frozen"))
    if state.source == "sending" and state.copy == "wait":
        yield Step("destination QEMU has everything", state._replace(copy="load"))
    if state.source == "sending" and state.copy in ("load", "run"):
        yield Step("source QEMU is completed", state._replace(source="done"))
    if state.source in ("frozen", "sending"):  # the stream breaks
        broken = _resumed(state)
        if state.copy == "wait":
            broken = broken._replace(copy="bad")
        yield Step("the stream breaks: source QEMU runs on by itself", broken)


def _resumed(state: State) -> State:
    stale = state.stale or state.copy in ("load", "run")
    return state._replace(source="run", watched=False, stale=stale)


# The source's daemon ------------------------------------------------------------------------------


def _to(state: State, phase: str, name: str, why: str = "") -> Step:
    """The source journals an event (and with it whatever was not yet saved)."""
    after = state._replace(phase=phase, unsaved=False)
    return Step(f"{name}{f' ({why})' if why else ''}", after, f"source:{name}")


def _source(state: State, rules: Rules) -> Iterator[Step]:
    match state.phase:
        case "precopy":
            yield from _precopy(state)
        case "switchover":
            yield from _switchover(state, rules)
        case "granted":
            yield from _granted(state, rules)
        case "needs_operator":
            yield from _asking(state, rules)
        case "completing":
            if state.source in STOPPED:
                yield Step("source QEMU is ended", state._replace(source="dead"))
            yield _to(state, "succeeded", "source_released")
        case "rolling_back":
            yield from _bring_back(state, rules)
            yield _to(state, "needs_operator", "outcome_unknown", "not seen to run in time")
        case _:
            pass  # it is over


def _undo(state: State) -> Iterator[Step]:
    undoing = state._replace(undoing=True)
    yield _to(undoing, "rolling_back", "step_failed", "a deadline, or a failure")
    yield _to(undoing._replace(cancelled=True), "rolling_back", "cancel_requested")


def _precopy(state: State) -> Iterator[Step]:
    if state.source == "dead":
        refused = "view:refused" in state.messages
        if not state.taken_over or refused:
            yield _to(state, "guest_lost", "guest_died")
        else:
            yield _to(state, "switchover", "switchover_reached", "found dead")
        return
    yield from _undo(state)
    if state.source in STOPPED:
        watched = state.source == "frozen"
        reached = state._replace(phase="switchover", unsaved=True, watched=watched)
        yield Step("switchover_reached", reached, "source:switchover_reached")


def _switchover(state: State, rules: Rules) -> Iterator[Step]:
    if state.unsaved:
        yield Step("switchover_reached is saved", state._replace(unsaved=False))
    if state.source == "dead":
        yield from _after_death(state, rules)
        yield _to(state, "needs_operator", "outcome_unknown", "the destination is silent")
        return
    yield from _undo(state)
    if state.source == "frozen":
        yield Step("migrate-continue", state._replace(source="sending"))
    seen = ("done",) if rules.completed_must_be_seen else ("done", "sending")
    if state.source in seen and "view:loaded" in state.messages:
        yield _to(state._replace(granted=True), "granted", "transfer_completed")
        if not rules.grant_waits_for_the_journal:
            yield Step("GRANT", told(state, "grant"))


def _after_death(state: State, rules: Rules) -> Iterator[Step]:
    """The source's QEMU is proven dead; the destination may hold all of the guest."""
    if "view:refused" in state.messages:
        yield _to(state, "guest_lost", "guest_died")
    elif "view:loaded" in state.messages:
        if state.watched or not rules.unwatched_copy_is_kept:
            only = state._replace(granted=True, source_died=True)
            yield _to(only, "granted", "transfer_completed", "the source died")
        elif state.phase != "needs_operator":
            yield _to(state, "needs_operator", "outcome_unknown", "the copy may be old")


def _answered(state: State) -> Iterator[Step]:
    """GRANT, and what counts as its answer."""
    yield Step("GRANT", told(state, "grant"))
    if "view:running" in state.messages:
        yield _to(state, "completing", "destination_ran")
    if "view:refused" in state.messages:
        if state.source_died:
            yield _to(state, "guest_lost", "guest_died")
        else:
            yield _to(_given_back(state), "rolling_back", "destination_refused")


def _given_back(state: State) -> State:
    return state._replace(granted=False, undoing=True)


def _granted(state: State, rules: Rules) -> Iterator[Step]:
    yield from _answered(state)
    if rules.time_out_is_no_answer:
        yield _to(state, "needs_operator", "outcome_unknown", "GRANT is not answered")
    else:
        yield _to(_given_back(state), "rolling_back", "destination_refused", "a time-out")


def _asking(state: State, rules: Rules) -> Iterator[Step]:
    """needs_operator keeps asking."""
    if state.granted:
        yield from _answered(state)
    elif state.source == "dead" and not state.watched:
        if "view:refused" in state.messages:
            yield _to(state, "guest_lost", "guest_died")
    elif state.source == "dead":
        yield from _after_death(state, rules)
    else:
        yield from _bring_back(state, rules)


def _bring_back(state: State, rules: Rules) -> Iterator[Step]:
    if state.source == "dead":
        yield from _after_death(state, rules)
        return
    if state.source in STOPPED:
        yield Step("cont at the source", _resumed(state))
    else:
        yield Step("DISCARD", told(state, "discard"))
        if state.cancelled:
            yield _to(state, "cancelled", "cancel_completed")
        else:
            yield _to(state, "rolled_back", "source_kept")


# The destination's daemon -------------------------------------------------------------------------


def _journal(state: State, there: str, *names: str) -> Step:
    after = state._replace(there=there, there_unsaved=False)
    return Step(" + ".join(names), after, "destination:" + "+".join(names))


def _destination(state: State, rules: Rules) -> Iterator[Step]:
    yield from _refusals(state, rules)
    yield from _views(state, rules)
    match state.there:
        case "receiving" if state.copy in ("load", "run"):
            loaded = state._replace(there="loaded", there_unsaved=True)
            yield Step("guest_loaded", loaded, "destination:guest_loaded")
        case "loaded":
            if state.there_unsaved:
                yield Step("guest_loaded is saved", state._replace(there_unsaved=False))
            if "grant" in state.messages and state.copy != "dead":
                yield _journal(state, "starting", "grant_received", "start_ordered")
        case "starting" if state.copy == "load":
            yield Step("cont at the destination", state._replace(copy="run", ran_there=True))
        case "starting" if state.copy == "run":
            yield _journal(state, "running", "guest_ran")
        case "starting" if state.copy == "dead" and "discard" in state.messages:
            yield _journal(state, "refused", "taken_back")
        case "refused" if state.copy != "dead":
            yield Step("the discarded copy is ended", state._replace(copy="dead"))


def _refusals(state: State, rules: Rules) -> Iterator[Step]:
    told_so = "discard" in state.messages or (state.source_up and state.phase in SOURCE_ENDED)
    may = (
        state.there == "receiving"
        or (state.there == "loaded" and (state.copy == "dead" or told_so))
        or (state.there == "starting" and not rules.no_refusal_after_starting)
    )
    if may:
        refusal = _journal(state, "refused", "refusal_decided")
        if not rules.refusal_is_durable:
            after = refusal.state._replace(volatile_refusal=True)
            refusal = refusal._replace(state=after)
        yield refusal


def _views(state: State, rules: Rules) -> Iterator[Step]:
    """What it says of itself, whenever it is asked."""
    says = state.there if state.there in ("loaded", "running", "refused") else None
    if state.there == "starting" and not rules.owned_only_after_cont:
        says = "running"
    if says is not None and f"view:{says}" not in state.messages:
        yield Step(f"says {says}", told(state, f"view:{says}"))


# A person -----------------------------------------------------------------------------------------


def _operator(state: State, rules: Rules) -> Iterator[Step]:
    """`migrd resolve`: each word with the proof that it asks for."""
    proven_off = state.copy == "dead"
    if proven_off or not rules.fence_needs_proof:
        if state.source_died or state.source == "dead":
            yield _to(state, "guest_lost", "guest_died", "a person's word")
        else:
            back = _given_back(state)._replace(overruled=True)
            yield _to(back, "rolling_back", "destination_refused", "a person's word")
    if state.copy == "run" and state.granted:
        yield _to(state, "completing", "destination_ran", "a person's word")
    if state.source == "dead" and state.copy == "load" and not state.stale and not state.granted:
        only = state._replace(granted=True, source_died=True)
        yield _to(only, "granted", "transfer_completed", "a person's word")
    if state.source == "dead" and (state.copy != "run") and (state.stale or state.copy != "load"):
        yield _to(state, "guest_lost", "guest_died", "a person gives it up")
