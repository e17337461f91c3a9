"""Snapshots for clients, made from what the engine's tasks hold. Nothing here changes anything."""

from typing import Final

from migrd.core.convergence import Estimate
from migrd.core.facts import RunState, TransferSample
from migrd.core.handover import DestinationPhase
from migrd.core.migration import Mode
from migrd.core.phases import Phase
from migrd.engine.arbitrated import ELSEWHERE
from migrd.engine.device_holding import DeviceHolding
from migrd.engine.incoming import Incoming
from migrd.engine.operator_words import OperatorWords
from migrd.engine.outgoing import Outgoing
from migrd.engine.ownership import UNREACHABLE
from migrd.engine.service import (
    Condition,
    MigrationView,
    Progress,
    ResolutionView,
    Role,
    TimelineEntry,
    VmView,
    Whereabouts,
)
from migrd.engine.vms import Entry
from migrd.engine.world import World

STALL_SHOWN_S: Final = 1.0

RUNS_ON: Final = {
    Phase.SWITCHOVER: Whereabouts.MOVING,
    Phase.GRANTED: Whereabouts.MOVING,
    Phase.NEEDS_OPERATOR: Whereabouts.UNKNOWN,
    Phase.COMPLETING: Whereabouts.DESTINATION,
    Phase.SUCCEEDED: Whereabouts.DESTINATION,
    Phase.GUEST_LOST: Whereabouts.NOWHERE,
}
RUNS_ON_SEEN_THERE: Final = {
    DestinationPhase.PREPARING: Whereabouts.SOURCE,
    DestinationPhase.RECEIVING: Whereabouts.SOURCE,
    DestinationPhase.LOADED: Whereabouts.MOVING,
    DestinationPhase.OWNED: Whereabouts.MOVING,
    DestinationPhase.STARTING: Whereabouts.MOVING,
    DestinationPhase.RUNNING: Whereabouts.DESTINATION,
    DestinationPhase.REFUSED: Whereabouts.SOURCE,
}


def of_outgoing(m: Outgoing, queue_position: int | None = None) -> MigrationView:
    """The source's view of a migration."""
    state, now_s = m.state, m.world.clock.monotonic_s()
    total_s = state.total_s
    return MigrationView(
        id=m.id,
        role=Role.SOURCE,
        vm=m.stored.request.vm,
        source=m.world.options.host,
        destination=m.stored.request.destination,
        phase=state.phase.value,
        generation=m.generation,
        resource_version=m.resource_version,
        is_terminal=state.is_terminal,
        guest_runs_on=_whereabouts(m),
        epoch=state.epoch,
        created_wall_s=m.stored.created_wall_s,
        timeline=_timeline([(e.phase.value, e.wall_s, e.monotonic_s) for e in state.timeline]),
        mode=state.mode,
        policy=state.policy,
        progress=_progress(m, now_s),
        estimate=None if state.is_terminal else m.estimate,
        last_decision=m.decisions[-1] if m.decisions else None,
        cause=state.cause,
        refusals=state.refusals,
        conditions=_conditions(m),
        blackout_s=state.blackout_s,
        qemu_downtime_s=m.qemu_downtime_s,
        elapsed_s=total_s if total_s is not None else now_s - state.timeline[0].monotonic_s,
        total_s=total_s,
        next_step=next_step(m),
        requested_by=m.stored.request.requested_by,
        queue_position=queue_position,
        resolutions=_resolutions(m.words, is_open=state.phase is Phase.NEEDS_OPERATOR),
    )


def _resolutions(words: OperatorWords, *, is_open: bool) -> tuple[ResolutionView, ...]:
    return tuple(
        ResolutionView(word.stored, word.carried_out_wall_s, is_open and word is words.pending)
        for word in words.given
    )


def _whereabouts(m: Outgoing) -> Whereabouts:
    phase = m.state.phase
    if phase is Phase.ROLLING_BACK:
        running = m.sample is not None and m.sample.run_state is RunState.RUNNING
        return Whereabouts.SOURCE if running else Whereabouts.MOVING
    return RUNS_ON.get(phase, Whereabouts.SOURCE)


def _timeline(entries: list[tuple[str, float, float]]) -> tuple[TimelineEntry, ...]:
    ends = [entry[2] for entry in entries[1:]] + [None]
    return tuple(
        TimelineEntry(phase, wall_s, at_s, None if end is None else end - at_s)
        for (phase, wall_s, at_s), end in zip(entries, ends, strict=True)
    )


