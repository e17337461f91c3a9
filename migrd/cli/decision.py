"""The decision about a VM's passthrough devices, for people: the verdict first, then per device who
watches its DMA and what stands in the way, then cures, then figures.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import click
from rich.text import Text

from migrd.cli.printing import Cell, Column, Printer
from migrd.cli.seen import Seen
from migrd.cli.text import UNKNOWN, span, word

STYLE: Final[Mapping[str, str]] = {
    "live": "green",
    "stop_and_copy": "yellow",
    "needs_unplug": "red",
    "blocked": "bold red",
}
_RANK: Final = tuple(STYLE)
_COLUMNS: Final = (
    Column("device"),
    Column("address", drop=2),
    Column("iommu", drop=1),
    Column("tracked by"),
    Column("verdict"),
    Column("reason", wraps=True, enough=20),
)


def headline(vm: str, decision: Seen, host: str = "") -> Text:
    """What can be promised of the VM, as a sentence."""
    proven, best = decision.text("migratability"), decision.text("migratability_at_best")
    where = f" on {host}" if host else ""
    if decision.parts("refused"):
        return Text(f"{vm} cannot be started like this{where}", "bold red")
    said = {
        "live": "can be live-migrated",
        "stop_and_copy": f"can be migrated, but stands still {_how_long(decision)} meanwhile",
        "needs_unplug": f"cannot be migrated with {_in_the_way(decision) or 'its devices'}",
        "blocked": "cannot be migrated as it is",
    }.get(proven, f"is {word(proven)}")
    line = Text(f"{vm} {said}{where}", STYLE.get(proven, "bold"))
    if best not in (proven, UNKNOWN):
        line.append(f"; it may turn out to be {word(best)}", "yellow")
    return line


def change_line(change: Seen) -> str:
    """A verdict that is another one (`vm.verdict_changed`): which, and why."""
    why = [one.text("message") for one in change.parts("appeared")]
    why += [f"no more: {one.text('message')}" for one in change.parts("disappeared")]
    said = f"was {word(change.text('before'))}, is {word(change.text('after'))}"
    return f"{said}: {'; '.join(why)}" if why else said


def _how_long(decision: Seen) -> str:
    stands_s = decision.seconds("expected_blackout")
    return "for a time that is not known" if stands_s is None else f"for {span(stands_s)}"


def _in_the_way(decision: Seen) -> str:
    limits = [one for one in decision.parts("reasons") if one.raw("lowers_to") == "needs_unplug"]
    named = dict.fromkeys(one.text("device") for one in limits if one.raw("device"))
    return ", ".join(named)


def print_decision(printer: Printer, decision: Seen, in_the_way: Sequence[Seen] = ()) -> None:
    """All of it but the headline. `in_the_way`: all refusals, where there are others besides."""
    rows = _rows(decision)
    if rows:
        printer.table(_COLUMNS, rows, "")
    refused = decision.parts("refused")
    said = {_key(reason) for reason in refused}
    refused = [*in_the_way] or refused
    reasons = [one for one in decision.parts("reasons") if _key(one) not in said]
    print_reasons(printer, refused, "Why not")
    print_reasons(printer, (one for one in reasons if one.raw("lowers_to")), "Why")
    _print_notes(printer, [one for one in reasons if not one.raw("lowers_to")])
    printer.line()
    printer.facts(_figures(decision))


def _key(reason: Seen) -> tuple[str, str, str]:
    return reason.text("code"), reason.text("device"), reason.text("message")


def _rows(decision: Seen) -> list[list[Cell]]:
    known = {one.text("id"): one for one in decision.parts("evidence")}
    told = {one.text("id"): one for one in decision.part("launch").parts("devices")}
    trackers = decision.pairs("trackers")
    ids = list(dict.fromkeys((*decision.words("attach_order"), *known, *trackers)))
    return [
        [
            id_,
            (known.get(id_) or told.get(id_) or Seen(None)).text("address"),
            known.get(id_, Seen(None)).text("iommu"),
            word(trackers.get(id_, UNKNOWN)).replace("none", "nobody").replace("both", "both ways"),
            *_verdict_of(id_, decision),
        ]
        for id_ in ids
    ]


def _verdict_of(id_: str, decision: Seen) -> tuple[Cell, Cell]:
    """The verdict that this device alone would come to, and the words of its reasons."""
    own = [one for one in decision.parts("reasons") if one.raw("device") == id_]
    limits = [one for one in own if one.raw("lowers_to")]
    proven = _worst(limits)
    best = _worst(one for one in limits if not one.raw("probe"))
    codes = ", ".join(dict.fromkeys(word(one.text("code")) for one in limits or own))
    if best != proven:
        return Text(f"{word(best)}?", "yellow"), codes
    return Text(word(proven), STYLE.get(proven, "")), codes


def _worst(limits: Iterable[Seen]) -> str:
    found = [one.text("lowers_to") for one in limits]
    return max(found, key=lambda one: _RANK.index(one) if one in _RANK else 99, default="live")


def print_reasons(printer: Printer, reasons: Iterable[Seen], title: str) -> None:
    """Each once, with its cure."""
    found = list({_key(reason): reason for reason in reasons}.values())
    if not found:
        return
    printer.heading(title)
    for reason in found:
        style = STYLE.get(reason.raw("lowers_to") or "", "")
        message, device = reason.text("message"), reason.text("device", "")
        place = "" if not device or device in message else f"{device}: "
        printer.item("  - ", Text(f"{place}{message}", style).append(_code(reason), "dim"))
        if cure := reason.text("cure", ""):
            printer.item("    try: ", cure)


def _code(reason: Seen) -> str:
    return f" [{reason.text('code')}]"


def _print_notes(printer: Printer, notes: Sequence[Seen]) -> None:
    """Nothing has to be done about them."""
    if not notes:
        return
    printer.heading("Worth knowing")
    for note in notes:
        printer.item("  - ", Text(note.text("message")).append(_code(note), "dim"))


def _figures(decision: Seen) -> list[tuple[str, Cell]]:
    floor_s = decision.seconds("downtime_floor")
    return [
        ("policy", word(decision.text("policy"))),
        ("dirty tracking", _tracking(decision.parts("domains"))),
        ("downtime", f"at least {span(floor_s)}" if floor_s is not None else ""),
        ("blackout expected", _blackout(decision)),
        ("it costs", "; ".join(_costs(decision))),
        ("downgraded", ", ".join(decision.words("downgraded"))),
        ("rests on", _evidence(decision)),
    ]


def _tracking(domains: Sequence[Seen]) -> str:
    asked = [one for one in domains if one.flag("dirty_tracking")]
    tables = [one for one in domains if one.flag("is_ioas") is not True]
    if not tables:
        return "no page table to ask it for"
    if not asked:
        return "not asked for"
    named = ", ".join(dict.fromkeys(one.text("iommu") for one in asked))
    every = "all" if len(asked) == len(tables) else f"{len(asked)} of {len(tables)}"
    return f"asked for on {every} page tables ({named})"


def _blackout(decision: Seen) -> str:
    stands_s = decision.seconds("expected_blackout")
    return "" if stands_s is None else span(stands_s)


def _costs(decision: Seen) -> list[str]:
    return [
        one.text("message") + ("" if one.flag("is_paid") else " (not paid: tracking is not asked)")
        for one in decision.parts("costs")
    ]


def _evidence(decision: Seen) -> str:
    if decision.raw("decided_at") is None:
        return ""
    asked = "the kernel's own answers" if decision.flag("probed") else "what is known without"
    return asked if decision.flag("probed") else f"{asked} asking the devices"


def print_launch(printer: Printer, decision: Seen) -> None:
    """What QEMU is told, a line for each option."""
    arguments = decision.part("launch").words("arguments")
    if not arguments:
        return
    printer.heading("QEMU is told")
    for at in range(0, len(arguments), 2):
        click.echo(f"  {' '.join(arguments[at : at + 2])}")  # to be copied: never wrapped
