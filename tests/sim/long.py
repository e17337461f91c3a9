"""Many schedules, in several processes, in parts that can be gone on from."""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

from tests.sim.run import Wrong, play
from tests.sim.schedule import from_seed

PART = 1000


@dataclass
class Part:
    """What came of some seeds in a row."""

    first: int
    runs: int
    most: int
    commit: str
    cpu_s: float = 0.0
    ended_at: str = ""
    ends: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    """Commands that repeat what went wrong, and what did."""


def long_run(options: argparse.Namespace) -> int:
    """0 when nothing was wrong."""
    commit, out = _commit(), Path(options.out) if options.out else None
    done = _done(out, commit)
    parts = [
        Part(first, min(PART, options.first + options.runs - first), options.most, commit)
        for first in range(options.first, options.first + options.runs, PART)
    ]
    todo = [part for part in parts if (part.first, part.runs, part.most) not in done]
    results = [done[p.first, p.runs, p.most] for p in parts if p not in todo]
    for part in _played(todo, options.workers, options.seconds):
        results.append(part)
        for said in part.wrong:
            _say(said)
        if out is not None:
            with out.open("a") as file:
                file.write(json.dumps(asdict(part)) + "\n")
    return _sum_up(results)


def _played(todo: list[Part], workers: int, seconds: float) -> Iterator[Part]:
    end_s = time.monotonic() + seconds
    if workers == 1:
        for part in todo:
            if time.monotonic() < end_s:
                yield run_part(part)
        return
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        pending = iter(todo)
        running = [pool.apply_async(run_part, [part]) for part in islice(pending, workers)]
        while running:
            running[0].wait(0.5)
            for each in [each for each in running if each.ready()]:
                running.remove(each)
                yield each.get()
                more = islice(pending, 1 if time.monotonic() < end_s else 0)
                running.extend(pool.apply_async(run_part, [another]) for another in more)


def run_part(part: Part) -> Part:
    """In this process."""
    gc.collect()
    gc.freeze()
    gc.disable()
    began_s, ends = time.process_time(), Counter[str]()
    for seed in range(part.first, part.first + part.runs):
        try:
            ended = play(from_seed(seed, part.most))
        except Wrong as exc:
            part.wrong.append(f"python -m tests.sim {seed} --most {part.most}\n{exc}\n")
        else:
            ends[str(ended.phase)] += 1
            ends.update(f"resolved {word}" for word in ended.resolved)
        if not seed % 50:
            gc.collect()
    gc.enable()
    part.cpu_s = round(time.process_time() - began_s, 2)
    part.ended_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    part.ends = dict(ends)
    return part


def _done(out: Path | None, commit: str) -> dict[tuple[int, int, int], Part]:
    """Parts that ran at this commit."""
    if out is None or not out.exists():
        return {}
    parts = [Part(**json.loads(line)) for line in out.read_text().splitlines()]
    return {(p.first, p.runs, p.most): p for p in parts if p.commit == commit}


def _commit() -> str:
    """Of the code that runs; with a mark when it is not all of it."""
    told = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True,
        text=True,
        check=False,
    )
    return told.stdout.strip() or "unknown"


def _sum_up(parts: list[Part]) -> int:
    ends, wrong = Counter[str](), sum(len(part.wrong) for part in parts)
    for part in parts:
        ends.update(part.ends)
    runs, cpu_s = sum(part.runs for part in parts), sum(part.cpu_s for part in parts)
    if parts:
        last = max(part.first + part.runs - 1 for part in parts)
        _say(f"seeds {min(part.first for part in parts)} to {last} at {parts[0].commit}:")
    each_ms = 1000 * cpu_s / max(runs, 1)
    _say(f"{runs} runs, {wrong} wrong, {cpu_s:.0f} s of CPU time, {each_ms:.1f} ms each")
    for what, count in ends.most_common():
        _say(f"  {count:8} {what}")
    return 1 if wrong else 0


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