def _progress(m: Outgoing, now_s: float) -> Progress:
    sample, guess = m.sample, m.estimate or Estimate(None, None, None, None, None)
    if sample is None:
        return Progress(rounds=len(m.rounds))
    still_s = None if m.moved_at_s is None else now_s - m.moved_at_s
    stalled = m.state.phase is Phase.PRECOPY and still_s is not None and still_s > STALL_SHOWN_S
    return Progress(
        total_bytes=sample.total_bytes,
        transferred_bytes=sample.transferred_bytes,
        remaining_bytes=0 if m.state.phase is Phase.SUCCEEDED else sample.remaining_bytes,
        dirty_bytes_per_s=guess.dirty_bytes_per_s,
        bandwidth_bytes_per_s=_either(sample, guess),
        throttle_percent=max(sample.throttle_percent or 0, m.throttle_percent),
        rounds=m.rounds[-1].number if m.rounds else 0,
        qemu_status=sample.qemu_status.value,
        postcopy_requests=sample.postcopy_requests,
        stalled_s=still_s if stalled else None,
    )


def _either(sample: TransferSample, guess: Estimate) -> float | None:
    if sample.bandwidth_bytes_per_s:
        return sample.bandwidth_bytes_per_s
    return guess.bandwidth_bytes_per_s


def _conditions(m: Outgoing) -> tuple[Condition, ...]:
    standing = [
        Condition(type_, "True", _snake(type_), message, since)
        for type_, (message, since) in sorted(m.troubles.items())
    ]
    if m.cancel_wished and not m.state.is_terminal:
        now = m.world.clock.wall_s()
        standing.append(Condition("CancelRequested", "True", "cancel_requested", "", now))
    return tuple(standing)


def _snake(camel: str) -> str:
    return "".join("_" + c.lower() if c.isupper() else c for c in camel).lstrip("_")


def next_step(m: Outgoing) -> str | None:
    """What a person should do now; the on-call operator reads this first."""
    request, here = m.stored.request, m.world.options.host
    there, vm = request.destination, request.vm
    match m.state.phase:
        case Phase.NEEDS_OPERATOR:
            return _operators_part(m)
        case Phase.GUEST_LOST if m.has_left:
            return f"{vm} died with its move. See to its QEMU on {there}, then start it there."
        case Phase.GUEST_LOST if not m.vmm.is_dead:
            return (
                f"{vm} runs nowhere; its stopped QEMU (pid {m.vmm.pid}) still stands on {here}. "
                f"End that first: migrd stop {vm} (or where it was started, when migrd did not "
                f"launch it); then start it where you want it: migrd start {vm}"
            )
        case Phase.GUEST_LOST:
            return f"{vm} runs nowhere. Start it again where you want it: migrd start {vm}"
        case Phase.ROLLED_BACK:
            return f"{vm} runs on {here}. Mend what the cause names, then migrate again."
        case Phase.REFUSED:
            cures = [refusal.cure for refusal in m.state.refusals if refusal.cure]
            return "; ".join(dict.fromkeys(cures)) or None
        case Phase.COMPLETING if "PostcopyPaused" in m.troubles:
            return (
                f"Mend the network between {here} and {there}: {vm} waits for memory that is "
                f"still on {here}. Kill neither QEMU."
            )
        case Phase.COMPLETING if "PostcopyFailed" in m.troubles:
            return (
                f"Memory of {vm} was lost on the way, and it stands still on {there} as soon as "
                f"it needs it. When it is of no more use, end its QEMU there (migrd vms on "
                f"{there} has the pid): this then ends as guest_lost, and {vm} can be started anew."
            )
        case _:
            return None


def _operators_part(m: Outgoing) -> str:
    """What would settle a migration in needs_operator."""
    here, there, vm = m.world.options.host, m.stored.request.destination, m.stored.request.vm
    if m.state.granted and m.vmm.is_dead:
        return (
            f"Find out whether {vm} runs on {there}: the QEMU on {here} is dead. When migrd on "
            f"{there} can be brought back, do that: this ends by itself. If {there} is dead for "
            f"good, {vm} runs nowhere: migrd resolve {m.id} guest_lost --evidence '...'."
        )
    if m.state.cause is not None and m.state.cause.code == "destination_silent":
        return (
            f"Bring migrd on {there} back: {vm} has left for it by postcopy, and this ends by "
            "itself then. Kill neither QEMU: each may hold memory that the other one lacks. If "
            f"{there} is gone for good, so is {vm}: migrd resolve {m.id} guest_lost "
            "--evidence '...'."
        )
    if m.state.granted:
        return (
            f"Find out whether {vm} runs on {there}. When migrd on {there} can be brought "
            f"back, do that: this ends by itself. If {there} is dead for good and powered off, "
            f"prove it and say so: migrd resolve {m.id} destination_fenced --evidence '...' "
            f"(the guest then goes on from the copy on {here})."
        )
    if m.state.fenced and not m.troubles.keys().isdisjoint((UNREACHABLE, ELSEWHERE)):
        return (
            f"Bring the arbiter back (migrd doctor): {vm} goes on here as soon as its record says "
            "what was proven. The word need not be said again."
        )
    if m.vmm.is_dead:
        return (
            f"The QEMU on {here} is dead; {there} may hold a whole copy of {vm}, stopped. When "
            f"{vm} did nothing after that copy was taken (see when it died, and its disk), say "
            f"so: migrd resolve {m.id} use_destination_copy --evidence '...'; else give it up: "
            f"migrd resolve {m.id} guest_lost --evidence '...'."
        )
    return (
        f"Look at the VM's QEMU on {here} (pid {m.vmm.pid}): it does not say where "
        "the guest stands. migrd keeps trying; kill nothing on either side before that."
    )


