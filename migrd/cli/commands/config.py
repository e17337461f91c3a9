"""`migrd config`: the daemon's settings, checked without a daemon."""

import os
from pathlib import Path

import click

from migrd.cli.printing import Column
from migrd.cli.running import common_options, options_of
from migrd.cli.text import printable

_config = click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The configuration to read.  [default: /etc/migrd/migrd.toml]",
)


@click.group("config", short_help="Check the daemon's configuration")
def config() -> None:
    """Look at the daemon's configuration."""


@config.command("check")
@_config
@click.option("--show", is_flag=True, help="Also print every setting in force and its origin.")
@common_options(hidden=True)
@click.pass_context
def check(context: click.Context, config_path: Path | None, show: bool) -> None:
    """Check the configuration, as the daemon would read it at its start.

    Every problem is listed at once, each with its key, its line, the value found and what would be
    right. Exit code 2 when there is one. The daemon itself is not asked and not touched.

    \b
    Examples:
      migrd config check
      migrd config check --config config/migrd.toml --show
    """
    from migrd.config import explain, load  # here: every other command starts faster without

    printer = options_of(context).printer()
    settings = load(config_path, os.environ)
    explained = explain(settings)
    if printer.is_for_scripts:
        printer.json(
            {
                "ok": True,
                "items": [
                    {"key": one.key, "value": one.value, "origin": one.origin} for one in explained
                ],
            }
        )
        return
    changed = sum(not one.is_default for one in explained)
    printer.line(f"The configuration is in order: {changed} settings set, the rest by default.")
    if show:
        columns = (Column("setting"), Column("value", wraps=True), Column("from", drop=1))
        rows = [(one.key, printable(one.value) or "-", printable(one.origin)) for one in explained]
        printer.table(columns, rows, "no settings")
