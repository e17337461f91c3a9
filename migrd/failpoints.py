"""Named places in the handover at which a test may kill, stop or delay this process.

    reached("source.transfer_completed.journalled")
    with around("source.grant"): ...

A failpoint stands on either side of each durable step and of each act that cannot be undone. It
does nothing (one look at an empty mapping) unless the environment of the process names it:

    MIGRD_FAILPOINTS=source.transfer_completed.journalled=kill,destination.cont.deciding=stop

    kill     SIGKILL to itself: nothing is tidied up, as at a power cut of the daemon
    stop     SIGSTOP to itself: all of it stands still until a SIGCONT
    delay:S  blocks for S seconds, event loop and all

with `@N` behind the action for the N-th time that it is reached (default: the first; each strikes
once). The daemon says in its log that it was started with failpoints. A simulator that has no
process to kill observes them instead (`observing`).

Names are `<side>.<event>.<moment>`: `deciding` is before it is journalled or done, `journalled` or
`done` after it. All of them are in POINTS; a test proves that each is reached.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import product
from typing import Final

import structlog

from migrd.core.handover import DestinationTrigger
from migrd.core.phases import Trigger
from migrd.errors import ConfigError

log = structlog.get_logger(__name__)

VARIABLE: Final = "MIGRD_FAILPOINTS"
LONGEST_DELAY_S: Final = 600.0

_ACTS: Final = (
    "source.migrate",
    "source.continue",
    "source.assign",
    "source.grant",
    "source.take_back",
    "source.resume",
    "source.discard",
    "source.quit",
    "destination.launch",
    "destination.mark_started",
    "destination.cont",
    "destination.quit",
)
"""What is done, beside what is journalled: each has a `deciding` and a `done`."""

POINTS: Final = frozenset(
    [
        *(f"source.{t.value}.{m}" for t, m in product(Trigger, ("deciding", "journalled"))),
        *(
            f"destination.{t.value}.{m}"
            for t, m in product(DestinationTrigger, ("deciding", "journalled"))
        ),
        *(f"{act}.{moment}" for act, moment in product(_ACTS, ("deciding", "done"))),
    ]
)
"""Every name there is."""


@dataclass
class _Armed:
    action: str
    passes_left: int
    delay_s: float = 0.0


_armed: dict[str, _Armed] = {}
_observers: list[Callable[[str], None]] = []


def reached(point: str) -> None:
    """The code has come to `point`. Nothing happens unless a test asked for it."""
    if _armed or _observers:
        _strike(point)


def around(act: str) -> AbstractContextManager[None]:
    """Around an act that cannot be undone: its `deciding`, and its `done` unless it raises."""
    return _around(act) if _armed or _observers else _NOTHING


@contextlib.contextmanager
def _around(act: str) -> Iterator[None]:
    reached(f"{act}.deciding")
    yield
    reached(f"{act}.done")


_NOTHING: Final = contextlib.nullcontext()


def arm_from_environment() -> None:
    """Raises as `arm`. The variable is taken out: no VMM inherits it."""
    armed = arm(os.environ.pop(VARIABLE, ""))
    if armed:
        log.warning("started with failpoints: this daemon will be killed or stopped", armed=armed)


def arm(text: str) -> list[str]:
    """Arm what `text`, the variable's value, names; returns the names, sorted.

    Raises ConfigError for a name or an action that there is not: a test that waits for a kill that
    never comes must not start.
    """
    found = dict(_parsed(one.strip()) for one in text.split(",") if one.strip())
    _armed.update(found)
    return sorted(found)


@contextlib.contextmanager
def observing(observer: Callable[[str], None]) -> Iterator[None]:
    """Have each point that is reached told to `observer`, which may raise."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def _parsed(text: str) -> tuple[str, _Armed]:
    name, _, rest = text.partition("=")
    action, _, times = rest.partition("@")
    kind, _, seconds = action.partition(":")
    if name not in POINTS:
        raise ConfigError(f"{VARIABLE}: there is no failpoint {name!r}: see migrd.failpoints")
    try:
        passes = int(times or 1) - 1
        delay_s = float(seconds or 0)
    except ValueError:
        raise ConfigError(f"{VARIABLE}: {rest!r} of {name}: numbers expected") from None
    is_known = (kind in ("kill", "stop") and not seconds) or (kind == "delay" and seconds)
    if not is_known or passes < 0 or not 0 <= delay_s <= LONGEST_DELAY_S:
        raise ConfigError(
            f"{VARIABLE}: {rest!r} of {name}: kill, stop or delay:SECONDS, with @N for the N-th"
        )
    return name, _Armed(kind, passes, delay_s)


def _strike(point: str) -> None:
    if point not in POINTS:
        raise ValueError(f"{point} is no failpoint")
    for observer in _observers:
        observer(point)
    armed = _armed.get(point)
    if armed is None:
        return
    if armed.passes_left:
        armed.passes_left -= 1
        return
    del _armed[point]
    match armed.action:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case _:
            time.sleep(armed.delay_s)
