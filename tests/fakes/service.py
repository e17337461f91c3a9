"""A simulator of the engine for those who build on `migrd.engine.service.Service`.

It has the real rules: migrations move along the real phase table (`core.migration.advance`), wishes
are judged by the real `admit_*`, estimates and decisions come from `core.convergence`, and the
stream is the engine's own. What it has not is QEMUs, peers and time: the test says what happens
next (`step`, `drive_to`, `add_round`), and the clock moves when the test moves it.

`failures[<method>] = <error>` makes the next call of that method fail; `delays_s` makes it slow.
Longer than 400 lines because it is one port, whole.
"""

import asyncio
import itertools
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace

from migrd.core.admission import Admission, admit_cancel, admit_policy, admit_switchover
from migrd.core.convergence import Decision, Situation, decide, estimate
from migrd.core.devices import Inventory
from migrd.core.facts import Feature, QemuStatus, Round, RunState, VmFacts, VmSpec
from migrd.core.migration import (
    Cause,
    MigrationEvent,
    MigrationState,
    Mode,
    Policy,
    Refusal,
    Request,
    advance,
    begin,
)
from migrd.core.phases import Phase, Trigger
from migrd.core.standing import StandingDecision
from migrd.core.tracking import TrackingPolicy
from migrd.engine.device_changes import compare
from migrd.engine.device_verdict import why_all_track
from migrd.engine.service import (
    Answer,
    Check,
    Condition,
    DeviceVerdict,
    DeviceView,
    HostView,
    MigrationView,
    PeerView,
    PlanView,
    PlugRequest,
    Progress,
    Published,
    Resolution,
    Role,
    TimelineEntry,
    VmView,
    WhatIf,
    Whereabouts,
)
from migrd.engine.stream import Stream
from migrd.errors import Conflict, Invalid, NotFound, Violation
from tests.fakes.deciding import Deciding
from tests.fakes.inventory import mixed_host
from tests.fakes.rates import FakeRates

WALL_S = 1_795_000_000.0
PAGE_BYTES = 4096
HAPPY_PATH = (
    Trigger.STARTED,
    Trigger.PREFLIGHT_PASSED,
    Trigger.DESTINATION_PREPARED,
    Trigger.SWITCHOVER_REACHED,
    Trigger.TRANSFER_COMPLETED,
    Trigger.DESTINATION_RAN,
    Trigger.SOURCE_RELEASED,
)
RUNS_ON = {
    Phase.SWITCHOVER: Whereabouts.MOVING,
    Phase.GRANTED: Whereabouts.MOVING,
    Phase.NEEDS_OPERATOR: Whereabouts.UNKNOWN,
    Phase.COMPLETING: Whereabouts.DESTINATION,
    Phase.SUCCEEDED: Whereabouts.DESTINATION,
    Phase.GUEST_LOST: Whereabouts.NOWHERE,
}


@dataclass
class FakeVm:
    spec: VmSpec
    running: bool = False
    managed: bool = True
    epoch: int = 0
    resource_version: int = 0
    decision: StandingDecision | None = None


@dataclass
class FakeMigration:
    state: MigrationState
    generation: int = 1
    resource_version: int = 0
    rounds: list[Round] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    digest: str = ""


