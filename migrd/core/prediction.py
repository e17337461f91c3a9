"""What a migration would take, from how its guest was seen to write before it.

The rounds of `core.convergence`, played through with the model of `core.working_set`:

    R = memory;  each round takes R / B, and leaves R' = U(R / B);  until c + R / B fits the limit

B is the bandwidth, c the fixed cost of a switchover. R shrinks to nothing when the guest writes
slower than B, else to a fixed point: what it dirties while just that much is sent. If that does not
fit the limit, it does not converge, however long it goes on.

All memory counts, pages of zeros too, which QEMU sends in no time: `total_s` is rather too long.
Where the working set is not known, the guest is taken to go on as it began: rather too pessimistic.
"""

from dataclasses import dataclass
from typing import Final

from migrd.core.convergence import FIXED_COST_S
from migrd.core.working_set import WorkingSet

MOST_ROUNDS: Final = 100
SHRINKS: Final = 0.99
"""A round that leaves more than this share of the one before has come to the fixed point."""


@dataclass(frozen=True)
class Prediction:
    """None: not known."""

    converges: bool
    blackout_s: float
    """At the switchover; if it does not converge: at the best moment there is."""
    total_s: float | None
    """None: it does not end by itself."""


def predict(
    found: WorkingSet,
    *,
    memory_bytes: int,
    bandwidth_bytes_per_s: float,
    downtime_limit_s: float,
) -> Prediction | None:
    """Play the rounds through; None where the rate or the bandwidth is not known."""
    if bandwidth_bytes_per_s <= 0 or found.distinct_bytes(0.0) is None:
        return None
    remaining, total_s = float(memory_bytes), 0.0
    for _ in range(MOST_ROUNDS):
        blackout_s = FIXED_COST_S + remaining / bandwidth_bytes_per_s
        if blackout_s <= downtime_limit_s:
            return Prediction(True, blackout_s, total_s + blackout_s)
        round_s = remaining / bandwidth_bytes_per_s
        total_s += round_s
        left = min(found.distinct_bytes(round_s) or 0.0, float(memory_bytes))
        if left > SHRINKS * remaining:
            return Prediction(False, FIXED_COST_S + left / bandwidth_bytes_per_s, None)
        remaining = left
    return Prediction(False, FIXED_COST_S + remaining / bandwidth_bytes_per_s, None)
