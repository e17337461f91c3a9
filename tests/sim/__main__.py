"""python -m tests.sim SEED [SEED ...]
python -m tests.sim --from SEED --runs N [--most FAULTS] [--seconds S] [--workers N] [--out FILE]

A run that fails prints a line that repeats it, and the others go on. With --out, each part of
PART seeds adds a line of JSON to the file, and parts that are there already are not run again.
"""

from __future__ import annotations

import argparse
import os
import sys

import tests.sim.quick  # noqa: F401 - first: it makes `replace` quick for all that follow
from tests.sim.long import long_run
from tests.sim.run import Wrong, play
from tests.sim.schedule import MOST, from_seed


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.sim",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("seeds", nargs="*", type=int, metavar="SEED")
    parser.add_argument("--from", dest="first", type=int, default=0, metavar="SEED")
    parser.add_argument("--runs", type=int, default=0, help="how many, counted up from --from")
    parser.add_argument("--most", type=int, default=MOST, help="faults in one schedule, at most")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin none after that")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--out", help="a file of JSON lines, to go on from")
    options = parser.parse_args()
    if not options.seeds:
        return long_run(options)
    return max(_one(seed, options.most) for seed in options.seeds)


def _one(seed: int, most: int) -> int:
    try:
        ended = play(from_seed(seed, most))
    except Wrong as exc:
        sys.stdout.write(f"{exc}\n")
        return 1
    told = (from_seed(seed, most), *ended.struck, ended.phase, *ended.resolved)
    sys.stdout.write("\n  ".join(map(str, told)) + "\n")
    return 0


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":  # sets have an order, too
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, "-m", "tests.sim", *sys.argv[1:]])
    sys.exit(main())
