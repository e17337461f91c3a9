"""The guest of the direct demo: a process whose threads write memory and count, and that can move.

    python -m migrd.demo.direct_guest --memory-mib 512 --working-set-mib 96 --dirty-mib-per-s 20

It is what the author of a VMM would write with the client library (migrd.direct.client): memory
in a memfd, threads behind a gate, and a little state of its own. Workers visit the pages of the
working set by a rule (direct_memory), look on each visit whether the page is as they left it, and
write it anew. A line per beat says how far it is, as the other demo's guest does (heartbeat).
"""

import argparse
import json
import os
import threading
import time
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from migrd.demo.direct_memory import PAGE_BYTES, WORDS, Layout, Words, content, fill
from migrd.direct.client import DirectClient, GuestRegion, Vmm

MIB: Final = 1 << 20
BEAT_S: Final = 0.01
STEP_S: Final = 0.002
MOST_AT_ONCE: Final = 256


class CountingGuest(Vmm):
    """Memory, workers, and a counter."""

    def __init__(self, layout: Layout, pages_per_s: float) -> None:
        self.layout = layout
        self._pages_per_s = pages_per_s / layout.workers
        self._words: Words = np.empty(0, np.uint64)
        self._visits = [0] * layout.workers
        self._beats = 0
        self._errors = 0
        self.client: DirectClient | None = None

    # What the library asks --------------------------------------------------------------------

    def memory_arrived(self, regions: Sequence[GuestRegion]) -> None:
        self._words = np.frombuffer(regions[0].memory, np.uint64)

    def save_state(self) -> bytes:
        told = {"beats": self._beats, "visits": self._visits, "errors": self._errors}
        return json.dumps(told).encode()

    def load_state(self, state: bytes) -> None:
        told: dict[str, Any] = json.loads(state)
        self._beats, self._errors = int(told["beats"]), int(told["errors"])
        self._visits = [int(visits) for visits in told["visits"]]

    # What it does by itself -------------------------------------------------------------------

    def begin(self, *, is_incoming: bool) -> DirectClient:
        """With memory of its own, or empty: then the gate is closed until a guest has come."""
        regions = []
        if not is_incoming:
            length_bytes = self.layout.memory_pages * PAGE_BYTES
            regions = [GuestRegion.create(id=0, gpa=0, length_bytes=length_bytes)]
            self.memory_arrived(regions)
            fill(self._words, self.layout)
        self.client = DirectClient(self, regions=regions, throttles=True)
        for worker in range(self.layout.workers):
            threading.Thread(target=self._work, args=(worker,), daemon=True).start()
        threading.Thread(target=self._count, daemon=True).start()
        self.client.start()
        return self.client

    def _work(self, worker: int) -> None:
        assert self.client is not None
        gate, owed, last_s = self.client.gate, 0.0, time.monotonic()
        while True:
            time.sleep(STEP_S)
            with gate.entered():
                now_s = time.monotonic()
                owed = min(owed + (now_s - last_s) * self._pages_per_s, MOST_AT_ONCE)
                last_s = now_s
                while owed >= 1:
                    gate.checkpoint()
                    self._visit(worker)
                    owed -= 1

    def _visit(self, worker: int) -> None:
        page, visits = self.layout.place(worker, self._visits[worker])
        words = self._words[page * WORDS : (page + 1) * WORDS]
        if visits > 1 and not np.array_equal(words, content(page, visits - 1)):
            self._errors += 1
        words[:] = content(page, visits)
        self._visits[worker] += 1

    def _count(self) -> None:
        assert self.client is not None
        while True:
            with self.client.gate.entered():
                self._beats += 1
                done = sum(self._visits) & 0xFFFFFFFF
                told = (self._beats, 1, self._errors, done, self._beats)
                os.write(1, (b"H %08x %08x %08x %08x %08x\n" % told))
            time.sleep(BEAT_S)


def parsed(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A process with a guest in it, for migrd's demo.")
    parser.add_argument("--memory-mib", type=int, default=256)
    parser.add_argument("--working-set-mib", type=int, default=64)
    parser.add_argument("--filling-mib", type=int, default=32)
    parser.add_argument("--dirty-mib-per-s", type=float, default=20.0)
    parser.add_argument("--workers", type=int, default=2)
    return parser.parse_args(argv)


def layout_of(asked: argparse.Namespace) -> Layout:
    pages = MIB // PAGE_BYTES
    return Layout(
        memory_pages=asked.memory_mib * pages,
        working_set_pages=asked.working_set_mib * pages,
        filling_pages=asked.filling_mib * pages,
        workers=asked.workers,
    )


def main() -> None:
    asked = parsed()
    guest = CountingGuest(layout_of(asked), asked.dirty_mib_per_s * MIB / PAGE_BYTES)
    guest.begin(is_incoming=os.environ.get("MIGRD_INCOMING") == "1")
    threading.Event().wait()  # QUIT ends the process


if __name__ == "__main__":
    main()
