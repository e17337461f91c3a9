"""A finding, and the running of checks.

A check that blocks runs in a daemon thread (and may run an event loop of its own there), which is
left behind at its deadline: on a host whose storage hangs, the doctor must still be able to say so,
and to end. Only a program that is about to exit may do that; the daemon uses engine.threads.
"""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

DEADLINE_S: Final = 20.0


class Status(StrEnum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    """Of what was looked at, e.g. "qemu /usr/bin/qemu-system-x86_64"."""
    status: Status
    message: str
    """What was found."""
    cure: str = ""
    """What to do, one step per line; "" when there is nothing to do."""


def ok(name: str, message: str) -> Finding:
    return Finding(name, Status.OK, message)


def warn(name: str, message: str, cure: str) -> Finding:
    return Finding(name, Status.WARN, message, cure)


def fail(name: str, message: str, cure: str) -> Finding:
    return Finding(name, Status.FAIL, message, cure)


Found = Finding | Iterable[Finding]


@dataclass(frozen=True)
class Check:
    """One look; exactly one of the two ways to do it is given."""

    name: str
    blocking: Callable[[], Found] | None = None
    waiting: Callable[[], Awaitable[Found]] | None = None
    deadline_s: float = DEADLINE_S


async def run_check(check: Check) -> tuple[Finding, ...]:
    """The findings; never raises but to be cancelled."""
    try:
        async with asyncio.timeout(check.deadline_s):
            found = await _found(check)
    except TimeoutError:
        message = f"no answer within {check.deadline_s:g} s"
        return (fail(check.name, message, "look what hangs: dmesg -T | tail"),)
    except Exception as defect:
        message = f"could not be looked at: {type(defect).__name__}: {defect}"
        return (warn(check.name, message, "this is a defect of migrd's doctor: report it"),)
    return (found,) if isinstance(found, Finding) else tuple(found)


async def _found(check: Check) -> Found:
    if check.waiting is not None:
        return await check.waiting()
    assert check.blocking is not None
    return await _in_daemon_thread(check.blocking)


async def _in_daemon_thread(look: Callable[[], Found]) -> Found:
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Found] = loop.create_future()

    def settle(found: Found | None, defect: Exception | None) -> None:
        if done.cancelled() or (found is None and defect is None):
            return
        if defect is not None:
            done.set_exception(defect)
        elif found is not None:
            done.set_result(found)

    def run() -> None:
        found, defect = None, None
        try:
            seen = look()
            found = seen if isinstance(seen, Finding) else tuple(seen)
        except Exception as exc:
            defect = exc
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, found, defect)

    threading.Thread(target=run, daemon=True, name="doctor").start()
    return await done
