"""`migrd vms …`, `migrd start`, `migrd stop`: the VMs of this host."""

from collections.abc import Mapping, Sequence

import click

from migrd.cli.client import path
from migrd.cli.commands import plugging
from migrd.cli.decision import headline
from migrd.cli.devices import Given, asked_for, device_options
from migrd.cli.naming import vm_argument
from migrd.cli.printing import Cell, Column
from migrd.cli.running import Session, common_options, remote
from migrd.cli.seen import Json, Seen
from migrd.cli.text import UNKNOWN, brief_version, size, word, yes_no
from migrd.cli.units import setting

_COLUMNS = (
    Column("vm"),
    Column("state"),
    Column("memory", right=True),
    Column("qemu"),
    Column("profile"),
    Column("migration"),
)
_profile = click.option("--profile", metavar="P", help="Launch profile to use, by its name.")
_set = click.option(
    "--set",
    "settings",
    type=setting,
    metavar="KEY=VALUE",
    multiple=True,
    help="A parameter of the profile; may be given several times.",
)

Settings = Sequence[tuple[str, str | int | bool]]


@click.group(
    "vms",
    short_help="The VMs of this host: list, show, define, forget",
    invoke_without_command=True,
)
@common_options(hidden=True)
@click.pass_context
def vms(context: click.Context) -> None:
    """The VMs of this host; without a subcommand: list them.

    \b
    Examples:
      migrd vms
      migrd vms show web1
      migrd vms define web1 --profile standard --set memory_mib=2048
    """
    if context.invoked_subcommand is None:
        context.invoke(list_vms)


@vms.command("list")
@remote
async def list_vms(session: Session) -> None:
    """List the VMs of this host."""
    reply = await session.client.get("vms")
    if session.printer.is_for_scripts:
        session.printer.json(reply.body)
        return
    rows = [_row(vm) for vm in reply.seen.parts("items")]
    session.printer.table(_COLUMNS, rows, "no VMs on this host")


def _row(vm: Seen) -> list[Cell]:
    facts = vm.part("facts")
    return [
        vm.text("name"),
        word(vm.text("state")),
        size(facts.number("memory_bytes")),
        brief_version(facts.text("qemu_version")),
        _profile_of(vm),
        vm.text("migration_id"),
    ]


def _profile_of(vm: Seen) -> str:
    return vm.text("profile", UNKNOWN)


@vms.command("show")
@vm_argument
@remote
async def show_vm(session: Session, vm: str) -> None:
    """Show one VM: its state, what QEMU offers, what stands in the way of a migration."""
    reply = await session.client.get("vms", vm)
    if session.printer.is_for_scripts:
        session.printer.json(reply.body)
        return
    session.printer.facts(_facts(reply.seen))


def _facts(vm: Seen) -> list[tuple[str, Cell]]:
    facts = vm.part("facts")
    parameters = vm.pairs("parameters")
    features = facts.words("features")
    devices = facts.words("passthrough_devices")
    return [
        ("vm", vm.text("name")),
        ("state", word(vm.text("state"))),
        ("managed by migrd", yes_no(vm.flag("managed"))),
        ("profile", _profile_of(vm)),
        ("parameters", ", ".join(f"{k}={v}" for k, v in parameters.items())),
        ("memory", size(facts.number("memory_bytes"))),
        ("machine", facts.text("machine_type")),
        ("QEMU", facts.text("qemu_version")),
        ("QEMU offers", ", ".join(sorted(features)) if facts else "not known"),
        (
            "passthrough devices",
            ", ".join(devices) if devices else "none" if facts else "not known",
        ),
        ("defined devices", ", ".join(_device(one) for one in vm.parts("devices"))),
        ("tracking policy", word(vm.text("tracking_policy", ""))),
        ("decision", _decision(vm)),
        ("migration blocked by", "; ".join(facts.words("blocked_reasons"))),
        ("migration going on", vm.text("migration_id", "")),
        ("epoch", vm.text("epoch")),
        ("pid", vm.text("pid", "")),
        ("serial line", vm.text("serial_path", "")),
    ]


def _device(device: Seen) -> str:
    return f"{device.text('id')} = {device.text('address')}"


