"""A migration as it is asked for on the command line, for `plan` and `migrate`."""

from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

import click

from migrd.cli.devices import there
from migrd.cli.policy import Wishes, policy_options
from migrd.cli.seen import Json

Command = TypeVar("Command", bound=Callable[..., Any])

_multifd: Final = click.option(
    "--multifd",
    type=int,
    metavar="N",
    help="Parallel connections for memory; 0 means one plain stream.",
)
_postcopy: Final = click.option(
    "--allow-postcopy",
    is_flag=True,
    help="Prepare both sides so that postcopy can be chosen while the migration runs.",
)
_there: Final = click.option(
    "--device-there",
    "devices_there",
    type=there,
    metavar="ID=ADDRESS",
    multiple=True,
    help="The device at the destination that takes the place of this one; else the same address.",
)
_accept: Final = click.option(
    "--accept-less-migratable",
    is_flag=True,
    help="Go even if the VM is less migratable there, or cannot come back.",
)


def how_options(command: Command) -> Command:
    """All that says how a guest is to be moved; it arrives as keywords for `move_request`."""
    return policy_options(_there(_accept(_multifd(_postcopy(command)))))


def move_request(
    destination: str | None,
    *,
    devices_there: Sequence[tuple[str, str]],
    accept_less_migratable: bool,
    multifd: int | None,
    allow_postcopy: bool,
    **wishes: Any,
) -> dict[str, Json]:
    """What was said, in the API's words; what was not said is left to the daemon."""
    said: dict[str, Json] = {
        "destination": destination,
        "policy": Wishes(**wishes).policy() or None,
        "multifd_channels": multifd,
        "allow_postcopy": allow_postcopy or None,
        "destination_devices": dict(devices_there) or None,
        "accept_less_migratable": accept_less_migratable or None,
    }
    return {name: value for name, value in said.items() if value is not None}
