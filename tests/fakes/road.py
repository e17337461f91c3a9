"""The management network: what daemons say to each other, lost, late, repeated or cut off.

Messages pass through the real models and the real answering side, byte for byte; only the sockets
are missing. `faults` is asked for each message: what becomes of it.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine
from contextvars import Context, copy_context
from enum import Enum
from typing import Any

from migrd.engine.peer_service import PEER_PROTOCOL, PeerService
from migrd.errors import PeerTimedOut, PeerUnreachable
from migrd.peer.answering import Reply, answer
from migrd.peer.asking import WirePeer
from tests.fakes.gate import Gate

LATENCY_S = 0.0005
OVERTAKEN_S = 0.4
LATE_S = 40.0
"""A late message arrives after every deadline of its sender."""


class Loss(Enum):
    """What may become of a message."""

    REQUEST_LOST = "request_lost"
    ANSWER_LOST = "answer_lost"
    REQUEST_LATE = "request_late"
    """The caller has given up when it arrives."""
    REPEATED = "repeated"
    """Delivered twice, the second time late."""
    REPEATED_AT_ONCE = "repeated_at_once"
    """Delivered twice, both on the way at the same time."""
    OVERTAKEN = "overtaken"
    """Delayed within the deadline of its sender: later ones come first."""
    UNREACHABLE = "unreachable"


Faults = Callable[[str, str, str], Loss | None]
"""(caller, callee, call) -> what becomes of this message."""


class Door:
    """Where a daemon answers; its tasks end with it."""

    def __init__(self, service: PeerService, gate: Gate | None = None) -> None:
        self.service = service
        self._gate = gate
        self.context: Context = copy_context()
        self.tasks: set[asyncio.Task[Any]] = set()
        self.is_closed = False

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(work, context=self.context)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    async def answer(self, caller: str, call: str, body: bytes) -> Reply:
        """As soon as the daemon does not stand still."""
        if self._gate is not None:
            await self._gate.running()
        return await answer(self.service, caller, call, str(PEER_PROTOCOL), body)

    async def close(self) -> None:
        """The daemon is gone: whatever it was answering is cut off."""
        self.is_closed = True
        tasks = list(self.tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


class Road:
    """All daemons' doors, and the way between them."""

    def __init__(self) -> None:
        self.doors: dict[str, Door] = {}
        self.faults: Faults = lambda caller, callee, call: None
        self.down: set[tuple[str, str]] = set()
        """(caller, callee): no connection can be made."""
        self.mute: set[tuple[str, str]] = set()
        """(caller, callee): a request gets there, and no answer comes back (half open)."""
        self.log: list[tuple[str, str, str]] = []
        self.under_way: Counter[tuple[str, str]] = Counter()
        """(caller, call): those without an answer yet."""
        self._late: set[asyncio.Task[None]] = set()

    def part(self, a: str, b: str) -> None:
        """Cut the management network between two hosts."""
        self.down |= {(a, b), (b, a)}

    def heal(self) -> None:
        self.down.clear()
        self.mute.clear()
        self.faults = lambda caller, callee, call: None

    def later(self, caller: str, callee: str, call: str, body: bytes, after_s: float) -> None:
        """Deliver a message that nobody waits for any more."""

        async def deliver() -> None:
            await asyncio.sleep(after_s)
            door = self.doors.get(callee)
            if door is not None:
                await door.spawn(door.answer(caller, call, body))

        task = asyncio.create_task(deliver())
        self._late.add(task)
        task.add_done_callback(self._late.discard)

    async def close(self) -> None:
        """What is still under way is lost."""
        late = list(self._late)
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late)


class RoadPeer(WirePeer):
    """`engine.ports.Peer` for one caller and one callee."""

    def __init__(self, road: Road, caller: str, callee: str) -> None:
        super().__init__(callee)
        self._road = road
        self._caller = caller

    async def _exchange(self, call: str, body: bytes, *, within_s: float) -> Reply:
        self._road.under_way[self._caller, call] += 1
        try:
            return await self._carried(call, body, within_s)
        finally:
            self._road.under_way[self._caller, call] -= 1

    async def _carried(self, call: str, body: bytes, within_s: float) -> Reply:
        road, way = self._road, (self._caller, self.name)
        road.log.append((*way, call))
        loss = road.faults(*way, call)
        await asyncio.sleep(LATENCY_S)
        door = road.doors.get(self.name)
        if way in road.down or door is None or loss is Loss.UNREACHABLE:
            raise PeerUnreachable(f"{self.name}: connection refused")
        if loss is Loss.REQUEST_LATE:
            road.later(*way, call, body, LATE_S)
        if loss is Loss.REPEATED:
            road.later(*way, call, body, LATE_S)
        if loss is Loss.REPEATED_AT_ONCE:
            road.later(*way, call, body, LATENCY_S)
        if loss is Loss.OVERTAKEN:
            await asyncio.sleep(min(OVERTAKEN_S, within_s / 2))
            door = road.doors.get(self.name, door)
        if loss in (Loss.REQUEST_LOST, Loss.REQUEST_LATE):
            await asyncio.sleep(within_s)
            raise PeerTimedOut(f"{self.name}: no answer to {call} within {within_s:g} s")
        reply = await self._served(door, call, body, within_s)
        if loss is Loss.ANSWER_LOST or way in road.mute:
            await asyncio.sleep(within_s)
            raise PeerTimedOut(f"{self.name}: no answer to {call} within {within_s:g} s")
        await asyncio.sleep(LATENCY_S)
        if way in road.down:
            raise PeerTimedOut(f"{self.name}: cut off while waiting for the answer to {call}")
        return reply

    async def _served(self, door: Door, call: str, body: bytes, within_s: float) -> Reply:
        """The callee ends what it has begun, unless it is itself ended; only `view` is cut off."""
        if door.is_closed:
            raise PeerTimedOut(f"{self.name}: the connection broke after {call} was sent")
        task = door.spawn(door.answer(self._caller, call, body))
        try:
            await asyncio.wait([task], timeout=within_s)
        except asyncio.CancelledError:
            if call == "view":
                task.cancel()
            raise
        if not task.done():
            raise PeerTimedOut(f"{self.name}: no answer to {call} within {within_s:g} s")
        if task.cancelled():
            raise PeerTimedOut(f"{self.name}: the connection broke after {call} was sent")
        reply = task.result()
        assert isinstance(reply, Reply)
        return reply
