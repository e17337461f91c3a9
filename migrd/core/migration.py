"""One migration as its source sees it: state, events, and the pure `advance` between them.

    (state, event) --advance--> (new state, instructions)

- An event is a fact that is already true; it is journalled before its instructions are carried out.
- Each phase has exactly one instruction, and each instruction may be begun again from the start at
  any time: it looks at both QEMUs before it does anything. So recovery after a restart is: fold the
  journalled events through `advance`, then carry out the instruction of the phase that comes out.
- An instruction ends in exactly one event (the engine's runner sees to it).

Times: `wall_s` is for people; `monotonic_s` (CLOCK_MONOTONIC, one boot) is for durations.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from migrd.core.facts import TransferAddress
from migrd.core.phases import INSTRUCTION_OF, TERMINAL, Instruction, Phase, Trigger, next_phase


class WhenNotConverging(StrEnum):
    """What to do when the rounds say that the downtime limit will not be met as things are."""

    WAIT = "wait"
    """Go on precopying; the deadline decides."""
    THROTTLE = "throttle"
    """Slow the vCPUs just as far as the rounds call for."""
    POSTCOPY = "postcopy"
    """Move the guest first and fetch the rest; only for VMs without passthrough devices."""
    GIVE_UP = "give_up"
    """Roll back as soon as it is plain, without waiting for the deadline."""


@dataclass(frozen=True)
class Policy:
    """What a client asked for, and may change while the migration runs."""

    when_not_converging: WhenNotConverging = WhenNotConverging.WAIT
    downtime_limit_s: float = 0.3
    """Longest acceptable blackout."""
    deadline_s: float = 3600.0
    """From the request: roll back when the guest has not moved by then."""
    max_bandwidth_bytes_per_s: int = 0
    """0 means unlimited."""
    max_throttle_percent: int = 80


@dataclass(frozen=True)
class Request:
    """One migration as asked for."""

    vm: str
    destination: str
    policy: Policy = field(default_factory=Policy)
    multifd_channels: int = 0
    allow_postcopy: bool = False
    """Prepare both sides so that postcopy can be chosen later (implied by the policy)."""
    requested_by: str = ""
    destination_devices: Mapping[str, str] = field(default_factory=dict)
    """QEMU id of a passthrough device -> address of the one that takes its place there; those not
    named have the same address there."""
    accept_less_migratable: bool = False
    """Someone has agreed that the VM may be less migratable there than it is here."""

    @property
    def may_postcopy(self) -> bool:
        return self.allow_postcopy or self.policy.when_not_converging is WhenNotConverging.POSTCOPY


class Mode(StrEnum):
    """How the memory travels when the guest moves."""

    PRECOPY = "precopy"
    POSTCOPY = "postcopy"


@dataclass(frozen=True)
class Cause:
    """Why a migration did not simply succeed: a stable code and a sentence with the next step."""

    code: str
    message: str


@dataclass(frozen=True)
class Refusal:
    """One reason of preflight not to begin."""

    code: str
    message: str
    """What is wrong, with the values found."""
    cure: str = ""


@dataclass(frozen=True)
class MigrationEvent:
    """Something that happened to a migration; `trigger` says what, the rest with which facts."""

    trigger: Trigger
    wall_s: float
    monotonic_s: float
    cause: Cause | None = None
    refusals: tuple[Refusal, ...] = ()
    address: TransferAddress | None = None
    """With DESTINATION_PREPARED."""
    arbitrated: bool = False
    """With DESTINATION_PREPARED: an arbiter's record says who runs the guest, on both sides."""
    run_guest: bool | None = None
    """With PREFLIGHT_PASSED: the guest was running, so it is to run afterwards."""
    stopped_at_s: float | None = None
    """With SWITCHOVER_REACHED: monotonic time of the source's STOP."""
    resumed_at_s: float | None = None
    """With DESTINATION_RAN: monotonic time when its RESUME was known here."""
    source_died: bool = False
    """With TRANSFER_COMPLETED: the source process is dead, the destination holds the only copy."""
    decided_on_revision: int | None = None
    """With TRANSFER_COMPLETED, arbitrated: of the record, which the grant is to change."""
    policy: Policy | None = None
    """With POLICY_CHANGED."""
    by_operator: bool = False
    """A person's word, which has its place only while it is asked for."""


@dataclass(frozen=True)
class PhaseEntry:
    """When a phase was entered."""

    phase: Phase
    wall_s: float
    monotonic_s: float


