"""python -m tests.fleet [NAME ...]: the figures of a fleet, by simulation (minutes of one core)."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time

import structlog

from tests.fakes.virtual_time import VirtualTimeLoop
from tests.fleet.latencies import EtcdLoad
from tests.fleet.measured import THREE_MEMBERS
from tests.fleet.scenarios import Report, Scenario, etcd_away, play, rack_loses_power

SCENARIOS = {
    "rack": Scenario("a rack is drained", racks=125, emptied=1, per_host=20, at_once=500),
    "storm": Scenario("500 at once", racks=125, emptied=7, per_host=4, at_once=500),
    "away": Scenario(
        "etcd is away for 20 s", racks=30, emptied=3, per_host=3, at_once=500, trouble=etcd_away
    ),
    "power": Scenario(
        "a rack of destinations loses power",
        racks=10,
        emptied=3,
        per_host=3,
        at_once=500,
        trouble=rack_loses_power,
    ),
}


def run(scenario: Scenario) -> Report:
    """In a loop of its own, with the latencies that were measured."""
    captured = structlog.testing.capture_logs()  # written out, logs would take most of the time
    with captured, asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(play(scenario, EtcdLoad(THREE_MEMBERS)))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fleet", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(SCENARIOS))
    names = parser.parse_args().names or list(SCENARIOS)
    unknown = sorted(set(names) - set(SCENARIOS))
    if unknown:
        parser.error(f"there is no {', '.join(unknown)}: {', '.join(SCENARIOS)}")
    for name in names:
        began_s = time.perf_counter()
        report = run(SCENARIOS[name])
        told = [*report.lines(), f"  ({time.perf_counter() - began_s:.0f} s here)"]
        sys.stdout.write("\n".join(told) + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
