"""python -m tests.sim SEED [SEED ...] | --from SEED --runs N [--most FAULTS] [--seconds S]"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

from tests.sim.run import Wrong, play
from tests.sim.schedule import MOST, from_seed


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("seeds", nargs="*", type=int, metavar="SEED")
    parser.add_argument("--from", dest="first", type=int, default=0, metavar="SEED")
    parser.add_argument("--runs", type=int, default=0, help="how many, counted up from --from")
    parser.add_argument("--most", type=int, default=MOST, help="faults in one schedule, at most")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long")
    options = parser.parse_args()
    seeds = options.seeds or range(options.first, options.first + options.runs)
    began_s, ends, wrong, last = time.monotonic(), Counter[str](), 0, None
    for seed in seeds:
        if time.monotonic() - began_s > options.seconds:
            break
        last = seed
        try:
            ended = play(from_seed(seed, options.most))
        except Wrong as exc:
            wrong += 1
            say(f"python -m tests.sim {seed} --most {options.most}\n{exc}\n")
        else:
            ends[str(ended.phase)] += 1
            ends.update(f"resolved {word}" for word in ended.resolved)
            if options.seeds:
                say(
                    "\n  ".join(
                        map(str, (from_seed(seed, options.most), *ended.struck, ended.phase))
                    )
                )
    took_s = time.monotonic() - began_s
    say(f"up to seed {last}: {sum(ends.values())} runs, {wrong} wrong, {took_s:.0f} s")
    for what, count in ends.most_common():
        say(f"  {count:7} {what}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
