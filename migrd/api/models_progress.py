"""Wire models of how a migration stands: phases, figures, rounds, decisions.

Times on the engine's monotonic clock become `elapsed_ms`: milliseconds since the migration was
asked for. Wall-clock times are for people.
"""

from enum import StrEnum
from typing import Annotated, Final, Self

from pydantic import Field

from migrd.api.models_words import OperatorWord
from migrd.api.wire import At, WireModel, at, exact_ms, finite, ms
from migrd.core import convergence, facts, harvest_round, migration
from migrd.core.convergence import Verdict
from migrd.core.handover import DestinationPhase
from migrd.core.harvest_round import ReadOutcome, Tracker
from migrd.core.migration import Mode, WhenNotConverging
from migrd.core.phases import Phase
from migrd.engine import service
from migrd.engine.service import Role, Whereabouts

ALL_PHASES: Final = tuple(dict.fromkeys(p.value for p in (*Phase, *DestinationPhase)))
"""The words of both sides; `preparing` and `refused` are words of both."""

PhaseWord = Annotated[str, Field(json_schema_extra={"enum": list(ALL_PHASES)})]


class ConditionStatus(StrEnum):
    """As Kubernetes has it."""

    TRUE = "True"
    FALSE = "False"
    UNKNOWN = "Unknown"

    @classmethod
    def of(cls, word: str) -> "ConditionStatus":
        return cls(word) if word in ("True", "False") else cls.UNKNOWN


class Policy(WireModel):
    """How the guest is being moved."""

    when_not_converging: WhenNotConverging
    downtime_limit_ms: float
    """Longest acceptable blackout."""
    deadline_s: float
    """Seconds after the request; then it is rolled back."""
    max_bandwidth_bytes_per_s: int
    """0: unlimited."""
    max_throttle_percent: int

    @classmethod
    def of(cls, policy: migration.Policy) -> Self:
        return cls(
            when_not_converging=policy.when_not_converging,
            downtime_limit_ms=exact_ms(policy.downtime_limit_s),
            deadline_s=policy.deadline_s,
            max_bandwidth_bytes_per_s=policy.max_bandwidth_bytes_per_s,
            max_throttle_percent=policy.max_throttle_percent,
        )


class Refusal(WireModel):
    """One reason of preflight not to begin, or one warning."""

    code: str
    message: str
    cure: str
    """What to do about it; may be empty."""

    @classmethod
    def of(cls, refusal: migration.Refusal) -> Self:
        return cls(code=refusal.code, message=refusal.message, cure=refusal.cure)


class Cause(WireModel):
    """Why a migration did not simply succeed."""

    code: str
    message: str


class Condition(WireModel):
    """One standing fact, as Kubernetes clients know them."""

    type: str
    status: ConditionStatus
    reason: str
    message: str
    since: At

    @classmethod
    def of(cls, condition: service.Condition) -> Self:
        return cls(
            type=condition.type,
            status=ConditionStatus.of(condition.status),
            reason=condition.reason,
            message=condition.message,
            since=at(condition.since_wall_s),
        )


class TimelineEntry(WireModel):
    """A phase, when it was entered, and how long it lasted."""

    phase: PhaseWord
    entered_at: At
    duration_ms: float | None
    """null while it lasts, and for the last phase."""

    @classmethod
    def of(cls, entry: service.TimelineEntry) -> Self:
        return cls(phase=entry.phase, entered_at=at(entry.wall_s), duration_ms=ms(entry.duration_s))


class Progress(WireModel):
    """The newest figures of the transfer; null where QEMU has not said."""

    total_bytes: int | None
    transferred_bytes: int | None
    remaining_bytes: int | None
    dirty_bytes_per_s: float | None
    bandwidth_bytes_per_s: float | None
    throttle_percent: int
    rounds: int
    qemu_status: str | None
    """QEMU's own word (MigrationStatus), not ours: `phase` is."""
    postcopy_requests: int | None
    stalled_ms: float | None
    """How long nothing has moved; null while it moves."""

    @classmethod
    def of(cls, progress: service.Progress) -> Self:
        return cls(
            total_bytes=progress.total_bytes,
            transferred_bytes=progress.transferred_bytes,
            remaining_bytes=progress.remaining_bytes,
            dirty_bytes_per_s=finite(progress.dirty_bytes_per_s),
            bandwidth_bytes_per_s=finite(progress.bandwidth_bytes_per_s),
            throttle_percent=progress.throttle_percent,
            rounds=progress.rounds,
            qemu_status=progress.qemu_status,
            postcopy_requests=progress.postcopy_requests,
            stalled_ms=ms(progress.stalled_s),
        )


