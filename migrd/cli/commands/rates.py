"""`migrd rates`: how fast a VM's memory gets dirty, now and in the last hours."""

import asyncio
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final

import click
from rich.text import Text

from migrd.cli.client import path
from migrd.cli.naming import vm_argument
from migrd.cli.printing import Cell, Column
from migrd.cli.running import Session, remote
from migrd.cli.seen import Seen
from migrd.cli.text import UNKNOWN, ago, clock, rate, size, span, word
from migrd.cli.units import whole_s

Tries = dict[str, tuple[int | None, int | None]]
"""Tracker -> its measurements and failures so far."""

POLL_S: Final = 1.0
MEASURED_WITHIN_S: Final = 120.0
BAR_CELLS: Final = 24
WHO: Final = {
    "qemu": "guest's CPUs",
    "iommu": "devices, by IOMMU",
    "device": "devices, by themselves",
    "pagemap": "process",
}
STATES: Final = {
    "on": "measured now and then",
    "off": "not measured; see [sampling] of the daemon's configuration",
    "migrating": "not measured while it is migrated: `migrd rounds` tells more",
    "not_running": "not measured: the guest does not run",
    "unreachable": "not measured: its QEMU does not answer",
}
UNPROVEN: Final = {
    "unproven": "no write seen, but QEMU tracks devices in a migration only",
    "saturated": "hardly a page was clean",
    "cleared": "QEMU cleared meanwhile",
    "nothing_mapped": "no memory is mapped for devices",
    "memory_size_unknown": "the size of its memory is not known",
}
_WINDOWS: Final = (
    Column("within", right=True),
    Column("dirtied", right=True, drop=1),
    Column("at", right=True),
    Column("95 % interval", wraps=True, enough=13),
)
_PAST: Final = (
    Column("from"),
    Column("written by", drop=2),
    Column("mean", right=True),
    Column("lowest", right=True, drop=4),
    Column("highest", right=True),
    Column("working set", right=True, drop=3),
    Column("", drop=1),
)


@click.command("rates", short_help="How fast a VM's memory gets dirty, now and in the past")
@vm_argument
@click.option("--history", is_flag=True, help="The last hours instead.")
@click.option("--since", type=whole_s, metavar="AGO", help="With --history: how far back.")
@click.option("--step", type=whole_s, metavar="S", help="With --history: one line for so long.")
@click.option("--watch", is_flag=True, help="A line for each new measurement, until Ctrl-C.")
@click.option("--measure", is_flag=True, help="Have it measured now, and wait for it.")
@remote
async def rates(
    session: Session,
    vm: str,
    history: bool,
    since: int | None,
    step: int | None,
    watch: bool,
    measure: bool,
) -> None:
    """Show how fast the memory of VM gets dirty, and its working set, as measured last.

    The daemon measures all VMs now and then, within a budget of CPU time, and never during a
    migration. A page that is written twice within a window counts once: that is why longer windows
    show lower rates, and how the working set is found.

    \b
    Examples:
      migrd rates web1
      migrd rates web1 --measure
      migrd rates web1 --watch
      migrd rates web1 --history --since 6h --step 10min
      migrd rates web1 -o json | jq '.trackers[0].working_set'
    """
    if (since is not None or step is not None) and not history:
        raise click.UsageError("--since and --step belong to --history")
    if history and (watch or measure):
        raise click.UsageError("--history shows what is kept; leave out --watch and --measure")
    if history:
        await _history(session, vm, since, step)
        return
    before = await _ask(session, vm) if measure else None
    if watch:
        await _watch(session, vm)
    else:
        await _now(session, vm, before)


# Now ----------------------------------------------------------------------------------------------


async def _now(session: Session, vm: str, before: Tries | None) -> None:
    """What was measured last; with `before`, once something was measured after that."""
    reply = await session.client.get("vms", vm, "dirty-rate")
    deadline_s = time.monotonic() + MEASURED_WITHIN_S
    while before is not None and _is_old(reply.seen, before) and time.monotonic() < deadline_s:
        await asyncio.sleep(POLL_S / 4)
        reply = await session.client.get("vms", vm, "dirty-rate")
    if session.printer.is_for_scripts:
        session.printer.json(reply.body)
    else:
        _show(session, reply.seen)


