"""`migrd migrate`, `migrd watch`: the main job."""

import asyncio
import uuid
from contextlib import nullcontext
from typing import Any

import click

from migrd.cli import story
from migrd.cli.client import Reply
from migrd.cli.exits import CommandError, Exit
from migrd.cli.naming import host_argument, migration_argument, vm_argument, whole_id
from migrd.cli.printing import Format
from migrd.cli.request import how_options, move_request
from migrd.cli.running import Session, remote
from migrd.cli.screens import LiveScreen, screen_for
from migrd.cli.seen import Json
from migrd.cli.units import whole_s
from migrd.cli.watching import Watch

_timeout = click.option(
    "--timeout",
    "timeout_s",
    type=whole_s,
    metavar="S",
    help="Stop watching after so long (exit code 9); the migration goes on.",
)
_through = click.option(
    "--through-needs-operator",
    is_flag=True,
    help="Watch on while the migration needs an operator, instead of ending with code 7.",
)


@click.command("migrate", short_help="Migrate a running VM to another host")
@vm_argument
@host_argument
@click.option("-w", "--watch", is_flag=True, help="Follow it to its end; the exit code tells how.")
@how_options
@_timeout
@_through
@click.option(
    "--idempotency-key",
    metavar="K",
    help="Asking twice with the same key gives the same migration, never a second one.",
)
@remote
async def migrate(
    session: Session,
    /,
    vm: str,
    destination: str,
    watch: bool,
    timeout_s: int | None,
    through_needs_operator: bool,
    idempotency_key: str | None,
    **how: Any,
) -> int:
    """Migrate the running VM to the host DESTINATION, a name from this host's roster.

    Without --watch it returns as soon as the daemon has taken the migration on, and prints its id.

    With --watch it follows the migration to its end: phases, rounds, decisions, and a summary that
    says where the guest runs. Ctrl-C then ends the watching, not the migration.

    \b
    Examples:
      migrd migrate web1 host-b --watch
      migrd migrate web1 host-b --watch --downtime-limit-ms 100 \\
          --when-not-converging throttle --max-throttle-percent 50
      migrd migrate web1 host-b --max-bandwidth 1Gbit/s --deadline-s 10min
      migrd migrate web1 host-b --device-there hostdev0=0000:81:00.2
      migrd migrate web1 host-b -o json | jq -r .id
    """
    request: dict[str, Json] = {"vm": vm, **move_request(destination, **how)}
    key = idempotency_key or str(uuid.uuid4())
    reply = await session.client.migrate(request, idempotency_key=key)
    id_ = reply.seen.raw("id")
    if id_ is None:
        raise CommandError("the daemon did not say which migration this is")
    if watch:
        return await _follow(session, id_, timeout_s, through_needs_operator)
    _print_begun(session, reply)
    return Exit.OK


def _print_begun(session: Session, reply: Reply) -> None:
    """The id alone on stdout, so that a script can catch it."""
    if session.printer.is_for_scripts:
        session.printer.json(reply.body)
    else:
        began = "going on already" if reply.status == 200 else "asked for"
        seen = reply.seen
        session.printer.line(seen.text("id"))
        session.printer.note(f"{seen.text('vm')} {story.route(seen)}: {began}")
        session.printer.note(f"watch it: migrd watch {seen.text('id')}")


@click.command("watch", short_help="Follow a migration to its end")
@migration_argument
@_timeout
@_through
@remote
async def watch(
    session: Session, migration_id: str, timeout_s: int | None, through_needs_operator: bool
) -> int:
    """Follow a migration to its end: phases, rounds, decisions, and where the guest runs.

    Ctrl-C ends the watching; the migration goes on. A restart of the daemon is waited out. When the
    migration has ended already, only the summary is printed. The exit code tells how it ended.

    \b
    Examples:
      migrd watch 5a3c
      migrd watch 5a3c --timeout 10min
      migrd watch 5a3c -o jsonl | jq -c '[.phase, .progress.remaining_bytes]'
    """
    id_ = await whole_id(session.client, migration_id)
    return await _follow(session, id_, timeout_s, through_needs_operator)


async def _follow(session: Session, id_: str, timeout_s: int | None, through: bool) -> int:
    printer = session.printer
    screen = screen_for(printer)
    watching = Watch(session.client, id_, screen, through_needs_operator=through)
    try:
        with screen if isinstance(screen, LiveScreen) else nullcontext():
            last = await watching.to_the_end(within_s=timeout_s)
    except asyncio.CancelledError:
        _say_it_goes_on(session, id_)
        raise
    if printer.format is Format.JSON:
        printer.json(last.body)
    elif not printer.is_for_scripts:
        story.summarise(printer, last)
    return story.exit_of(last)


def _say_it_goes_on(session: Session, id_: str) -> None:
    """Ctrl-C must not leave anyone in doubt about the migration."""
    session.printer.note("No longer watching. The migration goes on.", "yellow")
    session.printer.note(f"  watch it again:  migrd watch {id_}")
    session.printer.note(f"  cancel it:       migrd cancel {id_}")