def of_incoming(i: Incoming) -> MigrationView:
    """The destination's view of a migration."""
    now_s = i.world.clock.monotonic_s()
    sample, phase = i.sample, i.state.phase
    # dead while it was started: nothing is left to do here, and a person's word may change it yet
    over = i.is_over and phase is not DestinationPhase.STARTING
    elapsed_s = (i.entered[-1][2] if over else now_s) - i.entered[0][2]
    return MigrationView(
        id=i.id,
        role=Role.DESTINATION,
        vm=i.stored.spec.name,
        source=i.stored.source,
        destination=i.world.options.host,
        phase=phase.value,
        generation=i.generation,
        resource_version=i.resource_version,
        is_terminal=over,
        guest_runs_on=_whereabouts_there(i),
        epoch=i.state.epoch,
        created_wall_s=i.stored.created_wall_s,
        timeline=_timeline([(p.value, wall_s, at_s) for p, wall_s, at_s in i.entered]),
        mode=i.state.mode,
        policy=None,
        progress=Progress(
            total_bytes=sample.total_bytes if sample else None,
            transferred_bytes=sample.transferred_bytes if sample else None,
            qemu_status=sample.qemu_status.value if sample else None,
        ),
        cause=None,
        conditions=_notes(i),
        elapsed_s=elapsed_s,
        total_s=elapsed_s if over else None,
        next_step=_next_step_there(i),
        requested_by=i.stored.source,
        resolutions=_resolutions(i.words, is_open=not over),
    )


def _whereabouts_there(i: Incoming) -> Whereabouts:
    phase = i.state.phase
    if phase is DestinationPhase.REFUSED and i.state.mode is Mode.POSTCOPY:
        return Whereabouts.UNKNOWN  # it may have left the source; that one knows what came of it
    if i.vmm_died and phase is not DestinationPhase.REFUSED:  # else taken back by the source
        unsure = phase is DestinationPhase.STARTING
        return Whereabouts.UNKNOWN if unsure else Whereabouts.NOWHERE
    return RUNS_ON_SEEN_THERE[phase]


def _notes(i: Incoming) -> tuple[Condition, ...]:
    said, standing = i.state.reason or i.note, []
    if said is not None:
        type_ = "Refused" if i.state.reason else "NotGoingOn"
        standing.append(Condition(type_, "True", _snake(type_), said, i.entered[-1][1]))
    troubles = ((UNREACHABLE, i.arbiter_trouble), ("JournalFailing", i.journal_trouble))
    for type_, trouble in troubles:
        if trouble is not None and not i.is_over:
            standing.append(Condition(type_, "True", _snake(type_), *trouble))
    return tuple(standing)


def _next_step_there(i: Incoming) -> str | None:
    if i.state.phase is DestinationPhase.STARTING and i.vmm_died:
        return (
            f"The QEMU here died while {i.stored.spec.name} was being started. See migration "
            f"{i.id} on {i.stored.source}: an operator decides there."
        )
    waits = i.state.phase in (DestinationPhase.LOADED, DestinationPhase.OWNED)
    if waits and (word := i.words.pending) is not None:
        return (
            f"Nothing more need be said: {word.stored.resolution} is carried out as soon as the "
            "arbiter's record allows it. What stands against that is in the conditions."
        )
    if waits and i.note is not None:
        return (
            f"Bring migrd on {i.stored.source} back: this ends by itself then. If that host is "
            f"gone for good, this copy may be the last: migrd resolve {i.id} "
            "use_destination_copy --evidence '...' runs it here, guest_lost throws it away."
        )
    if i.state.phase is DestinationPhase.RECEIVING and i.note is not None and i.vmm is not None:
        return (
            f"Bring migrd on {i.stored.source} back: this ends by itself then. If that host is "
            f"gone for good, end process {i.vmm.pid} here: the guest has not come."
        )
    return None


def of_vm(entry: Entry, world: World, holding: DeviceHolding) -> VmView:
    """A VM as it is now."""
    age_s = None
    if entry.facts_at_s is not None:
        age_s = world.clock.monotonic_s() - entry.facts_at_s
    vmm = entry.vmm
    return VmView(
        name=entry.spec.name,
        resource_version=entry.resource_version,
        spec=entry.spec,
        managed=entry.managed,
        state=entry.state,
        facts=entry.facts,
        facts_age_s=age_s,
        epoch=entry.epoch,
        migration_id=entry.migration_id,
        pid=None if vmm is None or vmm.is_dead else vmm.pid,
        serial_path=None if vmm is None else world.launcher.serial_path(vmm),
        decision=entry.decision,
        dma_rates=() if vmm is None else holding.rates_of(vmm.instance),
        iommufds_held=vmm is not None and holding.is_held(vmm.instance),
    )