async def _ask(session: Session, vm: str) -> Tries:
    """Have it measured; how often each tracker had been tried before that."""
    before = await session.client.get("vms", vm, "dirty-rate")
    asked = await session.client.call("POST", path("vms", vm, "dirty-rate", verb="measure"))
    within = span(asked.seen.seconds("within"))
    session.printer.note(f"measuring, about {within}")
    return {each.text("tracker"): _tries(each) for each in before.seen.parts("trackers")}


def _tries(tracker: Seen) -> tuple[int | None, int | None]:
    return tracker.whole("measurements"), tracker.whole("failures")


def _is_old(seen: Seen, before: Tries) -> bool:
    """Some tracker that is still there has not been tried since."""
    return seen.text("state") == "on" and any(
        _tries(each) == before.get(each.text("tracker")) for each in seen.parts("trackers")
    )


def _show(session: Session, seen: Seen) -> None:
    printer, trackers = session.printer, seen.parts("trackers")
    state = seen.text("state")
    printer.facts([("vm", seen.text("vm")), ("state", STATES.get(state, word(state)))])
    for tracker in sorted(trackers, key=lambda each: each.text("tracker") != "qemu"):
        printer.heading(_who(tracker))
        printer.facts(_facts(tracker))
        rows = [_window(window) for window in tracker.parts("windows") if _is_known(window)]
        if len(rows) > 1:
            printer.table(_WINDOWS, rows, "")
    if trackers and not any(tracker.raw("sampled_at") for tracker in trackers):
        printer.note("no measurement yet; --measure has one made now")


def _who(tracker: Seen) -> str:
    name = tracker.text("tracker")
    return WHO.get(name, word(name))


def _is_known(window: Seen) -> bool:
    return window.number("dirty_bytes_per_s") is not None


def _window(window: Seen) -> list[Cell]:
    length_s, found = window.seconds("window"), window.number("dirty_bytes_per_s")
    dirtied = None if found is None or length_s is None else found * length_s
    return [span(length_s), size(dirtied), rate(found), _interval(window)]


def _reason(tracker: Seen) -> str:
    """Why no window has found anything out."""
    reasons = [window.text("reason", "") for window in tracker.parts("windows")]
    why = next((reason for reason in reasons if reason), "")
    return UNPROVEN.get(why, word(why))


def _between(low: str, high: str) -> str:
    """`180 MiB/s to 220 MiB/s`, `at least 180 MiB/s`."""
    return f"at least {low}" if high == UNKNOWN else f"{low} to {high}"


def _interval(seen: Seen) -> str:
    low, high = seen.number("low_bytes_per_s"), seen.number("high_bytes_per_s")
    return UNKNOWN if low is None else _between(rate(low), rate(high))


def _facts(tracker: Seen) -> list[tuple[str, Cell]]:
    found = tracker.part("working_set")
    return [
        ("measured", _when(tracker)),
        ("gets dirty", _rate(tracker)),
        ("working set", _set(found)),
        ("written at first", _first(found)),
        ("fits", _fits(found)),
        ("costs", _cost(tracker)),
        ("trouble", _trouble(tracker)),
    ]


def _rate(tracker: Seen) -> str:
    found = tracker.number("dirty_bytes_per_s")
    if found is None:
        why = _reason(tracker)
        return f"not known: {why}" if why else ""
    return f"{rate(found)} ({_interval(tracker)})"


def _when(tracker: Seen) -> str:
    when = ago(tracker.moment("sampled_at"))
    how = f"by {tracker.text('source')}"
    return f"not yet, {how}" if when == UNKNOWN else f"{when}, {how}"


def _set(found: Seen) -> str:
    quality = found.text("quality", "")
    if quality == "too_few_windows":
        return ""
    if quality == "nothing_written":
        return "not known: nothing was written"
    low, high = size(found.number("set_low_bytes")), size(found.number("set_high_bytes"))
    value = found.number("set_bytes")
    if low == UNKNOWN:
        return ""
    if value is None and not found.number("set_low_bytes"):
        return "not known: too little was seen to be written"
    return _between(low, high) if value is None else f"{size(value)} ({_between(low, high)})"


