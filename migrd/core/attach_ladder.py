"""What to do for each errno while a device gets its page table, as a table.

    ALLOCATE with tracking ──ok──────────────────────────────► ATTACH ──ok──► DONE
        │ EOPNOTSUPP: this IOMMU cannot (or not together           │ EINVAL: this domain enforces
        ▼             with nesting or PASID)                       ▼         tracking, this IOMMU
    ALLOCATE without, marked ──ok──► ATTACH ──ok──► DONE       ALLOCATE a domain of its own,
                                                               without, marked ──► ATTACH ──► DONE

Any other errno is an error and is not retried, and under policy `require` these two are errors as
well. Kernel: hw_pagetable.c answers EOPNOTSUPP to a flag that the IOMMU lacks; the IOMMU drivers
answer EINVAL to a domain with tracking that theirs cannot do. A plain domain attaches everywhere,
so nothing ever climbs back up.

Pure: `step` is told how the last call ended and answers with the ladder at its next rung.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from errno import EINVAL, EOPNOTSUPP
from functools import cache

from migrd.core.tracking_request import DomainFlag


class LadderAction(StrEnum):
    """What a rung asks for."""

    ALLOCATE = "allocate"
    """IOMMU_HWPT_ALLOC with `flags`."""
    ATTACH = "attach"
    """VFIO_DEVICE_ATTACH_IOMMUFD_PT to the domain: the one allocated last, else the shared one."""
    DONE = "done"
    FAILED = "failed"
    """Not to be retried; `Ladder.errno` is the kernel's answer."""


@dataclass(frozen=True)
class Rung:
    """One call, and where its outcomes lead (indexes of rungs)."""

    action: LadderAction
    flags: frozenset[DomainFlag] = frozenset()
    """Of ALLOCATE, and of the domain that ATTACH attaches to."""
    own_domain: bool = False
    """The domain is for this device alone."""
    lost: frozenset[DomainFlag] = frozenset()
    """What was given up on the way here; with DIRTY_TRACKING the device is downgraded."""
    then: int | None = None
    on_errno: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Ladder:
    """All rungs of one device, and the one it stands on."""

    device: str
    rungs: tuple[Rung, ...]
    at: int = 0
    errno: int | None = None
    """The last errno, also after it was answered by another rung."""
    failed: bool = False

    @property
    def rung(self) -> Rung:
        return self.rungs[self.at]

    @property
    def action(self) -> LadderAction:
        """What to do now."""
        return LadderAction.FAILED if self.failed else self.rung.action

    @property
    def is_downgraded(self) -> bool:
        """It goes on without the tracking that was planned: decide again with it in
        `TrackingRequest.downgraded`."""
        return DomainFlag.DIRTY_TRACKING in self.rung.lost


class _Rungs(list[Rung]):
    """Built from the last rung up, so that each knows where it leads."""

    def add(self, rung: Rung) -> int:
        self.append(rung)
        return len(self) - 1

    def attach(self, rung: Rung, on_errno: Mapping[int, int]) -> int:
        """ATTACH to what `rung` describes, then DONE."""
        done = self.add(replace(rung, action=LadderAction.DONE))
        return self.add(replace(rung, action=LadderAction.ATTACH, then=done, on_errno=on_errno))


def build(
    device: str, flags: frozenset[DomainFlag], *, is_first: bool, may_lose: Sequence[DomainFlag]
) -> Ladder:
    """The ladder of a device whose domain is to have `flags`.

    `is_first`: the domain is allocated for it; the others attach to what is there (when the first
    one of a domain is downgraded, all of the domain are). `may_lose`: what may be given up on
    EOPNOTSUPP, one after the other, tracking last and then instead of the others; nothing under
    `require`.
    """
    rungs = _rungs(flags, is_first, tuple(flag for flag in may_lose if flag in flags))
    return Ladder(device, rungs, at=len(rungs) - 1)


@cache
def _rungs(
    flags: frozenset[DomainFlag], is_first: bool, may_lose: tuple[DomainFlag, ...]
) -> tuple[Rung, ...]:
    """The last one is the first to stand on. Kept: there are few, and each VM has many devices."""
    rungs = _Rungs()
    escape: Mapping[int, int] = {}
    if DomainFlag.DIRTY_TRACKING in may_lose:
        lost = frozenset({DomainFlag.DIRTY_TRACKING})
        own = Rung(LadderAction.ALLOCATE, flags - lost, own_domain=True, lost=lost)
        escape = {EINVAL: rungs.add(replace(own, then=rungs.attach(own, {})))}
    tries = [flags]
    if is_first:
        for flag in may_lose:
            from_here = flags if flag is DomainFlag.DIRTY_TRACKING else tries[-1]
            tries.append(from_here - {flag})
    below: Mapping[int, int] = {}
    for wanted in reversed(tries):
        tracks = DomainFlag.DIRTY_TRACKING in wanted
        rung = Rung(LadderAction.ALLOCATE, wanted, lost=flags - wanted)
        attach = rungs.attach(rung, escape if tracks else {})
        if is_first:
            below = {EOPNOTSUPP: rungs.add(replace(rung, then=attach, on_errno=below))}
    return tuple(rungs)


def step(ladder: Ladder, errno: int | None) -> Ladder:
    """The ladder after its rung's call ended with `errno` (None: it worked).

    Raises ValueError when the ladder has ended.
    """
    rung = ladder.rung
    if ladder.failed or rung.then is None:
        raise ValueError(f"the ladder of {ladder.device} has ended: {ladder.action}")
    if errno is None:
        return replace(ladder, at=rung.then)
    lower = rung.on_errno.get(errno)
    if lower is None:
        return replace(ladder, errno=errno, failed=True)
    return replace(ladder, at=lower, errno=errno)
