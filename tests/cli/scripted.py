"""An engine that follows a script, for trying the command line.

It stands in for migrd's own behind the real HTTP interface (`scripted_daemon`). Its migrations run
through the real phase table (`core.migration.advance`) and the real estimate
(`core.convergence.decide`), on figures from a small model of a guest that dirties memory. The name
of the destination says how the story ends:

    host-b          succeeds            host-refuses    refused by preflight
    host-never      does not converge   host-fails      rolled back
    host-lost       the guest is lost   host-unknown    needs an operator
    host-odd        succeeds; every text it sends tries to steer the terminal
"""

import asyncio
import itertools
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, Final

from migrd.core.admission import Admission, admit_cancel, admit_policy, admit_switchover
from migrd.core.convergence import Decision, Situation, Verdict, decide
from migrd.core.facts import (
    Round,
    TransferAddress,
    VmSpec,
)
from migrd.core.migration import (
    Cause,
    MigrationEvent,
    Mode,
    Policy,
    Refusal,
    Request,
    advance,
    begin,
)
from migrd.core.phases import Phase, Trigger
from migrd.engine.service import (
    Answer,
    Check,
    HostView,
    MigrationView,
    PlanView,
    Published,
    Resolution,
    VmView,
)
from migrd.errors import Conflict, Invalid, NotFound
from tests.cli.scripted_devices import ScriptedDevices
from tests.cli.scripted_view import (
    MIB,
    ODD,
    Running,
    host_of,
    refusals_of,
    view_of,
    vm_of,
)

DESTINATIONS: Final = (
    "host-b",
    "host-never",
    "host-lost",
    "host-refuses",
    "host-fails",
    "host-unknown",
    "host-odd",
)


class Scripted(ScriptedDevices):
    """The engine's Service, with endings by the destination's name."""

    def __init__(self, *, speed: float = 1.0) -> None:
        super().__init__()
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
        return vm_of(spec, state, version=self.version, memory_bytes=self.memory_bytes)

    # what clients look at

    def host(self) -> HostView:
        active = sum(not r.state.is_terminal for r in self.migrations_by_id.values())
        return host_of(self.inventory, outgoing_active=active, vms=len(self.vms_by_name))

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
        decision = await self._deciding.defined(spec)
        view = replace(self._vm(spec, "stopped"), decision=decision)
        if not dry_run:
            self.vms_by_name[spec.name] = view
            await self._publish("vm.changed", spec.name, None, state=view.state)
        return view, created

    async def forget_vm(self, name: str) -> None:
        if self.vm(name).state == "running":
            raise Conflict(f"{name} runs here", code="vm_running")
        del self.vms_by_name[name]

    async def start_vm(self, name: str) -> VmView:
        before = self.vm(name)
        self.vms_by_name[name] = replace(self._vm(before.spec), decision=before.decision)
        return self.vms_by_name[name]

    async def stop_vm(self, name: str) -> VmView:
        self.vms_by_name[name] = self._vm(self.vm(name).spec, "stopped")
        return self.vms_by_name[name]

    async def plan(self, request: Request) -> PlanView:
        self.vm(request.vm)
        refusals = refusals_of(request.destination)
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
            predicted_blackout_s=0.4,
            predicted_converges=request.destination != "host-never",
            dirty_bytes_per_s=self.dirty_rate,
            dirty_rate_age_s=12.0,
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
        return view_of(self._running(migration_id))

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
        if refusals := refusals_of(request.destination):
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
