"""The steps before anything moves: preflight touches nothing, preparing touches both QEMUs."""

import asyncio
from dataclasses import dataclass, replace
from typing import Final

from migrd.core.facts import VmFacts, VmSpec
from migrd.core.migration import MigrationEvent, Refusal, Request
from migrd.core.phases import Trigger
from migrd.core.preflight import DestinationFacts, Preflight, SourceFacts, check
from migrd.core.standing import placed_launch, with_addresses
from migrd.core.tracking import Plan
from migrd.core.vfio_launch import VfioLaunch
from migrd.engine.arbitrated import own_record
from migrd.engine.outgoing import Outgoing
from migrd.engine.ownership import Proof, elsewhere
from migrd.engine.ports import DestinationView, HostProfile, Peer, Vmm
from migrd.engine.threads import in_thread
from migrd.engine.world import World
from migrd.errors import (
    ArbiterUnavailable,
    Conflict,
    MigrdError,
    PeerError,
    PeerTimedOut,
    PeerUnreachable,
    VmmDied,
    VmmError,
)

RESTART_S: Final = 10.0
"""So long the other daemon may be away while it is asked to prepare; the guest runs meanwhile."""
RETRY_S: Final = 0.25


@dataclass(frozen=True)
class Candidate:
    """The VM that is to leave, as this host has it."""

    spec: VmSpec
    epoch: int
    vmm: Vmm
    plan: Plan | None
    """The decision about its passthrough devices that stands here."""
    told: VfioLaunch | None = None
    """What its QEMU would be told of them, of a what-if; None: what it has been told."""
    proves: Proof = lambda _: False
    """Whether this host's journal proves that the arbiter's record is behind the truth."""


async def judge(
    world: World, request: Request, candidate: Candidate, peer: Peer
) -> tuple[Preflight, VmFacts | None, HostProfile | None]:
    """Ask both sides and compare. Raises VmmDied; everything else becomes a refusal."""
    spec = candidate.spec
    profile, facts, digest, disowned = await asyncio.gather(
        _destination(peer, with_addresses(spec, request.destination_devices)),  # takes longest
        _source(candidate.vmm),
        _digest(world, candidate),
        _by_record(world, candidate),
        return_exceptions=True,
    )
    if isinstance(disowned, BaseException):
        raise disowned
    refusals: list[Refusal] = [*disowned]
    if isinstance(facts, VmmDied):
        raise facts
    if isinstance(facts, BaseException):
        refusals.append(_refusal("source_unreachable", facts, "look at the VM's QEMU"))
    if isinstance(profile, BaseException):
        code = "destination_unreachable" if isinstance(profile, PeerError) else "internal_error"
        if isinstance(profile, MigrdError) and not isinstance(
            profile, PeerUnreachable | TimeoutError
        ):
            code = profile.code if profile.code != "peer_timed_out" else code
        refusals.append(_refusal(code, profile, f"see to migrd on {peer.name}: migrd doctor"))
    if isinstance(facts, BaseException) or isinstance(profile, BaseException):
        left = None if isinstance(facts, BaseException) else facts
        right = None if isinstance(profile, BaseException) else profile
        return Preflight(tuple(refusals), ()), left, right
    if isinstance(digest, BaseException):
        raise digest
    found = check(request, _source_facts(world, candidate, facts, digest), _as_facts(profile))
    return replace(found, refusals=(*found.refusals, *disowned)), facts, profile


def _source_facts(
    world: World, candidate: Candidate, facts: VmFacts, digest: str | None
) -> SourceFacts:
    return SourceFacts(
        world.options.host,
        facts,
        candidate.spec,
        digest,
        candidate.epoch,
        world.options.tls is not None,
        candidate.plan,
        is_as_it_is=candidate.told is None,
        arbiter=world.arbiter.state.kind,
    )


async def _by_record(world: World, candidate: Candidate) -> tuple[Refusal, ...]:
    """What the arbiter, if there is one, has against it."""
    if not world.arbiter.is_present:
        return ()
    vm = candidate.spec.name
    try:
        record = await world.arbiter.read(vm)
    except ArbiterUnavailable as exc:
        cure = "bring the arbiter back (migrd doctor), then ask again; the guest runs on meanwhile"
        return (Refusal(exc.code, exc.message, cure),)
    if record is None or record.owner == world.options.host or candidate.proves(record):
        return ()
    conflict = elsewhere(vm, record)
    return (Refusal(conflict.code, conflict.message, f"ask migrd on {record.owner}"),)


async def _digest(world: World, candidate: Candidate) -> str | None:
    """Of what the guest sees here; None for a VM that others launched."""
    spec, check = candidate.spec, world.launcher.check
    if spec.profile is None:
        return None
    if not spec.devices:
        return await in_thread(check, spec)
    planned = None if candidate.plan is None else candidate.plan.launch
    told = candidate.told or world.launcher.devices_of(candidate.vmm) or planned
    return await in_thread(check, spec, placed_launch(told, spec))


