"""A process that handed its guest over: what migrd knows of it, and what it may ask.

    HandoffListener ── checks everything ──► HandedOver ──► the engine
                                               │ pause, save_state, ... each one ask and its answer
                                               └ descriptors of memory, sources, devices

One HandedOver stands for one connection. When that breaks, the process connects anew and another
HandedOver comes, with the same vm, instance and pid; nothing of the guest has changed by it.

What an ask raises, and what that says
    VmmRefused      the process said no, or may not be asked now: nothing was changed
    VmmTimedOut     not known whether it took effect: `ask_state` (answers come in order)
    VmmUnreachable  the connection is gone: not known whether it took effect
    VmmDied         the process is dead; its pidfd says so

The descriptors are closed when the connection is gone **and** nobody holds them: who reads memory
in a thread does so in `with client.held():`, for a number that was closed is soon another file's.
They are closed in a thread: when the process is dead they are the last of its memory, which is
freed with them, and that takes an eighth of a second for each GiB.

Longer than other modules because all asks and what becomes of their answers are one state.
"""

import asyncio
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Final, NamedTuple

import structlog

from migrd.core.memory_map import MemoryMap
from migrd.direct.descriptors import DescriptorKinds
from migrd.direct.messages import (
    MOST_THROTTLE_PERCENT,
    Answer,
    Ask,
    AskState,
    BadMessage,
    ClientState,
    Departed,
    ErrorCode,
    Event,
    EventKind,
    Features,
    GiveRegion,
    Hello,
    LoadState,
    Pause,
    Quit,
    Resume,
    SaveState,
    Status,
    Throttle,
    printable,
)
from migrd.direct.offer import Offer, OfferedDevice, OfferedSource
from migrd.direct.packets import ConnectionEnded, PacketSocket, Received
from migrd.direct.peer_process import PeerProcess
from migrd.engine.threads import in_thread
from migrd.errors import Invalid, VmmDied, VmmRefused, VmmTimedOut, VmmUnreachable

log = structlog.get_logger(__name__)

ASK_S: Final = 10.0
STATE_S: Final = 60.0
"""For asks that move memory or state: mapping a terabyte, writing down a whole machine."""
MOST_STATE_BYTES: Final = 64 << 20
_DEATH_GRACE_S: Final = 1.0
"""A process that dies closes its sockets a moment before its death can be seen."""
_MOST_EVENTS: Final = 256
_MOST_ABANDONED: Final = 64
"""Asks without an answer, behind which a connection is given up."""
_LAST_SERIAL: Final = (1 << 32) - 1
_LEADS_TO: Final[Mapping[type[Ask], ClientState]] = {
    Pause: ClientState.PAUSED,
    Resume: ClientState.RUNNING,
    SaveState: ClientState.PAUSED,
    GiveRegion: ClientState.INCOMING,
    LoadState: ClientState.LOADED,
    Departed: ClientState.DEPARTED,
}
"""What the answer must say when it says that the ask was done."""


class _Answered(NamedTuple):
    answer: Answer
    fd: int | None


