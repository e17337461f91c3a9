"""Moving a guest: migrd beside a bare script (and libvirt), in turns, on one machine.

Every driver has a guest of its own, all alike, and all guests run all the time: what is measured is
the same machine under the same load. A guest goes to and fro between its driver's two hosts.
"""

import asyncio
import contextlib
import mmap
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from migrd.core.facts import TransferSettings
from tests.bench.bare import BareScript
from tests.bench.figures import Figure, Judge, Move, Table, median
from tests.bench.guest import PAGE_BYTES, Guest
from tests.bench.rig import (
    BANDWIDTH_BYTES_PER_S,
    DOWNTIME_LIMIT_S,
    MigrdRig,
    Told,
    command_of,
    migrd_rig,
    qemu_arguments,
)
from tests.bench.stamper import Stamps, blackout_s, stamping
from tests.bench.traces import Trace, read_trace
from tests.setup import debian

SETTLE_S: Final = 0.5
"""Between two moves: the guest has run for a while where it is."""
WARM_BYTES: Final = 256 << 20
"""Where this machine is itself virtual, memory that was free for some seconds has been given back
to its host, and touching it again costs a destination 50 ms and more. Which driver gets such memory
is chance, and stays so for a whole run of turns; so each finds memory that was used just now."""


class Driver(Protocol):
    """Something that moves its guest when told."""

    @property
    def name(self) -> str: ...

    async def move(self) -> Move: ...


@dataclass
class Measured:
    """What one driver's moves came to, in seconds."""

    total_s: list[float] = field(default_factory=list)
    blackout_s: list[float] = field(default_factory=list)
    answered_s: list[float] = field(default_factory=list)
    """From QEMU's `completed` on the source to the driver's answer."""
    segments: list[dict[str, float]] = field(default_factory=list)
    """The blackout, by what was done in it."""
    stages: list[dict[str, float]] = field(default_factory=list)
    """The whole move, by what QEMU was doing."""


def warm_memory(size_bytes: int = WARM_BYTES) -> None:
    """Touch and free as much memory as a destination will need: see WARM_BYTES. Blocking."""
    with mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        for at in range(0, size_bytes, PAGE_BYTES):
            memory[at] = 1


@contextlib.asynccontextmanager
async def drivers(
    directory: Path, stamps: Stamps, guest: Guest, *, tls: bool
) -> AsyncIterator[tuple[MigrdRig, BareScript]]:
    """migrd and the script, each with its guest running."""
    binary = debian.qemu_binaries()["10"]
    rom = directory / "guest.rom"
    rom.write_bytes(await asyncio.to_thread(guest.rom))
    arguments = qemu_arguments(rom, stamps)
    settings = TransferSettings(
        downtime_limit_s=DOWNTIME_LIMIT_S,
        max_bandwidth_bytes_per_s=BANDWIDTH_BYTES_PER_S,
        auto_converge=True,
        tls=tls,
    )
    async with contextlib.AsyncExitStack() as stack:
        rig = await stack.enter_async_context(
            migrd_rig(directory / "m", binary, guest, arguments, tls=tls)
        )
        command = await asyncio.to_thread(command_of, await rig.pid(0), binary)
        dirs = [str(host.directory / "tls") for host in rig.hosts]
        script = await stack.enter_async_context(
            BareScript(
                command,
                directory / "s",
                settings,
                (dirs[0], dirs[1]) if tls else None,
                (rig.hosts[0].name, rig.hosts[1].name),
            )
        )
        await _all_beat(stamps, 2)
        yield rig, script


async def _all_beat(stamps: Stamps, guests: int) -> None:
    give_up_at_s = time.monotonic() + 60.0
    while time.monotonic() < give_up_at_s:
        now_s = time.monotonic()
        beats = await asyncio.to_thread(stamps.between, now_s - 0.3, now_s)
        if sum(len(one) > 20 for one in beats.values()) >= guests:
            return
        await asyncio.sleep(0.1)
    raise AssertionError(f"no {guests} guests beat within a minute")


