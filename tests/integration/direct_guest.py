"""The demo's guest, that tells what it is when it stands still, and can be made to misbehave.

    python direct_guest.py --told FILE --behave FILE ...

The second file says how: well, lies, is_slow, refuses, breaks (does not take a guest), is_greedy.

Each time its state is saved or loaded it appends a line to FILE: "saved" or "loaded", and a
checksum of all its memory and state, equal on both sides or something was lost, and the
milliseconds that this took (a part of the blackout). SIGUSR1 breaks its
connection to migrd; the library connects anew by itself.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType

import xxhash

from migrd.demo.direct_guest import MIB, CountingGuest, layout_of, parsed
from migrd.demo.direct_memory import PAGE_BYTES, Layout
from migrd.direct.client import GuestRegion, Refused

MADV_POPULATE_READ = 22
"""<linux/mman.h>, Linux 5.14."""
LATE_S = 6.0
"""Longer than migrd waits for a pause."""


class ToldGuest(CountingGuest):
    def __init__(self, layout: Layout, pages_per_s: float, told: Path, behave: str) -> None:
        super().__init__(layout, pages_per_s)
        self._told = told
        self._behave = behave
        self._lying: threading.Thread | None = None
        self._honest = threading.Event()
        self._populated_ms = 0.0

    def memory_arrived(self, regions: Sequence[GuestRegion]) -> None:
        began_s = time.monotonic()
        for region in regions:  # at once, not page by page under the checksum
            region.memory.madvise(MADV_POPULATE_READ)
        self._populated_ms = (time.monotonic() - began_s) * 1000
        super().memory_arrived(regions)

    def save_state(self) -> bytes:
        state = super().save_state()
        self._tell("saved", state)
        return state

    def load_state(self, state: bytes) -> None:
        if self._behave == "breaks":
            raise Refused("this guest is not to my taste")
        self._tell("loaded", state)
        super().load_state(state)

    def pause(self) -> None:
        behaves, self._behave = self._behave, "well"  # it does so once
        if behaves == "is_slow":
            time.sleep(LATE_S)
        elif behaves == "refuses":
            raise Refused("I will not stop")
        elif behaves == "lies":
            self._lying = threading.Thread(target=self._write_on)
            self._lying.start()

    def resume(self) -> None:
        self._honest.set()
        if self._lying is not None:
            self._lying.join()

    def _write_on(self) -> None:
        while not self._honest.is_set():
            self._words[-1] += 1
            time.sleep(0.0005)
        self._words[-1] = 0

    def _tell(self, what: str, state: bytes) -> None:
        began_s = time.monotonic()
        checksum = xxhash.xxh3_128(self._words.data)
        checksum.update(state)
        took_ms = (time.monotonic() - began_s) * 1000
        if what == "loaded":  # memory came in the blackout too
            took_ms += self._populated_ms
        with self._told.open("a") as file:
            file.write(f"{what} {checksum.hexdigest()} {took_ms:.0f}\n")


def break_connection(number: int, frame: FrameType | None) -> None:
    for entry in Path("/proc/self/fd").iterdir():
        with (
            contextlib.suppress(OSError),
            socket.socket(fileno=os.dup(int(entry.name))) as plain,
        ):
            if plain.type == socket.SOCK_SEQPACKET:
                plain.shutdown(socket.SHUT_RDWR)


def main() -> None:
    _, _, told, _, behaviour, *rest = sys.argv
    behave = Path(behaviour).read_text()
    asked = parsed(rest)
    pages_per_s = asked.dirty_mib_per_s * MIB / PAGE_BYTES
    layout = layout_of(asked)
    if behave == "is_greedy":
        layout = replace(layout, memory_pages=2 * layout.memory_pages)
    guest = ToldGuest(layout, pages_per_s, Path(told), behave)
    signal.signal(signal.SIGUSR1, break_connection)
    guest.begin(is_incoming=os.environ.get("MIGRD_INCOMING") == "1")
    while True:
        signal.pause()


if __name__ == "__main__":
    main()
