"""What /readyz would answer, for those who only scrape: an alert can wait a while before it tells.

The checks are the engine's; their names are a closed set in its code, so each has a series. Whether
peers answer is no readiness of this host (`migrd_peer_up`).
"""

from collections.abc import Iterable

from migrd.engine.service import Check
from migrd.metrics.render import Family, Rows

READY = Family(
    "migrd_ready",
    "gauge",
    "Whether this check of /readyz holds: the daemon can do its work when all do.",
    ("check",),
)


def readiness_families(checks: Iterable[Check]) -> tuple[tuple[Family, Rows], ...]:
    return ((READY, {(check.name,): float(check.ok) for check in checks}),)
