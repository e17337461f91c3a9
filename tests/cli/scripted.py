"""A daemon with the real HTTP interface over a scripted engine, for trying the command line.

The engine's place is taken by `Scripted`: its migrations run through the real phase table
(`core.migration.advance`) and the real estimate (`core.convergence.decide`), on figures from a
small model of a guest that dirties memory. The name of the destination says how the story ends:

    host-b          succeeds            host-refuses    refused by preflight
    host-never      does not converge   host-fails      rolled back
    host-lost       the guest is lost   host-unknown    needs an operator
    host-odd        succeeds; every text it sends tries to steer the terminal

`python -m tests.cli.scripted SOCKET` serves one; SIGUSR1 takes the listener away for a second.
"""

import asyncio
import itertools
import signal
import sys
import threading
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from aiohttp import web

from migrd.api.app import build_app
from migrd.core.convergence import Decision, Situation, Verdict, decide, estimate
from migrd.core.facts import (
    Feature,
    QemuStatus,
    Round,
    RunState,
    TransferAddress,
    VmFacts,
    VmSpec,
)
from migrd.core.migration import (
    Admission,
    Cause,
    MigrationEvent,
    MigrationState,
    Mode,
    Policy,
    Refusal,
    Request,
    admit_cancel,
    admit_policy,
    admit_switchover,
    advance,
    begin,
)
from migrd.core.phases import Phase, Trigger
from migrd.engine.service import (
    Answer,
    Check,
    HostView,
    MigrationView,
    PeerView,
    PlanView,
    Progress,
    Published,
    Resolution,
    Role,
    TimelineEntry,
    VmView,
    Whereabouts,
)
from migrd.errors import Conflict, Invalid, NotFound

MIB: Final = 2**20
ODD: Final = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202egnp\nsecond line [bold red]markup[/] é日本"
"""Clears the screen, sets the title, speaks C1, turns text around, breaks the line, is markup."""
DESTINATIONS: Final = (
    "host-b",
    "host-never",
    "host-lost",
    "host-refuses",
    "host-fails",
    "host-unknown",
    "host-odd",
)


@dataclass
class Running:
    """One migration and what the guest's memory does."""

    state: MigrationState
    started_s: float
    rounds: list[Round] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    throttle_percent: int = 0
    remaining_bytes: int = 0
    sent_bytes: int = 0
    generation: int = 1
    version: int = 1
    task: asyncio.Task[None] | None = None


