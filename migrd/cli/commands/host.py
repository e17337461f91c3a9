"""`migrd host`: this host as its daemon sees it."""

from typing import Final

import click
from rich.text import Text

from migrd.cli.client import Problem
from migrd.cli.commands.devices import capability
from migrd.cli.printing import Cell, Column, violations
from migrd.cli.running import Session, remote
from migrd.cli.seen import Seen
from migrd.cli.text import UNKNOWN, ago, brief_version, clock, size, word, yes_no

MOST_TROUBLE: Final = 4
MOST_HOSTS: Final = 10
_TRACKS: Final = {"yes": "green", "no": "red", "unknown": "yellow"}
_IOMMUS: Final = (
    Column("iommu"),
    Column("kind", drop=2),
    Column("devices", right=True),
    Column("tracks dirty pages"),
    Column("known by", drop=1),
    Column("capabilities", drop=3),
    Column("because", wraps=True),
)


@click.command("host", short_help="This host: versions, slots, IOMMUs, other hosts")
@remote
async def host(session: Session) -> None:
    """Show this host: versions, slots, peers, and whether its IOMMUs track dirty pages: if all of
    them do, every VM can be given dirty tracking at its start (policy "always") at no risk.

    \b
    Examples:
      migrd host
      migrd host -o json | jq .all_iommus_track_dirty
      migrd host -o json | jq -r '.iommus[] | .name, .dirty_tracking.answer'
    """
    reply = await session.client.get("host")
    printer = session.printer
    if printer.is_for_scripts:
        printer.json(reply.body)
        return
    printer.facts(_facts(reply.seen))
    for line in await _what_is_missing(session):
        printer.line(Text(line, "bold yellow"))
    if iommus := reply.seen.parts("iommus"):
        printer.heading("IOMMUs")
        printer.table(_IOMMUS, [_iommu(iommu) for iommu in iommus], "none")
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
        ("all IOMMUs track dirty pages", _all_track(seen)),
        ("tracking policy", _policy(seen)),
        ("kernel", _kernel(seen.part("kernel"))),
        ("devices to pass through", seen.text("devices")),
        ("could not be read", "; ".join(seen.words("inventory_trouble")[:MOST_TROUBLE])),
        ("streams encrypted (TLS)", yes_no(seen.flag("tls"))),
        ("launch profiles", _profiles(seen)),
        ("arbiter", _arbiter(seen.part("arbiter"))),
    ]


def _arbiter(arbiter: Seen) -> Cell:
    """Who says who may run a VM; nothing of it for a daemon that does not tell."""
    kind = arbiter.text("kind", "")
    if kind in ("", "journal"):
        return "none: the journals of both hosts decide" if kind else ""
    members = ", ".join(arbiter.words("endpoints"))
    since = clock(arbiter.moment("since"))
    if not arbiter.flag("reachable"):
        why = arbiter.text("problem", "")
        return Text(f"{kind} ({members}), not reachable since {since}: {why}", "bold red")
    hosts = arbiter.words("hosts")
    names = ", ".join(hosts[:MOST_HOSTS]) + (", ..." if len(hosts) > MOST_HOSTS else "")
    told = f"{kind} ({members}), reachable since {since}; hosts there ({len(hosts)}): {names}"
    problem = arbiter.text("problem", "")
    return Text.assemble(told, (f"; {problem}", "bold red") if problem else "")


def _all_track(seen: Seen) -> Text:
    flag = seen.flag("all_iommus_track_dirty")
    told = yes_no(flag)
    why = seen.text("all_iommus_track_dirty_why", "")
    return Text.assemble((told, _TRACKS[told]), f": {why}" if why else "")


def _policy(seen: Seen) -> str:
    forbidden = seen.words("forbidden_tracking_policies")
    policy = seen.text("tracking_policy")
    return f"{policy}; forbidden: {', '.join(forbidden)}" if forbidden else policy


def _kernel(kernel: Seen) -> str:
    """Its release, and of what passthrough needs only what is missing."""
    if not kernel:
        return ""
    said = [kernel.text("release", "not known")]
    for name, what in (("iommufd", "/dev/iommu"), ("vfio_cdev", "VFIO character devices")):
        if kernel.part(name).text("answer") != "yes":
            said.append(f"{what}: {capability(kernel.part(name))}")
    if kernel.flag("unsafe_interrupts"):
        said.append("unsafe interrupts are allowed")
    return "; ".join(said)


def _iommu(iommu: Seen) -> list[Cell]:
    told = iommu.part("dirty_tracking")
    answer = told.text("answer", "unknown")
    return [
        iommu.text("name"),
        word(iommu.text("kind")),
        iommu.text("devices"),
        Text(answer, _TRACKS.get(answer, "")),
        word(told.text("evidence")),
        iommu.text("capability_bits"),
        "; ".join(
            part for part in (word(told.text("reason", "")), told.text("detail", "")) if part
        ),
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
