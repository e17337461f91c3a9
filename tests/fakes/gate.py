"""Every call of a daemon to its ports passes a gate: it is counted, may fail, and may be the last.

    before its effect   the call never took place
    after its effect    it did, and the caller is told something else, or is killed

A killed daemon's calls have no effect any more, whatever its tasks still try.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

from migrd.errors import (
    ArbiterUnavailable,
    JournalError,
    KernelBusy,
    MigrdError,
    PeerTimedOut,
    PeerUnreachable,
    VmmRefused,
    VmmTimedOut,
    VmmUnreachable,
)
from tests.fakes.launcher import FakeLauncher

WAITS = frozenset({"newer"})
"""Calls that only wait: neither counted nor failed."""


@dataclass(frozen=True)
class Fault:
    """What is to happen to one call; without an error the daemon is killed there."""

    after_effect: bool
    error: MigrdError | None = None


Plan = Callable[[str, int], Fault | None]
"""(call, its number from 1) -> what is to happen to it."""


def no_faults(call: str, number: int) -> Fault | None:
    """The plan of a quiet day."""
    return None


class Gate:
    """Of one daemon's life."""

    def __init__(self, plan: Plan = no_faults) -> None:
        self.plan = plan
        self.calls: list[str] = []
        self.is_dead = False
        self.crashed = asyncio.Event()
        self.is_calm = False
        """Whatever was still to strike a call under way does not any more."""
        self._goes_on = asyncio.Event()
        self._goes_on.set()

    @property
    def stands_still(self) -> bool:
        """As after SIGSTOP: no call begins or comes back, and nobody is answered."""
        return not self._goes_on.is_set()

    def stop(self) -> None:
        self._goes_on.clear()

    def go_on(self) -> None:
        self._goes_on.set()

    async def running(self) -> None:
        """Until it does not stand still."""
        while self.stands_still:
            await self._goes_on.wait()

    def crash(self) -> None:
        """From here on nothing that this daemon does reaches the world."""
        self.is_dead = True
        self.crashed.set()
        self._goes_on.set()

    async def call(self, name: str, func: Callable[..., Any], *args: Any, **named: Any) -> Any:
        """Make the call, or what the plan has for it."""
        if self.stands_still:
            await self.running()
        if self.is_dead:
            raise asyncio.CancelledError
        self.calls.append(name)
        fault = self.plan(name, len(self.calls))
        if fault is not None and not fault.after_effect:
            self._strike(fault)
        result = await func(*args, **named)
        if self.stands_still:
            await self.running()
        if self.is_dead:
            raise asyncio.CancelledError
        if fault is not None and not self.is_calm:
            self._strike(fault)
        return result

    def _strike(self, fault: Fault) -> None:
        if fault.error is not None:
            raise fault.error
        self.crash()
        raise asyncio.CancelledError


class Gated:
    """A port behind the gate; everything that is not a coroutine function passes freely."""

    def __init__(self, gate: Gate, port: str, inner: Any) -> None:
        self._gate = gate
        self._port = port
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if name in WAITS or not _is_call(self._inner, name, found):
            return found

        async def call(*args: Any, **named: Any) -> Any:
            return await self._gate.call(f"{self._port}.{name}", found, *args, **named)

        return call

    def feed(self) -> AbstractAsyncContextManager[Any]:
        """A Vmm's feed only waits."""
        feed: AbstractAsyncContextManager[Any] = self._inner.feed()
        return feed


_CALLS: dict[tuple[type, str], bool] = {}
"""Of methods: are they coroutine functions? To ask takes longer than many a call."""


def _is_call(inner: Any, name: str, found: Any) -> bool:
    if name in vars(inner):
        return inspect.iscoroutinefunction(found)
    key = type(inner), name
    known = _CALLS.get(key)
    if known is None:
        known = _CALLS[key] = inspect.iscoroutinefunction(found)
    return known


class GatedLauncher(Gated):
    """The launcher's QEMUs are behind the same gate."""

    def __init__(self, gate: Gate, launcher: FakeLauncher) -> None:
        super().__init__(gate, "launcher", launcher)
        self._vmms: dict[int, Gated] = {}

    def _gated(self, vmm: Any) -> Any:
        return self._vmms.setdefault(id(vmm), Gated(self._gate, "vmm", vmm))

    async def launch(self, *args: Any, **named: Any) -> Any:
        launch = self._inner.launch
        try:
            return self._gated(await self._gate.call("launcher.launch", launch, *args, **named))
        except asyncio.CancelledError:
            if not self._gate.is_dead:  # a daemon that lives ends what it has begun
                self._inner.give_up(args[1])
            raise

    async def find(self) -> list[Any]:
        found = await self._gate.call("launcher.find", self._inner.find)
        return [self._gated(vmm) for vmm in found]


def errors_of(call: str) -> list[tuple[str, MigrdError, bool]]:
    """(name, error, may it be told after the effect) for each way in which a call may fail."""
    port = call.partition(".")[0]
    if port == "journal":
        return [("journal_error", JournalError("the disk is full"), False)]
    if port == "peer":
        return [
            ("peer_timed_out", PeerTimedOut("no answer"), True),
            ("peer_unreachable", PeerUnreachable("connection refused"), False),
        ]
    if port == "arbiter":
        return [("arbiter_unavailable", ArbiterUnavailable("no answer"), True)]
    if call == "passthrough.open":
        return [("kernel_busy", KernelBusy("somebody has it open", errno=16), False)]
    if port == "vmm":
        return [
            ("vmm_timed_out", VmmTimedOut("no answer"), True),
            ("vmm_unreachable", VmmUnreachable("no connection"), False),
            ("vmm_refused", VmmRefused("the command failed"), False),
        ]
    return []
