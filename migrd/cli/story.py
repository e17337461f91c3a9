"""What a migration's figures mean, in sentences: used by the live view, the summary and `show`.

The question a person has at 3 a.m. is "where is my guest?", so that is the first line of every
summary. A guest is said to run somewhere only when the daemon says so: not known is said as such.
"""

from collections.abc import Sequence
from typing import Final

from rich.text import Text

from migrd.cli.exits import Exit, of_end
from migrd.cli.printing import Cell, Printer
from migrd.cli.seen import Seen
from migrd.cli.text import UNKNOWN, clock, percent, rate, size, span, word
from migrd.core.handover import DestinationPhase
from migrd.core.phases import Phase

STYLE_OF_END: Final = {
    Exit.OK: "bold green",
    Exit.REFUSED: "bold yellow",
    Exit.ENDED_OTHERWISE: "bold yellow",
    Exit.GUEST_LOST: "bold red",
    Exit.NEEDS_OPERATOR: "bold red",
}


MEANING_OF_PHASE: Final = {
    Phase.PENDING.value: "waiting for a free slot",
    Phase.PREFLIGHT.value: "checking both hosts",
    Phase.PREPARING.value: "the destination gets ready",
    Phase.PRECOPY.value: "memory is copied while the guest runs on the source",
    Phase.SWITCHOVER.value: "the guest is stopped and the rest of it is sent",
    Phase.GRANTED.value: "point of no return: the destination may run the guest",
    Phase.COMPLETING.value: "the guest runs on the destination; the source is cleaned up",
    Phase.ROLLING_BACK.value: "the guest goes on at the source",
    Phase.NEEDS_OPERATOR.value: "it is not known who runs the guest; migrd keeps asking",
    DestinationPhase.RECEIVING.value: "the guest's memory arrives",
    DestinationPhase.LOADED.value: "all of it has arrived; the source decides",
    DestinationPhase.OWNED.value: "the source has given the guest up",
    DestinationPhase.STARTING.value: "the guest is being started",
}
"""What a phase means to a person; the ends explain themselves."""


def exit_of(migration: Seen) -> Exit:
    """The exit code that tells how the migration ended."""
    phase = migration.raw("phase") or ""
    if migration.raw("role") == "destination":
        ends = {DestinationPhase.RUNNING.value: Exit.OK}
        ends[DestinationPhase.REFUSED.value] = Exit.ENDED_OTHERWISE
        return ends.get(phase, Exit.UNEXPECTED)
    return of_end(phase)


def whereabouts(migration: Seen) -> str:
    """Where the guest runs, as a sentence."""
    vm = migration.text("vm")
    match migration.raw("guest_runs_on"):
        case "source":
            return f"{vm} runs on {migration.text('source')} (the source)"
        case "destination":
            return f"{vm} runs on {migration.text('destination')} (the destination)"
        case "nowhere":
            return f"{vm} runs nowhere: the guest is lost"
        case "moving":
            return f"{vm} is stopped for the move, on its way to {migration.text('destination')}"
        case _:
            return f"It is not known where {vm} runs"


def guest_on(migration: Seen) -> str:
    """The same in one word: a host's name, or `nowhere`, `moving`, `unknown`."""
    where = migration.raw("guest_runs_on")
    if where in ("source", "destination"):
        return migration.text(where)
    return word(where) if where in ("nowhere", "moving") else "unknown"


def phase_word(migration: Seen) -> Text:
    """The phase, coloured by what it means for the guest."""
    style = "cyan"
    if migration.flag("is_terminal") or migration.raw("phase") == Phase.NEEDS_OPERATOR.value:
        style = STYLE_OF_END.get(exit_of(migration), "")
    return Text(word(migration.text("phase")), style)


def route(migration: Seen) -> str:
    """`host-a -> host-b`."""
    return f"{migration.text('source')} -> {migration.text('destination')}"


def outcome(migration: Seen) -> str:
    """How the migration ended, or stands, in a few words."""
    match migration.raw("phase"):
        case Phase.SUCCEEDED.value:
            return "migrated"
        case Phase.REFUSED.value:
            return "refused: nothing was touched"
        case Phase.ROLLED_BACK.value:
            return "rolled back: the guest never ran on the destination"
        case Phase.CANCELLED.value:
            return "cancelled"
        case Phase.GUEST_LOST.value:
            return "the guest is lost"
        case Phase.NEEDS_OPERATOR.value:
            return "needs an operator: migrd cannot prove alone who runs the guest"
        case _:
            return f"in phase {word(migration.text('phase'))}"


def reason(migration: Seen) -> str:
    """Why it did not simply succeed; "" when there is nothing to say."""
    cause = migration.part("cause")
    if not cause:
        return ""
    return f"{cause.text('message')} [{cause.text('code')}]"


