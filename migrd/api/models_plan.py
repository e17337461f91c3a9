"""Wire models of passthrough devices in a request, and of the decision about them."""

from collections.abc import Iterable, Mapping
from errno import errorcode
from typing import Annotated, Any, Final, Self

from pydantic import ConfigDict, Field

from migrd.api.models_devices import Address, Capability, safe, safe_or_none
from migrd.api.wire import At, WireModel, at, exact_ms, ms
from migrd.core import attach_ladder, facts, standing, tracking, tracking_plan
from migrd.core.attach_ladder import LadderAction
from migrd.core.devices import MigrationFlag
from migrd.core.tracking import CostCode, DomainFlag, Migratability, TrackingPolicy
from migrd.core.vfio_launch import GivenBy, VfioLaunch, arguments

MAX_DEVICES: Final = 64
"""Of one VM: more than a machine has slots."""
_PLACEHOLDERS: Final = 1_000_000_000
"""Where the descriptors of a launch are not open yet, numbers from here on stand for them."""

QemuId = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9._-]{0,62}$", examples=["hostdev0"])]
GuestSlot = Annotated[str, Field(pattern=r"^[01][0-9a-f](\.[0-7])?$", examples=["05.0"])]


class GivenDevice(WireModel):
    """A passthrough device that a VM is given."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"address": "0000:41:00.2"}]})

    address: Address
    """On this host."""
    id: QemuId | None = None
    """QEMU's id of it, the same on both hosts of a migration. Left out: hostdev0, hostdev1, …"""
    guest_bus: QemuId | None = None
    """The bus in the guest (a root port of the profile, `rp0`). Left out: QEMU's default."""
    guest_address: GuestSlot | None = None
    """Its slot there. Left out: the next free one, which may be another one on another host."""


def spec_devices(given: Iterable[GivenDevice]) -> tuple[facts.SpecDevice, ...]:
    """With an id for each: those that are not named get the first free ones."""
    given = tuple(given)
    taken = {device.id for device in given}
    free = (name for n in range(len(given) * 2) if (name := f"hostdev{n}") not in taken)
    return tuple(
        facts.SpecDevice(
            id=next(free) if device.id is None else device.id,
            address=device.address,
            guest_bus=device.guest_bus,
            guest_address=device.guest_address,
        )
        for device in given
    )


Devices = Annotated[tuple[GivenDevice, ...], Field(max_length=MAX_DEVICES, strict=False)]


class VmDevice(WireModel):
    """A passthrough device of a VM."""

    id: str
    address: str
    guest_bus: str | None
    guest_address: str | None

    @classmethod
    def of(cls, device: facts.SpecDevice) -> Self:
        return cls(
            id=device.id,
            address=device.address,
            guest_bus=device.guest_bus,
            guest_address=device.guest_address,
        )


class TrackingReason(WireModel):
    """Why a decision is what it is."""

    code: str
    """Stable, for programs; new words may come."""
    device: str | None
    """QEMU's id of the device; null: of the VM or its host."""
    message: str
    cure: str
    """What would change it; empty when nothing needs to."""
    lowers_to: Migratability | None
    """The best that is left while this holds; null: it only is worth knowing."""
    probe: str | None
    """Of what is unknown or estimated: the question that settles it."""

    @classmethod
    def of(cls, reason: tracking.Reason) -> Self:
        return cls(
            code=reason.code.value,
            device=safe_or_none(reason.device),
            message=safe(reason.message),
            cure=safe(reason.cure),
            lowers_to=reason.lowers_to,
            probe=None if reason.probe is None else reason.probe.value,
        )


class TrackingDomain(WireModel):
    """Devices that share one I/O page table."""

    iommu: str | None
    iommufd: str | None
    """The iommufd object whose address space it maps; null: the legacy VFIO interface."""
    devices: tuple[str, ...]
    dirty_tracking: bool
    """Tracking is requested when it is allocated."""
    flags: tuple[DomainFlag, ...]
    is_ioas: bool
    """There is no page table to make: the devices are attached to the address space itself."""

    @classmethod
    def of(cls, domain: tracking.Domain) -> Self:
        return cls(
            iommu=domain.iommu,
            iommufd=domain.iommufd,
            devices=tuple(domain.devices),
            dirty_tracking=domain.dirty_tracking,
            flags=tuple(flag for flag in DomainFlag if flag in domain.flags),
            is_ioas=domain.is_ioas,
        )