class Scripted:
    """The engine's Service, with endings by the destination's name."""

    def __init__(self, *, speed: float = 1.0) -> None:
        self.speed = speed
        """How much faster than life: 10 makes a round of half a second last 50 ms."""
        self.memory_bytes = 4096 * MIB
        self.bandwidth = 1000.0 * MIB
        self.dirty_rate = 400.0 * MIB
        self.migrations_by_id: dict[str, Running] = {}
        self.keys: dict[str, tuple[str, str]] = {}
        self.vms_by_name: dict[str, VmView] = {}
        self.version = 1
        self.history: list[Published] = []
        self.news = asyncio.Condition()
        self.ready = True
        self.listeners = 0
        """Event streams that are open."""
        for name in ("web1", "db1"):
            self.vms_by_name[name] = self._vm(VmSpec(name, "standard", {"memory_mib": 4096}))

    def _vm(self, spec: VmSpec, state: str = "running") -> VmView:
        facts = VmFacts(
            vm=spec.name,
            run_state=RunState.RUNNING,
            qemu_status=QemuStatus.NONE,
            qemu_version="10.0.2",
            machine_type="pc-q35-10.0",
            memory_bytes=self.memory_bytes,
            features=frozenset(Feature),
        )
        return VmView(
            name=spec.name,
            resource_version=self.version,
            spec=spec,
            managed=True,
            state=state,
            facts=facts if state == "running" else None,
            facts_age_s=0.2 if state == "running" else None,
            epoch=1,
            pid=4711 if state == "running" else None,
        )

    # what clients look at

    def host(self) -> HostView:
        return HostView(
            name="host-a",
            migrd_version="0.1.0",
            boot_wall_s=time.time() - 86_400,
            qemu_binaries={"standard": "10.0.2", "small": None},
            profiles=("small", "standard"),
            outgoing_slots=4,
            outgoing_active=sum(not r.state.is_terminal for r in self.migrations_by_id.values()),
            incoming_slots=4,
            incoming_active=0,
            memory_available_bytes=51_539_607_552,
            all_iommus_track_dirty=None,
            tls=True,
            vms=len(self.vms_by_name),
            peers=(
                PeerView("host-b", "https://192.0.2.2:7443", True, time.time() - 3, None, "0.1.0"),
                PeerView("host-c", "https://192.0.2.3:7443", False, time.time() - 64, ODD),
                PeerView("host-d", "https://192.0.2.4:7443", None, None, None),
            ),
        )

    def readiness(self) -> Sequence[Check]:
        return [Check("journal", self.ready, "writes" if self.ready else "the disk is full")]

    def vms(self) -> tuple[int, Sequence[VmView]]:
        return self.version, [self.vms_by_name[name] for name in sorted(self.vms_by_name)]

    def vm(self, name: str) -> VmView:
        if name not in self.vms_by_name:
            raise NotFound(f"there is no VM {name} on this host", code="unknown_vm")
        return self.vms_by_name[name]

    async def define_vm(self, spec: VmSpec, *, dry_run: bool) -> tuple[VmView, bool]:
        if spec.profile not in ("standard", "small"):
            raise NotFound(f"there is no launch profile {spec.profile}", code="unknown_profile")
        created = spec.name not in self.vms_by_name
        view = self._vm(spec, "stopped")
        if not dry_run:
            self.vms_by_name[spec.name] = view
            await self._publish("vm.changed", spec.name, None, state=view.state)
        return view, created

    async def forget_vm(self, name: str) -> None:
        if self.vm(name).state == "running":
            raise Conflict(f"{name} runs here", code="vm_running")
        del self.vms_by_name[name]

    async def start_vm(self, name: str) -> VmView:
        self.vms_by_name[name] = self._vm(self.vm(name).spec)
        return self.vms_by_name[name]

    async def stop_vm(self, name: str) -> VmView:
        self.vms_by_name[name] = self._vm(self.vm(name).spec, "stopped")
        return self.vms_by_name[name]

    async def plan(self, request: Request) -> PlanView:
        self.vm(request.vm)
        refusals = _refusals(request.destination)
        return PlanView(
            vm=request.vm,
            destination=request.destination,
            possible=not refusals,
            refusals=refusals,
            warnings=(Refusal("no_tls", "the stream would not be encrypted", "set peer.cert"),),
            memory_bytes=self.memory_bytes,
            mode_choices=(Mode.PRECOPY, Mode.POSTCOPY),
            features_missing={"destination": ("switchover_ack",)},
            predicted_total_s=self.memory_bytes / self.bandwidth,
        )

    async def create_migration(
        self, request: Request, *, idempotency_key: str | None, body_digest: str
    ) -> tuple[MigrationView, bool]:
        if idempotency_key in self.keys:
            id_, digest = self.keys[idempotency_key]
            if digest != body_digest:
                raise Invalid("this key came with another body", code="idempotency_key_reused")
            return self.migration(id_), False
        self.vm(request.vm)
        if request.destination not in DESTINATIONS:
            raise NotFound(f"no host {request.destination}", code="unknown_destination")
        if any(
            r.state.request.vm == request.vm and not r.state.is_terminal
            for r in self.migrations_by_id.values()
        ):
            raise Conflict(f"{request.vm} is being migrated already", code="already_migrating")
        id_ = str(uuid.uuid4())
        state = begin(id_, request, 2, time.time(), time.monotonic())
        running = Running(state, time.monotonic(), remaining_bytes=self.memory_bytes)
        self.migrations_by_id[id_] = running
        if idempotency_key is not None:
            self.keys[idempotency_key] = (id_, body_digest)
        await self._publish("migration.phase", request.vm, id_, phase="pending")
        running.task = asyncio.get_running_loop().create_task(self._run(running))
        return self.migration(id_), True

    def migrations(self) -> tuple[int, Sequence[MigrationView]]:
        newest_first = reversed(list(self.migrations_by_id))
        return self.version, [self.migration(id_) for id_ in newest_first]

    def migration(self, migration_id: str) -> MigrationView:
        return _view(self._running(migration_id))

    def _running(self, migration_id: str) -> Running:
        if migration_id not in self.migrations_by_id:
            raise NotFound(f"there is no migration {migration_id}", code="unknown_migration")
        return self.migrations_by_id[migration_id]

    async def wait_newer(self, resource_version: int, *, within_s: float) -> int:
        try:
            async with asyncio.timeout(within_s), self.news:
                await self.news.wait_for(lambda: self.version > resource_version)
        except TimeoutError:
            pass
        return self.version

    async def rounds(self, migration_id: str) -> Sequence[Round]:
        return self._running(migration_id).rounds

    async def decisions(self, migration_id: str) -> Sequence[Decision]:
        return self._running(migration_id).decisions

    # what clients wish

    async def cancel(self, migration_id: str, *, by: str) -> Answer:
        running = self._running(migration_id)
        admission, reason = admit_cancel(running.state)
        if admission is Admission.QUEUED:
            await self._advance(running, Trigger.CANCEL_REQUESTED)
            if running.state.phase is Phase.ROLLING_BACK:
                await self._advance(running, Trigger.CANCEL_COMPLETED)
        return Answer(admission, reason, f"cancel: {reason}", self.migration(migration_id))

    async def switch_over(self, migration_id: str, *, by: str) -> Answer:
        running = self._running(migration_id)
        admission, reason = admit_switchover(running.state)
        if admission is Admission.QUEUED:
            await self._advance(running, Trigger.SWITCHOVER_FORCED)
        return Answer(admission, reason, f"switchover: {reason}", self.migration(migration_id))

    async def change_policy(self, migration_id: str, policy: Policy, *, by: str) -> Answer:
        running = self._running(migration_id)
        admission, reason = admit_policy(running.state)
        if admission is Admission.QUEUED:
            await self._advance(running, Trigger.POLICY_CHANGED, policy=policy)
        return Answer(admission, reason, f"policy: {reason}", self.migration(migration_id))

    async def resolve(
        self, migration_id: str, resolution: Resolution, *, evidence: str, by: str
    ) -> Answer:
        running = self._running(migration_id)
        if running.state.phase is not Phase.NEEDS_OPERATOR:
            raise Conflict("it does not need an operator", code="not_in_needs_operator")
        trigger = {
            Resolution.DESTINATION_FENCED: Trigger.SOURCE_KEPT,
            Resolution.DESTINATION_RUNS: Trigger.DESTINATION_RAN,
            Resolution.GUEST_LOST: Trigger.GUEST_DIED,
        }[resolution]
        await self._advance(running, trigger)
        return Answer(Admission.QUEUED, "resolved", evidence, self.migration(migration_id))

    @asynccontextmanager
    async def events(self, *, after_id: int | None) -> AsyncIterator[AsyncIterator[Published]]:
        stream = self._read(len(self.history) if after_id is None else after_id)
        self.listeners += 1
        try:
            yield stream
        finally:
            self.listeners -= 1
            await stream.aclose()

    async def _read(self, seen: int) -> AsyncGenerator[Published, None]:
        for at in itertools.count(min(seen, len(self.history))):
            async with self.news:
                while len(self.history) <= at:
                    await self.news.wait()
            yield self.history[at]

    # how it goes on

    async def _publish(self, kind: str, vm: str, id_: str | None, **body: object) -> None:
        self.version += 1
        if id_ is not None:
            running = self.migrations_by_id[id_]
            running.generation += 1
            running.version = self.version
        event = Published(len(self.history) + 1, time.time(), kind, vm, id_, body)
        self.history.append(event)
        async with self.news:
            self.news.notify_all()

    async def _advance(self, running: Running, trigger: Trigger, **facts: Any) -> None:
        event = MigrationEvent(trigger, time.time(), time.monotonic(), **facts)
        running.state, _ = advance(running.state, event)
        request = running.state.request
        await self._publish(
            "migration.phase", request.vm, running.state.id, phase=running.state.phase.value
        )

    async def _nap(self, seconds: float) -> None:
        await asyncio.sleep(seconds / self.speed)

    async def _run(self, running: Running) -> None:
        request = running.state.request
        await self._advance(running, Trigger.STARTED)
        await self._nap(0.2)
        if refusals := _refusals(request.destination):
            await self._advance(running, Trigger.PREFLIGHT_REFUSED, refusals=refusals)
            return
        await self._advance(running, Trigger.PREFLIGHT_PASSED, run_guest=True)
        await self._nap(0.5)
        await self._advance(
            running, Trigger.DESTINATION_PREPARED, address=TransferAddress("192.0.2.2", 49152)
        )
        if await self._precopy(running):
            await self._hand_over(running)

    async def _precopy(self, running: Running) -> bool:
        """Rounds until the policy switches over; False when it ended otherwise."""
        destination = running.state.request.destination
        for number in itertools.count(1):
            if not await self._send(running, number):
                return False
            if destination in ("host-lost", "host-fails") and number == 3:
                await self._fail(running, destination)
                return False
            decision = self._decide(running)
            await self._publish("migration.decision", running.state.request.vm, running.state.id)
            running.throttle_percent = decision.throttle_percent or running.throttle_percent
            if decision.verdict is Verdict.GIVE_UP:
                cause = Cause(decision.reason, decision.message)
                await self._advance(running, Trigger.STEP_FAILED, cause=cause)
                await self._advance(running, Trigger.SOURCE_KEPT)
                return False
            if decision.verdict is Verdict.SWITCH_OVER:
                break
        return running.state.phase is Phase.PRECOPY

    def _decide(self, running: Running) -> Decision:
        state = running.state
        decision = decide(
            Situation(
                rounds=running.rounds,
                policy=state.policy,
                at_s=time.monotonic(),
                deadline_at_s=running.started_s + state.policy.deadline_s,
                forced=state.switchover_forced,
                throttle_percent=running.throttle_percent,
            )
        )
        if state.request.destination == "host-odd":
            decision = replace(decision, message=ODD)
        running.decisions.append(decision)
        return decision

    async def _send(self, running: Running, number: int) -> bool:
        """One round in ten steps; False when the migration has left precopy."""
        request = running.state.request
        to_send = running.remaining_bytes
        duration_s = max(0.05, to_send / self.bandwidth)
        for _ in range(10):
            await self._nap(duration_s / 10)
            if running.state.phase is not Phase.PRECOPY:
                return False
            running.remaining_bytes = max(0, running.remaining_bytes - to_send // 10)
            running.sent_bytes += to_send // 10
        rate = self.dirty_rate * (3.5 if request.destination == "host-never" else 1)
        rate *= 1 - running.throttle_percent / 100
        running.remaining_bytes = int(min(self.memory_bytes / 2, rate * duration_s))
        running.rounds.append(
            Round(
                number=number,
                at_s=time.monotonic(),
                duration_s=duration_s,
                transferred_bytes=to_send,
                remaining_bytes=running.remaining_bytes,
                dirty_pages_per_s=rate / 4096,
                page_size_bytes=4096,
                bandwidth_bytes_per_s=to_send / duration_s,
                throttle_percent=running.throttle_percent,
            )
        )
        await self._publish("migration.round", request.vm, running.state.id, number=number)
        return True

    async def _fail(self, running: Running, destination: str) -> None:
        if destination == "host-lost":
            cause = Cause("source_died", "the source's QEMU (pid 4711) was killed by signal 9")
            await self._advance(running, Trigger.GUEST_DIED, cause=cause)
            return
        cause = Cause("destination_died", "the destination's QEMU exited with status 1")
        await self._advance(running, Trigger.STEP_FAILED, cause=cause)
        await self._nap(0.2)
        await self._advance(running, Trigger.SOURCE_KEPT)

    async def _hand_over(self, running: Running) -> None:
        stopped_s = time.monotonic()
        await self._advance(running, Trigger.SWITCHOVER_REACHED, stopped_at_s=stopped_s)
        await self._nap(0.05)
        await self._advance(running, Trigger.TRANSFER_COMPLETED)
        if running.state.request.destination == "host-unknown":
            cause = Cause("destination_silent", "host-unknown has not answered for 30 s")
            await self._advance(running, Trigger.OUTCOME_UNKNOWN, cause=cause)
            return
        await self._nap(0.02)
        await self._advance(running, Trigger.DESTINATION_RAN, resumed_at_s=time.monotonic())
        await self._nap(0.02)
        await self._advance(running, Trigger.SOURCE_RELEASED)


def _refusals(destination: str) -> tuple[Refusal, ...]:
    if destination != "host-refuses":
        return ()
    return (
        Refusal("no_memory", "host-refuses has 1.0 GiB free, 4.0 GiB are needed", "stop a VM"),
        Refusal("no_profile", "host-refuses has no launch profile standard", ""),
    )


def _whereabouts(state: MigrationState) -> Whereabouts:
    match state.phase:
        case Phase.COMPLETING | Phase.SUCCEEDED:
            return Whereabouts.DESTINATION
        case Phase.SWITCHOVER | Phase.GRANTED:
            return Whereabouts.MOVING
        case Phase.GUEST_LOST:
            return Whereabouts.NOWHERE
        case Phase.NEEDS_OPERATOR:
            return Whereabouts.UNKNOWN
        case _:
            return Whereabouts.SOURCE


def _view(running: Running) -> MigrationView:
    state, now_s = running.state, time.monotonic()
    entered = [entry.monotonic_s for entry in state.timeline]
    left: list[float | None] = [*entered[1:], None]
    request = state.request
    odd = request.destination == "host-odd"
    return MigrationView(
        id=state.id,
        role=Role.SOURCE,
        vm=request.vm,
        source="host-a",
        destination=request.destination,
        phase=state.phase.value,
        generation=running.generation,
        resource_version=running.version,
        is_terminal=state.is_terminal,
        guest_runs_on=_whereabouts(state),
        epoch=state.epoch,
        created_wall_s=state.timeline[0].wall_s,
        timeline=tuple(
            TimelineEntry(
                entry.phase.value,
                entry.wall_s,
                entry.monotonic_s,
                None if until is None else until - entry.monotonic_s,
            )
            for entry, until in zip(state.timeline, left, strict=True)
        ),
        mode=state.mode,
        policy=state.policy,
        progress=Progress(
            total_bytes=4096 * MIB if running.sent_bytes else None,
            transferred_bytes=running.sent_bytes or None,
            remaining_bytes=running.remaining_bytes if running.sent_bytes else None,
            dirty_bytes_per_s=400.0 * MIB if running.rounds else None,
            bandwidth_bytes_per_s=1000.0 * MIB if running.sent_bytes else None,
            throttle_percent=running.throttle_percent,
            rounds=len(running.rounds),
            qemu_status="active",
        ),
        estimate=estimate(running.rounds, state.policy),
        last_decision=running.decisions[-1] if running.decisions else None,
        cause=state.cause,
        refusals=state.refusals,
        blackout_s=state.blackout_s,
        elapsed_s=(entered[-1] if state.is_terminal else now_s) - entered[0],
        total_s=state.total_s,
        next_step=ODD if odd else _NEXT_STEP.get(state.phase),
        requested_by=ODD if odd else "uid:0/root",
    )


_NEXT_STEP: Final = {
    Phase.GUEST_LOST: "start web1 anew from its disks",
    Phase.ROLLED_BACK: "look at the destination's log, then migrate again",
}


class Daemon:
    """The scripted engine behind the real interface, in a thread of its own."""

    def __init__(self, socket: Path, *, speed: float = 20.0) -> None:
        self.socket = socket
        self._speed = speed
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="scripted daemon")
        self._runner: web.AppRunner | None = None
        self.service: Scripted | None = None
        self.middlewares: list[Any] = []
        """Put before the interface's own when it next listens."""

    def __enter__(self) -> "Daemon":
        self._thread.start()
        self.do(self._begin())
        return self

    def __exit__(self, *error: object) -> None:
        self.do(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def do(self, work: Any) -> Any:
        """Run a coroutine on the daemon's loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(20)

    def call(self, work: Callable[[Scripted], Any]) -> Any:
        """Look at the engine, or change it, on its own loop."""

        async def on_loop() -> Any:
            assert self.service is not None
            return work(self.service)

        return self.do(on_loop())

    def stop_listening(self) -> None:
        self.do(self._stop_listening())

    def listen(self) -> None:
        self.do(self._listen())

    async def _begin(self) -> None:
        self.service = Scripted(speed=self._speed)
        await self._listen()

    async def _listen(self) -> None:
        assert self.service is not None
        app = build_app(self.service, metrics=lambda: (b"", "text/plain", "0"))
        for middleware in self.middlewares:
            app.middlewares.insert(0, middleware)
        self._runner = web.AppRunner(app, shutdown_timeout=0.2)
        await self._runner.setup()
        await web.UnixSite(self._runner, str(self.socket)).start()

    async def _stop_listening(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None
        self.socket.unlink(missing_ok=True)

    async def _end(self) -> None:
        assert self.service is not None
        tasks = [r.task for r in self.service.migrations_by_id.values() if r.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._stop_listening()


def main(arguments: Sequence[str]) -> None:
    """Serve until SIGTERM or SIGINT; SIGUSR1 takes the listener away for a second."""
    socket, speed = Path(arguments[0]), float(arguments[1]) if len(arguments) > 1 else 1.0
    with Daemon(socket, speed=speed) as daemon:
        signals = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1}
        while signal.sigwait(signals) == signal.SIGUSR1:
            daemon.stop_listening()
            signal.sigtimedwait(signals - {signal.SIGUSR1}, 1.0)
            daemon.listen()


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1})
    main(sys.argv[1:])
