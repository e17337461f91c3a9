"""Where the threads of a guest stop: for a pause, before the first RESUME, and when throttled.

    with gate.entered():               in every thread that writes guest memory
        while ...:
            gate.checkpoint()          often: a pause waits for the slowest thread
            ... write guest memory ...

    gate.close()   returns when each thread that entered waits at a checkpoint (or has left)
    gate.open()

Standard library alone: this is part of the client library for authors of VMMs.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

_LONGEST_NAP_S: Final = 0.1
_FULL_PERCENT: Final = 100


class GateStuck(Exception):
    """Not all threads came to a checkpoint in time; the gate is open again."""


class Gate:
    def __init__(self, *, is_open: bool) -> None:
        self._changed = threading.Condition()
        self._is_open = is_open
        self._inside = 0
        self._waiting = 0
        self._throttle_percent = 0
        self._mine = threading.local()

    @contextmanager
    def entered(self) -> Iterator[None]:
        """The calling thread writes guest memory inside; it waits here while the gate is closed."""
        with self._changed:
            while not self._is_open:  # before it counts: close() does not wait for who is not in
                self._changed.wait()
            self._inside += 1
        self._mine.since_s = time.monotonic()
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    def checkpoint(self) -> None:
        """Wait while the gate is closed. Costs next to nothing while it is open."""
        if self._throttle_percent:
            self._nap(self._throttle_percent)
        if self._is_open:  # read without the lock: a pause that is missed here is met next time
            return
        with self._changed:
            self._waiting += 1
            self._changed.notify_all()
            while not self._is_open:
                self._changed.wait()
            self._waiting -= 1
        self._mine.since_s = time.monotonic()

    def close(self, *, within_s: float) -> None:
        """Stop all threads. Raises GateStuck, and then the gate is as open as before."""
        with self._changed:
            was_open, self._is_open = self._is_open, False
            if self._changed.wait_for(lambda: self._waiting >= self._inside, within_s):
                return
            missing = self._inside - self._waiting
            self._is_open = was_open
            self._changed.notify_all()
        raise GateStuck(f"{missing} threads of the guest did not stop within {within_s:g} s")

    def open(self) -> None:
        with self._changed:
            self._is_open = True
            self._changed.notify_all()

    def throttle(self, percent: int) -> None:
        """Have each thread sleep for this share of its time."""
        self._throttle_percent = percent

    def _nap(self, percent: int) -> None:
        ran_s = time.monotonic() - self._mine.since_s
        time.sleep(min(ran_s * percent / (_FULL_PERCENT - percent), _LONGEST_NAP_S))
        self._mine.since_s = time.monotonic()
