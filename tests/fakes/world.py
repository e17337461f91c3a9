"""Two hosts with a daemon each, everything around them simulated: `Pair`.

    Ground (guests, their network)   Road (between daemons)       outlive every daemon
    FakeHost alpha, beta (QEMUs)     FakeDisk alpha, beta
        Daemon: Engine + Gate + FakeLauncher + FakeJournal        killed and started at will

A daemon is killed, not stopped: from that instant none of its calls has an effect. `Pair` looks at
the ground truth when a test ends: no violation, whatever the test was about.

Somewhat longer than other modules because it is the one place that knows all fakes.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self

from migrd.core.facts import SpecDevice, VmSpec
from migrd.core.migration import MigrationState, Policy, Request
from migrd.core.phases import Phase
from migrd.core.tracking import TrackingPolicy
from migrd.engine import host as host_module
from migrd.engine import reception as reception_module
from migrd.engine.arbiter_port import Arbiter, NoArbiter
from migrd.engine.engine import Engine
from migrd.engine.options import EngineOptions
from migrd.engine.ports import Peer
from migrd.engine.service import MigrationView
from migrd.engine.stream import Stream
from migrd.engine.world import NobodyWatches, World
from tests.fakes.arbiter import FakeArbiter, FakeArbiterStore
from tests.fakes.gate import Gate, Gated, GatedLauncher, Plan, no_faults
from tests.fakes.guest import Guest
from tests.fakes.hardware import Hardware, SimPassthrough, pidfds_of
from tests.fakes.journal import FakeDisk, FakeJournal
from tests.fakes.launcher import FakeHost, FakeLauncher, Ground
from tests.fakes.qemu_process import FakeQemu
from tests.fakes.road import Door, Road, RoadPeer
from tests.fakes.virtual_time import LoopClock, until

VM = "vm1"
GIB = 1 << 30
COMMIT_S = 0.0005

_memory_here: ContextVar[Callable[[], int | None]] = ContextVar("memory", default=lambda: 8 * GIB)


async def _memory_available_bytes() -> int | None:
    return _memory_here.get()()


@dataclass
class Counts(NobodyWatches):
    """An Observer that remembers."""

    ended: list[tuple[str, str, str]] = field(default_factory=list)
    blackouts_s: list[float] = field(default_factory=list)
    violations: int = 0
    decisions: list[tuple[str, str, str]] = field(default_factory=list)
    wrong_estimates: int = 0

    def decided(self, policy: str, decision: str, reason: str) -> None:
        self.decisions.append((policy, decision, reason))

    def estimate_was_wrong(self) -> None:
        self.wrong_estimates += 1

    def migration_ended(self, role: str, outcome: str, reason: str) -> None:
        self.ended.append((role, str(outcome), reason))

    def blackout(self, blackout_s: float) -> None:
        self.blackouts_s.append(blackout_s)

    def ownership_violation(self) -> None:
        self.violations += 1


class Daemon:
    """One life of one host's migrd."""

    def __init__(self, pair: Pair, name: str, plan: Plan) -> None:
        self.name = name
        self.gate = Gate(plan)
        self.observer = Counts()
        self._pair = pair
        self._stop = asyncio.Event()
        self._ready = asyncio.Event()
        self.launcher = FakeLauncher(pair.hosts[name], lambda: self.gate.is_dead)
        self.passthrough = SimPassthrough(pair.hardware[name])
        self.journal = FakeJournal(pair.disks[name], commit_s=COMMIT_S)
        self.options = replace(pair.options[name], host=name)
        self.engine = Engine(self._world())
        self.service = self.engine.service
        self._task = asyncio.create_task(self._live(), name=f"daemon-{name}")

    def _world(self) -> World:
        clock, pair, options = LoopClock(self.jumped_s), self._pair, self.options
        journal: Any = Gated(self.gate, "journal", self.journal)
        launcher: Any = GatedLauncher(self.gate, self.launcher)
        peers: dict[str, Any] = {
            other: Gated(self.gate, "peer", RoadPeer(pair.road, self.name, other))
            for other in pair.peers_of(self.name)
        }
        stream = Stream(history=options.history, queue=options.queue, wall_s=clock.wall_s)
        peer_map: Mapping[str, Peer] = peers
        hardware = pair.hardware[self.name]
        passthrough: Any = Gated(self.gate, "passthrough", self.passthrough)
        return World(
            options,
            journal,
            launcher,
            peer_map,
            stream,
            clock,
            self.observer,
            inventory=hardware.inventory,
            passthrough=passthrough,
            arbiter=self._arbiter(),
            open_pidfd=pidfds_of(hardware.host),
        )

    def jumped_s(self) -> float:
        """How far somebody has set this host's wall clock wrong."""
        return self._pair.jumped_s[self.name]

    def _arbiter(self) -> Arbiter:
        store = self._pair.arbiter
        if store is None:
            return NoArbiter()
        arbiter: Any = Gated(self.gate, "arbiter", FakeArbiter(store, self.name))
        gated: Arbiter = arbiter
        return gated

    async def _live(self) -> None:
        pair = self._pair
        _memory_here.set(lambda: pair.memory_bytes[self.name])
        async with self.engine:
            door = pair.road.doors[self.name] = Door(self.engine.reception, self.gate)
            self._ready.set()
            try:
                await self._stop.wait()
            finally:
                if pair.road.doors.get(self.name) is door:
                    del pair.road.doors[self.name]
                await door.close()

    async def ready(self) -> None:
        """Until it serves; raises what kept it from starting."""
        ready = asyncio.create_task(self._ready.wait())
        crashed = asyncio.create_task(self.gate.crashed.wait())
        try:
            await asyncio.wait({ready, crashed, self._task}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (ready, crashed):
                task.cancel()
        await asyncio.wait({ready, crashed})
        if self._task.done() and not self.gate.is_dead:
            await self._task

    async def kill(self) -> None:
        """SIGKILL."""
        self.gate.crash()
        self._task.cancel()
        await asyncio.wait([self._task])
        self.launcher.close()
        self.passthrough.end()

    async def stop(self) -> None:
        """An orderly shutdown; raises what it raises."""
        self._stop.set()
        if self.gate.is_dead:
            await self.kill()
            return
        await self._task
        self.launcher.close()


class Pair:
    """alpha and beta."""

    def __init__(self, *, arbiter: FakeArbiterStore | None = None, **options: Any) -> None:
        self.arbiter = arbiter
        """Of both hosts; None: the journals decide alone."""
        self.ground = Ground()
        self.road = Road()
        self.hosts = {name: FakeHost(name, self.ground) for name in ("alpha", "beta")}
        self.disks = {name: FakeDisk() for name in self.hosts}
        self.jumped_s = dict.fromkeys(self.hosts, 0.0)
        self.hardware = {name: Hardware(host) for name, host in self.hosts.items()}
        self.memory_bytes: dict[str, int | None] = dict.fromkeys(self.hosts, 8 * GIB)
        roster = {name: f"https://{name}:7744" for name in self.hosts}
        self.options = {
            name: EngineOptions(
                host=name,
                migrd_version="0.1.0",
                peers={n: url for n, url in roster.items() if n != name},
                **options,
            )
            for name in self.hosts
        }
        self.daemons: dict[str, Daemon] = {}
        self.plans: dict[str, Plan] = dict.fromkeys(self.hosts, no_faults)
        self.calls: dict[str, list[str]] = {name: [] for name in self.hosts}
        self.is_paused_guest = False
        """The guest is not to run, here or there."""
        self._restorers: list[Callable[[], None]] = []

    def peers_of(self, name: str) -> list[str]:
        """The hosts that one has in its roster."""
        return [other for other in self.hosts if other != name]

    # Life -------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        for module in (host_module, reception_module):
            self.replace(module, "memory_available_bytes", _memory_available_bytes)
        for name in self.hosts:
            await self.start(name)
        return self

    def replace(self, module: Any, name: str, value: object) -> None:
        """Of a module, for as long as this world lasts."""
        old = getattr(module, name)
        setattr(module, name, value)
        self._restorers.append(lambda: setattr(module, name, old))

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: object, traceback: TracebackType | None
    ) -> None:
        try:
            for name in list(self.daemons):
                await self.daemons.pop(name).stop()
        finally:
            await self._end_world()
        if kind is None:
            self.check_truth()

    async def _end_world(self) -> None:
        for restore in reversed(self._restorers):
            restore()
        await self.road.close()
        tasks = [t.task for t in self.ground.wire.transfers if t.task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def check_truth(self) -> None:
        """No guest has ever run twice, gone back in time, or been thrown away."""
        wrong = {g.name: g.violations for g in self.ground.guests.values() if g.violations}
        assert not wrong, wrong
        assert not any(d.observer.violations for d in self.daemons.values())
        leaks = {name: found for name, h in self.hardware.items() if (found := h.leaks())}
        assert not leaks, leaks

    async def start(self, name: str) -> Daemon:
        """Start a daemon; the one before it is gone."""
        daemon = self.daemons[name] = Daemon(self, name, self.plans[name])
        await daemon.ready()
        return daemon

    async def kill(self, name: str) -> None:
        daemon = self.daemons.pop(name)
        self.calls[name] += daemon.gate.calls
        await daemon.kill()

    async def restart(self, name: str) -> Daemon:
        """kill -9, and start again at once."""
        await self.kill(name)
        return await self.start(name)

    @property
    def alpha(self) -> Daemon:
        return self.daemons["alpha"]

    @property
    def beta(self) -> Daemon:
        return self.daemons["beta"]

    # The guest --------------------------------------------------------------------------------

    def guest(self, name: str = VM) -> Guest:
        return self.ground.guest(name)

    async def boot(
        self,
        name: str = VM,
        *,
        on: str = "alpha",
        devices: Mapping[str, str] | None = None,
        policy: TrackingPolicy | None = None,
    ) -> FakeQemu:
        """Define and start a VM through the daemon's own service. `devices`: QEMU id -> address."""
        service = self.daemons[on].service
        given = tuple(
            SpecDevice(id_, address, guest_bus="pcie.0", guest_address=f"{slot:02x}.0")
            for slot, (id_, address) in enumerate((devices or {}).items(), start=5)
        )
        spec = VmSpec(name, "tiny", devices=given, tracking_policy=policy)
        await service.define_vm(spec, dry_run=False)
        await service.start_vm(name)
        return self.hosts[on].qemu(name)

    def running_on(self, name: str = VM) -> str | None:
        """The host whose QEMU runs the guest now, by ground truth."""
        holder = self.guest(name).running_on
        return None if holder is None else holder.host_name

    def all_living(self, name: str = VM) -> list[FakeQemu]:
        """Every QEMU of a VM that lives, on any host."""
        return [q for host in self.hosts.values() for q in host.living(name)]

    # Migrations -------------------------------------------------------------------------------

    async def ask(
        self,
        vm: str = VM,
        *,
        source: str = "alpha",
        key: str | None = None,
        policy: Policy | None = None,
        **request: Any,
    ) -> str:
        """Ask for a migration; its id."""
        destination = "beta" if source == "alpha" else "alpha"
        request.setdefault("destination", destination)
        wanted = Request(vm, policy=policy or Policy(), requested_by="test", **request)
        service = self.daemons[source].service
        view, _ = await service.create_migration(wanted, idempotency_key=key, body_digest="d")
        return view.id

    def view(self, migration_id: str, on: str = "alpha") -> MigrationView:
        return self.daemons[on].service.migration(migration_id)

    async def until_phase(
        self, migration_id: str, *phases: str, on: str = "alpha", within_s: float = 60.0
    ) -> MigrationView:
        """Until the migration is in one of these phases (or ends, which fails if unwanted)."""

        def there() -> bool:
            phase, is_over = self.stands(migration_id, on)
            return is_over or phase in phases

        await until(there, within_s=within_s, what=f"{migration_id} on {on} in {phases}")
        view = self.view(migration_id, on)
        assert view.phase in phases, (view.phase, view.cause, view.refusals)
        return view

    def engine_state(self, migration_id: str, on: str = "alpha") -> MigrationState:
        """The source's state of a migration, as its owner task has it."""
        return self.daemons[on].engine.migrations.outgoing[migration_id].state

    def stands(self, migration_id: str, on: str = "alpha") -> tuple[str | None, bool]:
        """(phase, is it over) as that host's daemon has it; (None, False) while it is down."""
        daemon = self.daemons.get(on)
        if daemon is None or daemon.gate.is_dead:
            return None, False
        migrations = daemon.engine.migrations
        if migration_id in migrations.outgoing:
            state = migrations.outgoing[migration_id].state
            return state.phase.value, state.is_terminal
        if migration_id in migrations.incoming:
            i = migrations.incoming[migration_id]
            return i.state.phase.value, i.is_over
        return None, False

    async def until_over(
        self, migration_id: str, *, on: str = "alpha", within_s: float = 400.0
    ) -> MigrationView:
        """Until the migration has ended."""
        is_over = lambda: self.stands(migration_id, on)[1]  # noqa: E731 - named for the message
        await until(is_over, within_s=within_s, what=f"{migration_id} on {on} over")
        return self.view(migration_id, on)

    async def migrate(self, vm: str = VM, *, source: str = "alpha", **wanted: Any) -> MigrationView:
        """Ask, and wait for the end."""
        migration_id = await self.ask(vm, source=source, **wanted)
        return await self.until_over(migration_id, on=source)

    async def settle(self, vm: str = VM) -> None:
        """Until neither daemon has anything to do with the VM any more."""

        def quiet() -> bool:
            return all(d.engine.migrations.active_of(vm) is None for d in self.daemons.values())

        await until(quiet, within_s=200.0, what="both daemons at rest")

    async def migrates_again(self, vm: str = VM, *, times: int = 2) -> None:
        """Wherever the guest is, it can be moved to the other host (I11), and back."""
        await self.settle(vm)
        self.ground.calm()
        for _ in range(times):
            source = self.running_on(vm)
            assert source is not None, "the guest runs nowhere"
            view = await self.migrate(vm, source=source)
            assert view.phase == Phase.SUCCEEDED, (view.phase, view.cause, view.refusals)
            assert self.running_on(vm) not in (None, source)
            await self.settle(vm)


@contextlib.asynccontextmanager
async def running_pair(**options: Any) -> AsyncIterator[Pair]:
    """A Pair with its guest running on alpha."""
    async with Pair(**options) as pair:
        await pair.boot()
        yield pair