async def measure(
    driver: Driver, stamps: Stamps, traces: Path, into: Measured, *, keep: bool
) -> None:
    """One move, looked at from the guest and from both QEMUs."""
    await asyncio.sleep(SETTLE_S)
    await asyncio.to_thread(warm_memory)
    move = await driver.move()
    await asyncio.sleep(SETTLE_S)
    beats = await asyncio.to_thread(stamps.between, move.began_s - 0.2, time.monotonic())
    since_wall_s = time.time() - time.monotonic() + move.began_s
    source, destination = [
        await asyncio.to_thread(read_trace, traces / f"{pid}.trace", since_wall_s)
        for pid in (move.source_pid, move.destination_pid)
    ]
    ended_wall_s = since_wall_s + move.total_s
    parts = {}
    if isinstance(driver, MigrdRig):
        parts = blackout_of_migrd(source, destination, await driver.told())
    elif isinstance(driver, BareScript):
        parts = blackout_of_script(source, destination)
    if not keep:
        return
    into.total_s.append(move.total_s)
    into.blackout_s.append(blackout_s(beats, move.source_pid, move.destination_pid))
    into.answered_s.append(ended_wall_s - source.status("completed"))
    into.segments.append(parts)
    into.stages.append(stages(source, destination, since_wall_s, ended_wall_s))


async def in_turns(
    stamps: Stamps, sides: Sequence[tuple[Driver, Path, Measured]], runs: int
) -> None:
    """Each moves its guest once in each turn; who goes first changes, for what one leaves to be
    done falls on the next. A first turn is not counted."""
    for turn in range(runs + 1):
        first = turn % len(sides)
        for driver, traces, into in (*sides[first:], *sides[:first]):
            await measure(driver, stamps, traces, into, keep=turn > 0)


def stages(
    source: Trace, destination: Trace, began_wall_s: float, ended_wall_s: float
) -> dict[str, float]:
    """Where the total went, for any driver; the parts sum to it."""
    return _between(
        began_wall_s,
        ("both sides get ready, until `migrate` is said", source.first("qmp_enter_migrate")),
        ("QEMU connects and finds its dirty pages", source.status("active")),
        ("QEMU copies while the guest runs", source.stopped()),
        ("the guest stands still", destination.resumed()),
        ("until the driver says that it is over", ended_wall_s),
    )


def blackout_of_script(source: Trace, destination: Trace) -> dict[str, float]:
    """Where the blackout went; the parts sum to it."""
    over = max(source.status("completed"), destination.status("completed"))
    return _between(
        source.stopped(),
        ("QEMU stops the vCPUs and says pre-switchover", source.status("pre-switchover")),
        ("driver sends migrate-continue", source.first("qmp_enter_migrate_continue")),
        ("QEMU sends the rest; both completed", over),
        ("driver sees both sides completed, sends cont", destination.first("qmp_enter_cont")),
        ("QEMU starts the vCPUs", destination.resumed()),
    )


def blackout_of_migrd(source: Trace, destination: Trace, told: Told) -> dict[str, float]:
    """As `blackout_of_script`, with migrd's own steps."""
    over = max(source.status("completed"), destination.status("completed"))
    return _between(
        source.stopped(),
        ("QEMU stops the vCPUs and says pre-switchover", source.status("pre-switchover")),
        ("driver sends migrate-continue", source.first("qmp_enter_migrate_continue")),
        ("QEMU sends the rest; both completed", over),
        ("source knows that both sides are completed", told.source["granted"]),
        ("journal: granted (fsync)", told.source_durable["granted"]),
        ("GRANT travels; journal: owned, starting (fsync)", told.destination_durable["starting"]),
        ("driver sends cont", destination.first("qmp_enter_cont")),
        ("QEMU starts the vCPUs", destination.resumed()),
    )


def _between(start_s: float, *steps: tuple[str, float]) -> dict[str, float]:
    parts, before_s = {}, start_s
    for name, at_s in steps:
        parts[name] = at_s - before_s
        before_s = at_s
    return parts


def phases_sum(answers: Sequence[dict[str, object]], totals_s: Sequence[float]) -> str:
    """Check that each record accounts for all of its time; and how much the client saw beyond it.

    Raises AssertionError for a record whose phases miss more than 2 % of its total.
    """
    outside = []
    for answer, total_s in zip(answers, totals_s, strict=True):
        timeline = answer["timeline"]
        assert isinstance(timeline, list)
        known_ms = sum(entry["duration_ms"] or 0.0 for entry in timeline)
        total_ms = answer["total_ms"]
        assert isinstance(total_ms, float)
        assert abs(known_ms - total_ms) <= 0.02 * total_ms, (known_ms, total_ms)
        outside.append(1 - known_ms / (total_s * 1000))
    share = statistics.median(outside)
    return (
        "in each record the phases sum to the total within 2 %; "
        f"{share:.1%} of the client's time lies before or after it"
    )


