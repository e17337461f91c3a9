"""`migrd devices`: what this host can pass through to VMs, and what could be promised of it."""

from collections.abc import Mapping
from typing import Final

import click
from rich.text import Text

from migrd.cli.client import path
from migrd.cli.devices import whole_address
from migrd.cli.naming import device_argument
from migrd.cli.pages import every_item
from migrd.cli.printing import Cell, Column
from migrd.cli.running import Session, remote
from migrd.cli.seen import Seen
from migrd.cli.text import UNKNOWN, size, word, yes_no

_STYLE: Final[Mapping[str, str]] = {
    "live": "green",
    "stop_and_copy": "yellow",
    "needs_unplug": "red",
    "blocked": "bold red",
}
_COLUMNS: Final = (
    Column("address", wraps=True, enough=18),
    Column("driver"),
    Column("ready"),
    Column("group", right=True, drop=3),
    Column("iommu", drop=1),
    Column("tracked by"),
    Column("verdict"),
    Column("in use by", drop=2),
)
MOST_LISTED: Final = 8
"""So many VFs, or other members of a group, are named."""


@click.command("devices", short_help="What can be passed through, and what can be promised of it")
@device_argument
@click.option("--driver", metavar="D", help="Only those that this driver has.")
@click.option(
    "--iommu", metavar="I", help="Only those behind this IOMMU (`migrd host` lists them)."
)
@click.option("--passthrough", is_flag=True, help="Only those that a VFIO driver has.")
@click.option("--probe", is_flag=True, help="Ask the kernel about ADDRESS now, then show it.")
@remote
async def devices(
    session: Session,
    address: str | None,
    driver: str | None,
    iommu: str | None,
    passthrough: bool,
    probe: bool,
) -> None:
    """List the devices that are, or could be, passed through to VMs; with ADDRESS: show one.

    The verdict says what a VM that has this device and no other could be promised. A "?" marks what
    rests on an estimate or on something not known yet: binding the device, or --probe, settles it.
    A device is ready when a VM could be started with it as things are.

    \b
    Examples:
      migrd devices
      migrd devices --passthrough --iommu dmar0
      migrd devices 0000:41:00.2
      migrd devices 41:00.2 --probe
      migrd devices -o json | jq -r '.items[] | select(.verdict.migratability != "live").address'
    """
    if address is None:
        if probe:
            raise click.UsageError("say which device to ask about: migrd devices ADDRESS --probe")
        await _list(session, driver, iommu, passthrough)
        return
    if driver is not None or iommu is not None or passthrough:
        raise click.UsageError("ADDRESS names one device; --driver and its like choose from a list")
    where = path("devices", whole_address(address), verb="probe" if probe else None)
    reply = await session.client.call("POST" if probe else "GET", where)
    if session.printer.is_for_scripts:
        session.printer.json(reply.body)
        return
    session.printer.facts(_facts(reply.seen))
    _print_reasons(session, reply.seen.part("verdict"))


async def _list(session: Session, driver: str | None, iommu: str | None, passthrough: bool) -> None:
    query = {"limit": "1000"}
    query |= {} if driver is None else {"driver": driver}
    query |= {} if iommu is None else {"iommu": iommu}
    query |= {"passthrough": "true"} if passthrough else {}
    document = await every_item(session.client, "devices", query=query)
    if session.printer.is_for_scripts:
        session.printer.json(document)
        return
    found = Seen(document).parts("items")
    columns = _COLUMNS if any(device.raw("in_use_by") for device in found) else _COLUMNS[:-1]
    rows = [_row(device)[: len(columns)] for device in found]
    empty = "no such devices on this host" if len(query) > 1 else "no devices to pass through here"
    session.printer.table(columns, rows, empty)


def _row(device: Seen) -> list[Cell]:
    return [
        device.text("address"),
        device.text("driver"),
        yes_no(device.part("verdict").flag("can_start")),
        device.text("iommu_group"),
        device.text("iommu"),
        _tracked_by(device),
        verdict_of(device.part("verdict")),
        device.text("in_use_by"),
    ]


def _tracked_by(device: Seen) -> str:
    """Who would record its DMA; `?` after what is only estimated."""
    by_iommu, by_device = device.part("iommu_dirty_tracking"), device.part("dma_logging")
    found = [
        name + ("?" if answer.text("evidence") == "estimated" else "")
        for name, answer in (("iommu", by_iommu), ("device", by_device))
        if answer.text("answer") == "yes"
    ]
    if found:
        return ", ".join(found)
    answers = {by_iommu.text("answer"), by_device.text("answer")}
    return "nobody" if answers == {"no"} else "unknown"