def _decision(vm: Seen) -> Cell:
    decision = vm.part("decision")
    return headline(vm.text("name"), decision) if decision else ""


@vms.command("define")
@vm_argument
@_profile
@_set
@device_options
@click.option("--dry-run", is_flag=True, help="Only say whether it would be accepted.")
@remote
async def define_vm(
    session: Session,
    vm: str,
    profile: str | None,
    settings: Settings,
    devices: Sequence[Given],
    tracking: str | None,
    dry_run: bool,
) -> None:
    """Define VM from a launch profile, or name the profile of an adopted one.

    Repeating it with the same values changes nothing.

    \b
    Examples:
      migrd vms define web1 --profile standard --set memory_mib=2048
      migrd vms define web1 --profile standard --device 41:00.2 --dry-run
    """
    if profile is None:
        raise click.UsageError("say which launch profile: --profile P (`migrd host` lists them)")
    body = _body(profile, settings, devices, tracking)
    seen = await _define(session, vm, body, dry_run=dry_run)
    if session.printer.is_for_scripts:
        session.printer.json(seen.body)
    else:
        verb = "would be defined" if dry_run else "is defined"
        session.printer.line(f"{seen.text('name')} {verb}, profile {_profile_of(seen)}")
        _print_verdict(session, seen)


def _body(
    profile: str, settings: Settings, devices: Sequence[Given], tracking: str | None
) -> dict[str, Json]:
    return {"profile": profile, "parameters": dict(settings), **asked_for(devices, tracking)}


async def _define(
    session: Session, vm: str, body: Mapping[str, Json], *, dry_run: bool = False
) -> Seen:
    query = {"dry_run": "true"} if dry_run else None
    reply = await session.client.call("PUT", path("vms", vm), body=body, query=query)
    return reply.seen


def _print_verdict(session: Session, vm: Seen) -> None:
    """In a line; `migrd plan` has the rest."""
    decision = vm.part("decision")
    if not decision:
        return
    session.printer.line(headline(vm.text("name"), decision))
    if decision.raw("migratability") != "live":
        session.printer.note(f"why, and what would change it: migrd plan {vm.text('name')}")


@vms.command("forget")
@vm_argument
@remote
async def forget_vm(session: Session, vm: str) -> None:
    """Forget VM; refused while it runs here."""
    await session.client.call("DELETE", path("vms", vm))
    session.printer.note(f"{vm} is forgotten")


@click.command("start", short_help="Start a VM from its launch profile")
@vm_argument
@_profile
@_set
@device_options
@remote
async def start(
    session: Session,
    vm: str,
    profile: str | None,
    settings: Settings,
    devices: Sequence[Given],
    tracking: str | None,
) -> None:
    """Start VM from its launch profile.

    With --profile (and --set, --device, --tracking) the VM is defined first; without, it must be
    defined already.

    \b
    Examples:
      migrd start web1
      migrd start web1 --profile standard --set memory_mib=2048
      migrd start web1 --profile standard --device 41:00.2 --tracking require
    """
    if (settings or devices or tracking) and profile is None:
        raise click.UsageError("--set, --device and --tracking define a VM: say --profile as well")
    if profile is not None:
        await _define(session, vm, _body(profile, settings, devices, tracking))
    await _act(session, vm, "start")


@click.command("stop", short_help="Stop a VM that migrd started")
@vm_argument
@remote
async def stop(session: Session, vm: str) -> None:
    """Stop VM: its QEMU is ended. For VMs that migrd started; refused during a migration."""
    await _act(session, vm, "stop")


async def _act(session: Session, vm: str, verb: str) -> None:
    reply = await session.client.call("POST", path("vms", vm, verb=verb))
    if session.printer.is_for_scripts:
        session.printer.json(reply.body)
        return
    session.printer.line(f"{reply.seen.text('name', vm)} is {word(reply.seen.text('state'))}")
    if verb == "start":
        _print_verdict(session, reply.seen)


vms.add_command(start, "start")
vms.add_command(stop, "stop")
vms.add_command(plugging.plug, "plug")
vms.add_command(plugging.unplug, "unplug")