def fate_of(guess: Seen, limit_s: float | None) -> tuple[str, str]:
    """The estimate as (text, style): predicted blackout against the limit, and what follows."""
    blackout_s = guess.seconds("predicted_blackout")
    if blackout_s is None:
        return "not predictable yet", "dim"
    text = span(blackout_s)
    if limit_s is not None:
        text += f", limit {span(limit_s)}"
    if limit_s is not None and blackout_s <= limit_s:
        return f"{text}: fits", "green"
    converges = guess.flag("converges")
    if converges is False:
        return f"{text}: does not converge", "red"
    return f"{text}: {'converging' if converges else 'too early to say'}", "yellow"


def time_left(migration: Seen) -> str:
    """Until the guest runs on the destination; where that cannot be said, until the deadline."""
    guess = migration.part("estimate")
    left_s = guess.seconds("predicted_remaining")
    if left_s is not None:
        return f"about {span(left_s)}"
    if guess.flag("converges") is not False:
        return "not predictable yet"
    deadline_s = migration.part("policy").seconds("deadline")
    elapsed_s = migration.seconds("elapsed")
    if deadline_s is None or elapsed_s is None:
        return "unlimited, as things are"
    return f"unlimited, as things are; the deadline is in {span(max(0, deadline_s - elapsed_s))}"


def ways_out(migration: Seen) -> list[tuple[str, str]]:
    """What a person can do about a migration that does not converge."""
    id_ = migration.text("id")[:8]
    return [
        ("to act", f"migrd policy {id_} --when-not-converging throttle"),
        ("or", f"migrd switchover {id_}"),
    ]


def phases(migration: Seen) -> list[tuple[str, float | None]]:
    """(phase, seconds spent in it; None while it lasts)."""
    return [
        (entry.text("phase"), entry.seconds("duration")) for entry in migration.parts("timeline")
    ]


def phase_line(migration: Seen) -> Text:
    """`preparing 310 ms > precopy 13.4 s > switchover 40 ms`, short ones left out at the end."""
    line = Text()
    for name, lasted_s in phases(migration):
        if lasted_s is None and migration.flag("is_terminal"):
            continue
        if line:
            line.append(" > ", "dim")
        line.append(word(name), "" if lasted_s is not None else "bold cyan")
        if lasted_s is not None:
            line.append(f" {span(lasted_s)}", "dim")
    return line


def total_s(migration: Seen) -> float | None:
    ended_s = migration.seconds("total")
    return ended_s if ended_s is not None else migration.seconds("elapsed")


def next_step(migration: Seen) -> str:
    """What a person should do now; "" when nothing."""
    told = migration.text("next_step", "")
    if told:
        return told
    if migration.raw("phase") == Phase.NEEDS_OPERATOR.value:
        return (
            "find out whether the destination can still run the guest, then say so: "
            f"migrd resolve {migration.text('id')} RESOLUTION --evidence TEXT"
        )
    return ""


def summarise(printer: Printer, migration: Seen) -> None:
    """The block at the end of a watch: where the guest is, how it went, what to do now."""
    code = exit_of(migration)
    printer.line(_headline(migration, code), STYLE_OF_END.get(code, "bold"))
    printer.facts([(f"  {name}", value) for name, value in _account(migration, code)])
    refusals(printer, migration.parts("refusals"))


def describe(printer: Printer, migration: Seen) -> None:
    """Everything worth knowing of one migration, at any time of its life."""
    ended = migration.flag("is_terminal") is True
    printer.line(f"{whereabouts(migration)}; {outcome(migration)}", "bold")
    fate, style = fate_of(migration.part("estimate"), limit_of(migration))
    lines = _account(migration, exit_of(migration) if ended else Exit.OK)
    if not ended:
        left_s = migration.part("estimate").seconds("predicted_remaining")
        lines[1:1] = [
            ("transfer", progress_line(migration)),
            ("predicted", Text(fate, style)),
            ("time left", "" if left_s is None else f"about {span(left_s)}"),
        ]
    lines += [
        ("vm", migration.text("vm")),
        ("route", route(migration)),
        ("this host is", migration.text("role")),
        ("policy", policy_line(migration.part("policy"))),
        ("last decision", _last_decision(migration)),
        ("asked for", _asked_for(migration)),
        ("epoch", migration.text("epoch")),
    ]
    printer.facts([(f"  {name}", value) for name, value in lines])
    refusals(printer, migration.parts("refusals"))
    for condition in migration.parts("conditions"):
        told = f"{condition.text('type')} is {condition.text('status')}"
        printer.line(f"  {told}: {condition.text('message')} [{condition.text('reason')}]")
    for said in migration.parts("resolutions"):
        printer.line(f"  {word_line(said)}")


def word_line(said: Seen) -> str:
    """An operator's word as a sentence: who, when, what, how it was known, what came of it."""
    known = said.part("known")
    there = known.text("peer_phase", "") or "silent"
    done = word(said.text("outcome"))
    if said.raw("carried_out_at"):
        done += f" at {clock(said.moment('carried_out_at'))}"
    return (
        f"{said.text('by')} said {said.text('resolution')} at {clock(said.moment('said_at'))}: "
        f"{said.text('evidence')} (VMM here: {known.text('run_state', 'silent')}; "
        f"{known.text('peer')}: {there}) - {done}"
    )


