"""One process with a guest in it, over all its connections: the hand-over comes and goes, it stays.

    process (pidfd) ─────────────────────────────────────► dead, proven
    HandedOver ── attach ──► now ── broken ──► (none) ── attach ──► now ...

A lost connection says nothing of the guest: its process connects anew within a second and says
where it stands. What stood in the last word holds meanwhile, since only we can change it.
"""

import asyncio
import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from migrd.core.facts import RunState
from migrd.direct.handoff import HandedOver
from migrd.direct.messages import ClientState
from migrd.errors import VmmDied, VmmUnreachable
from migrd.processes.process import WatchedProcess

RECONNECT_S: Final = 3.0
"""A client connects anew at most a second after its connection broke, or after we came back."""
OFFER_S: Final = 5.0
DEATH_FOLLOWS_S: Final = 0.25
"""The connection of a dying process closes a little before it can be seen dead."""
RUN_STATES: Final = {
    ClientState.RUNNING: RunState.RUNNING,
    ClientState.PAUSED: RunState.PAUSED,
    ClientState.INCOMING: RunState.INMIGRATE,
    ClientState.LOADED: RunState.PAUSED,
    ClientState.DEPARTED: RunState.POSTMIGRATE,
}


@dataclass(frozen=True)
class About:
    """What its profile says of it; of an adopted process nothing."""

    vm: str
    instance: str
    kind: str | None = None
    memory_limit_bytes: int | None = None
    output_path: Path | None = None


class Guest:
    """Made on the event loop. Owns neither the process watch nor the descriptors."""

    def __init__(self, about: About, process: WatchedProcess) -> None:
        self.about = about
        self.process = process
        self.first_state: ClientState | None = None
        """Where it stood when this daemon first heard of it."""
        self._client: HandedOver | None = None
        self._attached = asyncio.Event()

    def attach(self, client: HandedOver) -> None:
        """It has handed over, anew or for the first time."""
        self._client = client
        if self.first_state is None:
            self.first_state = client.state
        self._attached.set()

    @property
    def is_connected(self) -> bool:
        return self._client is not None and self._client.is_connected

    @property
    def last_seen(self) -> HandedOver | None:
        """Its newest hand-over, be it connected or not."""
        return self._client

    @property
    def state(self) -> ClientState | None:
        """By its last word; None: it has not spoken to this daemon."""
        return None if self._client is None else self._client.state

    @property
    def run_state(self) -> RunState:
        return RunState.UNKNOWN if self.state is None else RUN_STATES[self.state]

    def death(self) -> VmmDied:
        return VmmDied(f"the process of {self.about.vm} is dead (pid {self.process.pid})")

    async def connected(self, *, within_s: float = 0.0) -> HandedOver:
        """Its hand-over, as soon as it is connected. Raises VmmDied, VmmUnreachable."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while not self.is_connected and not self.process.is_dead:
                    self._attached.clear()
                    await self._attached_or_dead()
        client = self._client
        if client is not None and client.is_connected:
            return client
        if self.process.is_dead or await self.process.wait_dead(within_s=DEATH_FOLLOWS_S):
            raise self.death()
        raise VmmUnreachable(
            f"the process of {self.about.vm} (pid {self.process.pid or '?'}) is not connected"
        )

    @property
    def is_offering(self) -> bool:
        """It was just resumed with the guest that it was given, and is about to hand over that
        guest's memory: until that is done it takes no question."""
        client = self._client
        return client is not None and client.state is ClientState.RUNNING and not client.has_offered

    async def asked(self) -> HandedOver:
        """Its hand-over, when it takes a question. Raises VmmDied, VmmUnreachable."""
        client = await self.connected()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(OFFER_S):
                while self.is_offering and client.is_connected:
                    self._attached.clear()
                    await self._attached_or_dead()
        return await self.connected()

    async def _attached_or_dead(self) -> None:
        attached = asyncio.create_task(self._attached.wait())
        dead = asyncio.create_task(self.process.wait_dead(within_s=60.0))
        try:
            await asyncio.wait({attached, dead}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (attached, dead):
                task.cancel()
            await asyncio.wait({attached, dead})
