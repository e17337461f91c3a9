"""`migrd plan`: what a start or a migration would meet. Nothing is changed."""

from collections.abc import Sequence
from typing import Any

import click
from rich.text import Text

from migrd.cli import story
from migrd.cli.client import path
from migrd.cli.decision import headline, print_decision, print_launch
from migrd.cli.devices import Given, asked_for, device_options
from migrd.cli.exits import Exit
from migrd.cli.naming import maybe_host_argument, vm_argument
from migrd.cli.printing import Cell
from migrd.cli.request import how_options, move_request
from migrd.cli.running import Session, remote
from migrd.cli.seen import Seen
from migrd.cli.text import rate, size, span, word


@click.command("plan", short_help="Say what a start or a migration would meet; changes nothing")
@vm_argument
@maybe_host_argument
@click.option("--to", metavar="HOST", help="The same as DESTINATION.")
@device_options
@how_options
@click.option("--arguments", is_flag=True, help="Also print what QEMU would be told.")
@remote
async def plan(
    session: Session,
    /,
    vm: str,
    destination: str | None,
    to: str | None,
    devices: Sequence[Given],
    tracking: str | None,
    arguments: bool,
    **how: Any,
) -> int:
    """Say what can be promised of VM; with DESTINATION, what a migration there would meet.

    The verdict comes first. Then each passthrough device: who would watch its DMA, and what stands
    in the way, with a cure. With --device or --tracking: what if it were started like that. With a
    destination, that host's own decision besides: could it come back?

    Exit code 4 when the migration (or, without a destination, the start) would be refused.

    \b
    Examples:
      migrd plan web1
      migrd plan web1 --device 41:00.2 --device 41:00.3 --tracking require
      migrd plan web1 --to host-b --downtime-limit-ms 100
      migrd plan web1 host-b --when-not-converging postcopy && migrd migrate web1 host-b --watch
    """
    if to is not None and destination not in (None, to):
        raise click.UsageError(f"DESTINATION is {destination} and --to is {to}: name one")
    body = {**move_request(destination or to, **how), **asked_for(devices, tracking)}
    reply = await session.client.call("POST", path("vms", vm, verb="plan"), body=body)
    seen = reply.seen
    possible = seen.flag("possible") is True
    if session.printer.is_for_scripts:
        session.printer.json(reply.body)
    else:
        _print_plan(session, seen, possible)
        if arguments:
            print_launch(session.printer, seen.part("decision"))
    return Exit.OK if possible else Exit.REFUSED


def _print_plan(session: Session, seen: Seen, possible: bool) -> None:
    printer, vm = session.printer, seen.text("vm")
    decision, is_move = seen.part("decision"), seen.raw("destination") is not None
    if is_move:
        verdict = "can be migrated" if possible else "cannot be migrated"
        style = "bold green" if possible else "bold yellow"
        printer.line(f"{vm} {verdict} to {seen.text('destination')}", style)
        _print_move(session, seen)
    if decision:
        if is_move:
            printer.heading("Its passthrough devices, on this host")
        printer.line(headline(vm, decision))
        print_decision(printer, decision, [] if is_move else seen.parts("refusals"))
    elif not is_move:
        printer.line(f"{vm} has no passthrough devices: no dirty tracking is needed for it")
        story.refusals(printer, seen.parts("refusals"), "it could not be started, because")
    there = seen.part("decision_there")
    if there:
        printer.heading(f"Its passthrough devices, on {seen.text('destination')}")
        printer.line(headline(vm, there))
        print_decision(printer, there)


def _dirty_rate(seen: Seen) -> str:
    found, age_s = seen.number("dirty_bytes_per_s"), seen.seconds("dirty_rate_age")
    if found is None:
        return ""
    return rate(found) if age_s is None else f"{rate(found)}, measured {span(age_s)} ago"


def _blackout(seen: Seen) -> Cell:
    blackout_s = seen.seconds("predicted_blackout")
    if blackout_s is None:
        return ""
    if seen.flag("predicted_converges") is False:
        text = f"{span(blackout_s)}: it would not converge to the limit as it writes now"
        return Text(text, "yellow")
    return span(blackout_s)


def _print_move(session: Session, seen: Seen) -> None:
    printer, missing = session.printer, seen.part("features_missing")
    facts: list[tuple[str, Cell]] = [
        ("  memory", size(seen.number("memory_bytes"))),
        ("  gets dirty at", _dirty_rate(seen)),
        ("  takes about", span(seen.seconds("predicted_total"))),
        ("  stands still for about", _blackout(seen)),
        ("  can move by", ", ".join(word(mode) for mode in seen.words("mode_choices"))),
        ("  source's QEMU lacks", ", ".join(missing.words("source"))),
        ("  destination's QEMU lacks", ", ".join(missing.words("destination"))),
    ]
    printer.facts(facts)
    story.refusals(printer, seen.parts("refusals"), "would be refused because")
    story.refusals(printer, seen.parts("warnings"), "warnings")
