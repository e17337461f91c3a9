"""A migration as it is asked for on the command line, for `plan` and `migrate`."""

from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

import click

from migrd.cli.policy import Wishes
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


def how_options(command: Command) -> Command:
    """`--multifd` and `--allow-postcopy`."""
    return _multifd(_postcopy(command))


def move_request(
    destination: str | None, multifd: int | None, postcopy: bool, wishes: Mapping[str, Any]
) -> dict[str, Json]:
    """What was said, in the API's words; what was not said is left to the daemon."""
    body: dict[str, Json] = {} if destination is None else {"destination": destination}
    policy = Wishes(**wishes).policy()
    if policy:
        body["policy"] = policy
    if multifd is not None:
        body["multifd_channels"] = multifd
    if postcopy:
        body["allow_postcopy"] = True
    return body