class Estimate(WireModel):
    """What the rounds so far say; null: they do not say yet."""

    predicted_blackout_ms: float | None
    """If the switchover began now."""
    predicted_remaining_ms: float | None
    """Until the guest runs on the destination; null also when it will not, as things are."""
    converges: bool | None
    dirty_bytes_per_s: float | None
    bandwidth_bytes_per_s: float | None

    @classmethod
    def of(cls, estimate: convergence.Estimate) -> Self:
        return cls(
            predicted_blackout_ms=ms(estimate.predicted_blackout_s),
            predicted_remaining_ms=ms(estimate.predicted_remaining_s),
            converges=estimate.converges,
            dirty_bytes_per_s=finite(estimate.dirty_bytes_per_s),
            bandwidth_bytes_per_s=finite(estimate.bandwidth_bytes_per_s),
        )


class Decision(WireModel):
    """One verdict with its inputs."""

    verdict: Verdict
    reason: str
    """Stable code."""
    message: str
    round_number: int
    elapsed_ms: float
    estimate: Estimate
    throttle_percent: int | None
    """With `throttle`: the percentage that was set."""

    @classmethod
    def of(cls, decision: convergence.Decision, begun_s: float) -> Self:
        return cls(
            verdict=decision.verdict,
            reason=decision.reason,
            message=decision.message,
            round_number=decision.round_number,
            elapsed_ms=exact_ms(decision.at_s - begun_s),
            estimate=Estimate.of(decision.estimate),
            throttle_percent=decision.throttle_percent,
        )


class RoundSource(WireModel):
    """What one source of dirty pages told in a round."""

    source: str
    tracker: Tracker
    """Who saw the writes. iommu, device: DMA. pagemap: a process. vmm: the VMM's own log."""
    outcome: ReadOutcome
    """Other than `read`: its log was lost, and all its pages were taken for dirty."""
    reason: str | None
    """Why its log was lost."""
    dirty_pages: int
    """Pages of 4 KiB that it told of."""
    dirty_pages_per_s: float | None
    """Since its previous read."""
    page_size_bytes: int
    """What one write makes dirty."""
    amplification: float
    """At most so many times too many bytes are told of."""
    duration_ms: float

    @classmethod
    def of(cls, read: harvest_round.SourceRead) -> Self:
        return cls(
            source=read.source,
            tracker=read.tracker,
            outcome=read.outcome,
            reason=read.reason,
            dirty_pages=read.dirty_pages,
            dirty_pages_per_s=finite(read.dirty_pages_per_s),
            page_size_bytes=read.page_size_bytes,
            amplification=read.amplification,
            duration_ms=exact_ms(read.took_s),
        )


class Round(WireModel):
    """One dirty sync of QEMU, or one harvest of migrd, and the transfer that led to it."""

    number: int
    elapsed_ms: float
    """At the end of the round, since the migration was asked for."""
    duration_ms: float
    transferred_bytes: int
    remaining_bytes: int
    """Left to send right after the sync: what the next round has to move."""
    dirty_pages_per_s: float | None
    page_size_bytes: int
    dirty_bytes_per_s: float | None
    bandwidth_bytes_per_s: float | None
    throttle_percent: int
    sources: tuple[RoundSource, ...]
    """Where migrd harvests; empty where QEMU does."""

    @classmethod
    def of(cls, round_: facts.Round, begun_s: float) -> Self:
        dirty = finite(round_.dirty_pages_per_s)
        return cls(
            number=round_.number,
            elapsed_ms=exact_ms(round_.at_s - begun_s),
            duration_ms=exact_ms(round_.duration_s),
            transferred_bytes=round_.transferred_bytes,
            remaining_bytes=round_.remaining_bytes,
            dirty_pages_per_s=dirty,
            page_size_bytes=round_.page_size_bytes,
            dirty_bytes_per_s=None if dirty is None else dirty * round_.page_size_bytes,
            bandwidth_bytes_per_s=finite(round_.bandwidth_bytes_per_s),
            throttle_percent=round_.throttle_percent,
            sources=tuple(map(RoundSource.of, round_.sources)),
        )