class TrackingObject(WireModel):
    """One iommufd object of QEMU: devices in different ones never share a page table."""

    id: str
    devices: tuple[str, ...]


class LadderRung(WireModel):
    """One call while a device gets its page table, and where its outcomes lead (indexes)."""

    action: LadderAction
    flags: tuple[DomainFlag, ...]
    own_domain: bool
    lost: tuple[DomainFlag, ...]
    """What was given up on the way here."""
    next_rung: int | None
    """When it works; null: the end."""
    on_errno: Mapping[str, int]

    @classmethod
    def of(cls, rung: attach_ladder.Rung) -> Self:
        return cls(
            action=rung.action,
            flags=tuple(flag for flag in DomainFlag if flag in rung.flags),
            own_domain=rung.own_domain,
            lost=tuple(flag for flag in DomainFlag if flag in rung.lost),
            next_rung=rung.then,
            on_errno={errorcode.get(n, str(n)): to for n, to in sorted(rung.on_errno.items())},
        )


class DeviceLadder(WireModel):
    """What is done for each errno while one device gets its page table."""

    device: str
    first_rung: int
    rungs: tuple[LadderRung, ...]


class TrackingCost(WireModel):
    """What dirty tracking takes away on one IOMMU instance."""

    code: CostCode
    iommu: str
    message: str
    is_paid: bool
    """Tracking is requested there; else what it would cost."""
    is_wanted: bool
    """The VM asked for what is lost."""

    @classmethod
    def of(cls, cost: tracking.Cost) -> Self:
        return cls(
            code=cost.code,
            iommu=safe(cost.iommu),
            message=safe(cost.message),
            is_paid=cost.is_paid,
            is_wanted=cost.is_wanted,
        )


class LaunchDevice(WireModel):
    """One `-device vfio-pci`."""

    id: str
    address: str
    iommufd: str | None
    given_by: GivenBy
    """fd: as an open descriptor; sysfsdev: by its path in sysfs."""


class Launch(WireModel):
    """What QEMU is told."""

    arguments: tuple[str, ...]
    """Exactly; `fd=<iommufd0>` and `fd=<hostdev0>` stand for descriptors that are opened first.
    Empty: of another host."""
    devices: tuple[LaunchDevice, ...]
    """In attach order."""

    @classmethod
    def of(cls, launch: VfioLaunch, *, is_ours: bool = True) -> Self:
        return cls(
            arguments=tuple(launch_arguments(launch)) if is_ours else (),
            devices=tuple(
                LaunchDevice(
                    id=device.id,
                    address=device.address,
                    iommufd=device.iommufd,
                    given_by=device.given_by,
                )
                for device in launch.devices
            ),
        )


def launch_arguments(launch: VfioLaunch) -> list[str]:
    """QEMU's arguments, with a name in the place of each descriptor."""
    objects = launch.iommufds if launch.iommufds_by_fd else ()
    names = [*objects, *(device.id for device in launch.devices)]
    numbers = range(_PLACEHOLDERS, _PLACEHOLDERS + len(names))
    addresses = [device.address for device in launch.devices]
    fds = dict(zip(addresses, numbers[len(objects) :], strict=True))
    said = arguments(launch, numbers[: len(objects)], fds)
    for number, name in zip(numbers, names, strict=True):
        said = [text.replace(f"fd={number}", f"fd=<{name}>") for text in said]
    return said


