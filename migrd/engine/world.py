"""Everything the engine's tasks share: settings, ports, the event stream, and who watches."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from migrd.core.devices import Inventory
from migrd.core.facts import Round
from migrd.engine.arbiter_port import Arbiter, NoArbiter
from migrd.engine.device_ports import DeviceInventory, Passthrough
from migrd.engine.no_devices import NoInventory, NoPassthrough
from migrd.engine.options import EngineOptions
from migrd.engine.ports import Clock, Journal, Launcher, Peer, SystemClock
from migrd.engine.rate_views import RateSeen
from migrd.engine.stream import Stream


class Observer(Protocol):
    """Who counts (the metrics). Never blocks, never raises."""

    def phase_changed(
        self, role: str, phase_from: str, phase_to: str, duration_s: float
    ) -> None: ...

    def migration_ended(self, role: str, outcome: str, reason: str) -> None: ...

    def blackout(self, blackout_s: float) -> None: ...

    def round_recorded(self, vm: str, round_: Round) -> None: ...

    def transferred(self, vm: str, channel: str, bytes_delta: int) -> None: ...

    def peer_checked(self, name: str, up: bool) -> None: ...

    def ownership_violation(self) -> None: ...

    def inventory_seen(self, inventory: Inventory) -> None: ...

    def estimate_was_wrong(self) -> None: ...

    def decided(self, policy: str, decision: str, reason: str) -> None: ...

    def rate_sampled(self, seen: RateSeen) -> None: ...

    def rates_ended(self, vm: str) -> None: ...


class NobodyWatches:
    """An Observer that counts nothing."""

    def phase_changed(
        self, role: str, phase_from: str, phase_to: str, duration_s: float
    ) -> None: ...

    def migration_ended(self, role: str, outcome: str, reason: str) -> None: ...

    def blackout(self, blackout_s: float) -> None: ...

    def round_recorded(self, vm: str, round_: Round) -> None: ...

    def transferred(self, vm: str, channel: str, bytes_delta: int) -> None: ...

    def peer_checked(self, name: str, up: bool) -> None: ...

    def ownership_violation(self) -> None: ...

    def inventory_seen(self, inventory: Inventory) -> None: ...

    def estimate_was_wrong(self) -> None: ...

    def decided(self, policy: str, decision: str, reason: str) -> None: ...

    def rate_sampled(self, seen: RateSeen) -> None: ...

    def rates_ended(self, vm: str) -> None: ...


@dataclass(frozen=True)
class World:
    """What a migration's task may reach."""

    options: EngineOptions
    journal: Journal
    launcher: Launcher
    peers: Mapping[str, Peer]
    stream: Stream
    clock: Clock = field(default_factory=SystemClock)
    observer: Observer = field(default_factory=NobodyWatches)
    inventory: DeviceInventory = field(default_factory=NoInventory)
    passthrough: Passthrough = field(default_factory=NoPassthrough)
    arbiter: Arbiter = field(default_factory=NoArbiter)
    open_pidfd: Callable[[int], int] = os.pidfd_open
    """A descriptor of a process, by its pid. Raises ProcessLookupError when it is gone."""