def _first(found: Seen) -> str:
    low = found.number("first_low_bytes_per_s")
    if low is None:
        return ""
    between = _between(rate(low), rate(found.number("first_high_bytes_per_s")))
    value = found.number("first_bytes_per_s")
    return between if value is None else f"{rate(value)} ({between})"


def _fits(found: Seen) -> Cell:
    misfit = found.number("misfit")
    if misfit is None:
        return ""
    if misfit <= 2:
        return "well"
    return Text(f"badly: errors widened {misfit:.0f} times; does it write unevenly?", "yellow")


def _cost(tracker: Seen) -> str:
    cost_s, interval_s = tracker.seconds("cost"), tracker.seconds("interval")
    if cost_s is None:
        return ""
    each = "" if interval_s is None else f" every {span(interval_s)}"
    return f"at most {span(cost_s)} of CPU time{each}"


def _trouble(tracker: Seen) -> Cell:
    trouble = tracker.part("trouble")
    if not trouble:
        return ""
    text = f"{trouble.text('message')} [{trouble.text('code')}], {ago(trouble.moment('at'))}"
    return Text(text, "yellow")


# As it goes on ------------------------------------------------------------------------------------


async def _watch(session: Session, vm: str) -> None:
    """A line for each new measurement, until interrupted."""
    shown: Tries = {}
    state = ""
    while True:
        reply = await session.client.get("vms", vm, "dirty-rate")
        if reply.seen.text("state") != state:
            state = reply.seen.text("state")
            session.printer.note(STATES.get(state, word(state)))
        for tracker in reply.seen.parts("trackers"):
            name, tries = tracker.text("tracker"), _tries(tracker)
            if tries == shown.get(name) or not any(tries):
                continue
            shown[name] = tries
            if session.printer.is_for_scripts:
                session.printer.json_line(tracker.body)
            else:
                session.printer.line(_news(tracker))
        await asyncio.sleep(POLL_S)


def _news(tracker: Seen) -> Text:
    trouble = tracker.part("trouble")
    head = f"{clock(tracker.moment('sampled_at'))}  {_who(tracker)}  "
    if trouble:
        head = f"{clock(trouble.moment('at'))}  {_who(tracker)}  "
        return Text.assemble(head, (trouble.text("message"), "yellow"))
    found = tracker.number("dirty_bytes_per_s")
    if found is None:
        return Text.assemble(head, (_rate(tracker) or "not known", "dim"))
    line = f"{head}{_rate(tracker)}"
    found_set = tracker.part("working_set")
    is_known = found_set.number("set_bytes") is not None
    return Text(f"{line}, working set {_set(found_set)}" if is_known else line)


# The past -----------------------------------------------------------------------------------------


async def _history(session: Session, vm: str, since: int | None, step: int | None) -> None:
    query: dict[str, str] = {} if step is None else {"step_s": str(step)}
    if since is not None:
        query["from"] = datetime.fromtimestamp(time.time() - since, UTC).isoformat()
    reply = await session.client.get("vms", vm, "dirty-rate", "history", query=query)
    if session.printer.is_for_scripts:
        session.printer.json(reply.body)
        return
    points = reply.seen.parts("items")
    most = max((p.number("highest_bytes_per_s") or 0.0 for p in points), default=0.0)
    empty = "nothing is kept from that time: it begins with the daemon, and goes back six hours"
    session.printer.table(_PAST, [_point(point, most) for point in points], empty)


def _point(point: Seen, most: float) -> Sequence[Cell]:
    mean = point.number("dirty_bytes_per_s")
    cells = round(BAR_CELLS * (mean or 0.0) / most) if most > 0 else 0
    return [
        clock(point.moment("at")),
        _who(point),
        rate(mean),
        rate(point.number("lowest_bytes_per_s")),
        rate(point.number("highest_bytes_per_s")),
        size(point.number("set_bytes")),
        Text("\u2587" * cells, "cyan"),
    ]
