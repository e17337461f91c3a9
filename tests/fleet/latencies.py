"""How long an etcd takes: one queue before measured latencies.

    request -> queue (one server, as raft has one leader) -> latency, drawn from what was measured

The queue is what many hosts share; the latency is what one host alone was seen to wait for, drawn
by quantile. Leases that are kept alive take their share of the queue without a request each here.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import dataclass, field

from tests.fakes.virtual_time import now_s


@dataclass(frozen=True)
class Measured:
    """Of a real etcd: `python -m tests.bench arbiter` on the machine of README's figures."""

    quantiles_s: tuple[tuple[float, float], ...]
    """(share, latency): the latency that this share of the requests does not exceed."""
    writes_per_s: float
    """Most that it took from many clients at once."""
    renewals_per_s: float
    """Most leases kept alive in a second; a daemon's look is taken to cost as much."""


@dataclass
class EtcdLoad:
    """Callable as `FakeArbiterStore(latency_s=...)`: the latency of the next request."""

    measured: Measured
    seed: int = 1
    leases: int = 0
    renew_every_s: float = 20.0
    """A third of `lease_ttl_s`: as often each daemon renews its lease and looks once."""
    requests: Counter[int] = field(default_factory=Counter)
    """By second."""
    waited_s: list[float] = field(default_factory=list)
    longest_queue_s: float = 0.0

    def __post_init__(self) -> None:
        self._chance = random.Random(self.seed)
        self._free_at_s = 0.0
        self._booked_at_s: float | None = None

    def begin(self, *, leases: int) -> None:
        """Count from now on, with so many hosts alive."""
        self.leases = leases
        self.requests.clear()
        self.waited_s.clear()
        self.longest_queue_s = 0.0

    def __call__(self) -> float:
        at_s = now_s()
        self._book_renewals(at_s)
        self.requests[int(at_s)] += 1
        queue_s = max(0.0, self._free_at_s - at_s)
        self._free_at_s = max(at_s, self._free_at_s) + 1.0 / self.measured.writes_per_s
        self.longest_queue_s = max(self.longest_queue_s, queue_s)
        latency_s = queue_s + self._drawn_s()
        self.waited_s.append(latency_s)
        return latency_s

    def _book_renewals(self, at_s: float) -> None:
        """What the leases' renewals since the last request have taken of the queue."""
        since_s, self._booked_at_s = self._booked_at_s, at_s
        if since_s is None:
            return
        asked = (at_s - since_s) * self.asked_per_s
        taken_s = asked / self.measured.renewals_per_s
        # they came evenly: what had time to drain away meanwhile is gone
        backlog_s = max(0.0, self._free_at_s - since_s) + taken_s - (at_s - since_s)
        self._free_at_s = max(self._free_at_s, at_s + max(0.0, backlog_s))

    @property
    def asked_per_s(self) -> float:
        """Renewals and looks of all hosts."""
        return 2 * self.leases / self.renew_every_s

    def _drawn_s(self) -> float:
        share = self._chance.random()
        points = self.measured.quantiles_s
        for (low, low_s), (high, high_s) in itertools.pairwise(points):
            if share <= high:
                return low_s + (high_s - low_s) * (share - low) / (high - low)
        return points[-1][1]

    def most_per_s(self) -> int:
        """Requests in the busiest second."""
        return max(self.requests.values(), default=0)
