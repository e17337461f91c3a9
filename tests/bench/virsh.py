"""migrd beside `virsh migrate` of libvirt 11, and beside the bare script; none with TLS."""

import contextlib
import tempfile
from pathlib import Path
from typing import Final

from tests.bench.figures import Figure, Judge, Table, median
from tests.bench.guest import Guest
from tests.bench.libvirt import LibvirtMissing, VirshRig, virsh_rig
from tests.bench.moving import (
    Driver,
    Measured,
    by_stage,
    drivers,
    in_turns,
    move_figures,
    phases_sum,
    where_it_goes,
    where_the_total_goes,
)
from tests.bench.rig import extra_arguments
from tests.bench.stamper import stamping
from tests.setup import debian

LOUD: Final = """\
!!! NOT MEASURED HERE: `virsh migrate`. libvirt 11 could not be set up on this machine:
!!! {why}
!!! The bound "total time at most 0.35 of virsh" is neither met nor missed by this run."""


async def run(runs: int) -> Table:
    """All three in turns, after one move each that is not counted."""
    guest = Guest()
    table = Table()
    with tempfile.TemporaryDirectory(prefix="migrd-", dir="/tmp") as work:
        directory = Path(work)
        async with contextlib.AsyncExitStack() as stack:
            stamps = stack.enter_context(stamping(directory / "beats"))
            rig, script = await stack.enter_async_context(
                drivers(directory, stamps, guest, tls=False)
            )
            libvirt: VirshRig | None = None
            rom, extra = directory / "guest.rom", extra_arguments(stamps)
            try:
                qemu = debian.qemu_binaries()["10"]
                peer = virsh_rig(directory / "v", qemu, guest, rom, extra)
                libvirt = await stack.enter_async_context(peer)
            except (LibvirtMissing, debian.SetUpError, OSError) as failure:
                table.notes.append(LOUD.format(why=failure))
            ours, theirs, libvirts = Measured(), Measured(), Measured()
            sides: list[tuple[Driver, Path, Measured]] = [
                (rig, rig.directory, ours),
                (script, script.directory, theirs),
            ]
            if libvirt is not None:
                sides.append((libvirt, libvirt.directory, libvirts))
            await in_turns(stamps, sides, runs)
    phases_sum(rig.answers[1:], ours.total_s)
    figures = move_figures(ours, theirs, tls=False)
    if libvirt is not None:
        figures.append(virsh_figure(ours, libvirts))
        table.notes.append(by_stage(migrd=ours, script=theirs, virsh=libvirts))
        table.notes.append(virsh_blackout(libvirts))
    notes = [
        where_the_total_goes(rig.answers[1:], ours),
        where_it_goes("migrd", ours),
        where_it_goes("the script", theirs),
    ]
    table.add(Table.of("virsh", runs, figures, notes))
    return table


def virsh_figure(ours: Measured, libvirts: Measured) -> Figure:
    virsh = "virsh migrate (libvirt 11)"
    total = (median(ours.total_s) * 1000, median(libvirts.total_s) * 1000, virsh)
    return Figure("total time, no TLS", "ms", *total, Judge.RATIO, 0.35)


def virsh_blackout(libvirts: Measured) -> str:
    """Not judged: its guest is not quite the same (see `libvirt`)."""
    blackout_ms = median(libvirts.blackout_s) * 1000
    return f"blackout with virsh, whose guest has a little less memory: {blackout_ms:.1f} ms"
