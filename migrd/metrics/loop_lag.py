"""How late the event loop is: the price that every blocking call on it has.

A task sleeps for a known time and looks how much later it woke. What is measured is what any other
task of the daemon would have had to wait.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Final

PROBE_INTERVAL_S: Final = 0.1


class LoopLagProbe:
    """`run` belongs to the daemon's task group."""

    def __init__(
        self, observe: Callable[[float], None], interval_s: float = PROBE_INTERVAL_S
    ) -> None:
        self._observe = observe
        self._interval_s = interval_s
        self._worst_s = 0.0

    async def run(self) -> None:
        """Probe for ever; ends by being cancelled."""
        while True:
            asked_at_s = time.monotonic()
            await asyncio.sleep(self._interval_s)
            lag_s = max(0.0, time.monotonic() - asked_at_s - self._interval_s)
            self._worst_s = max(self._worst_s, lag_s)
            self._observe(lag_s)

    def take_worst_s(self) -> float:
        """The worst lag since the last call, in seconds."""
        worst_s, self._worst_s = self._worst_s, 0.0
        return worst_s
