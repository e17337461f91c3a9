"""The states of a VFIO device on its way to another host, as a table of arcs.

    RUNNING ⇄ RUNNING_P2P ⇄ STOP ──► RESUMING     loading on the destination
       ⇅           ⇅          ⇅  ◄──
    PRE_COPY ⇄ PRE_COPY_P2P ─► STOP_COPY          saving on the source; one data fd for all three

Rule 1: an arc is what a driver does in one step; ARCS has them all, and nothing else is allowed.
Rule 2: every other transition is a way along arcs. The kernel takes the shortest; it passes through
        a saving state only when both ends are saving states, so that no session is opened unseen.
Rule 3: a device without P2P has no `*_P2P` states: the arcs on both sides of such a state are one.
Rule 4: each arc names where to go when it fails. That place never opens a session; RESET_ONLY says
        there is none: a half-loaded device, and one in ERROR, can only be reset.
Rule 5: a state with an unknown number is a state: it is kept and shown. No arc leads there or away,
        so a device found in one is reset or left alone.

After an error the device may stand anywhere on the way, so the state is asked for, never assumed.
A reset puts it into RUNNING with nothing of the guest's left in it: on a source that is a device
lost to the guest, and has to be said so.

Source: linux/vfio.h (enum vfio_device_mig_state), QEMU's hw/vfio/migration.c for the last resort.
"""

from collections import deque
from collections.abc import Mapping, Set
from dataclasses import dataclass
from enum import IntEnum
from types import MappingProxyType
from typing import Final

from migrd.abi.vfio import vfio_device_mig_state as _Uapi
from migrd.core.devices import MigrationFlag


class DeviceState(IntEnum):
    """`enum vfio_device_mig_state`; a number that this version has not met is kept, nameless."""

    ERROR = _Uapi.ERROR.value
    STOP = _Uapi.STOP.value
    RUNNING = _Uapi.RUNNING.value
    STOP_COPY = _Uapi.STOP_COPY.value
    RESUMING = _Uapi.RESUMING.value
    RUNNING_P2P = _Uapi.RUNNING_P2P.value
    PRE_COPY = _Uapi.PRE_COPY.value
    PRE_COPY_P2P = _Uapi.PRE_COPY_P2P.value

    @classmethod
    def _missing_(cls, value: object) -> "DeviceState | None":
        if not isinstance(value, int) or not 0 <= value < 1 << 32:
            return None
        unknown = int.__new__(cls, value)
        unknown._name_ = f"UNKNOWN_{value}"
        unknown._value_ = value
        return unknown

    @property
    def is_known(self) -> bool:
        return self.name in type(self).__members__


RESET_ONLY: Final = None
"""In place of a state to fall back to: only VFIO_DEVICE_RESET helps, as the last resort."""


@dataclass(frozen=True)
class Arc:
    """One step of a driver."""

    start: DeviceState
    end: DeviceState
    fall_back: DeviceState | None
    """Where to go when this step, or one after it, fails; RESET_ONLY: nowhere."""
    p2p: bool | None = None
    """True: only devices with P2P have it; False: only those without; None: both."""


_S = DeviceState
ARCS: Final = (
    # The guest's device: back to where it was.
    Arc(_S.RUNNING, _S.RUNNING_P2P, _S.RUNNING, p2p=True),
    Arc(_S.RUNNING_P2P, _S.RUNNING, _S.RUNNING_P2P, p2p=True),
    Arc(_S.RUNNING_P2P, _S.STOP, _S.RUNNING_P2P, p2p=True),
    Arc(_S.STOP, _S.RUNNING_P2P, _S.STOP, p2p=True),
    Arc(_S.RUNNING, _S.STOP, _S.RUNNING, p2p=False),
    Arc(_S.STOP, _S.RUNNING, _S.STOP, p2p=False),
    # Saving begins.
    Arc(_S.RUNNING, _S.PRE_COPY, _S.RUNNING),
    Arc(_S.RUNNING_P2P, _S.PRE_COPY_P2P, _S.RUNNING_P2P, p2p=True),
    Arc(_S.STOP, _S.STOP_COPY, _S.STOP),
    # Saving goes on: the session is still good.
    Arc(_S.PRE_COPY, _S.PRE_COPY_P2P, _S.PRE_COPY, p2p=True),
    Arc(_S.PRE_COPY_P2P, _S.PRE_COPY, _S.PRE_COPY_P2P, p2p=True),
    Arc(_S.PRE_COPY_P2P, _S.STOP_COPY, _S.PRE_COPY_P2P, p2p=True),
    Arc(_S.PRE_COPY, _S.STOP_COPY, _S.PRE_COPY, p2p=False),
    # Saving ends. Going back would open a new session, so the only way is on, once more.
    Arc(_S.PRE_COPY, _S.RUNNING, _S.RUNNING),
    Arc(_S.PRE_COPY_P2P, _S.RUNNING_P2P, _S.RUNNING_P2P, p2p=True),
    Arc(_S.STOP_COPY, _S.STOP, _S.STOP),
    # Loading. The driver may have emptied the device to receive, and validates on leaving.
    Arc(_S.STOP, _S.RESUMING, _S.STOP),
    Arc(_S.RESUMING, _S.STOP, RESET_ONLY),
)

