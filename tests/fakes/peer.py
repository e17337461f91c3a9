"""The answering side of a peer, simulated: one host's incoming and outgoing migrations in memory.

Keeps the rules of `engine.peer_service`: idempotent by migration id and epoch, an older epoch
changes nothing, a refusal is final, after `starting` nothing is refused. A test moves a migration
along with `move`, and plants errors with `fail`. `seeded_faults` makes a road lossy, repeatably.
"""

import asyncio
import random
from dataclasses import dataclass, field, replace

from migrd.core.facts import TransferAddress, TransferSettings, VmSpec
from migrd.core.handover import DestinationPhase
from migrd.core.tracking import Migratability, Plan
from migrd.engine.peer_service import HelloFacts
from migrd.engine.ports import DestinationView, HostProfile, SourceView
from migrd.errors import Conflict, NotFound
from tests.fakes.road import Faults, Loss

FINAL = (DestinationPhase.STARTING, DestinationPhase.RUNNING, DestinationPhase.REFUSED)


@dataclass
class Stored:
    """One incoming migration."""

    source: str
    vm: VmSpec
    settings: TransferSettings
    view: DestinationView
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)


class FakePeerService:
    """`engine.peer_service.PeerService` of a host that takes every guest."""

    def __init__(self, host: str = "host-b") -> None:
        self.host = host
        self.incoming: dict[str, Stored] = {}
        self.outgoing: dict[str, tuple[str, SourceView]] = {}
        self.epochs: dict[str, int] = {}
        self.calls: list[tuple[str, str]] = []
        """(caller, call), in order of arrival."""
        self.starts: list[str] = []
        """Migrations whose guest was started here, once for each start."""
        self.plan: Plan | None = None
        """What it says of the VM's passthrough devices."""
        self.least: Migratability | None = None
        """What the last prepare asked for."""
        self.slow_s = 0.0
        """How long grant and prepare take."""
        self._errors: dict[str, Exception] = {}

    def fail(self, call: str, error: Exception) -> None:
        """The next `call` raises this."""
        self._errors[call] = error

    async def move(self, migration_id: str, phase: DestinationPhase) -> None:
        """Something happened here."""
        stored = self.incoming[migration_id]
        async with stored.changed:
            stored.view = replace(stored.view, phase=phase, generation=stored.view.generation + 1)
            stored.changed.notify_all()

    def hello(self) -> HelloFacts:
        self._arrived("", "hello")
        return HelloFacts(self.host, "9.8.7")

    def incoming_source(self, migration_id: str) -> str | None:
        stored = self.incoming.get(migration_id)
        return None if stored is None else stored.source

    def outgoing_destination(self, migration_id: str) -> str | None:
        return self.outgoing.get(migration_id, (None,))[0]

    async def preflight(self, source: str, vm: VmSpec) -> HostProfile:
        self._arrived(source, "preflight")
        return HostProfile(
            host=self.host,
            migrd_version="9.8.7",
            protocol=1,
            qemu_version=None,
            features=frozenset({"multifd", "from_the_future"}),
            launch_digest=f"digest of {vm.name}",
            incoming_slots_free=2,
            memory_available_bytes=1 << 34,
            vm_present=False,
            last_epoch=self.epochs.get(vm.name, 0),
            tls=True,
            refusals=(("no_kvm", "no /dev/kvm — here"),),
            plan=self.plan,
        )

    async def prepare(
        self,
        source: str,
        migration_id: str,
        epoch: int,
        vm: VmSpec,
        settings: TransferSettings,
        *,
        least: Migratability | None = None,
    ) -> DestinationView:
        self._arrived(source, "prepare")
        self.least = least
        await asyncio.sleep(self.slow_s)
        if migration_id in self.incoming:
            return self.incoming[migration_id].view
        if epoch <= self.epochs.get(vm.name, 0):
            raise Conflict(f"epoch {epoch} of {vm.name} is old", code="stale_epoch")
        self.epochs[vm.name] = epoch
        address = TransferAddress("192.0.2.7", 49152 + len(self.incoming))
        view = DestinationView(migration_id, epoch, DestinationPhase.RECEIVING, 1, address)
        self.incoming[migration_id] = Stored(source, vm, settings, view)
        return view

    async def view(
        self, source: str, migration_id: str, *, newer_than: int, wait_s: float
    ) -> DestinationView:
        self._arrived(source, "view")
        stored = self._known(migration_id)
        try:
            async with asyncio.timeout(wait_s), stored.changed:
                await stored.changed.wait_for(lambda: stored.view.generation > newer_than)
        except TimeoutError:
            pass
        return stored.view

    async def grant(
        self, source: str, migration_id: str, epoch: int, *, run_guest: bool
    ) -> DestinationView:
        self._arrived(source, "grant")
        stored = self._checked(migration_id, epoch)
        await asyncio.sleep(self.slow_s)
        if stored.view.phase not in FINAL:
            self.starts.append(migration_id)
            await self.move(migration_id, DestinationPhase.RUNNING)
            stored.view = replace(stored.view, guest_running=run_guest, transfer_completed=True)
        return stored.view

    async def discard(
        self, source: str, migration_id: str, epoch: int, reason: str
    ) -> DestinationView:
        self._arrived(source, "discard")
        stored = self._checked(migration_id, epoch)
        if stored.view.phase not in FINAL:
            await self.move(migration_id, DestinationPhase.REFUSED)
            stored.view = replace(stored.view, reason=reason)
        return stored.view

    async def listen_for_recovery(self, source: str, migration_id: str) -> TransferAddress:
        self._arrived(source, "listen_for_recovery")
        self._known(migration_id)
        return TransferAddress("192.0.2.7", 50000)

    async def source_view(self, destination: str, migration_id: str) -> SourceView:
        self._arrived(destination, "source_view")
        if migration_id not in self.outgoing:
            raise NotFound(f"no migration {migration_id}", code="unknown_migration")
        return self.outgoing[migration_id][1]

    def _arrived(self, caller: str, call: str) -> None:
        self.calls.append((caller, call))
        error = self._errors.pop(call, None)
        if error is not None:
            raise error

    def _known(self, migration_id: str) -> Stored:
        if migration_id not in self.incoming:
            raise NotFound(f"no migration {migration_id}", code="unknown_migration")
        return self.incoming[migration_id]

    def _checked(self, migration_id: str, epoch: int) -> Stored:
        stored = self._known(migration_id)
        if epoch != stored.view.epoch:
            raise Conflict(f"epoch {epoch} is not {stored.view.epoch}", code="stale_epoch")
        return stored


def seeded_faults(seed: int, *, share: float = 0.5) -> Faults:
    """For `Road.faults`: of all messages, `share` meets some fault; the same ones for one seed."""
    chance = random.Random(seed)

    def fault(caller: str, callee: str, call: str) -> Loss | None:
        return chance.choice(list(Loss)) if chance.random() < share else None

    return fault
