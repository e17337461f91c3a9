"""The benchmarks: python -m tests.bench [NAME ...] [--runs N] [-o table|json|markdown]

    moving    migrd beside a bare QMP script, with TLS: total time, blackout, where each ms goes
    virsh     migrd beside `virsh migrate` and the script, without TLS
    watching  one daemon that watches 200 VMs at 1 Hz
    recovery  a daemon restarted with 200 VMs, 40 of them in migrations whose other side is silent
    scraping  a scrape of 10,000 series
    calls     one QMP command, one journal record, one message to a peer
    handover  journals and round trips of the handover at 1 ms round trip, with and without etcd
    arbiter   a read and a compare-and-swap of etcd, of one member and of three
    decision  the decision at VM start, for 16 devices on 8 IOMMU instances
    harvest   dirty pages of 4 GiB of process memory: beside the bare ioctls and mincore
    harvest_correctness  ten million pages dirtied at random: missed, and told of in vain
    inventory a host with 4,096 PCI functions: full scan, one uevent, event loop
    bitmap    merge, count and extents of bitmaps of 64 and 768 MiB, beside plain loops in C
    loop_lag  the event loop while a thread goes over bitmaps of 768 MiB
    direct    the direct engine's stream beside the fastest plain sender, with and without TLS

Without a name all run, with 9 runs each (medians of these; interleaved, so that all sides meet the
same machine). Exit code: 0 every figure is within its bound, 1 one is not, 2 wrong usage.

Read the ratios: absolute figures belong to the machine, and stand there to read the ratios by.
"""

import argparse
import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

from tests.bench import (
    arbiter,
    bitmap,
    calls,
    decision,
    direct_throughput,
    handover,
    harvest,
    harvest_correctness,
    inventory,
    loop_lag,
    moving,
    recovery,
    scraping,
    virsh,
    watching,
)
from tests.bench.figures import Table

RUNS: Final = 9
BENCHES: Final[Mapping[str, Callable[[int], Awaitable[Table]]]] = {
    "moving": moving.run,
    "virsh": virsh.run,
    "watching": watching.run,
    "recovery": recovery.run,
    "scraping": scraping.run,
    "calls": calls.run,
    "handover": handover.run,
    "arbiter": arbiter.run,
    "decision": decision.run,
    "harvest": harvest.run,
    "harvest_correctness": harvest_correctness.run,
    "inventory": inventory.run,
    "bitmap": bitmap.run,
    "loop_lag": loop_lag.run,
    "direct": direct_throughput.run,
}


def main(words: list[str]) -> int:
    """Run what was asked for and print it; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", choices=[*BENCHES, []])
    parser.add_argument("--runs", type=int, default=RUNS, help=f"of each (default {RUNS})")
    parser.add_argument("-o", "--output", choices=["table", "json", "markdown"], default="table")
    asked = parser.parse_args(words)
    table = Table()
    for name in asked.names or BENCHES:
        sys.stderr.write(f"{name}: {asked.runs} runs ...\n")
        table.add(asyncio.run(run(name, asked.runs)))
    match asked.output:
        case "json":
            text = json.dumps(table.as_json(), indent=1)
        case "markdown":
            text = table.markdown()
        case _:
            text = table.text()
    sys.stdout.write(text + "\n")
    return 1 if table.missed() else 0


async def run(name: str, runs: int) -> Table:
    """One benchmark."""
    return await BENCHES[name](runs)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