class HandedOver:
    """One process, as long as it is connected. Made by HandoffListener."""

    def __init__(
        self,
        connection: PacketSocket,
        process: PeerProcess,
        hello: Hello,
        offer: Offer | None,
        kinds: DescriptorKinds,
        most_state_bytes: int,
    ) -> None:
        self._connection = connection
        self._process = process
        is_waiting = hello.state is ClientState.INCOMING
        self._waiting = offer if is_waiting else None
        """Devices for the guest to come, and nothing else."""
        self._offer = None if is_waiting else offer
        self._kinds = kinds
        self._most_state_bytes = most_state_bytes
        self._asked: dict[int, tuple[Ask, asyncio.Future[_Answered]]] = {}
        self._abandoned: set[int] = set()
        self._last_serial = 0
        self._unasked = 0
        self._broken: str | None = None
        self._holders = 0
        self._is_closed = self._was_dead = False
        self._closing: asyncio.Future[None] | None = None
        self._gone = asyncio.Event()
        self.vm: Final = hello.vm
        self.instance: Final = hello.instance
        """Token of a process that migrd launched; "" for others."""
        self.features: Final = frozenset(
            feature.name.lower()
            for feature in Features
            if hello.features & feature and feature.name
        )
        self.state = hello.state
        """Where it stands, by its last word."""
        self.migration_id = hello.migration_id
        """In which it departed; "" in any other state."""
        self.is_going_away = False
        """It said that it ends soon, by its own will."""

    # ---------------------------------------------------------------------- what is known of it

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def uid(self) -> int:
        return self._process.uid

    @property
    def pidfd(self) -> int:
        """Readable once the process is dead. Open until the descriptors are closed."""
        return self._process.pidfd

    @property
    def is_connected(self) -> bool:
        return self._broken is None

    @property
    def is_dead(self) -> bool:
        """Proven. Raises VmmUnreachable when the proof was given up with the descriptors."""
        if self._is_closed:
            raise VmmUnreachable(f"{self.vm}: this hand-over of process {self.pid} is closed")
        return self._process.is_dead

    @property
    def has_offered(self) -> bool:
        """Whether its memory is handed over: not before an incoming process was resumed."""
        return self._offer is not None

    @property
    def offer(self) -> Offer:
        """Raises VmmRefused when nothing is handed over yet."""
        if self._offer is None:
            raise VmmRefused(
                f"{self.vm}: process {self.pid} has not handed over any memory; it is "
                f"{self.state.name.lower()}",
                code="nothing_handed_over",
            )
        return self._offer

    @property
    def memory(self) -> MemoryMap:
        return self.offer.memory

    @property
    def region_fds(self) -> Mapping[int, int]:
        return self.offer.region_fds

    @property
    def region_offsets(self) -> Mapping[int, int]:
        return self.offer.region_offsets

    @property
    def sources(self) -> tuple[OfferedSource, ...]:
        return self.offer.sources

    @property
    def devices(self) -> tuple[OfferedDevice, ...]:
        """Of a process that waits for its guest too."""
        waiting = self._waiting if self._offer is None else None
        return self.offer.devices if waiting is None else waiting.devices

    @contextmanager
    def held(self) -> Iterator["HandedOver"]:
        """Inside, all descriptors stay open, whatever happens to connection and process.

        Raises VmmUnreachable when they are closed already.
        """
        if self._is_closed:
            raise VmmUnreachable(f"{self.vm}: this hand-over of process {self.pid} is closed")
        self._holders += 1
        try:
            yield self
        finally:
            self._holders -= 1
            offer = self._given_up()
            if offer is not None:
                loop = asyncio.get_running_loop()
                self._closing = loop.run_in_executor(None, offer.close_descriptors)

    async def gone(self) -> None:
        """Return once the connection is broken."""
        await self._gone.wait()

    # ------------------------------------------------------------------------------------- asks

    async def pause(self, *, within_s: float = ASK_S) -> None:
        """Stop the guest: on return nothing of it writes memory."""
        await self._ask(Pause(), within_s=within_s)

    async def resume(self, *, within_s: float = ASK_S) -> None:
        """Let the guest execute: after a pause, a load, or (a rollback) a departure."""
        await self._ask(Resume(), within_s=within_s)

    async def save_state(self, *, within_s: float = STATE_S) -> int:
        """The opaque state of the paused guest: a sealed memfd, the caller's to close.

        Raises VmmRefused too when what came is no such memfd, or larger than the limit.
        """
        answer, fd = await self._ask(SaveState(), within_s=within_s)
        if fd is None:
            raise VmmRefused(f"{self.vm}: save_state was answered without a state")
        try:
            await in_thread(self._kinds.opaque_state, fd, answer.value, self._most_state_bytes)
        except BaseException as failure:
            os.close(fd)
            if isinstance(failure, Invalid):
                raise VmmRefused(f"{self.vm}: {failure.message}", code="bad_state") from failure
            raise
        return fd

    async def give_regions(
        self, memory: MemoryMap, fds: Mapping[int, int], *, within_s: float = STATE_S
    ) -> None:
        """Give an incoming process its memory: `fds` has a file for each region, which begins at
        byte 0. They stay the caller's. On return all is mapped."""
        total, clock = len(memory.regions), asyncio.get_running_loop().time
        deadline_s = clock() + within_s
        for index, region in enumerate(memory.regions):
            ask = GiveRegion(region.id, region.gpa, region.length_bytes, 0, index, total)
            await self._ask(ask, fd=fds[region.id], within_s=deadline_s - clock())

    async def load_state(self, memfd: int, *, within_s: float = STATE_S) -> None:
        """Give an incoming process its opaque state; `memfd` stays the caller's."""
        length_bytes = (await in_thread(os.fstat, memfd)).st_size
        await self._ask(LoadState(length_bytes), fd=memfd, within_s=within_s)

    async def departed(self, migration_id: str, *, within_s: float = ASK_S) -> None:
        """Tell the source that its guest is given away: it never runs again but by `resume`."""
        await self._ask(Departed(migration_id), within_s=within_s)

    async def throttle(self, percent: int, *, within_s: float = ASK_S) -> None:
        """Take this share of its time from the guest; 0 ends it."""
        if "throttle" not in self.features:
            raise VmmRefused(f"{self.vm}: process {self.pid} cannot throttle its guest")
        if not 0 <= percent <= MOST_THROTTLE_PERCENT:
            raise VmmRefused(f"{self.vm}: {percent} % is not 0 to {MOST_THROTTLE_PERCENT} %")
        await self._ask(Throttle(percent), within_s=within_s)

    async def quit(self, *, within_s: float = ASK_S) -> None:
        """Have the process end; on return it has said that it will."""
        await self._ask(Quit(), within_s=within_s)

    async def ask_state(self, *, within_s: float = ASK_S) -> ClientState:
        """Where it stands, now that all asks before have had all the effect they will have."""
        await self._ask(AskState(), within_s=within_s)
        return self.state

    # ------------------------------------------------------------------- the connection's own end

    def take(self, received: Received) -> None:
        """A message behind WELCOME that is no part of an offer. Raises BadMessage."""
        try:
            if isinstance(received.message, Answer):
                self._take_answer(received, received.message)
            elif isinstance(received.message, Event):
                self._take_event(received.message)
            else:
                name = received.message.TYPE.name
                raise BadMessage(f"{name}: a VMM may send ANSWER and EVENT here, nothing else")
        except BaseException:
            received.close_fd()
            raise

    def accept(self, offer: Offer) -> None:
        """An incoming process that runs now has handed over its memory."""
        earlier = () if self._waiting is None else self._waiting.devices
        self._offer = replace(offer, earlier_devices=earlier)

    def refuse(self, code: ErrorCode, why: str) -> None:
        """Tell the process what is wrong with what it does, and hang up."""
        if self._broken is None:
            self._broken = why
            log.warning("direct.refused", vm=self.vm, pid=self.pid, code=code.name, why=why)
            self._connection.refuse(code, why)

    def broken(self, why: str) -> None:
        """The connection is of no use any more."""
        self._connection.close()
        if self._broken is None:
            self._broken = why

    async def end(self) -> None:
        """After `broken`: tell those who wait, give up the descriptors. Idempotent."""
        try:
            if self._asked:  # what they are told differs
                with suppress(TimeoutError):
                    async with asyncio.timeout(_DEATH_GRACE_S):
                        await self._process.death()
        finally:
            for ask, future in self._asked.values():
                if not future.done():
                    future.set_exception(self._lost(ask.TYPE.name))
            self._asked.clear()
            self._gone.set()
            offer = self._given_up()
            if offer is not None:
                await in_thread(offer.close_descriptors)

    def _given_up(self) -> Offer | None:
        """What nobody needs any more, once: its descriptors are the caller's to close."""
        if not self._gone.is_set() or self._holders or self._is_closed:
            return None
        self._is_closed = True
        self._was_dead = self._process.is_dead
        self._process.close()
        return self._offer or self._waiting

    def _lost(self, what: str) -> VmmDied | VmmUnreachable:
        text = f"{self.vm}: {what.lower()} was not answered: process {self.pid}"
        if self._was_dead if self._is_closed else self._process.is_dead:
            return VmmDied(f"{text} is dead")
        return VmmUnreachable(f"{text} is not connected any more ({self._broken})")

    async def _ask(self, ask: Ask, *, fd: int | None = None, within_s: float) -> _Answered:
        name = ask.TYPE.name
        if self._broken is not None:
            raise self._lost(name)
        self._last_serial = serial = self._last_serial % _LAST_SERIAL + 1
        answer: asyncio.Future[_Answered] = asyncio.get_running_loop().create_future()
        self._asked[serial] = ask, answer
        answered: _Answered | None = None
        try:
            if len(self._abandoned) >= _MOST_ABANDONED:
                self.refuse(ErrorCode.TOO_SLOW, f"{_MOST_ABANDONED} asks were never answered")
            async with asyncio.timeout(within_s):
                await self._connection.send(ask, serial, () if fd is None else (fd,))
                answered = await answer
        except TimeoutError:
            raise VmmTimedOut(
                f"{self.vm}: process {self.pid} did not answer {name.lower()} within "
                f"{within_s:g} s; whether it took effect is not known"
            ) from None
        except ConnectionEnded as failure:
            self.broken(str(failure))
            await self._gone.wait()
            raise self._lost(name) from None
        finally:
            if answered is None:
                self._abandon(serial, answer)
        if answered.answer.status is Status.REFUSED:
            why = printable(answered.answer.text) or "it gives no reason"
            raise VmmRefused(f"{self.vm}: {name.lower()} was refused: {why}")
        return answered

    def _abandon(self, serial: int, answer: asyncio.Future[_Answered]) -> None:
        """Nobody waits for this answer any more."""
        if answer.done() and not answer.cancelled():
            late = None if answer.exception() else answer.result().fd
            if late is not None:
                os.close(late)
        elif self._asked.pop(serial, None) is not None:
            self._abandoned.add(serial)

    def _take_answer(self, received: Received, answer: Answer) -> None:
        serial = received.serial
        asked = self._asked.get(serial)
        if asked is None and serial not in self._abandoned:
            raise BadMessage(
                f"ANSWER: serial {serial} was never asked, or is answered already; answer each "
                "ask once"
            )
        if asked is not None:
            _check_answer(asked[0], answer, received.fd)
            del self._asked[serial]
        self.state, self.migration_id = answer.state, answer.migration_id
        if asked is None:
            self._abandoned.discard(serial)
            received.close_fd()
            log.warning("direct.answered_late", vm=self.vm, serial=serial, state=self.state.name)
        elif asked[1].done():  # given up in this very turn of the loop
            received.close_fd()
        else:
            asked[1].set_result(_Answered(answer, received.fd))

    def _take_event(self, event: Event) -> None:
        self._unasked += 1
        if self._unasked > _MOST_EVENTS:
            raise BadMessage(f"EVENT: more than {_MOST_EVENTS} on one connection; send fewer")
        self.is_going_away = event.kind is EventKind.GOING_AWAY
        log.info("direct.going_away", vm=self.vm, pid=self.pid, why=printable(event.text))


def _check_answer(ask: Ask, answer: Answer, fd: int | None) -> None:
    """That the answer is possible. Raises BadMessage."""
    is_done = answer.status is Status.DONE
    wanted = _LEADS_TO.get(type(ask))
    if is_done and wanted is not None and answer.state is not wanted:
        raise BadMessage(
            f"ANSWER: {ask.TYPE.name} is done, and state is {answer.state.name.lower()}, not "
            f"{wanted.name.lower()}"
        )
    if (fd is not None) is not (is_done and isinstance(ask, SaveState)):
        raise BadMessage(
            f"ANSWER: to {ask.TYPE.name} {'with' if fd is not None else 'without'} a descriptor; "
            "send one with the state that SAVE_STATE asked for, else none"
        )