@dataclass(frozen=True)
class MigrationState:
    """Everything that decides what happens next to one migration."""

    id: str
    request: Request
    epoch: int
    phase: Phase
    timeline: tuple[PhaseEntry, ...]
    policy: Policy
    mode: Mode = Mode.PRECOPY
    run_guest: bool = True
    address: TransferAddress | None = None
    cause: Cause | None = None
    refusals: tuple[Refusal, ...] = ()
    granted: bool = False
    """GRANT may have been sent: only the destination's word, or proof, brings the guest back."""
    undoing: bool = False
    """A roll-back was decided: it is still the aim while the operator is needed."""
    cancelled: bool = False
    source_died: bool = False
    arbitrated: bool = False
    decided_on_revision: int | None = None
    fenced: bool = False
    """Given back by a person's word: the arbiter's record has to say so before the guest runs."""
    switchover_forced: bool = False
    stopped_at_s: float | None = None
    blackout_s: float | None = None
    events_applied: int = 0

    @property
    def is_terminal(self) -> bool:
        return self.phase in TERMINAL

    @property
    def total_s(self) -> float | None:
        """From the request to the terminal phase; None while it goes on."""
        if not self.is_terminal:
            return None
        return self.timeline[-1].monotonic_s - self.timeline[0].monotonic_s


def begin(
    id_: str, request: Request, epoch: int, wall_s: float, monotonic_s: float
) -> MigrationState:
    """The state of a migration that has just been asked for."""
    return MigrationState(
        id=id_,
        request=request,
        epoch=epoch,
        phase=Phase.PENDING,
        timeline=(PhaseEntry(Phase.PENDING, wall_s, monotonic_s),),
        policy=request.policy,
    )


def advance(
    state: MigrationState, event: MigrationEvent
) -> tuple[MigrationState, tuple[Instruction, ...]]:
    """Apply one event. Raises IllegalTransition, and changes nothing, where it has no place."""
    phase = next_phase(state.phase, event.trigger)
    new = _note_facts(state, event)
    if phase is state.phase:
        return new, ()
    entry = PhaseEntry(phase, event.wall_s, event.monotonic_s)
    new = replace(new, phase=phase, timeline=(*new.timeline, entry))
    instruction = INSTRUCTION_OF.get(phase)
    return new, () if instruction is None else (instruction,)


def fold(state: MigrationState, events: Sequence[MigrationEvent]) -> MigrationState:
    """Replay journalled events; raises IllegalTransition on a journal that makes no sense."""
    for event in events:
        state, _ = advance(state, event)
    return state


def _note_facts(state: MigrationState, event: MigrationEvent) -> MigrationState:
    """What the event says, kept; the phase is not touched here."""
    new = replace(state, events_applied=state.events_applied + 1)
    if event.cause is not None:
        new = replace(new, cause=event.cause)
    match event.trigger:
        case Trigger.PREFLIGHT_PASSED:
            return replace(new, run_guest=event.run_guest is not False)
        case Trigger.PREFLIGHT_REFUSED:
            return replace(new, refusals=event.refusals)
        case Trigger.DESTINATION_PREPARED:
            return replace(new, address=event.address, arbitrated=event.arbitrated)
        case Trigger.SWITCHOVER_REACHED:
            return replace(new, stopped_at_s=event.stopped_at_s)
        case Trigger.POSTCOPY_CHOSEN:
            return replace(new, mode=Mode.POSTCOPY)
        case Trigger.POLICY_CHANGED:
            return replace(new, policy=event.policy or new.policy)
        case Trigger.SWITCHOVER_FORCED:
            return replace(new, switchover_forced=True)
        case Trigger.TRANSFER_COMPLETED:
            said = event.cause if event.by_operator else None
            new = replace(new, granted=True, fenced=False, source_died=event.source_died)
            return replace(new, cause=said, decided_on_revision=event.decided_on_revision)
        case Trigger.DESTINATION_RAN:
            return replace(new, blackout_s=_blackout_s(new, event.resumed_at_s), cause=None)
        case Trigger.DESTINATION_REFUSED:
            return replace(new, granted=False, undoing=True, fenced=event.by_operator)
        case Trigger.STEP_FAILED:
            return replace(new, undoing=True)
        case Trigger.CANCEL_REQUESTED:
            return replace(new, undoing=True, cancelled=True)
        case _:
            return new


def _blackout_s(state: MigrationState, resumed_at_s: float | None) -> float | None:
    if state.stopped_at_s is None or resumed_at_s is None or not state.run_guest:
        return None
    return max(0.0, resumed_at_s - state.stopped_at_s)
