"""What is held of one migration away: its facts, its observations, what others are shown.

Split from `outgoing`, whose owner task alone changes the state. Steps and views read it.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Final

import structlog

from migrd.core.convergence import Decision, Estimate
from migrd.core.deadline import Deadline, taken_up
from migrd.core.facts import Round, TransferAddress, TransferSample, TransferSettings, VmSpec
from migrd.core.migration import Cause, MigrationEvent, MigrationState
from migrd.core.phases import Phase, Trigger
from migrd.core.standing import StandingDecision, with_addresses
from migrd.core.tracking import Migratability, Plan
from migrd.engine.arbiter_port import Ownership
from migrd.engine.operator_words import OperatorWords
from migrd.engine.ownership import Proof
from migrd.engine.ports import Peer, StoredRequest, Vmm
from migrd.engine.world import World
from migrd.errors import JournalError

log = structlog.get_logger(__name__)

KEEP_EVERY_S: Final = 1.0
KEPT_ROUNDS: Final = 5000
"""Rounds of one migration in the journal; later ones are counted and shown, not kept."""
ROUNDS_IN_MEMORY: Final = 2000
DECISIONS_IN_MEMORY: Final = 500


class OutgoingRecord:
    """The source's side of one migration, without the task that moves it."""

    def __init__(
        self, world: World, stored: StoredRequest, state: MigrationState, vmm: Vmm, peer: Peer
    ) -> None:
        self.world, self.stored, self.state = world, stored, state
        self.vmm, self.peer = vmm, peer
        self.generation = state.events_applied
        self.resource_version = 0
        self.sample: TransferSample | None = None
        self.rounds: deque[Round] = deque(maxlen=ROUNDS_IN_MEMORY)
        self.decisions: deque[Decision] = deque(maxlen=DECISIONS_IN_MEMORY)
        self.estimate: Estimate | None = None
        self.troubles: dict[str, tuple[str, float]] = {}
        """Standing conditions: type -> (message, since wall_s)."""
        self.words = OperatorWords()
        self.moved_at_s: float | None = None
        """Monotonic time at which bytes were last seen to move."""
        self.throttle_percent = 0
        self.qemu_downtime_s: float | None = None
        self.policy_changed = asyncio.Event()
        self.resumed = False
        """True when this task took over from an earlier daemon process."""
        self.cancel_wished = False
        self._know_nothing_of_devices()
        self.may_have_run = True
        """The source may have executed since the copy at the destination was taken. False only
        while this process has watched it stand still without a gap."""
        self.record: Ownership | None = None
        """The arbiter's, as this process last saw that it is this host's; None: not yet."""
        self.proves: Proof = lambda _: False
        """Whether this host's journal proves that a record is behind the truth."""
        self._deadline = Deadline(state.timeline[0].monotonic_s)
        self._unkept: deque[tuple[str, dict[str, object]]] = deque(maxlen=KEPT_ROUNDS)
        self.log = log.bind(vm=stored.request.vm, migration_id=stored.id)

    def _know_nothing_of_devices(self) -> None:
        """Until whoever knows the VM says what stands."""
        self.decision: Callable[[], StandingDecision | None] = lambda: None
        """About the VM's passthrough devices, as it stands here."""
        self.plan_now: Callable[[], Awaitable[Plan | None]] = self._plan_that_stands
        """The same from the facts of now. Raises MigrdError."""
        self.spec_now: Callable[[], VmSpec] = lambda: self.stored.spec
        """With the guest slots that its devices are seen in."""

    # Facts ------------------------------------------------------------------------------------

    @property
    def id(self) -> str:
        return self.stored.id

    def settings(self) -> TransferSettings:
        """How QEMU is to move the guest; the same on both sides."""
        request, policy = self.stored.request, self.state.policy
        return TransferSettings(
            downtime_limit_s=policy.downtime_limit_s,
            max_bandwidth_bytes_per_s=policy.max_bandwidth_bytes_per_s,
            multifd_channels=request.multifd_channels,
            auto_converge=True,
            postcopy=request.may_postcopy,
            tls=self.world.options.tls is not None,
            peer_name=self.peer.name,
            migration_id=self.id,
            epoch=self.state.epoch,
            arbitrated=self.world.arbiter.is_present,
        )

    def spec_there(self) -> VmSpec:
        """The VM as the destination is to launch it: its devices at their addresses there."""
        return with_addresses(self.spec_now(), self.stored.request.destination_devices)

    def plan(self) -> Plan | None:
        """What was decided about its passthrough devices; None: it has none."""
        decision = self.decision()
        return None if decision is None else decision.plan

    def copies_stopped(self) -> bool:
        """The DMA of some device is watched by nobody, so everything is copied while the guest
        stands still: QEMU takes no memory for dirty because of it (seen in QEMU 10)."""
        plan = self.plan()
        return plan is not None and plan.migratability is not Migratability.LIVE

    async def _plan_that_stands(self) -> Plan | None:
        return self.plan()

    def least(self) -> Migratability | None:
        """The VM must not be less migratable there; None: someone agreed, or it has no devices."""
        plan = self.plan()
        if plan is None or self.stored.request.accept_less_migratable:
            return None
        return plan.migratability

    def reachable(self, address: TransferAddress) -> TransferAddress:
        """Where the destination listens, at the address that the roster names for the stream."""
        host = self.world.options.migration_hosts.get(self.peer.name, address.host)
        return TransferAddress(host, address.port)

    @property
    def decided_on_revision(self) -> int | None:
        """Of the record, for a grant that is decided now."""
        return None if self.record is None else self.record.revision

    @property
    def has_left(self) -> bool:
        """It ended, and the guest has run on the destination: nothing of it is on this host."""
        passed = [entry.phase for entry in self.state.timeline]
        return self.state.is_terminal and Phase.COMPLETING in passed

    @property
    def deadline_at_s(self) -> float:
        """Monotonic time at which the policy's deadline is over."""
        return self._deadline.at_s(self.state.policy.deadline_s)

    def take_up_clocks(self) -> None:
        """After a restart, with rounds and decisions restored: the deadline counts on."""
        seen = [entry.monotonic_s for entry in self.state.timeline]
        seen += [kept[-1].at_s for kept in (self.rounds, self.decisions) if kept]
        clock = self.world.clock
        self._deadline = taken_up(
            asked_s=self.state.timeline[0].monotonic_s,
            asked_wall_s=self.stored.created_wall_s,
            last_seen_s=max(seen),
            deadline_s=self.state.policy.deadline_s,
            now_s=clock.monotonic_s(),
            now_wall_s=clock.wall_s(),
        )

    def event(self, trigger: Trigger, **facts: Any) -> MigrationEvent:
        """An event that has just happened."""
        clock = self.world.clock
        return MigrationEvent(trigger, clock.wall_s(), clock.monotonic_s(), **facts)

    def failed(self, code: str, message: str) -> MigrationEvent:
        """STEP_FAILED with its cause."""
        return self.event(Trigger.STEP_FAILED, cause=Cause(code, message))

    # Rounds and decisions ---------------------------------------------------------------------

    def keep(self, kind: str, round_number: int, row: dict[str, object]) -> None:
        """Keep an observation soon; never waits (a guest may stand still meanwhile)."""
        if round_number <= KEPT_ROUNDS:
            self._unkept.append((kind, row))

    async def _keep_observations(self) -> None:
        """Write observations while the guest runs; the journal is left alone in a switchover."""
        while True:
            await asyncio.sleep(KEEP_EVERY_S)
            if self.state.phase is Phase.PRECOPY:
                await self._keep_now()

    async def _keep_now(self) -> None:
        while self._unkept:
            kind = self._unkept[0][0]
            rows = []
            while self._unkept and self._unkept[0][0] == kind:
                rows.append(self._unkept.popleft()[1])
            try:
                await self.world.journal.add_observations(self.id, kind, rows)
            except JournalError as exc:
                self.trouble("JournalFailing", exc.message)
                return
            self.settle("JournalFailing")

    # Telling others ---------------------------------------------------------------------------

    def changed(self, kind: str, **body: object) -> None:
        """A visible change: one more generation."""
        self.generation += 1
        facts = {"phase": self.state.phase.value, "generation": self.generation, **body}
        self.resource_version = self.world.stream.publish(
            kind, facts, vm=self.stored.request.vm, migration_id=self.id
        )

    def trouble(self, type_: str, message: str) -> None:
        """A standing condition; said once, kept until settled."""
        if type_ not in self.troubles:
            self.troubles[type_] = (message, self.world.clock.wall_s())
            self.log.warning("trouble", condition=type_, message=message)
            self.changed("migration.condition", condition=type_, status="True", message=message)

    def settle(self, type_: str) -> None:
        """The condition is over."""
        if self.troubles.pop(type_, None) is not None:
            self.changed("migration.condition", condition=type_, status="False", message="")
