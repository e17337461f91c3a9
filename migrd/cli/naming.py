"""Names on the command line: VMs and migrations, their completion, and short ids.

A migration may be named by the beginning of its id, as long as only one begins so. It is looked up
in the daemon's list; an id that is found there whole is taken without a doubt.
"""

import asyncio
import re
from collections.abc import Callable, Sequence
from typing import Final

import click
from click.shell_completion import CompletionItem

from migrd.cli.client import Client
from migrd.cli.exits import CommandError, Exit
from migrd.cli.pages import every_item
from migrd.cli.running import options_of
from migrd.cli.seen import Seen
from migrd.cli.text import printable

_WHOLE_ID: Final = re.compile(
    r"^[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}$"
)
_COMPLETION_S: Final = 1.0


async def whole_id(client: Client, given: str) -> str:
    """The id that `given` is, or is the beginning of. Raises CommandError, and what calls raise."""
    if _WHOLE_ID.match(given):
        return given
    listed = Seen(await every_item(client, "migrations")).parts("items")
    ids = [id_ for item in listed if (id_ := item.raw("id")) is not None]
    if given in ids:
        return given
    matching = [id_ for id_ in ids if id_.startswith(given)]
    if len(matching) == 1:
        return matching[0]
    if not matching:
        raise CommandError(
            f"no migration {printable(given)}",
            cure="`migrd migrations` lists them",
            code="unknown_migration",
            exit_code=Exit.NOT_FOUND,
        )
    raise CommandError(
        f"{len(matching)} migrations begin with {printable(given)}",
        cure="give more of the id: " + ", ".join(printable(id_) for id_ in matching[:5]),
        code="ambiguous_id",
        exit_code=Exit.USAGE,
    )


def short_ids(ids: Sequence[str], least: int = 8) -> dict[str, str]:
    """id -> its shortest beginning, of at least `least` characters, that no other id shares."""
    for length in range(least, max((len(id_) for id_ in ids), default=0)):
        short = {id_: id_[:length] for id_ in ids}
        if len(set(short.values())) == len(set(ids)):
            return short
    return {id_: id_ for id_ in ids}


Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def _completes(collection: str, names_in: Callable[[Seen], list[str | None]]) -> Complete:
    """Completion from what the daemon lists."""

    async def ask(context: click.Context) -> list[str]:
        address = options_of(context).address()
        async with Client(address, deadline_s=_COMPLETION_S) as client:
            found = names_in((await client.get(collection)).seen)
        return [name for name in found if name is not None and printable(name) == name]

    def complete(
        context: click.Context, parameter: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        try:
            found = asyncio.run(ask(context))
        except Exception:
            return []  # completion must never print an error into somebody's command line
        return [CompletionItem(name) for name in found if name.startswith(incomplete)]

    return complete


def _names_in(seen: Seen) -> list[str | None]:
    return [item.raw("name") for item in seen.parts("items")]


def _ids_in(seen: Seen) -> list[str | None]:
    return [item.raw("id") for item in seen.parts("items")]


def _addresses_in(seen: Seen) -> list[str | None]:
    return [item.raw("address") for item in seen.parts("items")]


def _peers_in(seen: Seen) -> list[str | None]:
    return [peer.raw("name") for peer in seen.parts("peers")]


def _name(text: str) -> str:
    """A path segment of `.` or `..` would be taken out of the path on its way."""
    if text in ("", ".", ".."):
        raise click.BadParameter(f"{text!r} is no name")
    return text


device_argument = click.argument(
    "address",
    metavar="[ADDRESS]",
    type=_name,
    required=False,
    shell_complete=_completes("devices", _addresses_in),
)
vm_argument = click.argument("vm", type=_name, shell_complete=_completes("vms", _names_in))
host_argument = click.argument(
    "destination", type=_name, shell_complete=_completes("host", _peers_in)
)
maybe_host_argument = click.argument(
    "destination",
    metavar="[DESTINATION]",
    type=_name,
    required=False,
    shell_complete=_completes("host", _peers_in),
)
migration_argument = click.argument(
    "migration_id", metavar="ID", type=_name, shell_complete=_completes("migrations", _ids_in)
)
