"""This host, as clients see it: slots, profiles, peers, IOMMUs, readiness."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Final

import structlog

from migrd.engine.arbiter_port import ArbiterState
from migrd.engine.device_verdict import why_all_track
from migrd.engine.devices import HostDevices
from migrd.engine.memory import memory_available_bytes
from migrd.engine.migrations import Migrations
from migrd.engine.ports import Peer
from migrd.engine.service import Check, HostView, PeerView
from migrd.engine.world import World
from migrd.errors import PeerError

log = structlog.get_logger(__name__)

ASK_S: Final = 5.0
AT_ONCE: Final = 16
PEERS_PER_S: Final = 50
"""Peers asked, at most: in a fleet of thousands everybody is in everybody's roster, and asking all
of them each interval would be most of what a daemon, and its network, does."""


class HostFacts:
    """What is known of the host, kept fresh by `watch`."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.devices = HostDevices(world)
        self._binaries: Mapping[str, str | None] = {}
        self._boot_wall_s = world.clock.wall_s()
        self._memory_bytes: int | None = None
        self._peers: dict[str, PeerView] = {
            name: PeerView(name, url, up=None, checked_wall_s=None, error=None)
            for name, url in world.options.peers.items()
        }
        self.recovered = False

    def view(self, migrations: Migrations) -> HostView:
        """A snapshot."""
        options, binaries = self._world.options, dict(self._binaries)
        inventory = self.devices.inventory
        return HostView(
            name=options.host,
            migrd_version=options.migrd_version,
            boot_wall_s=self._boot_wall_s,
            qemu_binaries=binaries,
            profiles=tuple(sorted(binaries)),
            outgoing_slots=options.outgoing_slots,
            outgoing_active=migrations.outgoing_active,
            incoming_slots=options.incoming_slots,
            incoming_active=migrations.incoming_active,
            memory_available_bytes=self._memory_bytes,
            all_iommus_track_dirty=inventory.all_iommus_track_dirty,
            all_iommus_track_dirty_why=why_all_track(inventory),
            iommus=tuple(inventory.iommus[name] for name in sorted(inventory.iommus)),
            kernel=inventory.kernel,
            devices=len(inventory.devices),
            inventory_trouble=tuple(inventory.trouble),
            tracking_policy=options.tracking_policy,
            forbidden_tracking_policies=tuple(sorted(options.forbidden_tracking_policies)),
            tls=options.tls is not None,
            vms=len(migrations.vms.all()),
            peers=tuple(self._peers[name] for name in sorted(self._peers)),
            arbiter=self._world.arbiter.state,
        )

    def readiness(self, migrations: Migrations) -> Sequence[Check]:
        """Can this daemon do its work? Peers being down is shown, and is not our unreadiness."""
        stuck = [
            *(
                m.id
                for m in migrations.outgoing.values()
                if "JournalFailing" in m.troubles and not m.state.is_terminal
            ),
            *(i.id for i in migrations.incoming.values() if i.journal_trouble and not i.is_over),
        ]
        checks = (
            Check("recovered", self.recovered, "journal replayed" if self.recovered else "not yet"),
            Check("journal", not stuck, "; ".join(stuck) or "writable"),
        )
        arbiter = self._world.arbiter
        return (*checks, _arbiter_check(arbiter.state)) if arbiter.is_present else checks

    async def watch(self) -> None:
        """Ask each peer, and the kernel for memory, every peer interval. Runs until cancelled."""
        self._binaries = await self._world.launcher.versions()
        while True:
            try:
                self._memory_bytes = await memory_available_bytes()
                await self._ask_all()
            except Exception as exc:  # what is only looked at must not end the daemon
                log.error("looking at peers failed", exc_info=exc)
            await asyncio.sleep(self._world.options.peer_interval_s)

    async def _ask_all(self) -> None:
        """A few at a time, and no faster than PEERS_PER_S: a large roster takes longer instead."""
        peers = list(self._world.peers.values())
        for first in range(0, len(peers), AT_ONCE):
            some = peers[first : first + AT_ONCE]
            began_s = self._world.clock.monotonic_s()
            await asyncio.gather(*(self._ask(peer) for peer in some))
            took_s = self._world.clock.monotonic_s() - began_s
            if len(some) == AT_ONCE:
                await asyncio.sleep(max(0.0, AT_ONCE / PEERS_PER_S - took_s))

    async def _ask(self, peer: Peer) -> None:
        before, version, error = self._peers[peer.name], None, None
        try:
            async with asyncio.timeout(ASK_S):
                version = (await peer.hello()).migrd_version
        except (PeerError, TimeoutError) as exc:
            error = str(exc) or "no answer"
        up = error is None
        self._peers[peer.name] = PeerView(
            peer.name, before.url, up, self._world.clock.wall_s(), error, version
        )
        self._world.observer.peer_checked(peer.name, up)
        if up is not before.up:
            self._world.stream.publish("peer.changed", {"peer": peer.name, "up": up})
            log.info("peer", peer=peer.name, up=up, cause=error)


def _arbiter_check(state: ArbiterState) -> Check:
    """Guests run on without it; a new migration would not begin."""
    is_ok = state.is_reachable and state.problem is None
    return Check("arbiter", is_ok, f"{state.kind}: {state.problem or 'answers'}")
