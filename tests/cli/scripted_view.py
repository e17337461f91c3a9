"""The host, VMs and migrations of the scripted engine, as clients see them."""

import asyncio
import time
from dataclasses import dataclass, field
from typing import Final

from migrd.core.convergence import Decision, estimate
from migrd.core.devices import Inventory
from migrd.core.facts import Feature, QemuStatus, Round, RunState, VmFacts, VmSpec
from migrd.core.migration import MigrationState, Refusal
from migrd.core.phases import Phase
from migrd.engine.device_verdict import why_all_track
from migrd.engine.service import (
    HostView,
    MigrationView,
    PeerView,
    Progress,
    Role,
    TimelineEntry,
    VmView,
    Whereabouts,
)

MIB: Final = 2**20
ODD: Final = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202egnp\nsecond line [bold red]markup[/] é日本"
"""Clears the screen, sets the title, speaks C1, turns text around, breaks the line, is markup."""


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


def vm_of(spec: VmSpec, state: str, *, version: int, memory_bytes: int) -> VmView:
    """A VM that migrd has launched from a profile, or will."""
    facts = VmFacts(
        vm=spec.name,
        run_state=RunState.RUNNING,
        qemu_status=QemuStatus.NONE,
        qemu_version="10.0.2 (Debian 1:10.0.2+ds-2)",
        machine_type="pc-q35-10.0",
        memory_bytes=memory_bytes,
        features=frozenset(Feature),
    )
    return VmView(
        name=spec.name,
        resource_version=version,
        spec=spec,
        managed=True,
        state=state,
        facts=facts if state == "running" else None,
        facts_age_s=0.2 if state == "running" else None,
        epoch=1,
        pid=4711 if state == "running" else None,
    )


def host_of(inventory: Inventory, *, outgoing_active: int, vms: int) -> HostView:
    """This host, with one peer that is up, one that is down and one never asked."""
    return HostView(
        name="host-a",
        migrd_version="0.1.0",
        boot_wall_s=time.time() - 86_400,
        qemu_binaries={"standard": "10.0.2", "small": None},
        profiles=("small", "standard"),
        outgoing_slots=4,
        outgoing_active=outgoing_active,
        incoming_slots=4,
        incoming_active=0,
        memory_available_bytes=51_539_607_552,
        all_iommus_track_dirty=inventory.all_iommus_track_dirty,
        all_iommus_track_dirty_why=why_all_track(inventory),
        iommus=tuple(inventory.iommus.values()),
        kernel=inventory.kernel,
        devices=len(inventory.devices),
        inventory_trouble=tuple(inventory.trouble),
        tls=True,
        vms=vms,
        peers=(
            PeerView("host-b", "https://192.0.2.2:7443", True, time.time() - 3, None, "0.1.0"),
            PeerView("host-c", "https://192.0.2.3:7443", False, time.time() - 64, ODD),
            PeerView("host-d", "https://192.0.2.4:7443", None, None, None),
        ),
    )


def refusals_of(destination: str) -> tuple[Refusal, ...]:
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


def view_of(running: Running) -> MigrationView:
    """The migration as clients see it."""
    state, request = running.state, running.state.request
    begun_s, entered_s = state.timeline[0].monotonic_s, state.timeline[-1].monotonic_s
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
        timeline=_timeline(state),
        mode=state.mode,
        policy=state.policy,
        progress=_progress(running),
        estimate=estimate(running.rounds, state.policy),
        last_decision=running.decisions[-1] if running.decisions else None,
        cause=state.cause,
        refusals=state.refusals,
        blackout_s=state.blackout_s,
        elapsed_s=(entered_s if state.is_terminal else time.monotonic()) - begun_s,
        total_s=state.total_s,
        next_step=ODD if odd else _NEXT_STEP.get(state.phase),
        requested_by=ODD if odd else "uid:0/root",
    )


def _timeline(state: MigrationState) -> tuple[TimelineEntry, ...]:
    left_s: list[float | None] = [*(entry.monotonic_s for entry in state.timeline[1:]), None]
    return tuple(
        TimelineEntry(
            entry.phase.value,
            entry.wall_s,
            entry.monotonic_s,
            None if until_s is None else until_s - entry.monotonic_s,
        )
        for entry, until_s in zip(state.timeline, left_s, strict=True)
    )


def _progress(running: Running) -> Progress:
    begun = running.sent_bytes > 0
    return Progress(
        total_bytes=4096 * MIB if begun else None,
        transferred_bytes=running.sent_bytes or None,
        remaining_bytes=running.remaining_bytes if begun else None,
        dirty_bytes_per_s=400.0 * MIB if running.rounds else None,
        bandwidth_bytes_per_s=1000.0 * MIB if begun else None,
        throttle_percent=running.throttle_percent,
        rounds=len(running.rounds),
        qemu_status="active",
    )


_NEXT_STEP: Final = {
    Phase.GUEST_LOST: "start web1 anew from its disks",
    Phase.ROLLED_BACK: "look at the destination's log, then migrate again",
}
