"""Thousands of hosts under one virtual clock: the real engine of each, simulated around it.

    racks of 40 hosts:  the first ones are emptied (sources), the others take in (targets)

A source knows a few targets, as a scheduler would choose them, and each target few sources. What
every host does all the time by itself (looking at its VMs and neighbours) is left on but rarely: it
is the same for one host as for thousands, and would only take time here. A migration gets a fixed
share of its host's link: one over the slots.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

from migrd.core.migration import Policy, Request
from migrd.engine.options import EngineOptions
from migrd.engine.service import Resolution
from tests.fakes.arbiter import FakeArbiterStore
from tests.fakes.gate import no_faults
from tests.fakes.hardware import Hardware
from tests.fakes.journal import FakeDisk
from tests.fakes.launcher import FakeHost
from tests.fakes.world import Daemon, Pair
from tests.fleet.latencies import EtcdLoad

GIB = 1 << 30
HOSTS_PER_RACK = 40
SLOTS = 2
TARGETS_EACH = 6
LINK_BYTES_PER_S = 25e9 / 8
RARELY_S = 600.0
TOGETHER = 50
"""So many daemons are started at a time."""


class Fleet(Pair):
    """`racks` racks, of which the first `emptied` are to be drained."""

    def __init__(self, racks: int, emptied: int, load: EtcdLoad) -> None:
        rare: dict[str, Any] = {"watch_interval_s": RARELY_S, "peer_interval_s": RARELY_S}
        self.etcd = FakeArbiterStore(latency_s=load)
        super().__init__(arbiter=self.etcd, **rare)
        names = [f"r{rack:03}h{n:02}" for rack in range(racks) for n in range(HOSTS_PER_RACK)]
        at = emptied * HOSTS_PER_RACK
        self.sources, self.targets = names[:at], names[at:]
        self.hosts = {name: FakeHost(name, self.ground) for name in names}
        self.disks = {name: FakeDisk() for name in names}
        self.hardware = {name: Hardware(host) for name, host in self.hosts.items()}
        self.jumped_s = dict.fromkeys(names, 0.0)
        self.memory_bytes = dict.fromkeys(names, 1024 * GIB)
        self.options = {
            name: EngineOptions(
                host=name,
                migrd_version="0.1.0",
                outgoing_slots=SLOTS,
                incoming_slots=SLOTS,
                **rare,
            )
            for name in names
        }
        self.plans = dict.fromkeys(names, no_faults)
        self.calls = {name: [] for name in names}
        self.vms: dict[str, list[str]] = {name: [] for name in self.sources}
        self.died: set[str] = set()
        """Guests whose only copy went with its host."""
        self._peers: dict[str, list[str]] = {name: [] for name in names}
        for number, source in enumerate(self.sources):
            for each in range(TARGETS_EACH):
                # far apart: neighbours do not all ask the same ones, nor all of one rack
                at = number + each * len(self.targets) // TARGETS_EACH
                target = self.targets[at % len(self.targets)]
                self._peers[source].append(target)
                self._peers[target].append(source)
        self.ground.wire.bandwidth_bytes_per_s = int(LINK_BYTES_PER_S / SLOTS)

    def peers_of(self, name: str) -> list[str]:
        return self._peers[name]

    def targets_of(self, source: str) -> Sequence[str]:
        """Where a source's guests may go."""
        return self._peers[source]

    async def start(self, name: str) -> Daemon:
        daemon = await super().start(name)
        if len(self.daemons) % 1000 == 0:
            gc.freeze()  # they live to the end: not to be looked at again and again
        return daemon

    async def fill(self, per_host: int, memory_bytes: int, dirty_bytes_per_s: int) -> None:
        """Guests on the sources."""
        load = self.ground.load
        load.memory_bytes, load.dirty_bytes_per_s = memory_bytes, dirty_bytes_per_s
        load.working_set_bytes = memory_bytes // 16
        for source in self.sources:
            for number in range(per_host):
                name = f"{source}-{number:02}"
                await self.boot(name, on=source)
                self.vms[source].append(name)

    async def ask_to_move(self, vm: str, source: str, target: str) -> str:
        """The control plane's request; the migration's id."""
        request = Request(vm, target, policy=Policy(), requested_by="drain")
        service = self.daemons[source].service
        view, _ = await service.create_migration(request, idempotency_key=None, body_digest="d")
        return view.id

    async def say_fenced(self, id_: str, source: str, target: str) -> None:
        """What a person says who has seen that the target is off."""
        assert target not in self.daemons
        service, word = self.daemons[source].service, Resolution.DESTINATION_FENCED
        await service.resolve(id_, word, evidence="the rack has no power", by="drain")

    async def lose_power(self, name: str) -> None:
        """A host is gone for good, with all that ran on it."""
        held = {qemu.spec.name for qemu in self.hosts[name].qemus if not qemu.is_dead}
        await self.kill(name)
        for qemu in self.hosts[name].qemus:
            qemu.die()
        self.died |= {vm for vm in held if not self.guest(vm).whole_copies}

    def has_room(self, target: str) -> bool:
        if target not in self.daemons:
            return False
        return self.daemons[target].engine.migrations.incoming_active < SLOTS
