"""`migrd events`: the daemon's event stream."""

import asyncio
import json
from typing import Final

import click
from rich.text import Text

from migrd.cli import story
from migrd.cli.decision import change_line
from migrd.cli.exits import Exit
from migrd.cli.running import Session, remote
from migrd.cli.seen import Seen
from migrd.cli.stream import Connected, Event, EventStream, Lost
from migrd.cli.text import clock, printable, word
from migrd.cli.watching import AWAY_S

_LOST: Final = "events.lost"
"""The history does not reach back so far; of no interest to one who asked for all there is."""
_QUIET_S: Final = 0.5
"""Without --follow: the history has been sent when nothing more came for so long."""


@click.command("events", short_help="What has happened, and what happens")
@click.option("-f", "--follow", is_flag=True, help="Go on with what happens; ends with Ctrl-C.")
@click.option(
    "--after",
    "after_id",
    type=click.IntRange(min=0),
    metavar="ID",
    help="Only what came after the event with this number.",
)
@click.option("--vm", metavar="VM", help="Only what is about this VM.")
@click.option("--kind", metavar="KIND", help="Only this kind, or all that begin so: migration.")
@remote
async def events(
    session: Session, follow: bool, after_id: int | None, vm: str | None, kind: str | None
) -> int:
    """Show what has happened lately, oldest first, as far as the daemon still remembers.

    With --follow it goes on with what happens now; the connection is made again when it breaks, and
    what was missed is asked for. `-o jsonl` prints one event a line.

    \b
    Examples:
      migrd events
      migrd events --follow --kind migration
      migrd events --follow -o jsonl | jq -c 'select(.vm == "web1")'
    """
    begin = str(0 if after_id is None else after_id)
    if follow and after_id is None:
        begin = ""
    events_seen: list[Seen] = []
    async with EventStream(
        session.client, after_id=begin or None, give_up_after_s=AWAY_S if follow else 0.0
    ) as stream:
        while (heard := await _next(stream, follow)) is not None:
            if isinstance(heard, Event):
                if _wanted(heard, vm, kind) and not (heard.kind == _LOST and after_id is None):
                    _print(session, heard, events_seen, follow)
            else:
                _print_connection(session, heard)
                if not follow and isinstance(heard, Lost):
                    break
    if session.printer.format.value == "json" and not follow:
        session.printer.json({"items": [seen.body for seen in events_seen]})
    return Exit.OK


async def _next(stream: EventStream, follow: bool) -> Event | Connected | Lost | None:
    if follow:
        return await stream.next()
    try:
        async with asyncio.timeout(_QUIET_S):
            return await stream.next()
    except TimeoutError:
        return None


def _wanted(event: Event, vm: str | None, kind: str | None) -> bool:
    if event.kind == _LOST:
        return True
    if vm is not None and event.body.raw("vm") != vm:
        return False
    return kind is None or event.kind.startswith(kind)


def _print(session: Session, event: Event, kept: list[Seen], follow: bool) -> None:
    printer = session.printer
    if not printer.is_for_scripts:
        printer.line(_line(event))
    elif follow or printer.format.value == "jsonl":
        printer.json_line(event.body.body)
    else:
        kept.append(event.body)


def _print_connection(session: Session, change: Connected | Lost) -> None:
    if isinstance(change, Lost):
        session.printer.note(f"connection lost ({change.error.message}); trying again", "yellow")
    elif change.again:
        session.printer.note("connected again", "green")


def _line(event: Event) -> Text:
    seen = event.body
    line = Text.assemble((clock(seen.moment("at")), "dim"), "  ")
    line.append(seen.text("kind", printable(event.kind)).ljust(20), "cyan")
    line.append("  ")
    line.append(seen.text("vm", ""), "bold")
    told = _told(seen.part("body"))
    return line.append(f"  {told}") if told else line


def _told(body: Seen) -> str:
    """The figures of an event: rounds, decisions, verdicts as sentences, the rest as key=value."""
    if body.raw("before") and body.raw("after"):
        return change_line(body)
    if round_ := body.part("round"):
        return story.round_line(round_)
    if decision := body.part("decision"):
        return story.decision_line(decision)
    return "  ".join(f"{printable(key)}={_figure(value)}" for key, value in body.body.items())


def _figure(value: object) -> str:
    if isinstance(value, str):
        return word(value) if value.isidentifier() else printable(value)
    return json.dumps(value)
