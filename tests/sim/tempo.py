"""How fast the world of a run goes: the deadlines of the daemons, and how often they look around.

    SHIPPED   as the product is configured, each record sealed, each look at its own time
    BRISK     shorter deadlines, and faults that last in proportion; what no migration depends on
              is not looked at, and records stay as they are

Most runs are brisk: what is between two deadlines passes in virtual time, but somebody polls all
the while. One of SHIPPED_EACH runs goes at the product's own speed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType

from migrd.engine import engine, incoming, orphan
from migrd.engine.devices import HostDevices
from migrd.engine.host import HostFacts
from migrd.engine.reevaluation import Reevaluation
from migrd.engine.sampler import Sampler
from tests.fakes import road, virtual_time, vmm

SHIPPED_EACH = 32


@dataclass(frozen=True)
class Tempo:
    """Of both daemons of a run, and of what happens to them."""

    name: str
    options: Mapping[str, float]
    """Of the engine."""
    constants: tuple[tuple[ModuleType, str, float], ...]
    is_watchful: bool
    """Devices, peers and rates are looked at all the while, and all that is logged is kept."""
    is_sealed: bool
    faults_s: float
    """So long after the request the last fault is over."""
    patience_s: float
    """A doubt that time settles is settled by then."""
    end_s: float
    """So long after all faults nothing goes on any more."""
    again_each: int
    """Of so many runs, one ends with the VM being moved once more."""
    lasts_s: tuple[float, ...] = field(default=())
    """How long a fault may last."""
    aways_s: tuple[float, ...] = field(default=())
    """How long a killed daemon may stay away."""


SHIPPED = Tempo(
    "shipped",
    {"watch_interval_s": 7.0, "peer_interval_s": 31.0},
    (),
    is_watchful=True,
    is_sealed=True,
    faults_s=90.0,
    patience_s=60.0,
    end_s=1_500.0,
    again_each=1,
    lasts_s=(0.001, 0.05, 0.5, 3.0, 20.0, 70.0),
    aways_s=(0.0, 0.0, 0.05, 1.0, 45.0),
)
BRISK = Tempo(
    "brisk",
    {
        "watch_interval_s": 7.0,
        "peer_interval_s": 31.0,
        "preflight_deadline_s": 6.0,
        "prepare_deadline_s": 8.0,
        "grant_deadline_s": 4.0,
        "rollback_deadline_s": 6.0,
        "release_deadline_s": 6.0,
        "stall_s": 4.0,
        "receive_idle_s": 8.0,
        "loaded_idle_s": 10.0,
    },
    (
        (engine, "RESCAN_S", 9.0),
        (incoming, "TICK_S", 1.5),
        (orphan, "NOTHING_MORE_S", 20.0),
        (orphan, "ASK_EACH_S", 3.0),
        (vmm, "POLLS_GROW", 1.5),
        (road, "LATE_S", 12.0),
        (virtual_time, "GROWTH", 1.4),
    ),
    is_watchful=False,
    is_sealed=False,
    faults_s=30.0,
    patience_s=30.0,
    end_s=200.0,
    again_each=4,
    lasts_s=(0.001, 0.05, 0.5, 2.5, 7.0, 14.0),
    aways_s=(0.0, 0.0, 0.05, 1.0, 12.0),
)

WATCHERS = (
    (HostDevices, "watch"),
    (HostDevices, "first_look"),
    (HostFacts, "watch"),
    (Sampler, "watch"),
    (Reevaluation, "watch"),
)
"""What a daemon looks at that no migration without devices depends on."""


async def nothing(_: object) -> None:
    """Instead of a watcher."""
