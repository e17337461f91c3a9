"""`migrd host`: this host as its daemon sees it."""

import click
from rich.text import Text

from migrd.cli.client import Problem
from migrd.cli.printing import Cell, Column, violations
from migrd.cli.running import Session, remote
from migrd.cli.seen import Seen
from migrd.cli.text import UNKNOWN, ago, brief_version, clock, size, yes_no


@click.command("host", short_help="This host: versions, slots, other hosts")
@remote
async def host(session: Session) -> None:
    """Show this host: versions, slots, peers, and whether its IOMMUs track dirty pages.

    \b
    Examples:
      migrd host
      migrd host -o json | jq .all_iommus_track_dirty
    """
    reply = await session.client.get("host")
    printer = session.printer
    if printer.is_for_scripts:
        printer.json(reply.body)
        return
    printer.facts(_facts(reply.seen))
    for line in await _what_is_missing(session):
        printer.line(Text(line, "bold yellow"))
    peers = reply.seen.parts("peers")
    if not peers:
        printer.heading("No other hosts in the roster: this daemon cannot migrate anything away.")
        return
    printer.heading("Other hosts")
    columns = (
        Column("host"),
        Column("up"),
        Column("migrd"),
        Column("checked"),
        Column("problem", wraps=True),
    )
    printer.table(columns, [_peer(peer) for peer in peers], "none")


async def _what_is_missing(session: Session) -> list[str]:
    """Why the daemon cannot do its work, one line each; nothing when it can."""
    try:
        await session.client.call("GET", "/readyz")
    except Problem as problem:
        return ["not ready to migrate:", *(f"  {line}" for line in violations(problem.details))]
    return []


def _facts(seen: Seen) -> list[tuple[str, Cell]]:
    return [
        ("host", seen.text("name")),
        ("migrd", seen.text("migrd_version")),
        ("host booted", clock(seen.moment("booted_at"))),
        ("vms", seen.text("vms")),
        ("outgoing migrations", _slots(seen, "outgoing")),
        ("incoming migrations", _slots(seen, "incoming")),
        ("memory available", size(seen.number("memory_available_bytes"))),
        ("all IOMMUs track dirty pages", yes_no(seen.flag("all_iommus_track_dirty"))),
        ("streams encrypted (TLS)", yes_no(seen.flag("tls"))),
        ("launch profiles", _profiles(seen)),
    ]


def _slots(seen: Seen, side: str) -> str:
    return f"{seen.text(f'{side}_active')} of {seen.text(f'{side}_slots')} slots in use"


def _profiles(seen: Seen) -> str:
    versions = seen.pairs("qemu_binaries")
    names = seen.words("profiles") or list(versions)
    if not names:
        return "none"
    return ", ".join(f"{name} (QEMU {_version(versions.get(name))})" for name in names)


def _version(told: str | None) -> str:
    return "unknown" if told is None or told == UNKNOWN else brief_version(told)


def _peer(peer: Seen) -> list[Cell]:
    up = peer.flag("up")
    return [
        peer.text("name"),
        "not asked yet" if up is None else yes_no(up),
        peer.text("migrd_version"),
        ago(peer.moment("checked_at")),
        peer.text("error", ""),
    ]
