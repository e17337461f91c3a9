"""`migrd vms plug`, `migrd vms unplug`: passthrough devices of a VM that may be running."""

import click

from migrd.cli.client import path
from migrd.cli.decision import headline
from migrd.cli.devices import Given, given_device
from migrd.cli.naming import vm_argument
from migrd.cli.running import Session, remote
from migrd.cli.seen import Json, Seen


@click.command("plug")
@vm_argument
@click.argument("device", metavar="[ID=]ADDRESS[@BUS[/SLOT]]", type=given_device)
@click.option(
    "--accept-lower",
    is_flag=True,
    help="Add it even if VM can then be migrated less well, or not at all.",
)
@remote
async def plug(session: Session, vm: str, device: Given, accept_lower: bool) -> None:
    """Add a passthrough device to VM, running or not. Refused during a migration.

    It is judged first: what would make VM less migratable is refused with the reasons, and nothing
    is touched, unless --accept-lower.

    \b
    Examples:
      migrd vms plug web1 41:00.3@rp1
      migrd vms plug web1 hostdev1=0000:41:00.3@rp1 --accept-lower
    """
    body: dict[str, Json] = device.body()
    if accept_lower:
        body["accept_lower_migratability"] = True
    reply = await session.client.call("POST", path("vms", vm, "devices"), body=body)
    _print_vm(session, reply.seen, f"{device.address} is a device of {vm} now")


@click.command("unplug")
@vm_argument
@click.argument("device", metavar="ID")
@remote
async def unplug(session: Session, vm: str, device: str) -> None:
    """Take the passthrough device ID out of VM, together with the guest.

    When the guest has not let go of it in time, asking again goes on waiting. Refused during a
    migration.

    \b
    Examples:
      migrd vms show web1
      migrd vms unplug web1 hostdev1
    """
    reply = await session.client.call("DELETE", path("vms", vm, "devices", device))
    _print_vm(session, reply.seen, f"{device} is no device of {vm} any more")


def _print_vm(session: Session, vm: Seen, said: str) -> None:
    if session.printer.is_for_scripts:
        session.printer.json(vm.body)
        return
    session.printer.line(said)
    decision = vm.part("decision")
    if decision:
        session.printer.line(headline(vm.text("name"), decision))
