"""Which devices share an iommufd object, and in which order QEMU attaches them.

The rules (`partition_rules`) are about pairs that must not meet, so the parts are a colouring of
the graph of these pairs. With known facts it has at most two colours, and taking the devices in the
order capable without a log, capable with one, the rest, finds the least number; with unknowns,
first fit. As few as possible, because each object maps the guest's memory again.

Within a container capable devices go first, so that no plain page table is there to capture them.
Devices of one IOMMU group stay together: the kernel gives a group to one iommufd alone.

When the VM may have fewer objects than that (`max_iommufds`, H15), untracked devices join the
others and QEMU is left to block them, which is safe; what would corrupt silently (H2) is refused.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from migrd.core.devices import Answer
from migrd.core.partition_rules import Kind, captures, loses_all_dirty, loses_dirt, memory_of
from migrd.core.tracking_facts import Traits
from migrd.core.tracking_request import StandingObject, TrackingRequest

YES, NO, UNKNOWN = Answer.YES, Answer.NO, Answer.UNKNOWN


@dataclass
class _Container:
    """One iommufd object while it is filled."""

    id: str
    standing: tuple[str, ...] = ()
    remembered: set[Kind] = field(default_factory=set)
    members: list[Traits] = field(default_factory=list)
    kinds: set[Kind] = field(default_factory=set)

    def add(self, unit: Iterable[Traits]) -> None:
        for one in unit:
            self.members.append(one)
            self.kinds.add(Kind.of(one))

    def takes(self, unit: Sequence[Traits], *, apart: bool) -> bool:
        """`apart`: keep what nothing watches away from page tables with tracking."""
        new = {Kind.of(one) for one in unit}
        if any(
            loses_dirt(one, other) or captures(other, one) or captures(one, other)
            for one in new
            for other in self.kinds
        ):
            return False
        there = self.kinds | self.remembered
        return not (apart and any(loses_all_dirty(one, other) for one in new for other in there))

    @property
    def is_safe(self) -> bool:
        return not any(loses_dirt(one, other) for one in self.kinds for other in self.kinds)

    def may_copy_all(self, one: Traits) -> bool:
        kind = Kind.of(one)
        return not any(loses_all_dirty(kind, other) for other in self.kinds | self.remembered)

    def finished(self) -> StandingObject:
        attached = {one.id for one in self.members if one.vm_device.attached}
        new = [one for one in self.members if not one.vm_device.attached]
        new.sort(key=lambda one: (Kind.of(one).order, one.id))
        seen = self.kinds | self.remembered
        return StandingObject(
            self.id,
            (*(id_ for id_ in self.standing if id_ in attached), *(one.id for one in new)),
            any(kind.cap is YES for kind in seen),
            frozenset(kind.instance for kind in seen if kind.instance is not None),
        )


@dataclass(frozen=True)
class Partition:
    """The iommufd objects, and what they mean for devices that nothing watches."""

    objects: tuple[StandingObject, ...]
    is_safe: bool
    """False: some device's DMA could go unseen at a migration however they are arranged."""
    may_copy_all: frozenset[str]
    """Devices that, if nothing watches them, may still be migrated by taking all memory for dirty:
    no page table with tracking can be in their container, nor was one (H3, H4)."""

    @property
    def attach_order(self) -> tuple[str, ...]:
        return tuple(device for one in self.objects for device in one.devices)


def partition(traits: Mapping[str, Traits], request: TrackingRequest) -> Partition:
    """The parts with the fewest objects that the rules allow."""
    limit = request.max_iommufds
    containers = _fill(traits, request.standing, apart=True)
    if containers is None or (limit is not None and len(containers) > limit):
        containers = _fill(traits, request.standing, apart=False)
    if containers is None or (limit is not None and len(containers) > limit):
        return Partition((), False, frozenset())
    if not all(each.is_safe for each in containers):  # found out after they were attached
        return Partition(tuple(one.finished() for one in containers), False, frozenset())
    return Partition(
        tuple(one.finished() for one in containers),
        True,
        frozenset(one.id for each in containers for one in each.members if each.may_copy_all(one)),
    )


def _fill(
    traits: Mapping[str, Traits], standing: Sequence[StandingObject], *, apart: bool
) -> list[_Container] | None:
    """First fit; None when devices that must stay together have no place together."""
    attached = {one.id: one for one in traits.values() if one.vm_device.attached}
    known = {one.instance: NO for one in traits.values() if one.cap is NO}
    known |= {one.instance: YES for one in traits.values() if one.cap is YES}
    containers: list[_Container] = []
    home: set[str] = set()
    for old in standing:
        each = _Container(old.id, old.devices)
        each.add(attached[id_] for id_ in old.devices if id_ in attached)
        if each.members:  # else QEMU has let go of the container with its last device
            each.remembered = memory_of(old, known)
        home.update(one.id for one in each.members)
        containers.append(each)
    for unit in _units(one for one in traits.values() if one.id not in home):
        group = unit[0].vm_device.device.iommu_group if unit[0].is_behind_iommu else None
        places = [each for each in containers if group is not None and _holds(each, group)]
        candidates = places or containers
        place = next((each for each in candidates if each.takes(unit, apart=apart)), None)
        if place is None and places:
            return None
        if place is None:
            place = _Container(_free_id(containers))
            containers.append(place)
        place.add(unit)
    return [each for each in containers if each.members]


def _holds(container: _Container, group: int) -> bool:
    return any(
        one.is_behind_iommu and one.vm_device.device.iommu_group == group
        for one in container.members
    )


def _units(traits: Iterable[Traits]) -> list[list[Traits]]:
    """Devices of one group together, in the order that needs the fewest containers."""
    units: dict[object, list[Traits]] = {}
    for one in traits:
        group = one.vm_device.device.iommu_group if one.is_behind_iommu else None
        units.setdefault(one.id if group is None else group, []).append(one)
    return sorted(units.values(), key=lambda unit: min(_fit_order(one) for one in unit))


def _fit_order(one: Traits) -> tuple[int, int, str]:
    return Kind.of(one).order, (NO, UNKNOWN, YES).index(one.log), one.id


def _free_id(containers: Sequence[_Container]) -> str:
    taken = {each.id for each in containers}
    return next(id_ for n in range(len(containers) + 1) if (id_ := f"iommufd{n}") not in taken)
