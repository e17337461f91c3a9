"""What a real etcd was measured to take, for the simulated one: `python -m tests.bench arbiter`.

Three members and their only client, one Python process, on a 2-core machine at a load of 10,
2026-11-23. So it is what the worst of machines would give: an etcd on machines of its own takes ten
times as much and more.
"""

from __future__ import annotations

from typing import Final

from tests.fleet.latencies import Measured

THREE_MEMBERS: Final = Measured(
    quantiles_s=(
        *((0.0, 0.0016), (0.01, 0.0017), (0.1, 0.00206), (0.25, 0.0024), (0.5, 0.00299)),
        *((0.75, 0.00387), (0.9, 0.00489), (0.95, 0.00606), (0.99, 0.01129), (1.0, 0.0312)),
    ),
    writes_per_s=505.0,
    renewals_per_s=1437.0,
)