def _last_decision(migration: Seen) -> str:
    decision = migration.part("last_decision")
    return decision_line(decision) if decision else ""


def _asked_for(migration: Seen) -> str:
    by = migration.text("requested_by", "")
    return clock(migration.moment("created_at")) + (f" by {by}" if by else "")


def policy_line(policy: Seen) -> str:
    """The policy as a sentence; "" on the destination, which is not told."""
    if not policy:
        return ""
    bandwidth = policy.number("max_bandwidth_bytes_per_s")
    return (
        f"when not converging: {word(policy.text('when_not_converging'))}; "
        f"downtime limit {span(policy.seconds('downtime_limit'))}; "
        f"deadline {span(policy.seconds('deadline'))}; "
        f"bandwidth {rate(bandwidth) if bandwidth else 'unlimited'}; "
        f"throttle at most {percent(policy.number('max_throttle_percent'))}"
    )


def _headline(migration: Seen, code: Exit) -> str:
    where = whereabouts(migration)
    return where if code in (Exit.OK, Exit.GUEST_LOST) else f"{where}; {outcome(migration)}"


def _account(migration: Seen, code: Exit) -> list[tuple[str, Cell]]:
    progress, limit_s = migration.part("progress"), limit_of(migration)
    blackout_s = migration.seconds("blackout")
    lines: list[tuple[str, Cell]] = []
    if blackout_s is not None:
        lines.append(("blackout", _blackout(blackout_s, limit_s)))
    lines.append(("total", span(total_s(migration))))
    lines.append(("phases", phase_line(migration)))
    moved = progress.number("transferred_bytes")
    if moved is not None:
        rounds = progress.whole("rounds") or 0
        lines.append(("sent", f"{size(moved)} in {rounds} round{'' if rounds == 1 else 's'}"))
    lines.append(("why", reason(migration)))
    lines.append(("do now", Text(next_step(migration), "bold" if code is not Exit.OK else "")))
    lines.append(("migration", migration.text("id")))
    return lines


def _blackout(blackout_s: float, limit_s: float | None) -> Text:
    if limit_s is None:
        return Text(span(blackout_s))
    if blackout_s > limit_s:
        return Text(f"{span(blackout_s)}, over the limit of {span(limit_s)}", "yellow")
    return Text(f"{span(blackout_s)} (limit {span(limit_s)})")


def limit_of(migration: Seen) -> float | None:
    """The downtime limit in force, in seconds."""
    return migration.part("policy").seconds("downtime_limit")


def refusals(printer: Printer, found: Sequence[Seen], title: str = "refused because") -> None:
    """Every refusal with its cure."""
    if not found:
        return
    printer.line(f"  {title}:")
    for refusal in found:
        printer.line(f"    - {refusal.text('message')} [{refusal.text('code')}]")
        cure = refusal.text("cure", "")
        if cure:
            printer.line(f"      try: {cure}")


def round_line(round_: Seen) -> str:
    """One round as a sentence; what is not known is left out."""
    sent, took_s = round_.number("transferred_bytes"), round_.seconds("duration")
    bandwidth, dirtying = round_.number("bandwidth_bytes_per_s"), dirty_rate(round_)
    throttled = round_.number("throttle_percent")
    parts = [
        f"sent {size(sent)} in {span(took_s)}" if sent else "",
        rate(bandwidth) if bandwidth else "",
        f"left {size(round_.number('remaining_bytes'))}",
        "" if dirtying is None else f"dirtying {rate(dirtying)}",
        f"throttled {percent(throttled)}" if throttled else "",
    ]
    return f"round {round_.text('number')}: " + ", ".join(part for part in parts if part)


def dirty_rate(seen: Seen) -> float | None:
    """Bytes dirtied per second, also where the answer counts pages."""
    in_bytes = seen.number("dirty_bytes_per_s")
    if in_bytes is not None:
        return in_bytes
    pages, page = seen.number("dirty_pages_per_s"), seen.number("page_size_bytes")
    return None if pages is None or page is None else pages * page


def decision_line(decision: Seen) -> str:
    """One decision as a sentence."""
    verdict, why = word(decision.text("verdict")), decision.text("reason", "")
    message = decision.text("message", "")
    return f"{verdict}: {message}" + (f" [{why}]" if why else "")


def is_news(decision: Seen, before: Seen | None) -> bool:
    """Whether a decision says more than the one before it."""
    if before is None or decision.raw("verdict") != "continue":
        return True
    return decision.raw("reason") != before.raw("reason")


def progress_line(migration: Seen) -> str:
    """The transfer as it stands, on one line; "" before it has begun."""
    progress = migration.part("progress")
    remaining = progress.number("remaining_bytes")
    if remaining is None:
        return ""
    parts = [f"{size(remaining)} left", f"sent at {rate(progress.number('bandwidth_bytes_per_s'))}"]
    dirtying = rate(dirty_rate(progress))
    if dirtying != UNKNOWN:
        parts.append(f"dirtying {dirtying}")
    if throttled := progress.number("throttle_percent"):
        parts.append(f"throttled {percent(throttled)}")
    return ", ".join(parts)
