"""The reference for watching: python -m tests.bench.plain_watch <directory> <count> <interval_s>

One bare connection and one task for each monitor; each asks for the run state at the interval, all
spread over it as widely as migrd spreads them. It keeps the answer, and that is all.

Asked on stdin, it says how late its own event loop was at the 99th percentile since the last time,
in seconds: what the machine does to anybody, whatever he does.
"""

import asyncio
import os
import sys
import time
from pathlib import Path

from migrd.engine.vms import STAGGER
from tests.bench.bare import BareQmp, connect
from tests.bench.figures import percentile

PROBE_S = 0.1  # as the daemon's own probe


async def watch(qmp: BareQmp, after_s: float, interval_s: float, states: dict[int, str]) -> None:
    await asyncio.sleep(after_s)
    while True:
        states[id(qmp)] = (await qmp.call("query-status"))["status"]
        await asyncio.sleep(interval_s)


async def probe(lags_s: list[float]) -> None:
    while True:
        asked_s = time.monotonic()
        await asyncio.sleep(PROBE_S)
        lags_s.append(time.monotonic() - asked_s - PROBE_S)


def answer(lags_s: list[float]) -> None:
    if not sys.stdin.readline():
        os._exit(0)  # nothing here is worth an orderly end
    sys.stdout.write(f"{percentile(lags_s, 0.99) if lags_s else 0.0}\n")
    sys.stdout.flush()
    lags_s.clear()


async def main() -> None:
    directory, count, interval_s = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    states: dict[int, str] = {}
    lags_s: list[float] = []
    asyncio.get_running_loop().add_reader(0, answer, lags_s)
    async with asyncio.TaskGroup() as group:
        for n in range(count):
            qmp = await connect(directory / f"vm-{n}.qmp")
            after_s = interval_s * (n % STAGGER) / STAGGER
            group.create_task(watch(qmp, after_s, interval_s, states))
        group.create_task(probe(lags_s))
        sys.stdout.write("ready\n")
        sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(main())
