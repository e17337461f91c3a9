"""The program: the command line, with the commands that need the whole daemon."""

import asyncio
import os
from pathlib import Path

import click

from migrd.cli.main import build
from migrd.config import DEFAULT_PATH, load
from migrd.demo.command import demo
from migrd.doctor.command import doctor


@click.command("serve", short_help="Run the daemon of this host")
@click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path, dir_okay=False),
    help=f"The configuration.  [default: {DEFAULT_PATH}]",
)
def serve(config_path: Path | None) -> None:
    """Run the daemon of this host, in the foreground, until SIGTERM.

    Stopping or restarting it leaves guests and running migrations as they are; they are taken up
    again at the next start.
    """
    # Imported here: the other commands start without the daemon's parts.
    from migrd.daemon import serve as run

    asyncio.run(run(load(config_path, os.environ)))


def main() -> None:
    """Entry point of `migrd`."""
    build([serve, doctor, demo])()


if __name__ == "__main__":
    main()