SAVING: Final = frozenset({_S.PRE_COPY, _S.PRE_COPY_P2P, _S.STOP_COPY})
"""The states that share one data fd."""

_NEEDS: Final[Mapping[DeviceState, frozenset[MigrationFlag]]] = MappingProxyType(
    {
        _S.STOP: frozenset({MigrationFlag.STOP_COPY}),
        _S.STOP_COPY: frozenset({MigrationFlag.STOP_COPY}),
        _S.RESUMING: frozenset({MigrationFlag.STOP_COPY}),
        _S.RUNNING_P2P: frozenset({MigrationFlag.STOP_COPY, MigrationFlag.P2P}),
        _S.PRE_COPY: frozenset({MigrationFlag.STOP_COPY, MigrationFlag.PRE_COPY}),
        _S.PRE_COPY_P2P: frozenset(MigrationFlag),
        _S.RUNNING: frozenset(),
        _S.ERROR: frozenset(),
    }
)

_NOT_PERMITTED: Final = frozenset({(_S.STOP_COPY, _S.PRE_COPY), (_S.STOP_COPY, _S.PRE_COPY_P2P)})
"""Reserved by vfio.h for a later flag; a way along arcs exists, and the kernel refuses it."""


class NoWay(ValueError):
    """No way leads from one state to the other for a device with these flags."""

    def __init__(self, start: DeviceState, target: DeviceState) -> None:
        super().__init__(f"no way from {start.name} to {target.name}")
        self.start = start
        self.target = target


def supported_states(flags: Set[MigrationFlag]) -> frozenset[DeviceState]:
    """The states that a device with these flags can be in."""
    return frozenset(state for state, needs in _NEEDS.items() if needs <= flags)


def direct_arcs(flags: Set[MigrationFlag]) -> tuple[Arc, ...]:
    """The arcs of a device with these flags."""
    states = supported_states(flags)
    p2p = MigrationFlag.P2P in flags
    return tuple(
        arc for arc in ARCS if arc.start in states and arc.end in states and arc.p2p in (None, p2p)
    )


def way(
    start: DeviceState, target: DeviceState, flags: Set[MigrationFlag]
) -> tuple[DeviceState, ...]:
    """The states that the kernel leads a device through, `start` and `target` included.

    Raises NoWay. Only `start` itself: nothing has to be done.
    """
    return (start, *(arc.end for arc in _arcs_between(start, target, flags)))


def fall_back(
    start: DeviceState, target: DeviceState, flags: Set[MigrationFlag]
) -> DeviceState | None:
    """Where to bring a device whose way from `start` to `target` has failed; RESET_ONLY: nowhere.

    Raises NoWay when there was no such way, and so nothing has changed.
    """
    arcs = _arcs_between(start, target, flags)
    return arcs[0].fall_back if arcs else start


def opens_session(start: DeviceState, target: DeviceState, flags: Set[MigrationFlag]) -> bool:
    """Does the kernel return a new data fd on this way? Raises NoWay."""
    arcs = _arcs_between(start, target, flags)
    return bool(arcs) and (
        target == _S.RESUMING or (target in SAVING and arcs[-1].start not in SAVING)
    )


def _arcs_between(
    start: DeviceState, target: DeviceState, flags: Set[MigrationFlag]
) -> tuple[Arc, ...]:
    """Breadth first, so the first way found is the shortest; no two are equally short."""
    states = supported_states(flags)
    unsettable = target not in states or target == _S.ERROR
    if start not in states or unsettable or (start, target) in _NOT_PERMITTED:
        raise NoWay(start, target)
    arcs = direct_arcs(flags)
    within_saving = start in SAVING and target in SAVING
    waiting: deque[tuple[DeviceState, tuple[Arc, ...]]] = deque([(start, ())])
    seen = {start}
    while waiting:
        here, so_far = waiting.popleft()
        if here == target:
            return so_far
        for arc in arcs:
            passable = arc.end == target or arc.end not in SAVING or within_saving
            if arc.start == here and arc.end not in seen and passable:
                seen.add(arc.end)
                waiting.append((arc.end, (*so_far, arc)))
    raise NoWay(start, target)