class Migration(WireModel):
    """One migration as this host knows it."""

    id: str
    role: Role
    """Which side this host is."""
    vm: str
    source: str
    destination: str
    phase: PhaseWord
    """The source's words where `role` is `source`, else the destination's."""
    generation: int
    """Grows by one with every change a client can see; it is also the ETag."""
    resource_version: int
    """The daemon's counter at that change: what a watcher hands back."""
    is_terminal: bool
    guest_runs_on: Whereabouts
    """Where the guest runs, as far as this host can prove."""
    epoch: int
    created_at: At
    timeline: tuple[TimelineEntry, ...]
    mode: Mode
    policy: Policy | None
    """null on the destination, which is not told."""
    progress: Progress
    estimate: Estimate | None
    last_decision: Decision | None
    cause: Cause | None
    refusals: tuple[Refusal, ...]
    conditions: tuple[Condition, ...]
    blackout_ms: float | None
    """How long the guest ran nowhere: an upper bound, from the source's STOP to the destination's
    RESUME being known here; null until then."""
    qemu_downtime_ms: float | None
    """QEMU's own figure."""
    elapsed_ms: float
    """Age of the migration when it was looked at; ages with the clock, so the ETag ignores it."""
    total_ms: float | None
    """From the request to the last phase; null while it goes on."""
    next_step: str | None
    """What a person should do now, when there is something."""
    requested_by: str
    queue_position: int | None
    resolutions: tuple[OperatorWord, ...]
    """What operators have said of it to this host, oldest first; kept as long as the migration."""

    @classmethod
    def of(cls, view: service.MigrationView) -> Self:
        decision, estimate, cause = view.last_decision, view.estimate, view.cause
        return cls(
            id=view.id,
            role=view.role,
            vm=view.vm,
            source=view.source,
            destination=view.destination,
            phase=view.phase,
            generation=view.generation,
            resource_version=view.resource_version,
            is_terminal=view.is_terminal,
            guest_runs_on=view.guest_runs_on,
            epoch=view.epoch,
            created_at=at(view.created_wall_s),
            timeline=tuple(TimelineEntry.of(entry) for entry in view.timeline),
            mode=view.mode,
            policy=None if view.policy is None else Policy.of(view.policy),
            progress=Progress.of(view.progress),
            estimate=None if estimate is None else Estimate.of(estimate),
            last_decision=None if decision is None else Decision.of(decision, begun_s(view)),
            cause=None if cause is None else Cause(code=cause.code, message=cause.message),
            refusals=tuple(Refusal.of(refusal) for refusal in view.refusals),
            conditions=tuple(Condition.of(condition) for condition in view.conditions),
            blackout_ms=ms(view.blackout_s),
            qemu_downtime_ms=ms(view.qemu_downtime_s),
            elapsed_ms=exact_ms(view.elapsed_s),
            total_ms=ms(view.total_s),
            next_step=view.next_step,
            requested_by=view.requested_by,
            queue_position=view.queue_position,
            resolutions=tuple(OperatorWord.of(word) for word in view.resolutions),
        )


def begun_s(view: service.MigrationView) -> float:
    """The monotonic time that `elapsed_ms` counts from."""
    return view.timeline[0].monotonic_s if view.timeline else 0.0


class MigrationList(WireModel):
    """Migrations, newest first."""

    resource_version: int
    """Hand it back with `watch` to wait for anything newer."""
    items: tuple[Migration, ...]
    next_page_token: str | None
    """null: this was the last page."""


class RoundList(WireModel):
    """The rounds of a migration, oldest first."""

    items: tuple[Round, ...]
    next_page_token: str | None


class DecisionList(WireModel):
    """The decisions of a migration, oldest first."""

    items: tuple[Decision, ...]
    next_page_token: str | None
