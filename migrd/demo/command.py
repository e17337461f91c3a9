"""`migrd demo`."""

import asyncio
from pathlib import Path

import click
from rich.console import Console

from migrd.demo.errors import DemoFailed
from migrd.demo.image import Pattern


@click.command("demo", short_help="Two hosts on this machine, and a guest that moves")
@click.option(
    "--engine",
    type=click.Choice(["qemu", "direct"]),
    default="qemu",
    show_default=True,
    help="Who moves the memory: QEMU, or migrd itself that of a plain process (no QEMU needed).",
)
@click.option(
    "--memory",
    "memory_mib",
    type=int,
    help="Guest RAM, MiB.  [default: 256, with --engine direct 512]",
)
@click.option(
    "--working-set", "working_set_mib", default=96, show_default=True, help="Dirtied part, MiB."
)
@click.option(
    "--dirty", "dirty_mib_per_s", default=20.0, show_default=True, help="Pace of dirtying, MiB/s."
)
@click.option(
    "--pattern",
    type=click.Choice([pattern.value for pattern in Pattern]),
    default=Pattern.RANDOM.value,
    show_default=True,
    help="Order in which pages are dirtied.",
)
@click.option(
    "--bandwidth",
    "bandwidth_mib_per_s",
    default=64,
    show_default=True,
    help="Limit for the migration, MiB/s, so that there is something to see; 0: none.",
)
@click.option("--downtime-limit-ms", default=300, show_default=True, help="Longest blackout.")
@click.option(
    "--when-not-converging",
    type=click.Choice(["wait", "throttle", "postcopy", "give_up"]),
    default="throttle",
    show_default=True,
    help="The policy to show.",
)
@click.option("--multifd", default=0, show_default=True, help="Parallel connections; 0: one.")
@click.option("--no-tls", is_flag=True, help="Leave the stream of guest memory unencrypted.")
@click.option("--qemu", "binary", default="/usr/bin/qemu-system-x86_64", show_default=True)
@click.option("--machine", default="pc-i440fx-7.2", show_default=True, help="Machine type.")
@click.option("--directory", type=click.Path(path_type=Path), help="Where; default: below /tmp.")
@click.option("--keep", is_flag=True, help="Leave both daemons and the guest running.")
@click.option(
    "--end",
    "kept",
    type=click.Path(path_type=Path, exists=True),
    metavar="DIRECTORY",
    help="End what --keep left there, and do nothing else.",
)
def demo(
    pattern: str,
    no_tls: bool,
    kept: Path | None,
    keep: bool,
    directory: Path | None,
    engine: str,
    memory_mib: int | None,
    **chosen: int,
) -> None:
    """Show the main job on this machine.

    Starts two migrd daemons as two hosts on the loopback, starts a small guest of our own on one
    of them, moves it live to the other, and proves from outside that it went on: its count has no
    gap, its memory is right byte for byte, and one copy runs. Leaves nothing behind.
    """
    try:  # needs more than the daemon does: a throw-away CA, numpy
        from migrd.demo.run import Plan, end_kept, run
    except ImportError as exc:
        raise click.ClickException(f"{exc}: in the checkout, pip install '.[demo]'") from exc
    console = Console(highlight=False)
    if kept is not None:
        try:
            end_kept(kept.resolve())
        except DemoFailed as exc:
            raise click.ClickException(str(exc)) from exc
        console.print("Ended and removed.")
        return
    chosen["memory_mib"] = memory_mib or (512 if engine == "direct" else 256)
    plan = Plan(
        engine=engine,
        pattern=Pattern(pattern),
        tls=not no_tls,
        keep=keep,
        directory=directory,
        **chosen,  # type: ignore[arg-type]  # click has checked the types
    )
    raise SystemExit(asyncio.run(run(plan, console)))
