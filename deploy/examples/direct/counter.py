"""A guest that counts aloud while it dirties its memory: counter.c once more, in Python.

    python counter.py OUT TAG [MIB [PAGES_PER_S [THREADS [random|sequential]]]]

Appends `beat <n> <TAG>` to OUT, 100 times a second; n is kept in guest memory. THREADS threads
write PAGES_PER_S pages a second in all. A process that waits for a guest (MIGRD_INCOMING=1) has
size, pace and pattern from that guest. Where the memory that arrived is not what was written, OUT
says `LOST`.
"""

import mmap
import os
import signal
import struct
import sys
import threading
import time
from collections.abc import Sequence

from migrd.direct.client import DirectClient, GuestRegion, Vmm

PAGE, MIB_PAGES, BEATS_PER_S, TICKS_PER_S = 4096, 256, 100, 1000
WORD = struct.Struct("<Q")


class Counter(Vmm):
    """The guest: its memory, and all else it is (the opaque state): settings, pages written."""

    def __init__(self, out: str, tag: str, settings: Sequence[int] = ()) -> None:
        self._out = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._tag = tag
        self._memory: mmap.mmap
        self._settings = tuple(settings)
        self._written: list[int] = []
        regions = []
        if settings:
            pages, _, threads, _ = settings
            self._written = [0] * threads
            regions = [GuestRegion.create(id=0, gpa=0, length_bytes=pages * PAGE)]
            self._memory = regions[0].memory
        self.client = DirectClient(self, regions=regions, throttles=True)

    def boot(self) -> None:
        """Start the guest's threads; they wait at the gate until it may run."""
        for number in range(len(self._written)):
            threading.Thread(target=self._dirty, args=(number,), daemon=True).start()
        threading.Thread(target=self._beat, daemon=True).start()

    def save_state(self) -> bytes:
        return struct.pack(f"<{4 + len(self._written)}Q", *self._settings, *self._written)

    def load_state(self, state: bytes) -> None:
        numbers = struct.unpack(f"<{len(state) // WORD.size}Q", state)
        self._settings, self._written = numbers[:4], list(numbers[4:])
        self.boot()

    def memory_arrived(self, regions: Sequence[GuestRegion]) -> None:
        self._memory = regions[0].memory

    def _say(self, what: str, number: int) -> None:
        os.write(self._out, f"{what} {number} {self._tag}\n".encode())

    def _place(self, thread: int, number: int) -> int:
        """Where a thread writes its number'th page: what it wrote last can be checked later."""
        pages, _, threads, is_random = self._settings
        share = (pages - 1) // threads
        scattered = (number * 0x9E3779B97F4A7C15 % (1 << 64)) >> 20
        return (1 + thread * share + (scattered if is_random else number) % share) * PAGE

    def _dirty(self, thread: int) -> None:
        due = 0.0
        with self.client.gate.entered():
            number = self._written[thread]
            if number and WORD.unpack_from(self._memory, self._place(thread, number)) != (number,):
                self._say("LOST", number)
            while True:
                self.client.gate.checkpoint()
                due += self._settings[1] / self._settings[2] / TICKS_PER_S
                while due >= 1:
                    number = self._written[thread] + 1
                    WORD.pack_into(self._memory, self._place(thread, number), number)
                    self._written[thread] = number
                    due -= 1
                time.sleep(1 / TICKS_PER_S)

    def _beat(self) -> None:
        with self.client.gate.entered():
            while True:
                self.client.gate.checkpoint()
                number = WORD.unpack_from(self._memory)[0] + 1
                WORD.pack_into(self._memory, 0, number)
                self._say("beat", number)
                time.sleep(1 / BEATS_PER_S)


def main(
    out: str,
    tag: str,
    mib: str = "16",
    rate: str = "1000",
    threads: str = "2",
    pattern: str = "random",
) -> None:
    settings = (int(mib) * MIB_PAGES, int(rate), int(threads), int(pattern == "random"))
    if os.environ.get("MIGRD_INCOMING") == "1":
        counter = Counter(out, tag)
    else:
        counter = Counter(out, tag, settings)
        counter.boot()
    counter.client.start()
    signal.pause()  # SIGTERM ends it: migrd's QUIT, or yours


if __name__ == "__main__":
    main(*sys.argv[1:])
