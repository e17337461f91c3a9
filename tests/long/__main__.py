"""python -m tests.long --migrations N --seed-from SEED [--seconds S] [--restarts N]

Faulted migrations of real guests, one line each; `--sum FILE ...` adds up what runs have written.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.long.blows import Fight
from tests.long.field import Field, Nursery, field_of, nursery
from tests.long.judging import (
    Violation,
    forget_what_was_heard,
    judge,
    migrates_again,
    restarts_within,
    start_anew,
)
from tests.long.schedule import EVERY, GROUP, Schedule, every_failpoint, from_seed
from tests.setup import debian

ONE_S = 400.0
KEPT = Path("/tmp/long")


@dataclass
class Result:
    """One faulted migration, as it is written down."""

    seed: int
    schedule: str
    qemu: str
    at: str
    ended: str = "?"
    words: list[str] = field(default_factory=list)
    struck: list[str] = field(default_factory=list)
    restarts: int = 0
    """Of daemons that were killed while the migration was unfinished."""
    deaths: int = 0
    """Of daemons, all in all."""
    took_s: float = 0.0
    violation: str | None = None
    message: str = ""


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def command_of(seed: int) -> str:
    return f"python -m tests.long --seed-from {seed} --migrations 1"


async def fought(two: Field, schedule: Schedule) -> Result:
    """One faulted migration, judged, and a plain one after it."""
    at = datetime.now(UTC).isoformat(timespec="seconds")
    result = Result(schedule.seed, str(schedule), schedule.qemu, at)
    began_s = time.monotonic()
    source = await two.home()
    two.deaths.clear()
    fight = Fight(two, schedule, source, two.other(source))
    try:
        async with asyncio.timeout(ONE_S):
            await fight.go()
            result.ended, result.words = await judge(fight)
            result.restarts = restarts_within(fight, await fight.begun())
            if not await two.qemus():
                await start_anew(two)
            await forget_what_was_heard(two)
            await migrates_again(two)
            await forget_what_was_heard(two)
    except Violation as exc:
        result.violation, result.message = exc.kind, str(exc)
    except Exception as exc:
        result.violation, result.message = "broke", f"{type(exc).__name__}: {exc!r}"
    if result.violation is not None:
        with contextlib.suppress(AssertionError, TimeoutError):  # of what is wrong already
            await fight.end()
    result.deaths = len(two.deaths)
    result.struck, result.took_s = fight.struck, round(time.monotonic() - began_s, 2)
    return result


@contextlib.asynccontextmanager
async def guest_of(schedule: Schedule, births: Nursery) -> AsyncIterator[Field]:
    """A fleet for a group of seeds, its guest counting on alpha."""
    directory = Path(tempfile.mkdtemp(prefix="migrd-", dir="/tmp"))
    binary = (await asyncio.to_thread(debian.qemu_binaries))[schedule.qemu]
    try:
        small = schedule.has_small_disks
        async with field_of(directory, binary, births, small_disks=small) as two:
            await two.start_guest("alpha")
            yield two
    finally:
        await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)


@dataclass(frozen=True)
class Wanted:
    """How much is to be run."""

    first: int
    migrations: int
    restarts: int
    """Go on until there were so many, too."""
    until_s: float

    def after(self, seed: int, results: list[Result]) -> list[Schedule]:
        """What comes next, of one group; nothing when there is enough."""
        end, stop = self.first + self.migrations, (seed // GROUP + 1) * GROUP
        if seed < end:
            stop = min(stop, end)
        elif sum(result.restarts for result in results) >= self.restarts:
            stop = seed
        return [from_seed(one) for one in range(seed, stop)]


async def run(wanted: Wanted, out: Path | None) -> list[Result]:
    """All of it, or as much as there is time for."""
    results: list[Result] = []
    seed = wanted.first
    async with nursery() as births:
        while left := wanted.after(seed, results):
            seed += len(left)
            while left and time.monotonic() < wanted.until_s:
                async with guest_of(left[0], births) as two:
                    await _while_it_lives(two, left, wanted.until_s, results, out)
            if left:
                break
    return results


async def _while_it_lives(
    two: Field, left: list[Schedule], until_s: float, results: list[Result], out: Path | None
) -> None:
    while left and time.monotonic() < until_s:
        result = await fought(two, left.pop(0))
        results.append(result)
        await asyncio.to_thread(_write, result, out)
        if result.violation is not None:
            await asyncio.to_thread(_keep, two, result)
            return  # its guest is not to be trusted any more


def _write(result: Result, out: Path | None) -> None:
    verdict = f"VIOLATION ({result.violation})" if result.violation else result.ended
    say(
        f"{result.seed:6} {result.took_s:6.1f} s {result.restarts:3} restarts  {verdict}"
        f"  [{result.schedule}]{'  ' + '; '.join(result.words) if result.words else ''}"
    )
    if result.violation:
        say(f"    {result.message}\n    {command_of(result.seed)}")
    if out is not None:
        with out.open("a") as file:
            file.write(json.dumps(asdict(result)) + "\n")


def _keep(two: Field, result: Result) -> None:
    """What the daemons have said, for whoever looks into it."""
    kept = KEPT / f"failed-{result.seed}-{int(time.time())}"
    kept.mkdir(parents=True, exist_ok=True)
    for host in two.hosts.values():
        shutil.copy(host.log, kept / f"{host.name}.log")
    (kept / "result.json").write_text(json.dumps(asdict(result), indent=1))
    (kept / "heard").write_text(
        "\n".join(f"== {tap.owner}\n{tap.text().decode(errors='replace')}" for tap in two.taps)
    )


def summary(results: list[dict[str, Any]]) -> int:
    """Print it; the exit code."""
    wrong = Counter(r["violation"] for r in results if r["violation"])
    ends = Counter(r["ended"] for r in results if not r["violation"])
    seeds = sorted(r["seed"] for r in results)
    say(
        f"{len(results)} faulted migrations, seeds {seeds[0]}..{seeds[-1]}, "
        f"{sum(r['restarts'] for r in results)} daemon restarts in the middle of them"
        if results
        else "nothing was run"
    )
    columns = ("double run", "lost", "false answer", "memory", "stuck", "no end", "left behind")
    say("  ".join(f"{kind}: {wrong.pop(kind, 0)}" for kind in columns))
    for kind, count in wrong.items():
        say(f"{kind}: {count}")
    for what, count in ends.most_common():
        say(f"  {count:6} {what}")
    return 1 if any(r["violation"] for r in results) or not results else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.long", description=__doc__)
    parser.add_argument("--migrations", type=int, default=300)
    parser.add_argument("--seed-from", type=int, default=1)
    parser.add_argument("--every-failpoint", action="store_true", help="each of them by name")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--restarts", type=int, default=0, help="go on until so many, too")
    parser.add_argument("--results", type=Path, help="append to this file, one JSON a line")
    parser.add_argument("--sum", type=Path, nargs="+", help="add up such files, run nothing")
    options = parser.parse_args()
    if options.sum:
        lines = [line for path in options.sum for line in path.read_text().splitlines()]
        return summary([json.loads(line) for line in lines])
    first, count = options.seed_from, options.migrations
    if options.every_failpoint:
        first, count = EVERY, len(every_failpoint())
    until_s = time.monotonic() + options.seconds
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # daemons and QEMUs end with us
    wanted = Wanted(first, count, options.restarts, until_s)
    results = asyncio.run(run(wanted, options.results))
    return summary([asdict(result) for result in results])


if __name__ == "__main__":
    sys.exit(main())
