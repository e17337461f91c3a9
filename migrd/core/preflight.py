"""Facts of both hosts in, every reason not to begin out: all at once, nothing touched yet.

A refusal is certain (the migration cannot work); a warning is worth knowing. What could not be
found out is a refusal only where going on would be unsafe.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from migrd.core.convergence import FIXED_COST_S
from migrd.core.device_preflight import of_devices
from migrd.core.facts import (
    REQUIRED_FEATURES,
    Feature,
    QemuStatus,
    RunState,
)
from migrd.core.migration import Refusal, Request, WhenNotConverging
from migrd.core.preflight_facts import DestinationFacts as DestinationFacts
from migrd.core.preflight_facts import SourceFacts as SourceFacts

MOVABLE: Final = frozenset({RunState.RUNNING, RunState.PAUSED, RunState.PRELAUNCH})
"""Run states in which a guest may be moved. After an internal or I/O error its state is not to be
trusted; after shutdown there is nothing to move."""

WORD: Final = {True: "required", False: "off"}
BUSY: Final = frozenset(
    {
        QemuStatus.SETUP,
        QemuStatus.ACTIVE,
        QemuStatus.CANCELLING,
        QemuStatus.PRE_SWITCHOVER,
        QemuStatus.DEVICE,
        QemuStatus.WAIT_UNPLUG,
        QemuStatus.COLO,
    }
)


@dataclass(frozen=True)
class Preflight:
    """The result."""

    refusals: tuple[Refusal, ...]
    warnings: tuple[Refusal, ...]

    @property
    def passed(self) -> bool:
        return not self.refusals


def check(request: Request, source: SourceFacts, destination: DestinationFacts) -> Preflight:
    """Every reason not to begin. Pure."""
    devices = of_devices(request, source, destination)
    refusals = (
        *_of_request(request, source),
        *_of_source(request, source),
        *_of_destination(request, source, destination),
        *devices.refusals,
    )
    warnings = (*_warnings(source, destination), *devices.warnings)
    return Preflight(tuple(dict.fromkeys(refusals)), warnings)


def _of_request(request: Request, source: SourceFacts) -> Iterator[Refusal]:
    if request.destination == source.host:
        yield Refusal("destination_is_source", f"the VM is on {source.host} already")
    floor_s = FIXED_COST_S
    if source.plan is None and request.policy.downtime_limit_s < floor_s:  # else the plan says it
        yield Refusal(
            "downtime_limit_below_floor",
            f"downtime_limit_ms = {request.policy.downtime_limit_s * 1000:.0f} is below what a "
            f"switchover costs by itself ({floor_s * 1000:.0f} ms): precopy would never end",
            f"allow at least {floor_s * 1000:.0f} ms",
        )
    devices = source.vm.passthrough_devices
    if devices and request.may_postcopy:
        yield Refusal(
            "postcopy_with_passthrough",
            f"QEMU refuses postcopy for a VM with passthrough devices ({', '.join(devices)})",
            "choose another when_not_converging: wait, throttle or give_up",
        )
    if request.multifd_channels and request.may_postcopy:  # QEMU 7.2 takes it, untried
        yield Refusal(
            "multifd_with_postcopy",
            f"QEMU does no postcopy with multifd_channels = {request.multifd_channels}",
            "leave out multifd_channels, or choose another when_not_converging",
        )


def _of_source(request: Request, source: SourceFacts) -> Iterator[Refusal]:
    vm = source.vm
    if vm.run_state not in MOVABLE:
        yield Refusal(
            "guest_not_movable",
            f"the guest's run state is {vm.run_state.value}; it can be moved while "
            + ", ".join(sorted(MOVABLE)),
            "bring the guest back to running first",
        )
    if vm.qemu_status in BUSY or vm.qemu_status.is_postcopy:
        yield Refusal(
            "qemu_already_migrating",
            f"its VMM is in a migration that is not ours (status {vm.qemu_status.value})",
            "let it end, or cancel it, where it was started",
        )
    for reason in vm.blocked_reasons:
        yield Refusal("qemu_blocks", f"its VMM says: {reason}", "unplug the device it names")
    if vm.may_lose_dirty_pages:
        yield Refusal(
            "qemu_loses_dirty_pages",
            f"QEMU {vm.qemu_version} loses dirty pages of a TCG guest whose RAM is a multiple of "
            "64 pages: the guest would go on with old memory",
            "launch it by a migrd profile, give it 8 KiB more RAM, or use QEMU 9.0 or newer",
        )
    if source.spec.profile is None:
        yield Refusal(
            "no_launch_profile",
            f"nobody has said how {vm.vm} is to be launched on another host",
            f"name the profile that fits it: PUT /v1/vms/{vm.vm} (migrd vms define)",
        )
    missing = _missing(request, vm.features, source.tls)
    yield from _lacks("source", source.host, vm.qemu_version, missing)


def _of_destination(
    request: Request, source: SourceFacts, destination: DestinationFacts
) -> Iterator[Refusal]:
    host = destination.host
    for code, message in destination.refusals:
        yield Refusal(code, f"{host}: {message}")
    if destination.vm_present:
        yield Refusal(
            "vm_exists_at_destination",
            f"{host} already has a VM named {request.vm}",
            "stop and forget it there if it is not wanted",
        )
    if destination.last_epoch > source.epoch:
        yield Refusal(
            "stale_epoch",
            f"{host} has seen this VM at epoch {destination.last_epoch}, here it is "
            f"{source.epoch}: this host's copy may be an old one",
            "find out where the guest ran last before anything else",
        )
    if destination.tls != source.tls:
        yield Refusal(
            "tls_mismatch",
            f"migration.tls is {WORD[source.tls]} here and {WORD[destination.tls]} on {host}",
            "set migration.tls alike on both hosts",
        )
    if destination.arbiter != source.arbiter:
        yield Refusal(
            "arbiter_differs",
            f"arbiter.kind is {source.arbiter} here and {destination.arbiter} on {host}: they "
            "would not agree on who runs the guest",
            "configure the same arbiter on both hosts",
        )
    if destination.incoming_slots_free < 1:
        yield Refusal(
            "destination_full",
            f"{host} has no incoming slot free",
            "wait for a migration to end there, or raise migration.incoming_slots",
        )
    yield from _of_memory(source, destination)
    yield from _of_launch(request, source, destination)


def _of_memory(source: SourceFacts, destination: DestinationFacts) -> Iterator[Refusal]:
    need, have = source.vm.memory_bytes, destination.memory_available_bytes
    if need is not None and have is not None and have < need:
        yield Refusal(
            "destination_out_of_memory",
            f"the guest has {need >> 20} MiB, {destination.host} has {have >> 20} MiB available",
            "free memory there, or choose another destination",
        )


def _of_launch(
    request: Request, source: SourceFacts, destination: DestinationFacts
) -> Iterator[Refusal]:
    if source.spec.profile is None or destination.refusals:
        return  # said already; without a profile there is no QEMU to compare with
    ours, theirs = source.launch_digest, destination.launch_digest
    if ours is not None and theirs is not None and ours != theirs:
        yield Refusal(
            "profile_differs",
            f"profile {source.spec.profile} gives another machine on {destination.host} "
            f"({theirs[:12]}) than here ({ours[:12]})",
            "install the same profile, and the same firmware, on both hosts",
        )
    missing = _missing(request, destination.features, destination.tls)
    yield from _lacks(
        "destination", destination.host, destination.qemu_version or "unknown", missing
    )


def wanted_features(request: Request, *, tls: bool) -> frozenset[Feature]:
    """What both QEMUs must offer for this request."""
    wanted = set(REQUIRED_FEATURES)
    if request.multifd_channels:
        wanted.add(Feature.MULTIFD)
    if request.may_postcopy:
        wanted.add(Feature.POSTCOPY)
    if request.policy.when_not_converging is WhenNotConverging.THROTTLE:
        wanted.add(Feature.AUTO_CONVERGE)
    if tls:
        wanted.add(Feature.TLS)
    return frozenset(wanted)


def _missing(request: Request, features: frozenset[str], tls: bool) -> list[str]:
    return sorted(wanted_features(request, tls=tls) - features)


def _lacks(side: str, host: str, version: str, missing: list[str]) -> Iterator[Refusal]:
    if missing:
        yield Refusal(
            f"{side}_lacks_feature",
            f"the VMM on {host} ({version}) does not offer: {', '.join(missing)}",
            "use a newer one there, or leave out what needs it",
        )


def _warnings(source: SourceFacts, destination: DestinationFacts) -> Iterator[Refusal]:
    if destination.memory_available_bytes is None:
        yield Refusal("memory_unknown", f"{destination.host} could not say how much memory it has")
    if destination.qemu_version and destination.qemu_version != source.vm.qemu_version:
        yield Refusal(
            "qemu_versions_differ",
            f"QEMU {source.vm.qemu_version} here, {destination.qemu_version} on "
            f"{destination.host}: it works within one versioned machine type",
        )
