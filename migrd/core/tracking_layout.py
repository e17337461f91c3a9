"""Where each device goes and what is asked for it: flags, domains, trackers, ladders, prices.

The policy decides about `flags` only: what a domain is allocated with. Where devices go
(`partition`) follows from what they can, not from the policy, because QEMU requests tracking
wherever the IOMMU can, whatever it is told.

One domain for each iommufd object, IOMMU instance and set of flags. An unknown `cap` is requested
where the policy allows: the ladder finds out, and marks the device when it cannot.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from migrd.core.attach_ladder import Ladder, build
from migrd.core.devices import Answer, IommuKind
from migrd.core.partition import Partition, partition
from migrd.core.tracking_facts import (
    Traits,
    excluded_by_tracking,
    traits_of,
    uses_legacy_interface,
)
from migrd.core.tracking_plan import Cost, CostCode, Domain, Tracker
from migrd.core.tracking_request import DomainFlag, TrackingPolicy, TrackingRequest

YES, NO, UNKNOWN = Answer.YES, Answer.NO, Answer.UNKNOWN
TRACKING = DomainFlag.DIRTY_TRACKING


@dataclass(frozen=True)
class Layout:
    """A request with everything that was worked out of it, before the verdict."""

    request: TrackingRequest
    is_legacy: bool
    traits: dict[str, Traits]
    """By QEMU id, sorted by it."""
    partition: Partition
    flags: dict[str, frozenset[DomainFlag]]

    @property
    def attach_order(self) -> tuple[str, ...]:
        """QEMU ids. On the legacy interface nothing depends on it."""
        return self.partition.attach_order or tuple(self.traits)

    @cached_property
    def has_p2p(self) -> bool:
        """The P2P rule cannot strike: all that migrate have it, or one alone migrates."""
        moving = [one for one in self.traits.values() if one.migrates is not NO]
        return len(moving) < 2 or not any(one.p2p is NO for one in moving)

    def is_requested(self, one: Traits) -> bool:
        return TRACKING in self.flags[one.id]

    def tracker(self, one: Traits) -> Tracker:
        """Who is proven to watch it."""
        by_iommu = self.is_requested(one) and one.cap is YES
        by_device = one.log is YES and not one.viommu_blocks
        if by_iommu and by_device:
            return Tracker.BOTH
        if by_iommu:
            return Tracker.IOMMU
        return Tracker.DEVICE if by_device else Tracker.NONE


def lay_out(request: TrackingRequest) -> Layout:
    is_legacy = uses_legacy_interface(request)
    traits = traits_of(request, legacy=is_legacy)
    parts = Partition((), True, frozenset(traits)) if is_legacy else partition(traits, request)
    flags = _flags(traits, request, is_legacy=is_legacy)
    return Layout(request, is_legacy, traits, parts, flags)


def _flags(
    traits: dict[str, Traits], request: TrackingRequest, *, is_legacy: bool
) -> dict[str, frozenset[DomainFlag]]:
    everything = list(traits.values())
    requests = {
        TrackingPolicy.NEVER: False,
        TrackingPolicy.ALWAYS: True,
    }.get(request.policy, all(can_be_tracked(one, request) for one in everything))
    flags = {}
    for one in everything:
        wanted = request.wants if one.is_behind_iommu and not is_legacy else frozenset()
        if requests and asks_iommu(one, request):
            lost = excluded_by_tracking(one, wanted)
            wanted = (wanted - lost) | {TRACKING}
        flags[one.id] = wanted
    return flags


def asks_iommu(one: Traits, request: TrackingRequest) -> bool:
    """Its IOMMU may be asked for tracking: it can, or may be able to, and what the VM wants besides
    stays possible (or the policy puts tracking first)."""
    if one.cap is NO:
        return False
    return request.policy is TrackingPolicy.ALWAYS or not excluded_by_tracking(one, request.wants)


def can_be_tracked(one: Traits, request: TrackingRequest) -> bool:
    """Not proven that nothing can watch it."""
    return asks_iommu(one, request) or (one.log is not NO and not one.viommu_blocks)


def domains(layout: Layout) -> tuple[Domain, ...]:
    """In attach order of their first devices."""
    found: dict[tuple[object, ...], list[str]] = {}
    homes = {id_: part.id for part in layout.partition.objects for id_ in part.devices}
    for id_ in layout.attach_order:
        one = layout.traits[id_]
        instance = one.instance if one.is_behind_iommu else None
        found.setdefault((homes.get(id_), instance, layout.flags[id_]), []).append(id_)
    return tuple(_domain(layout, homes.get(ids[0]), ids) for ids in found.values())


def _domain(layout: Layout, iommufd: str | None, ids: list[str]) -> Domain:
    first = layout.traits[ids[0]]
    return Domain(
        first.vm_device.device.iommu if first.is_behind_iommu else None,
        iommufd,
        tuple(ids),
        layout.flags[first.id],
        is_ioas=not first.is_behind_iommu,
    )


def ladders(layout: Layout, made: tuple[Domain, ...]) -> dict[str, Ladder]:
    """Of all devices, by QEMU id."""
    match layout.request.policy:
        case TrackingPolicy.REQUIRE:
            may_lose: tuple[DomainFlag, ...] = ()
        case TrackingPolicy.ALWAYS:
            may_lose = (DomainFlag.NEST_PARENT, DomainFlag.PASID, TRACKING)
        case _:
            may_lose = (TRACKING,)
    return {
        id_: build(id_, domain.flags, is_first=not domain.is_ioas and n == 0, may_lose=may_lose)
        for domain in made
        for n, id_ in enumerate(domain.devices)
    }


_PRICES = {
    IommuKind.AMD_VI: (
        (CostCode.AMD_V1_PAGE_TABLE, None, "a page table with dirty tracking is of format v1"),
        (CostCode.AMD_NO_PASID, DomainFlag.PASID, "dirty tracking excludes PASID"),
    ),
    IommuKind.ARM_SMMU_V3: (
        (CostCode.SMMU_V3_NO_NESTING, DomainFlag.NEST_PARENT, "dirty tracking excludes nesting"),
    ),
}
"""Kernel: amd/iommu.c, arm-smmu-v3.c. Intel VT-d has none."""


def costs(layout: Layout) -> Iterator[Cost]:
    """What tracking costs, or would cost, on each instance below the VM's devices."""
    paid = {one.instance for one in layout.traits.values() if layout.is_requested(one)}
    below = {
        one.instance: one.iommu
        for one in layout.traits.values()
        if one.is_behind_iommu and one.cap is not NO and one.iommu is not None
    }
    for instance, iommu in sorted(below.items()):
        for code, lost, message in _PRICES.get(iommu.kind, ()):
            yield Cost(
                code,
                instance,
                f"{instance}: {message}",
                is_paid=instance in paid,
                is_wanted=lost in layout.request.wants,
            )