def move_figures(ours: Measured, script: Measured, *, tls: bool) -> list[Figure]:
    how = "TLS" if tls else "no TLS"
    bare = "bare QMP script"
    total = (median(ours.total_s) * 1000, median(script.total_s) * 1000, bare)
    blackout = (median(ours.blackout_s) * 1000, median(script.blackout_s) * 1000, bare)
    answered = (median(ours.answered_s) * 1000, None, "QEMU's trace")
    return [
        Figure(f"total time, {how}", "ms", *total, Judge.RATIO, 1.25),
        Figure(f"total time, {how}, added", "ms", *total, Judge.MORE, 60),
        Figure(f"QEMU's `completed` to `succeeded`, {how}", "ms", *answered, Judge.VALUE, 50),
        Figure(f"blackout seen by the guest, {how}, added", "ms", *blackout, Judge.MORE, 15),
    ]


def where_it_goes(name: str, measured: Measured) -> str:
    """The mean blackout by part."""
    parts = measured.segments
    lines = [f"where the blackout of {name} goes (mean of {len(parts)} moves, ms):"]
    lines += [
        f"  {statistics.fmean(one[part] for one in parts) * 1000:7.2f}  {part}" for part in parts[0]
    ]
    total_s = statistics.fmean(sum(one.values()) for one in parts)
    seen_s = statistics.fmean(measured.blackout_s)
    lines.append(f"  {total_s * 1000:7.2f}  in all; the guest's heartbeat says {seen_s * 1000:.2f}")
    return "\n".join(lines)


def by_stage(**measured: Measured) -> str:
    """Each driver's moves by stage, side by side."""
    lines = [f"where the total goes (median, ms): {', '.join(measured)}"]
    for stage in next(iter(measured.values())).stages[0]:
        cells = [
            f"{median([one[stage] for one in each.stages]) * 1000:8.1f}"
            for each in measured.values()
        ]
        lines.append("".join(cells) + f"  {stage}")
    return "\n".join(lines)


def where_the_total_goes(answers: Sequence[dict[str, object]], measured: Measured) -> str:
    lines = ["the phases of migrd (mean, ms):"]
    phases: dict[str, list[float]] = {}
    for answer in answers:
        timeline = answer["timeline"]
        assert isinstance(timeline, list)
        for entry in timeline:
            if entry["duration_ms"] is not None:
                phases.setdefault(entry["phase"], []).append(entry["duration_ms"])
    lines += [f"  {sum(ms) / len(answers):7.2f}  {phase}" for phase, ms in phases.items()]
    record_ms = sum(sum(ms) for ms in phases.values()) / len(answers)
    rest_ms = statistics.fmean(measured.total_s) * 1000 - record_ms
    lines.append(f"  {rest_ms:7.2f}  before the first and after the last phase (client, HTTP)")
    return "\n".join(lines)


async def run(runs: int, *, tls: bool = True, guest: Guest | None = None) -> Table:
    """migrd and the script in turns, after one move each that is not counted."""
    guest = guest or Guest()
    with tempfile.TemporaryDirectory(prefix="migrd-", dir="/tmp") as work:
        directory = Path(work)
        with stamping(directory / "beats") as stamps:
            async with drivers(directory, stamps, guest, tls=tls) as (rig, script):
                ours, theirs = Measured(), Measured()
                sides: list[tuple[Driver, Path, Measured]] = [
                    (rig, rig.directory, ours),
                    (script, script.directory, theirs),
                ]
                await in_turns(stamps, sides, runs)
    answers = rig.answers[1:]
    summed = phases_sum(answers, ours.total_s)
    return Table.of(
        "moving",
        runs,
        move_figures(ours, theirs, tls=tls),
        [
            by_stage(migrd=ours, script=theirs),
            where_the_total_goes(answers, ours) + "\n  " + summed,
            where_it_goes("migrd", ours),
            where_it_goes("the script", theirs),
        ],
    )