class DeviceEvidence(WireModel):
    """What the decision knew of one device."""

    id: str
    address: str
    driver: str | None
    iommu: str | None
    iommu_dirty_tracking: Capability
    dma_logging: Capability
    migration: Capability
    migration_flags: tuple[MigrationFlag, ...]
    stop_copy_bytes: int | None

    @classmethod
    def of(cls, known: standing.DeviceEvidence) -> Self:
        return cls(
            id=known.id,
            address=safe(known.address),
            driver=safe_or_none(known.driver),
            iommu=safe_or_none(known.iommu),
            iommu_dirty_tracking=Capability.of(known.iommu_dirty_tracking),
            dma_logging=Capability.of(known.dma_logging),
            migration=Capability.of(known.migration),
            migration_flags=tuple(known.migration_flags),
            stop_copy_bytes=known.stop_copy_bytes,
        )


class TrackingDecision(WireModel):
    """Whether dirty tracking is asked for, for which devices, and what the VM can be promised."""

    policy: TrackingPolicy
    migratability: Migratability
    """The verdict: what is proven, whatever the unknowns turn out to be."""
    migratability_at_best: Migratability
    """If every unknown turns out well; better than the verdict only with probes to do."""
    reasons: tuple[TrackingReason, ...]
    """Limits first, the worst first; then what is worth knowing."""
    refused: tuple[TrackingReason, ...]
    """Why the VM must not be started like this, all at once; empty when it may."""
    domains: tuple[TrackingDomain, ...]
    trackers: Mapping[str, tracking_plan.Tracker]
    """QEMU id -> who watches its DMA."""
    attach_order: tuple[str, ...]
    iommufds: tuple[TrackingObject, ...]
    """The partition: who may share a page table."""
    ladders: tuple[DeviceLadder, ...]
    launch: Launch | None
    """null: refused."""
    downtime_floor_ms: float
    """No switchover of this VM is shorter; a lower limit is refused."""
    expected_blackout_ms: float | None
    """Of stop_and_copy: how long the guest would stand still; null: not so, or not known."""
    costs: tuple[TrackingCost, ...]
    downgraded: tuple[str, ...]
    """Devices whose page table the kernel refused tracking when QEMU tried."""
    evidence: tuple[DeviceEvidence, ...]
    probed: bool
    """The kernel was asked about each device for it."""
    decided_at: At | None
    """null: of another host."""

    @classmethod
    def of(cls, known: standing.StandingDecision) -> Self:
        return cls(
            **_plan(known.plan),
            launch=None if known.plan.launch is None else Launch.of(known.plan.launch),
            downgraded=tuple(known.downgraded),
            evidence=tuple(DeviceEvidence.of(one) for one in known.evidence),
            probed=known.probed,
            decided_at=at(known.decided_wall_s),
        )

    @classmethod
    def of_plan(cls, plan: tracking.Plan) -> Self:
        """Another host's: what it said of it."""
        return cls(
            **_plan(plan),
            launch=None if plan.launch is None else Launch.of(plan.launch, is_ours=False),
            downgraded=(),
            evidence=(),
            probed=False,
            decided_at=None,
        )


def decision_or_none(known: standing.StandingDecision | None) -> TrackingDecision | None:
    return None if known is None else TrackingDecision.of(known)


def _plan(plan: tracking.Plan) -> dict[str, Any]:
    return {
        "policy": plan.policy,
        "migratability": plan.migratability,
        "migratability_at_best": plan.migratability_at_best,
        "reasons": tuple(TrackingReason.of(reason) for reason in plan.reasons),
        "refused": tuple(TrackingReason.of(reason) for reason in plan.refused),
        "domains": tuple(TrackingDomain.of(domain) for domain in plan.domains),
        "trackers": dict(plan.trackers),
        "attach_order": tuple(plan.attach_order),
        "iommufds": tuple(
            TrackingObject(id=one.id, devices=tuple(one.devices)) for one in plan.iommufds
        ),
        "ladders": tuple(
            DeviceLadder(
                device=device,
                first_rung=ladder.at,
                rungs=tuple(LadderRung.of(rung) for rung in ladder.rungs),
            )
            for device, ladder in plan.ladders.items()
        ),
        "downtime_floor_ms": exact_ms(plan.downtime_floor_s),
        "expected_blackout_ms": ms(plan.expected_blackout_s),
        "costs": tuple(TrackingCost.of(cost) for cost in plan.costs),
    }
