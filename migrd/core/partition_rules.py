"""Who may share an iommufd object with whom: QEMU's holes H1 to H4 as rules about pairs of devices.

For QEMU each iommufd object is a container of its own, and at a migration it watches each container
in one way: by the devices' own logs if all of its devices log, else by its page tables with dirty
tracking if it has any, else not at all (QEMU 10 takes no memory for dirty then, seen in the lab: a
VM with such a container is stopped before it is copied). So two devices in one container may leave
one of them unwatched, without an error:

    loses_dirt        only by its own log x only by IOMMU   the page tables are read, the log is
                                                            never started (H2)
    loses_all_dirty   by nothing x by IOMMU                 the page tables are read; of the other,
                                                            nothing is (H3, and H4 after an unplug)

and a page table made for a device whose IOMMU cannot track is tried for each later device, and
accepted by it:

    captures          plain page table, then capable        tracked needlessly not (H1)

Each rule asks what may happen, whatever an unknown turns out to be.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from migrd.core.devices import Answer
from migrd.core.tracking_facts import Traits
from migrd.core.tracking_request import StandingObject

YES, NO, UNKNOWN = Answer.YES, Answer.NO, Answer.UNKNOWN
_CAPABLE_FIRST = {YES: 0, UNKNOWN: 1, NO: 2}


@dataclass(frozen=True)
class Kind:
    """What of a device decides whom it may meet."""

    cap: Answer
    log: Answer
    is_behind_iommu: bool
    is_attached: bool
    instance: str | None
    """Of an unknown `cap`: two of one instance turn out alike."""

    @classmethod
    def of(cls, one: Traits) -> "Kind":
        instance = one.instance if one.cap is UNKNOWN else None
        return cls(one.cap, one.log, one.is_behind_iommu, one.vm_device.attached, instance)

    @property
    def order(self) -> int:
        """Capable first, so that no plain page table is there to capture them (H1)."""
        return _CAPABLE_FIRST[self.cap] if self.is_behind_iommu else len(_CAPABLE_FIRST)


def memory_of(seen: StandingObject, known: Mapping[str, Answer]) -> set[Kind]:
    """What a running container remembers (H4), as kinds that a newcomer must get on with: once a
    device tracked by its IOMMU was in it, QEMU takes it for tracked until it is empty. `known`:
    what is known by now of the instances that were unsettled."""
    remembered = {
        Kind(UNKNOWN, YES, True, True, name)
        for name in seen.unsettled
        if known.get(name, UNKNOWN) is UNKNOWN
    }
    if seen.saw_iommu_tracking or YES in {known.get(name) for name in seen.unsettled}:
        remembered.add(Kind(YES, YES, True, True, None))
    return remembered


def loses_dirt(one: Kind, other: Kind) -> bool:
    """H2: one may be watched only by its own log, the other only by its IOMMU."""
    if _alike(one, other):
        return False
    return _only_logs(one, other) or _only_logs(other, one)


def _only_logs(one: Kind, other: Kind) -> bool:
    return one.cap is not YES and one.log is not NO and other.cap is not NO and other.log is not YES


def loses_all_dirty(one: Kind, other: Kind) -> bool:
    """H3: one may be watched by nothing while the other has a page table with tracking."""
    if _alike(one, other):
        return False
    return (_is_untracked(one) and other.cap is not NO) or (
        _is_untracked(other) and one.cap is not NO
    )


def _is_untracked(one: Kind) -> bool:
    return one.cap is not YES and one.log is not YES


def captures(first: Kind, later: Kind) -> bool:
    """H1: the page table that `first` has, or may get, is plain, and `later` may need its own. Also
    where both log, so that it would not matter now: `later` would still be on that plain page table
    when the next device comes, and nobody could see it."""
    if not (first.is_behind_iommu and later.is_behind_iommu) or _alike(first, later):
        return False
    is_before = first.is_attached or first.order <= later.order
    return is_before and not later.is_attached and first.cap is not YES and later.cap is not NO


def _alike(one: Kind, other: Kind) -> bool:
    return one.instance is not None and one.instance == other.instance