async def _source(vmm: Vmm) -> VmFacts:
    return await vmm.facts()


async def _destination(peer: Peer, spec: VmSpec) -> HostProfile:
    return await peer.preflight(spec)


def _refusal(code: str, exc: BaseException, cure: str) -> Refusal:
    if not isinstance(exc, MigrdError):
        raise exc
    return Refusal(code, exc.message, cure)


def _as_facts(profile: HostProfile) -> DestinationFacts:
    return DestinationFacts(
        host=profile.host,
        qemu_version=profile.qemu_version,
        features=profile.features,
        launch_digest=profile.launch_digest,
        incoming_slots_free=profile.incoming_slots_free,
        memory_available_bytes=profile.memory_available_bytes,
        vm_present=profile.vm_present,
        last_epoch=profile.last_epoch,
        tls=profile.tls,
        refusals=profile.refusals,
        plan=profile.plan,
        arbiter=profile.arbiter,
    )


async def check_preflight(m: Outgoing) -> MigrationEvent:
    """Carry out CHECK_PREFLIGHT."""
    limit_s = m.world.options.preflight_deadline_s
    try:
        async with asyncio.timeout(limit_s):
            plan = await m.plan_now()
            epoch = m.state.epoch - 1
            candidate = Candidate(m.spec_now(), epoch, m.vmm, plan, proves=m.proves)
            result, facts, _ = await judge(m.world, m.stored.request, candidate, m.peer)
    except TimeoutError:
        late = Refusal("preflight_timed_out", f"preflight was not over within {limit_s:.0f} s")
        return m.event(Trigger.PREFLIGHT_REFUSED, refusals=(late,))
    except VmmDied:
        raise
    except MigrdError as exc:
        refusal = Refusal(exc.code, exc.message)
        return m.event(Trigger.PREFLIGHT_REFUSED, refusals=(refusal,))
    if not result.passed:
        return m.event(Trigger.PREFLIGHT_REFUSED, refusals=result.refusals)
    return m.event(Trigger.PREFLIGHT_PASSED, run_guest=facts is None or facts.is_running)


async def _prepare_there(m: Outgoing) -> DestinationView:
    """Asked again while the other daemon restarts: asking twice launches once."""
    give_up_at_s = m.world.clock.monotonic_s() + RESTART_S
    there, least = m.spec_there(), m.least()
    while True:
        try:
            view = await m.peer.prepare(m.id, m.state.epoch, there, m.settings(), least=least)
        except (PeerUnreachable, PeerTimedOut) as exc:
            if m.world.clock.monotonic_s() > give_up_at_s:
                raise
            m.trouble("DestinationUnreachable", exc.message)
            await asyncio.sleep(RETRY_S)
        else:
            m.settle("DestinationUnreachable")
            return view


async def prepare_destination(m: Outgoing) -> MigrationEvent:
    """Carry out PREPARE_DESTINATION: a waiting QEMU there, capabilities here, at the same time."""
    limit_s = m.world.options.prepare_deadline_s
    there = asyncio.create_task(_prepare_there(m), name=f"prepare-{m.id[:8]}")
    record = asyncio.create_task(_claim(m), name=f"claim-{m.id[:8]}")
    try:
        async with asyncio.timeout(limit_s):
            await m.vmm.prepare_outgoing(m.settings(), m.world.options.tls)
            view = await there
            await record
    except TimeoutError:
        return m.failed("prepare_timed_out", f"{m.peer.name} was not ready within {limit_s:.0f} s")
    except (PeerError, VmmError, ArbiterUnavailable, Conflict) as exc:
        if isinstance(exc, VmmDied):
            raise
        return m.failed(exc.code, exc.message)
    finally:
        for task in (there, record):
            task.cancel()
        await asyncio.wait([there, record])
    return _prepared(m, view)


async def _claim(m: Outgoing) -> None:
    if m.world.arbiter.is_present:
        await own_record(m)


def _prepared(m: Outgoing, view: DestinationView) -> MigrationEvent:
    arbitrated = m.world.arbiter.is_present
    if view.arbitrated is not arbitrated:
        which = "no arbiter" if arbitrated else "an arbiter, and this host none"
        return m.failed("arbiter_differs", f"{m.peer.name} has {which}: configure the same")
    if view.address is None:
        why = view.reason or f"it is {view.phase.value}"
        return m.failed("destination_refused", f"{m.peer.name} did not get ready: {why}")
    return m.event(
        Trigger.DESTINATION_PREPARED, address=m.reachable(view.address), arbitrated=arbitrated
    )
