"""What goes wrong in one migration, all of it decided by one number.

    seed -> Schedule(pace, [Blow, ...])

    pace   quick     nothing limits it: over within a second
           slow      precopy goes on until the faults are over
           stopped   all of the guest is left for the switchover, on a slow road
           postcopy  it does not converge, and the guest moves first

Seeds from EVERY on are no random ones: each failpoint by its name, killed and stopped at, with what
it takes to come to it (`test_long` checks that none is left out).

A blow is struck so long after the request, or after a phase was seen, or at a failpoint.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

EVERY = 1_000_000
GROUP = 20
"""Seeds that share a guest, two daemons and a version of QEMU."""
SMALL_DISK_OF = 5
"""Every so many groups have their journals on disks that can be filled."""

_HANDOVER = (
    "source.started",
    "source.preflight_passed",
    "source.destination_prepared",
    "source.switchover_reached",
    "source.transfer_completed",
    "source.destination_ran",
    "source.source_released",
    "destination.incoming_ready",
    "destination.guest_loaded",
    "destination.grant_received",
    "destination.start_ordered",
    "destination.guest_ran",
)
_ACTS = (
    "source.migrate",
    "source.continue",
    "source.grant",
    "source.quit",
    "destination.launch",
    "destination.cont",
)
ON_THE_WAY: Sequence[str] = (
    *(f"{event}.{moment}" for event in _HANDOVER for moment in ("deciding", "journalled")),
    *(f"{act}.{moment}" for act in _ACTS for moment in ("deciding", "done")),
)
"""Failpoints of a migration that succeeds."""
ON_THE_WAY_BACK: Sequence[str] = (
    "source.cancel_requested.deciding",
    "source.cancel_requested.journalled",
    "source.cancel_completed.deciding",
    "source.cancel_completed.journalled",
    "source.discard.deciding",
    "source.discard.done",
    "destination.refusal_decided.deciding",
    "destination.refusal_decided.journalled",
    "destination.quit.deciding",
    "destination.quit.done",
)
"""Those of one that is cancelled in precopy."""


@dataclass(frozen=True)
class Blow:
    """One fault; see `tests.long.blows` for each `what`."""

    what: str
    side: str = "source"
    """source, destination or both."""
    after: str | None = None
    """The phase that has to be seen first; None: as soon as it is asked for."""
    at_s: float = 0.0
    for_s: float = 0.0
    """How long it lasts; of what dies: how long it stays away."""
    point: str = ""
    sides: tuple[str, ...] = ()
    """Whose daemon is killed, one time after the other."""


@dataclass(frozen=True)
class Schedule:
    """One faulted migration."""

    seed: int
    pace: str
    blows: tuple[Blow, ...]

    @property
    def group(self) -> int:
        return self.seed // GROUP

    @property
    def has_small_disks(self) -> bool:
        return self.group % SMALL_DISK_OF == SMALL_DISK_OF - 1

    @property
    def qemu(self) -> str:
        return ("10", "7.2")[self.group % 2]

    @property
    def kills_a_qemu(self) -> bool:
        return any(blow.what == "qemu_dies" for blow in self.blows)

    def __str__(self) -> str:
        return f"{self.pace}: {', '.join(map(_said, self.blows))}"


def _said(blow: Blow) -> str:
    who = blow.point or "/".join(blow.sides) or blow.side
    when = f"{blow.after or 'request'}+{blow.at_s:.2f}"
    return f"{blow.what} {who} {when} for {blow.for_s:.2f}"


def from_seed(seed: int) -> Schedule:
    """The same schedule for the same number, always."""
    if seed >= EVERY:
        return Schedule(seed, *every_failpoint()[seed - EVERY])
    random_ = random.Random(seed)
    kinds = dict(_KINDS)
    if Schedule(seed, "", ()).has_small_disks:
        kinds[_disk] = 40
    kind = random_.choices(list(kinds), list(kinds.values()))[0]
    pace, blows = kind(random_)
    return Schedule(seed, pace, tuple(blows))


Made = tuple[str, list[Blow]]


def _side(random_: random.Random) -> str:
    return random_.choice(("source", "destination"))


def _storm(random_: random.Random) -> Made:
    """Daemons restarted in a row in precopy, and perhaps once more in the handover."""
    one = ("source", "destination", "source", "destination", "both")
    sides = tuple(random_.choice(one) for _ in range(random_.randint(5, 10)))
    blows = [Blow("storm", after="precopy", at_s=random_.uniform(0, 0.3), sides=sides)]
    if random_.random() < 0.5:
        blows.append(_at_point(random_, ON_THE_WAY[6:]))
    return "slow", blows


def _at_point(random_: random.Random, points: Sequence[str]) -> Blow:
    point = random_.choice(points)
    what = random_.choice(("killed_at", "killed_at", "stopped_at"))
    side, for_s = point.split(".")[0], random_.choice((0.0, 0.0, 0.3, 1.5))
    return Blow(what, side, point=point, for_s=for_s)


def _failpoint(random_: random.Random) -> Made:
    return "quick", [_at_point(random_, ON_THE_WAY)]


def _two_failpoints(random_: random.Random) -> Made:
    return "quick", [_at_point(random_, ON_THE_WAY), _at_point(random_, ON_THE_WAY)]


def _cancelled(random_: random.Random) -> Made:
    blows = [Blow("cancel", after="precopy", at_s=random_.uniform(0, 0.3))]
    if random_.random() < 0.7:
        blows.append(_at_point(random_, ON_THE_WAY_BACK))
    return "slow", blows


def _kills(random_: random.Random) -> Made:
    count = random_.randint(1, 4)
    pace, after = random_.choice((("quick", None), ("quick", None), ("stopped", "switchover")))
    blows = [
        Blow(
            "kill",
            random_.choice(("source", "destination", "both")),
            after,
            random_.uniform(0, 0.7 if after is None else 1.5),
            random_.choice((0.0, 0.0, 0.5)),
        )
        for _ in range(count)
    ]
    return pace, blows


def _qemu_dies(random_: random.Random) -> Made:
    pace, after = random_.choice((("quick", None), ("slow", "precopy"), ("stopped", "switchover")))
    blows = [Blow("qemu_dies", _side(random_), after, random_.uniform(0, 0.7))]
    if random_.random() < 0.4:
        blows.append(Blow("kill", _side(random_), after, random_.uniform(0, 1.0)))
    return pace, blows


def _qemu_stands(random_: random.Random) -> Made:
    pace, after = random_.choice((("quick", None), ("slow", "precopy"), ("stopped", "switchover")))
    for_s = random_.choice((0.3, 1.5, 3.0))
    blows = [Blow("qemu_stands", _side(random_), after, random_.uniform(0, 0.6), for_s)]
    if random_.random() < 0.4:
        blows.append(Blow("kill", _side(random_), after, random_.uniform(0, 1.0)))
    return pace, blows


def _link(random_: random.Random) -> Made:
    pace, after = random_.choice((("quick", None), ("slow", "precopy"), ("stopped", "switchover")))
    what = random_.choice(("stream_cut", "stream_frozen", "peers_apart", "partition", "one_way"))
    at_s, for_s = random_.uniform(0, 0.8), random_.choice((0.2, 1.0, 3.0))
    blows = [Blow(what, _side(random_), after, at_s, for_s)]
    if random_.random() < 0.4:
        blows.append(Blow("kill", _side(random_), after, random_.uniform(0, 1.0)))
    return pace, blows


def _operator(random_: random.Random) -> Made:
    pace = random_.choice(("quick", "stopped"))
    blows = [
        Blow(random_.choice(("second", "opposite", "cancel")), at_s=random_.uniform(0, 0.7))
        for _ in range(random_.randint(1, 3))
    ]
    if random_.random() < 0.6:
        blows.append(Blow("kill", _side(random_), None, random_.uniform(0, 1.0)))
    return pace, blows


def _disk(random_: random.Random) -> Made:
    pace, after = random_.choice((("quick", None), ("slow", "precopy"), ("slow", "precopy")))
    for_s = random_.choice((0.5, 2.0))
    what = random_.choice(("disk_full", "disk_full", "disk_breaks", "disk_read_only"))
    blows = [Blow(what, _side(random_), after, random_.uniform(0, 0.5), for_s)]
    if what == "disk_full" and random_.random() < 0.4:
        blows.append(Blow("kill", blows[0].side, after, blows[0].at_s + random_.uniform(0.3, 1.5)))
    return pace, blows


_KINDS: Mapping[Callable[[random.Random], Made], int] = {
    _storm: 36,
    _failpoint: 18,
    _two_failpoints: 6,
    _kills: 14,
    _cancelled: 6,
    _qemu_dies: 7,
    _qemu_stands: 5,
    _link: 8,
    _operator: 4,
}


# Each failpoint ----------------------------------------------------------------------------------

_IN_PRECOPY = "precopy"
_LED_TO: Mapping[str, tuple[str, tuple[Blow, ...]]] = {
    "source.step_failed": ("slow", (Blow("stream_cut", after=_IN_PRECOPY, at_s=0.3),)),
    "source.source_kept": ("slow", (Blow("stream_cut", after=_IN_PRECOPY, at_s=0.3),)),
    "source.guest_died": ("slow", (Blow("qemu_dies", "source", after=_IN_PRECOPY, at_s=0.3),)),
    "source.policy_changed": ("slow", ()),
    "source.switchover_forced": ("slow", (Blow("force", after=_IN_PRECOPY, at_s=0.3),)),
    "source.postcopy_chosen": ("postcopy", ()),
    "source.preflight_refused": ("quick", (Blow("absent", "destination", for_s=1.0),)),
    "source.outcome_unknown": (
        "quick",
        (Blow("stopped_at", "destination", for_s=5.0, point="destination.guest_ran.deciding"),),
    ),
    **dict.fromkeys(
        ("source.destination_refused", "source.resume"),
        (
            "quick",
            (
                Blow(
                    "killed_at",
                    "destination",
                    for_s=1.0,
                    point="destination.grant_received.deciding",
                ),
                Blow("qemu_dies", "destination", after="granted", at_s=0.2),
            ),
        ),
    ),
    "destination.taken_back": (
        "quick",
        (
            Blow("stopped_at", "destination", for_s=1.5, point="destination.cont.deciding"),
            Blow("qemu_dies", "destination", after="granted", at_s=0.5),
        ),
    ),
}
"""Events and acts off the plain way -> pace, and what leads to them."""


_CANCELLED = (
    Blow("qemu_stands", "destination", after=_IN_PRECOPY, at_s=0.1, for_s=1.0),
    Blow("cancel", after=_IN_PRECOPY, at_s=0.3),
)
"""Else the destination's QEMU may end by itself as soon as its stream does."""


def every_failpoint() -> list[tuple[str, tuple[Blow, ...]]]:
    """Each point, killed at and stopped at; the blow at the point is the last one."""
    found: list[tuple[str, tuple[Blow, ...]]] = []
    for what in ("killed_at", "stopped_at"):
        found += [("quick", (_strike_at(what, point),)) for point in ON_THE_WAY]
        found += [("slow", (*_CANCELLED, _strike_at(what, point))) for point in ON_THE_WAY_BACK]
        for event, (pace, blows) in _LED_TO.items():
            moments = ("deciding", "done") if event == "source.resume" else _MOMENTS
            found += [(pace, (*blows, _strike_at(what, f"{event}.{m}"))) for m in moments]
    return found


_MOMENTS = ("deciding", "journalled")


def _strike_at(what: str, point: str) -> Blow:
    return Blow(what, point.split(".")[0], for_s=0.3, point=point)
