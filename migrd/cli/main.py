"""The commands put together.

Some commands need code above this layer (`serve`, `doctor`, `demo`): whoever builds the program
hands them to `build()` as finished click commands. They share the group's options, its error
messages and its exit codes (raise `CommandError`, or any MigrdError).
"""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Final

import click

import migrd
from migrd.cli import exits
from migrd.cli.commands import config, devices, events, host, migrations, move, plan, rates, vms
from migrd.cli.running import Guarded, Options, common_options

SECTIONS: Final[Mapping[str, Sequence[str]]] = MappingProxyType(
    {
        "Migrate": ("plan", "migrate", "watch", "policy", "switchover", "cancel", "resolve"),
        "Look": ("host", "devices", "vms", "rates", "migrations", "rounds", "decisions", "events"),
        "VMs": ("start", "stop"),
        "Daemon": ("serve", "doctor", "config", "demo"),
    }
)

_OURS: Final[Sequence[click.Command]] = (
    plan.plan,
    move.migrate,
    move.watch,
    migrations.policy,
    migrations.switchover,
    migrations.cancel,
    migrations.resolve,
    host.host,
    devices.devices,
    vms.vms,
    rates.rates,
    migrations.migrations,
    migrations.rounds,
    migrations.decisions,
    events.events,
    vms.start,
    vms.stop,
    config.config,
)

_EPILOG: Final = f"""\b
Exit codes:
{exits.as_table()}

\b
Where the daemon is:
  By default the commands speak with the daemon of this host over its unix socket,
  /run/migrd/api.sock. Another one: --socket PATH or MIGRD_SOCKET; one over TCP:
  --url https://HOST:PORT with --token-file FILE, or MIGRD_URL and MIGRD_TOKEN_FILE.

\b
Output:
  Results go to stdout, messages and errors to stderr. -o json prints the API's own
  answer, -o jsonl one object a line; errors are then JSON as well. Colours only on
  a terminal, and never with NO_COLOR set.

\b
Completion:
  eval "$(_MIGRD_COMPLETE=bash_source migrd)"    (also zsh_source, fish_source)

\b
Examples:
  migrd host
  migrd plan web1 host-b
  migrd migrate web1 host-b --watch --downtime-limit-ms 300
  migrd migrations
  migrd watch 5a3c
"""


class Program(Guarded):
    """The group, with its commands listed by subject."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        left = {name: self.commands[name] for name in self.list_commands(ctx)}
        for title, names in SECTIONS.items():
            _section(formatter, title, {n: left.pop(n) for n in names if n in left})
        _section(formatter, "Other", left)


def _section(
    formatter: click.HelpFormatter, title: str, commands: Mapping[str, click.Command]
) -> None:
    rows = [
        (name, command.get_short_help_str(limit=60))
        for name, command in commands.items()
        if not command.hidden
    ]
    if rows:
        with formatter.section(title):
            formatter.write_dl(rows)


def build(extra_commands: Iterable[click.Command] = ()) -> click.Group:
    """The program `migrd`: the commands of this layer, and those handed in."""

    @click.group(
        "migrd",
        cls=Program,
        epilog=_EPILOG,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )
    @common_options(hidden=False)
    @click.version_option(migrd.__version__, prog_name="migrd", message="%(prog)s %(version)s")
    @click.pass_context
    def program(context: click.Context) -> None:
        """Live migration of virtual machines with passthrough devices.

        migrd runs as one daemon per host; these commands ask it, and show what it does.
        """
        context.ensure_object(Options)

    for command in (*_OURS, *extra_commands):
        program.add_command(command)
    return program
