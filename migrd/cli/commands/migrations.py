"""`migrd migrations`, `rounds`, `decisions`, and what may be asked of a migration that goes on."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from migrd.cli import story
from migrd.cli.client import path
from migrd.cli.naming import migration_argument, short_ids, whole_id
from migrd.cli.pages import every_item
from migrd.cli.policy import Wishes, policy_options
from migrd.cli.printing import Cell, Column
from migrd.cli.running import Session, common_options, remote
from migrd.cli.seen import Json, Seen
from migrd.cli.text import clock, percent, rate, size, span, word
from migrd.core.phases import TERMINAL

_LIST = (
    Column("id"),
    Column("vm"),
    Column("from -> to"),
    Column("phase"),
    Column("guest on", drop=1),
    Column("blackout", right=True),
    Column("total", right=True, drop=2),
    Column("asked for", drop=3),
)
_ROUNDS = (
    Column("round", right=True),
    Column("at", right=True, drop=1),
    Column("took", right=True),
    Column("sent", right=True),
    Column("bandwidth", right=True),
    Column("left", right=True),
    Column("dirtying", right=True),
    Column("throttle", right=True),
)
_DECISIONS = (
    Column("at", right=True, drop=1),
    Column("round", right=True),
    Column("verdict"),
    Column("reason", drop=2),
    Column("in words", wraps=True),
)
Command = TypeVar("Command", bound=Callable[..., Any])

RESOLUTIONS = ("destination_fenced", "destination_runs", "use_destination_copy", "guest_lost")


def _chooses(command: Command) -> Command:
    for option in (
        click.option("--all", "show_all", is_flag=True, help="However many there are."),
        click.option("--active", is_flag=True, help="Only those that go on."),
        click.option("--vm", metavar="VM", help="Only those of this VM."),
    ):
        command = option(command)
    return command


@click.group("migrations", invoke_without_command=True, short_help="List migrations, or show one")
@_chooses
@common_options(hidden=True)
@click.pass_context
def migrations(context: click.Context, /, **choice: Any) -> None:
    """List migrations, newest first; `migrations show ID` shows one.

    A migration may be named by the beginning of its id wherever an ID is asked for.

    \b
    Examples:
      migrd migrations --active
      migrd migrations show 5a3c
      migrd migrations --vm web1 -o json | jq '.items[].phase'
    """
    if context.invoked_subcommand is None:
        context.invoke(list_migrations, **choice)


@migrations.command("list")
@_chooses
@remote
async def list_migrations(session: Session, show_all: bool, active: bool, vm: str | None) -> None:
    """List migrations, newest first."""
    query = {"active": "true"} if active else {}
    if vm is not None:
        query["vm"] = vm
    pages = None if show_all else 1
    body = await every_item(session.client, "migrations", pages=pages, query=query)
    printer = session.printer
    if printer.is_for_scripts:
        printer.json(body)
        return
    items = Seen(body).parts("items")
    short = short_ids([item.text("id") for item in items])
    wide = not printer.out.is_terminal or printer.out.width >= 140
    printer.table(_LIST, [_row(item, {} if wide else short) for item in items], "no migrations")
    if body.get("next_page_token"):
        printer.note("there are more: --all lists them", "dim")


def _row(migration: Seen, short: dict[str, str]) -> list[Cell]:
    id_ = migration.text("id")
    return [
        short.get(id_, id_),
        migration.text("vm"),
        story.route(migration),
        story.phase_word(migration),
        story.guest_on(migration),
        span(migration.seconds("blackout")),
        span(story.total_s(migration)),
        clock(migration.moment("created_at")),
    ]


@migrations.command("show")
@migration_argument
@remote
async def show_migration(session: Session, migration_id: str) -> None:
    """Show one migration: where the guest is, how far it got, why, and what to do now."""
    id_ = await whole_id(session.client, migration_id)
    reply = await session.client.get("migrations", id_)
    printer = session.printer
    if printer.is_for_scripts:
        printer.json(reply.body)
        return
    story.describe(printer, reply.seen)


@click.command("rounds", short_help="The rounds of a migration: sent, dirtied, left")
@migration_argument
@remote
async def rounds(session: Session, migration_id: str) -> None:
    """Show every harvest round of a migration: what was sent, what got dirty, what is left.

    \b
    Examples:
      migrd rounds 5a3c
      migrd rounds 5a3c -o jsonl | jq .remaining_bytes
    """
    await _list_of(session, migration_id, "rounds", _ROUNDS, _round, _sources)


@click.command("decisions", short_help="The decisions taken in a migration, and why")
@migration_argument
@remote
async def decisions(session: Session, migration_id: str) -> None:
    """Show every decision taken in a migration, with its reason and figures."""
    await _list_of(session, migration_id, "decisions", _DECISIONS, _decision)


async def _list_of(
    session: Session,
    given: str,
    kind: str,
    columns: tuple[Column, ...],
    row: Any,
    sources: Callable[[Seen], str] = lambda item: "",
) -> None:
    id_ = await whole_id(session.client, given)
    body = await every_item(session.client, "migrations", id_, kind)
    if session.printer.is_for_scripts:
        session.printer.json(body)
        return
    items = Seen(body).parts("items")
    rows = [row(item) for item in items]
    told = [sources(item) for item in items]
    if any(told):
        columns = (*columns, Column("sources", drop=2))
        rows = [[*cells, one] for cells, one in zip(rows, told, strict=True)]
    session.printer.table(columns, rows, f"no {kind} yet")


def _sources(round_: Seen) -> str:
    """What each source of dirty pages told, where migrd harvests: `ram 120, nic 8 (marked_all)`."""
    told = []
    for one in round_.parts("sources"):
        outcome = one.text("outcome")
        lost = "" if outcome == "read" else f" ({outcome})"
        told.append(f"{one.text('source')} {one.text('dirty_pages')}{lost}")
    return ", ".join(told)


def _round(round_: Seen) -> list[Cell]:
    return [
        round_.text("number"),
        span(round_.seconds("elapsed")),
        span(round_.seconds("duration")),
        size(round_.number("transferred_bytes")),
        rate(round_.number("bandwidth_bytes_per_s")),
        size(round_.number("remaining_bytes")),
        rate(story.dirty_rate(round_)),
        percent(round_.number("throttle_percent")),
    ]


def _decision(decision: Seen) -> list[Cell]:
    return [
        span(decision.seconds("elapsed")),
        decision.text("round_number"),
        word(decision.text("verdict")),
        decision.text("reason"),
        decision.text("message"),
    ]


@click.command("cancel", short_help="Ask to cancel a migration")
@migration_argument
@remote
async def cancel(session: Session, migration_id: str) -> None:
    """Ask to cancel a migration: the guest stays on its source.

    It is a request: past the point of no return it is denied (exit code 4), because the guest may
    already run on the destination. Watch the outcome with `migrd watch ID`.
    """
    await _ask(session, migration_id, "cancel")


@click.command("switchover", short_help="Ask to switch over now, whatever the blackout")
@migration_argument
@remote
async def switchover(session: Session, migration_id: str) -> None:
    """Ask to switch over now, whatever blackout that costs.

    For a migration in precopy that does not converge: the guest is stopped, the rest of its memory
    is sent, and it goes on at the destination. `migrd migrations show ID` predicts how long the
    guest would be stopped.
    """
    await _ask(session, migration_id, "switchover")


@click.command("resolve", short_help="Settle a migration that needs an operator")
@migration_argument
@click.argument("resolution", type=click.Choice(RESOLUTIONS))
@click.option(
    "--evidence",
    required=True,
    metavar="TEXT",
    help="How you know: what was looked at, when, by whom. It is written into the journal.",
)
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
@remote
async def resolve(
    session: Session, migration_id: str, resolution: str, evidence: str, yes: bool
) -> None:
    """Settle a migration that needs an operator.

    \b
    RESOLUTION says what you have proven:
      destination_fenced  the destination can never run the guest: its host is powered
                          off, or its QEMU was seen dead before it ran. The guest then
                          runs on at the source.
      destination_runs    the guest was seen to run on the destination. The source's
                          copy is then given up.
      use_destination_copy
                          the source is dead and did not run on after the destination had
                          its copy: that copy may run. Asked of the source's daemon, or of
                          the destination's when the source's host is gone for good.
      guest_lost          it runs nowhere and never will. The guest is given up.

    A wrong word here can run a guest twice and destroy its disks. Nothing else in migrd can.

    \b
    Example:
      migrd resolve 5a3c destination_fenced \\
          --evidence "host-b powered off at the PDU 03:12, seen dark by J. Doe"
    """
    id_ = await whole_id(session.client, migration_id)
    if not yes and session.printer.out.is_terminal and not session.printer.is_for_scripts:
        seen = (await session.client.get("migrations", id_)).seen
        session.printer.note(f"{story.whereabouts(seen)}; {story.outcome(seen)}.")
        click.confirm(f"Settle it as {resolution}?", abort=True, err=True)
    body: dict[str, Json] = {"resolution": resolution, "evidence": evidence}
    await _ask(session, id_, "resolve", body)


@click.command("policy", short_help="Change the policy of a migration that goes on")
@migration_argument
@policy_options
@remote
async def policy(session: Session, /, migration_id: str, **wishes: Any) -> None:
    """Change the policy of a migration that goes on; what is not named stays.

    \b
    Examples:
      migrd policy 5a3c --downtime-limit-ms 800
      migrd policy 5a3c --when-not-converging throttle --max-throttle-percent 60
      migrd policy 5a3c --max-bandwidth unlimited
    """
    change = Wishes(**wishes).policy()
    if not change:
        raise click.UsageError("say what to change, for example --downtime-limit-ms 800")
    id_ = await whole_id(session.client, migration_id)
    reply = await session.client.call("PATCH", path("migrations", id_, "policy"), body=change)
    _print_answer(session, reply.body)


async def _ask(session: Session, given: str, verb: str, body: Json = None) -> None:
    id_ = await whole_id(session.client, given)
    where = path("migrations", id_, verb=verb)
    reply = await session.client.call("POST", where, body=body)
    _print_answer(session, reply.body)


def _print_answer(session: Session, body: Json) -> None:
    """What became of the wish, and how the migration stands."""
    if session.printer.is_for_scripts:
        session.printer.json(body)
        return
    seen = Seen(body)
    migration = seen.part("migration") or seen
    session.printer.line(seen.text("message", word(seen.text("admission"))))
    session.printer.note(
        f"{migration.text('vm')} {story.route(migration)}: {story.outcome(migration)}; "
        f"watch it: migrd watch {migration.text('id')}"
        if migration.raw("phase") not in {phase.value for phase in TERMINAL}
        else story.whereabouts(migration),
        "dim",
    )
