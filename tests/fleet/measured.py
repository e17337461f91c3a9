"""What a real etcd was measured to take, for the simulated one: `python -m tests.bench arbiter`."""

from __future__ import annotations

from typing import Final

from tests.fleet.latencies import Measured

THREE_MEMBERS: Final = Measured(
    quantiles_s=((0.0, 0.001), (0.5, 0.003), (0.99, 0.012), (1.0, 0.05)),
    writes_per_s=3000.0,
    renewals_per_s=8000.0,
)
