"""`migrd doctor`."""

import asyncio
import os
from pathlib import Path

import click

from migrd.cli.checkup import print_checkup
from migrd.cli.running import common_options, options_of
from migrd.config import DEFAULT_PATH


@click.command("doctor", short_help="Say what is missing on this host, and what to do")
@click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help=f"The configuration.  [default: {DEFAULT_PATH}]",
)
@common_options(hidden=True)
@click.pass_context
def doctor(context: click.Context, config_path: Path | None) -> None:
    """Look over this host: is everything here that migrd needs, and if not, what is to be done?

    Run it as the user that the daemon runs as; looking changes nothing, and the daemon may be
    running. Exit code 1 when something must be mended.

    \b
    Examples:
      migrd doctor
      sudo -u migrd migrd doctor --config /etc/migrd/migrd.toml -o json
    """
    # Imported here: every other command starts without the daemon's parts.
    from migrd.doctor.examination import examine

    printer = options_of(context).printer()
    findings = asyncio.run(examine(config_path, os.environ))
    context.exit(print_checkup(printer, findings))
