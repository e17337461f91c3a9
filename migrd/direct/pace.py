"""How fast all channels of one stream may send together: a token bucket, and what they sent.

Every channel asks before each piece. A piece is small enough that 10 ms of the limit pay for it
(within PIECE_LEAST_BYTES .. PIECE_MOST_BYTES), and whoever waits looks again when the limit
changes: a new limit holds from the next piece on, also in the middle of a record.
"""

import threading
import time
from collections import deque
from typing import Final

PIECE_LEAST_BYTES: Final = 16 << 10
PIECE_MOST_BYTES: Final = 1 << 20
_PIECE_S: Final = 0.01
_BURST_S: Final = 0.02
_LOOK_S: Final = 0.05
"""The longest a channel sleeps before it looks whether it was interrupted."""
_SAMPLE_S: Final = 0.1
_SAMPLES: Final = 20


class Pace:
    """Thread-safe."""

    def __init__(self, bytes_per_s: float | None = None) -> None:
        """`None`: as fast as it goes."""
        self._changed = threading.Condition()
        self._tokens = 0.0
        self._filled_s = time.monotonic()
        self.piece_bytes = PIECE_MOST_BYTES
        """The most to send at once."""
        self._bytes_per_s: float | None = None
        self.limit(bytes_per_s)

    def limit(self, bytes_per_s: float | None) -> None:
        """From the next piece on. ValueError: not above zero."""
        if bytes_per_s is not None and not bytes_per_s > 0:
            raise ValueError(f"a bandwidth limit of {bytes_per_s} bytes/s: above 0, or None")
        with self._changed:
            self._bytes_per_s = bytes_per_s
            self._tokens = 0.0
            self._filled_s = time.monotonic()
            piece = PIECE_MOST_BYTES if bytes_per_s is None else int(bytes_per_s * _PIECE_S)
            self.piece_bytes = min(PIECE_MOST_BYTES, max(PIECE_LEAST_BYTES, piece))
            self._changed.notify_all()

    def may_send(self, count_bytes: int) -> bool:
        """Take so many tokens; False after a while without: look around, then ask again."""
        if self._bytes_per_s is None:
            return True
        with self._changed:
            rate = self._bytes_per_s
            if rate is None:
                return True
            now_s = time.monotonic()
            filled = self._tokens + (now_s - self._filled_s) * rate
            self._tokens = min(filled, max(rate * _BURST_S, PIECE_LEAST_BYTES))
            self._filled_s = now_s
            if self._tokens < 0:
                self._changed.wait(min(-self._tokens / rate, _LOOK_S))
                return False
            self._tokens -= count_bytes
            return True


class Meter:
    """Bytes that went by, in all and per second over the last two seconds. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bytes = 0
        self._samples: deque[tuple[float, int]] = deque([(time.monotonic(), 0)], _SAMPLES)

    def add(self, count_bytes: int) -> None:
        with self._lock:
            self._bytes += count_bytes
            now_s = time.monotonic()
            if now_s - self._samples[-1][0] >= _SAMPLE_S:
                self._samples.append((now_s, self._bytes))

    @property
    def total_bytes(self) -> int:
        return self._bytes

    @property
    def bytes_per_s(self) -> float:
        """Over the time that the samples span; 0.0 where nothing went by for as long."""
        with self._lock:
            now_s, total = time.monotonic(), self._bytes
            horizon_s = now_s - _SAMPLE_S * _SAMPLES
            since_s, before = self._samples[0]
            for sample in self._samples:
                if sample[0] > horizon_s:
                    break
                since_s, before = sample
        return (total - before) / max(now_s - since_s, _SAMPLE_S)