def verdict_of(verdict: Seen) -> Text:
    """`live`, `needs unplug`; `live?` is what it may turn out to be."""
    proven, at_best = verdict.text("migratability"), verdict.text("migratability_at_best")
    if proven in (UNKNOWN, at_best) or at_best == UNKNOWN:
        return Text(word(proven), _STYLE.get(proven, ""))
    return Text(f"{word(at_best)}?", "yellow")


def _verdict(verdict: Seen) -> Text:
    told = verdict_of(verdict)
    if told.plain.endswith("?"):
        told.append(f" (proven only: {word(verdict.text('migratability'))})", "default")
    return told


def capability(seen: Seen) -> str:
    """`yes (probed: …)`, `no (estimated: …)`, `unknown (driver not bound: …)`."""
    answer = seen.text("answer", "unknown")
    known = seen.text("reason" if answer == "unknown" else "evidence", "")
    why = ": ".join(part for part in (word(known), seen.text("detail", "")) if part)
    return f"{word(answer)} ({why})" if why else word(answer)


def _facts(device: Seen) -> list[tuple[str, Cell]]:
    return [
        ("device", device.text("address")),
        ("verdict", _verdict(device.part("verdict"))),
        ("in use by", device.text("in_use_by", "no VM that is known")),
        ("kind", word(device.text("kind"))),
        ("driver", _driver(device)),
        ("ready for a VM", yes_no(device.part("verdict").flag("can_start"))),
        ("vendor, device, class", _identity(device)),
        ("IOMMU", device.text("iommu", "none")),
        ("IOMMU tracks its DMA", capability(device.part("iommu_dirty_tracking"))),
        ("logs its own DMA", capability(device.part("dma_logging"))),
        ("can be migrated", _migration(device.part("migration"))),
        ("group", _group(device)),
        ("physical function", device.text("physical_function", "")),
        ("virtual functions", _several(device.words("virtual_functions"))),
        ("parent", device.text("mdev_parent", "")),
        ("type", device.text("mdev_type", "")),
        ("character device", device.text("vfio_cdev", "")),
        ("NUMA node", device.text("numa_node", "")),
        ("can be reset", capability(device.part("can_reset"))),
        ("DMA is coherent", capability(device.part("cache_coherent"))),
        ("could not be read", "; ".join(device.words("trouble")[:MOST_LISTED])),
    ]


def _driver(device: Seen) -> str:
    override = device.text("driver_override", "")
    if override and device.raw("driver") is None:
        return f"none; only {override} would be bound"
    return device.text("driver", "none")


def _identity(device: Seen) -> str:
    parts = (
        device.text("vendor_id", ""),
        device.text("device_id", ""),
        device.text("class_code", ""),
    )
    return " ".join(part for part in parts if part)


def _migration(seen: Seen) -> str:
    told = capability(seen.part("can"))
    more = [word(flag) for flag in seen.words("flags")]
    if seen.raw("unknown_flags"):
        more.append(f"unknown flags {seen.text('unknown_flags')}")
    stopped = seen.number("stop_copy_bytes")
    if stopped is not None:
        more.append(f"at most {size(stopped)} while stopped")
    return f"{told}; {', '.join(more)}" if more else told


def _group(device: Seen) -> str:
    number, others = device.text("iommu_group", "none"), device.words("group_devices")
    return f"{number}, with {_several(others)}" if others else f"{number}, alone"


def _several(names: list[str]) -> str:
    more = len(names) - MOST_LISTED
    listed = ", ".join(names[:MOST_LISTED])
    return f"{listed} and {more} more" if more > 0 else listed


def _print_reasons(session: Session, verdict: Seen) -> None:
    printer, reasons = session.printer, verdict.parts("reasons")
    if not reasons:
        return
    printer.heading("Why")
    for reason in reasons:
        style = _STYLE.get(reason.raw("lowers_to") or "", "")
        line = Text.assemble("  ", (reason.text("message"), style))
        printer.line(line.append(f" [{reason.text('code')}]", "dim"))
        if cure := reason.text("cure", ""):
            printer.line(Text.assemble("    ", ("try: ", "bold"), cure))
