"""Which devices share an iommufd object, and in which order QEMU attaches them.

The rules (`partition_rules`) are about pairs that must not meet, so the parts are a colouring of
the graph of these pairs. With known facts it has at most two colours, and taking the devices in the
order capable without a log, capable with one, the rest, finds the least number; with unknowns,
first fit. As few as possible, because each object maps the guest's memory again.

Within a container capable devices go first, so that no plain page table is there to capture them.
Devices of one IOMMU group stay together: the kernel gives a group to one iommufd alone.

When the VM may have fewer objects than that (`max_iommufds`), untracked devices join the
others and QEMU is left to block them, which is safe; what would corrupt silently (H2) is refused.
"""

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from migrd.core.devices import Answer
from migrd.core.partition_rules import Kind, captures, loses_all_dirty, loses_dirt, memory_of
from migrd.core.tracking_facts import Traits, group_of
from migrd.core.tracking_request import StandingObject, TrackingRequest

YES, NO, UNKNOWN = Answer.YES, Answer.NO, Answer.UNKNOWN
_FEWEST_LOGS_FIRST = {NO: 0, UNKNOWN: 1, YES: 2}


@dataclass
class _Container:
    """One iommufd object while it is filled."""

    id: str
    standing: tuple[str, ...] = ()
    remembered: set[Kind] = field(default_factory=set)
    members: dict[str, Kind] = field(default_factory=dict)
    kinds: set[Kind] = field(default_factory=set)

    def add(self, unit: Mapping[str, Kind]) -> None:
        self.members.update(unit)
        self.kinds.update(unit.values())

    def takes(self, unit: Mapping[str, Kind], *, apart: bool) -> bool:
        """`apart`: keep what nothing watches away from page tables with tracking."""
        new = set(unit.values()) - self.kinds  # what is there already gets on with its like
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

    def may_copy_all(self) -> Iterator[str]:
        there = self.kinds | self.remembered
        fit = {one for one in self.kinds if not any(loses_all_dirty(one, two) for two in there)}
        return (id_ for id_, kind in self.members.items() if kind in fit)

    def finished(self) -> StandingObject:
        new = [(kind.order, id_) for id_, kind in self.members.items() if not kind.is_attached]
        seen = self.kinds | self.remembered
        return StandingObject(
            self.id,
            (
                *(id_ for id_ in self.standing if id_ in self.members),
                *(id_ for _, id_ in sorted(new)),
            ),
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
    """Devices that, if nothing watches them, may still be migrated, with the guest stopped first:
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
        frozenset(id_ for each in containers for id_ in each.may_copy_all()),
    )


def _fill(
    traits: Mapping[str, Traits], standing: Sequence[StandingObject], *, apart: bool
) -> list[_Container] | None:
    """First fit; None when devices that must stay together have no place together."""
    kinds = {id_: Kind.of(one) for id_, one in traits.items()}
    containers = list(_running(traits, kinds, standing))
    home = {id_: each for each in containers for id_ in each.members}
    groups = {group_of(traits[id_]): each for id_, each in home.items()}
    for unit in _units(traits, kinds, home):
        group = group_of(traits[next(iter(unit))])
        mates = groups.get(group) if group is not None else None
        candidates = [mates] if mates is not None else containers
        place = next((each for each in candidates if each.takes(unit, apart=apart)), None)
        if place is None and mates is not None:
            return None
        if place is None:
            place = _Container(_free_id(containers))
            containers.append(place)
        place.add(unit)
    return [each for each in containers if each.members]


def _running(
    traits: Mapping[str, Traits], kinds: Mapping[str, Kind], standing: Sequence[StandingObject]
) -> Iterator[_Container]:
    """The containers of the running QEMU, with the devices that are still there."""
    known = {one.instance: NO for one in traits.values() if one.cap is NO}
    known |= {one.instance: YES for one in traits.values() if one.cap is YES}
    for old in standing:
        each = _Container(old.id, old.devices)
        each.add(
            {id_: kinds[id_] for id_ in old.devices if id_ in kinds and kinds[id_].is_attached}
        )
        if each.members:  # else QEMU has let go of the container with its last device
            each.remembered = memory_of(old, known)
        yield each


def _units(
    traits: Mapping[str, Traits], kinds: Mapping[str, Kind], home: Container[str]
) -> list[dict[str, Kind]]:
    """Devices of one group together, in the order that needs the fewest containers."""
    units: dict[object, dict[str, Kind]] = {}
    for id_, one in traits.items():
        if id_ not in home:
            group = group_of(one)
            units.setdefault(id_ if group is None else group, {})[id_] = kinds[id_]
    return sorted(units.values(), key=lambda unit: min(map(_fit_order, unit.items())))


def _fit_order(member: tuple[str, Kind]) -> tuple[int, int, str]:
    id_, kind = member
    return kind.order, _FEWEST_LOGS_FIRST[kind.log], id_


def _free_id(containers: Sequence[_Container]) -> str:
    taken = {each.id for each in containers}
    return next(id_ for n in range(len(containers) + 1) if (id_ := f"iommufd{n}") not in taken)