class FakeService(FakeRates):
    """One host with two peers, one profile, and whatever the test puts in."""

    def __init__(self, *, history: int = 1000, queue: int = 100) -> None:
        self.host_name = "host-a"
        self.peers = ["host-b", "host-c"]
        self.profiles = {"small": {"memory_mib": int, "vcpus": int, "label": str, "kvm": bool}}
        self.now_s = 1000.0
        self.stream = Stream(history=history, queue=queue, wall_s=lambda: WALL_S + self.now_s)
        self.known_vms: dict[str, FakeVm] = {}
        self.known: dict[str, FakeMigration] = {}
        self.keys: dict[str, str] = {}
        self.failures: dict[str, BaseException] = {}
        self.delays_s: dict[str, float] = {}
        self.checks = [Check("journal", True, "writable"), Check("qemu", True, "small: 10.0.2")]
        self.inventory = mixed_host()
        self.verdicts: dict[str, DeviceVerdict] = {}
        self.device_versions: dict[str, int] = {}
        self.devices_in_use: dict[str, str] = {}
        """Address -> VM."""
        self.forbidden_policies: frozenset[TrackingPolicy] = frozenset()
        self.set_inventory(self.inventory)
        self.said: list[tuple[str, str]] = []
        """(wish, by whom): what the engine would journal."""
        self._ids = itertools.count(1)

    # What a test does ---------------------------------------------------------------------------

    def add_vm(self, name: str, *, running: bool = True, managed: bool = True) -> FakeVm:
        vm = FakeVm(VmSpec(name, "small" if managed else None), running, managed)
        self.known_vms[name] = vm
        self._vm_changed(vm)
        return vm

    def set_inventory(self, inventory: Inventory) -> None:
        """The hardware is as given from now on; the real comparison says what is new."""
        changes = compare(self.inventory, self.verdicts, inventory)
        version = self.stream.publish("device.changed", changes.counts())
        self.device_versions |= dict.fromkeys(changes.touched, version)
        self.inventory, self.verdicts = inventory, dict(changes.verdicts)

    def step(self, migration_id: str, trigger: Trigger, **facts: object) -> None:
        """Something happened to a migration; the real table says what follows."""
        m = self.known[migration_id]
        self.now_s += 0.125
        event = MigrationEvent(trigger, WALL_S + self.now_s, self.now_s)
        m.state, _ = advance(m.state, replace(event, **facts))  # type: ignore[arg-type]  # by name
        if m.state.phase is Phase.SUCCEEDED:
            self.known_vms[m.state.request.vm].running = False
        self._changed(m, "migration.phase", phase=m.state.phase.value)

    def drive_to(self, migration_id: str, phase: Phase) -> None:
        """Along the happy path until `phase`."""
        m = self.known[migration_id]
        for trigger in HAPPY_PATH[m.state.events_applied :]:
            if m.state.phase is phase:
                return
            facts: dict[str, object] = {}
            if trigger is Trigger.SWITCHOVER_REACHED:
                facts["stopped_at_s"] = self.now_s
            if trigger is Trigger.DESTINATION_RAN:
                facts["resumed_at_s"] = self.now_s
            self.step(migration_id, trigger, **facts)
        assert m.state.phase is phase, m.state.phase

    def finish_cancel(self, migration_id: str) -> None:
        """The guest was seen to run on the source again."""
        if self.known[migration_id].state.phase is Phase.ROLLING_BACK:
            self.step(migration_id, Trigger.CANCEL_COMPLETED)

    def add_round(self, migration_id: str, *, remaining_bytes: int = 64 << 20) -> None:
        """One dirty sync, and the decision the real policy makes of it."""
        m = self.known[migration_id]
        self.now_s += 1.5
        number = len(m.rounds) + 1
        m.rounds.append(
            Round(number, self.now_s, 1.5, 150 << 20, remaining_bytes, 2560.0, PAGE_BYTES, 1e8, 0)
        )
        policy = m.state.policy
        deadline_at_s = m.state.timeline[0].monotonic_s + policy.deadline_s
        m.decisions.append(decide(Situation(m.rounds, policy, self.now_s, deadline_at_s)))
        self._changed(m, "migration.round", number=number, remaining_bytes=remaining_bytes)

    def _changed(self, m: FakeMigration, kind: str, **body: object) -> None:
        m.generation += 1
        body["generation"] = m.generation
        m.resource_version = self.stream.publish(
            kind, body, vm=m.state.request.vm, migration_id=m.state.id
        )

    def _vm_changed(self, vm: FakeVm) -> None:
        state = "running" if vm.running else "stopped"
        vm.resource_version = self.stream.publish("vm.changed", {"state": state}, vm=vm.spec.name)

    async def _reached(self, method: str) -> None:
        """Every call suspends once, as every real one does."""
        await asyncio.sleep(self.delays_s.get(method, 0.0))
        if error := self.failures.pop(method, None):
            raise error

    # The host and its VMs -----------------------------------------------------------------------

    def host(self) -> HostView:
        if error := self.failures.pop("host", None):
            raise error
        return HostView(
            name=self.host_name,
            migrd_version="0.1.0",
            boot_wall_s=WALL_S,
            qemu_binaries={"small": "10.0.2"},
            profiles=tuple(self.profiles),
            outgoing_slots=2,
            outgoing_active=len([m for m in self.known.values() if not m.state.is_terminal]),
            incoming_slots=2,
            incoming_active=0,
            memory_available_bytes=8 << 30,
            all_iommus_track_dirty=self.inventory.all_iommus_track_dirty,
            tls=True,
            vms=len(self.known_vms),
            peers=tuple(PeerView(p, f"https://{p}:7443", None, None, None) for p in self.peers),
            all_iommus_track_dirty_why=why_all_track(self.inventory),
            iommus=tuple(self.inventory.iommus.values()),
            kernel=self.inventory.kernel,
            devices=len(self.inventory.devices),
            inventory_trouble=tuple(self.inventory.trouble),
        )

    def devices(self) -> tuple[int, Sequence[DeviceView]]:
        views = [self.device(address) for address in sorted(self.inventory.devices)]
        return self.stream.resource_version, views

    def device(self, address: str) -> DeviceView:
        if address not in self.inventory.devices:
            raise NotFound(f"{address} is no device of this host", code="unknown_device")
        return DeviceView(
            self.inventory.devices[address],
            self.verdicts[address],
            self.device_versions[address],
            self.devices_in_use.get(address),
        )

    async def probe_device(self, address: str, *, by: str) -> DeviceView:
        await self._reached("probe_device")
        view = self.device(address)
        if not view.is_ready:
            raise Conflict(f"{address}: no VFIO driver has it", code="driver_not_bound")
        if view.in_use_by is not None:
            raise Conflict(f"{view.in_use_by} has {address}", code="device_in_use")
        self.said.append(("probe", by))
        return view

    def readiness(self) -> Sequence[Check]:
        return self.checks

    def vms(self) -> tuple[int, Sequence[VmView]]:
        return self.stream.resource_version, [self.vm(name) for name in sorted(self.known_vms)]

    def vm(self, name: str) -> VmView:
        vm = self._require_vm(name)
        active = self._active_of(name)
        return VmView(
            name=name,
            resource_version=vm.resource_version,
            spec=vm.spec,
            managed=vm.managed,
            state="running" if vm.running else "stopped",
            facts=_facts(name) if vm.running else None,
            facts_age_s=0.5 if vm.running else None,
            epoch=vm.epoch,
            migration_id=None if active is None else active.state.id,
            pid=4711 if vm.running else None,
            decision=vm.decision,
            iommufds_held=vm.running and vm.decision is not None,
        )

    @property
    def _deciding(self) -> Deciding:
        return Deciding(self.inventory, self.devices_in_use, self.forbidden_policies)

    def _require_vm(self, name: str) -> FakeVm:
        if name not in self.known_vms:
            raise NotFound(f"no VM named {name} is known here", code="unknown_vm")
        return self.known_vms[name]

    def _active_of(self, vm: str) -> FakeMigration | None:
        going_on = (m for m in self.known.values() if not m.state.is_terminal)
        return next((m for m in going_on if m.state.request.vm == vm), None)

    async def define_vm(self, spec: VmSpec, *, dry_run: bool) -> tuple[VmView, bool]:
        await self._reached("define_vm")
        self._check(spec)
        known = self.known_vms.get(spec.name)
        if known is not None and known.spec != spec and known.managed and known.running:
            raise Conflict(f"{spec.name} runs with other parameters", code="vm_running")
        vm = known or FakeVm(spec)
        decision = await self._deciding.defined(spec)
        if dry_run:
            shown = VmView(spec.name, 0, spec, True, "stopped", None, None, vm.epoch)
            shown = shown if known is None else replace(self.vm(spec.name), spec=spec)
            return replace(shown, decision=decision), known is None
        vm.spec, vm.decision = spec, decision
        self.known_vms[spec.name] = vm
        self._vm_changed(vm)
        return self.vm(spec.name), known is None

    def _check(self, spec: VmSpec) -> None:
        """As Launcher.check: each wrong parameter is named."""
        if spec.profile not in self.profiles:
            raise NotFound(f"no profile named {spec.profile}", code="unknown_profile")
        known = self.profiles[spec.profile]
        wrong = [
            Violation(f"parameters.{name}", "bad_parameter", f"{name} = {value!r} is not right")
            for name, value in spec.parameters.items()
            if name not in known or type(value) is not known[name]
        ]
        if wrong:
            raise Invalid(f"{len(wrong)} parameters are wrong", wrong)

    async def forget_vm(self, name: str) -> None:
        await self._reached("forget_vm")
        vm = self._require_vm(name)
        self._refuse_while_migrating(name)
        if vm.running:
            raise Conflict(f"{name} has a running QEMU: stop it first", code="vm_running")
        del self.known_vms[name]
        self.stream.publish("vm.changed", {"state": "forgotten"}, vm=name)

    async def start_vm(self, name: str) -> VmView:
        await self._reached("start_vm")
        vm = self._require_vm(name)
        if not vm.managed:
            raise Conflict(f"{name} was not launched by migrd", code="vm_adopted")
        vm.running = True
        self._vm_changed(vm)
        return self.vm(name)

    async def stop_vm(self, name: str) -> VmView:
        await self._reached("stop_vm")
        vm = self._require_vm(name)
        self._refuse_while_migrating(name)
        vm.running = False
        self._vm_changed(vm)
        return self.vm(name)

    async def plug_device(self, vm: str, request: PlugRequest, *, by: str) -> VmView:
        await self._reached("plug_device")
        known = self._require_vm(vm)
        self._refuse_while_migrating(vm)
        changed = await self._deciding.plugged(known.spec, known.decision, request)
        known.spec, known.decision = changed
        self.said.append(("plug", by))
        self._vm_changed(known)
        return self.vm(vm)

    async def unplug_device(self, vm: str, id_: str, *, by: str) -> VmView:
        await self._reached("unplug_device")
        known = self._require_vm(vm)
        self._refuse_while_migrating(vm)
        known.spec, known.decision = await self._deciding.unplugged(known.spec, id_)
        self.said.append(("unplug", by))
        self._vm_changed(known)
        return self.vm(vm)

    def _refuse_while_migrating(self, name: str) -> None:
        if self._active_of(name) is not None:
            raise Conflict(f"{name} is being migrated", code="already_migrating")

    # Migrations ---------------------------------------------------------------------------------

    async def what_if(self, question: WhatIf) -> PlanView:
        if question.move is not None:
            return await self.plan(question.move)
        await self._reached("plan")
        vm = self._require_vm(question.vm)
        return await self._deciding.what_if(question, vm.spec, vm.decision)

    async def plan(self, request: Request) -> PlanView:
        await self._reached("plan")
        self._parties(request)
        refusals: tuple[Refusal, ...] = ()
        if self._active_of(request.vm) is not None:
            refusals = (Refusal("already_migrating", "one is going on", "wait for it"),)
        return PlanView(
            vm=request.vm,
            destination=request.destination,
            possible=not refusals,
            refusals=refusals,
            warnings=(),
            memory_bytes=256 << 20,
            mode_choices=(Mode.PRECOPY, Mode.POSTCOPY),
            features_missing={"source": (), "destination": ("switchover_ack",)},
            predicted_total_s=2.5,
            predicted_blackout_s=0.1,
            predicted_converges=True,
            dirty_bytes_per_s=1e6,
            dirty_rate_age_s=3.0,
            decision=self._require_vm(request.vm).decision,
        )

    def _parties(self, request: Request) -> None:
        vm = self._require_vm(request.vm)
        if request.destination == self.host_name:
            what = Violation("destination", "destination_is_source", "name another host")
            raise Invalid("the destination is this host", [what])
        if request.destination not in self.peers:
            raise NotFound(
                f"no host named {request.destination} is in the roster", code="unknown_destination"
            )
        if not vm.running:
            raise Conflict(f"{request.vm} does not run", code="vm_stopped")

    async def create_migration(
        self, request: Request, *, idempotency_key: str | None, body_digest: str
    ) -> tuple[MigrationView, bool]:
        await self._reached("create_migration")
        if idempotency_key is not None and idempotency_key in self.keys:
            m = self.known[self.keys[idempotency_key]]
            if m.digest != body_digest:
                raise Invalid("this key came with another body", code="idempotency_key_reused")
            return self.migration(m.state.id), False
        self._parties(request)
        self._refuse_while_migrating(request.vm)
        vm = self._require_vm(request.vm)
        vm.epoch += 1
        id_ = str(uuid.UUID(int=next(self._ids)))
        self.now_s += 0.001
        state = begin(id_, request, vm.epoch, WALL_S + self.now_s, self.now_s)
        self.known[id_] = m = FakeMigration(state, digest=body_digest)
        if idempotency_key is not None:
            self.keys[idempotency_key] = id_
        self._changed(m, "migration.phase", phase=state.phase.value)
        self._vm_changed(vm)
        return self.migration(id_), True

    def migrations(self) -> tuple[int, Sequence[MigrationView]]:
        newest_first = sorted(
            (self.migration(id_) for id_ in self.known),
            key=lambda view: view.created_wall_s,
            reverse=True,
        )
        return self.stream.resource_version, newest_first

    def migration(self, migration_id: str) -> MigrationView:
        m = self._require(migration_id)
        state, rounds = m.state, m.rounds
        return MigrationView(
            id=state.id,
            role=Role.SOURCE,
            vm=state.request.vm,
            source=self.host_name,
            destination=state.request.destination,
            phase=state.phase.value,
            generation=m.generation,
            resource_version=m.resource_version,
            is_terminal=state.is_terminal,
            guest_runs_on=RUNS_ON.get(state.phase, Whereabouts.SOURCE),
            epoch=state.epoch,
            created_wall_s=state.timeline[0].wall_s,
            timeline=_timeline(state),
            mode=state.mode,
            policy=state.policy,
            progress=Progress(
                total_bytes=256 << 20,
                remaining_bytes=rounds[-1].remaining_bytes if rounds else None,
                rounds=len(rounds),
                qemu_status=QemuStatus.ACTIVE.value,
            ),
            estimate=estimate(rounds, state.policy),
            last_decision=m.decisions[-1] if m.decisions else None,
            cause=state.cause,
            refusals=state.refusals,
            conditions=_conditions(state),
            blackout_s=state.blackout_s,
            elapsed_s=self.now_s - state.timeline[0].monotonic_s,
            total_s=state.total_s,
            requested_by=state.request.requested_by,
            queue_position=1 if state.phase is Phase.PENDING else None,
        )

    def _require(self, migration_id: str) -> FakeMigration:
        if migration_id not in self.known:
            raise NotFound(f"no migration {migration_id} is known", code="unknown_migration")
        return self.known[migration_id]

    async def wait_newer(self, resource_version: int, *, within_s: float) -> int:
        return await self.stream.wait_newer(resource_version, within_s=within_s)

    async def rounds(self, migration_id: str) -> Sequence[Round]:
        await self._reached("rounds")
        return list(self._require(migration_id).rounds)

    async def decisions(self, migration_id: str) -> Sequence[Decision]:
        await self._reached("decisions")
        return list(self._require(migration_id).decisions)

    # Wishes -------------------------------------------------------------------------------------

    async def cancel(self, migration_id: str, *, by: str) -> Answer:
        await self._reached("cancel")
        m = self._require(migration_id)
        admission, reason = admit_cancel(m.state)
        if admission is Admission.QUEUED:
            self.step(migration_id, Trigger.CANCEL_REQUESTED, cause=Cause("cancelled", f"by {by}"))
        return self._answer(m, admission, reason, by)

    async def switch_over(self, migration_id: str, *, by: str) -> Answer:
        await self._reached("switch_over")
        m = self._require(migration_id)
        admission, reason = admit_switchover(m.state)
        if admission is Admission.QUEUED:
            self.step(migration_id, Trigger.SWITCHOVER_FORCED)
        return self._answer(m, admission, reason, by)

    async def change_policy(self, migration_id: str, policy: Policy, *, by: str) -> Answer:
        await self._reached("change_policy")
        m = self._require(migration_id)
        admission, reason = admit_policy(m.state)
        if admission is Admission.QUEUED and policy == m.state.policy:
            admission = Admission.ALREADY_SO
        if admission is Admission.QUEUED:
            self.step(migration_id, Trigger.POLICY_CHANGED, policy=policy)
        return self._answer(m, admission, reason, by)

    async def resolve(
        self, migration_id: str, resolution: Resolution, *, evidence: str, by: str
    ) -> Answer:
        await self._reached("resolve")
        m = self._require(migration_id)
        if m.state.phase is not Phase.NEEDS_OPERATOR:
            return self._answer(m, Admission.DENIED, "not_needs_operator", by)
        trigger = {
            Resolution.DESTINATION_FENCED: Trigger.DESTINATION_REFUSED,
            Resolution.DESTINATION_RUNS: Trigger.DESTINATION_RAN,
            Resolution.GUEST_LOST: Trigger.GUEST_DIED,
        }[resolution]
        self.step(migration_id, trigger, cause=Cause("resolved", evidence))
        return self._answer(m, Admission.QUEUED, "resolved", by)

    def _answer(self, m: FakeMigration, admission: Admission, reason: str, by: str) -> Answer:
        self.said.append((reason, by))
        message = f"migration {m.state.id} is {m.state.phase.value}"
        return Answer(admission, reason, message, self.migration(m.state.id))

    def events(
        self, *, after_id: int | None
    ) -> AbstractAsyncContextManager[AsyncIterator[Published]]:
        if error := self.failures.pop("events", None):
            raise error
        return self.stream.events(after_id=after_id)


def _facts(name: str) -> VmFacts:
    return VmFacts(
        vm=name,
        run_state=RunState.RUNNING,
        qemu_status=QemuStatus.NONE,
        qemu_version="10.0.2",
        machine_type="q35",
        memory_bytes=256 << 20,
        features=frozenset({Feature.MULTIFD, Feature.YANK}),
    )


def _timeline(state: MigrationState) -> tuple[TimelineEntry, ...]:
    ends = [*(entry.monotonic_s for entry in state.timeline[1:]), None]
    return tuple(
        TimelineEntry(e.phase.value, e.wall_s, e.monotonic_s, end and end - e.monotonic_s)
        for e, end in zip(state.timeline, ends, strict=True)
    )


def _conditions(state: MigrationState) -> tuple[Condition, ...]:
    if not state.cancelled:
        return ()
    return (Condition("CancelRequested", "True", "cancel_requested", "", WALL_S),)
