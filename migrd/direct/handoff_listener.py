"""Where processes hand their guests over: who may, and all checks before anything is used.

    accept ─► who is it (uid, pidfd) ─► HELLO ─► REGION, SOURCE, DEVICE ... OFFER_END ─► checks
                 │                        │                                                │
                 └────────────────────────┴─── ERROR, in a sentence; hang up ◄─────────────┤
                                                                                           ▼
                       on_client(HandedOver) ◄── WELCOME ◄── the name is free, or its own (names)

Bounds: connections that have not handed over yet, connections in all, messages and descriptors of
one hand-over, and the time it may take. A process that breaks the protocol loses its connection and
nothing else; all that it had passed is closed.

`on_client` is called for each connection, and again for the same object when a process that was
given a guest hands over that guest's memory (after RESUME). `on_gone` when a connection broke.
Neither may block.
"""

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

import structlog

from migrd.direct.accepting import accepted
from migrd.direct.descriptors import DescriptorKinds
from migrd.direct.handoff import MOST_STATE_BYTES, HandedOver
from migrd.direct.listening import listen, unlink_own
from migrd.direct.messages import (
    BadMessage,
    BadVersion,
    ClientState,
    DeviceMessage,
    ErrorCode,
    Features,
    Hello,
    OfferEnd,
    RegionMessage,
    SourceMessage,
    Welcome,
)
from migrd.direct.names import NameHolders
from migrd.direct.offer import Offer, OfferBuilder, OfferLimits
from migrd.direct.packets import ConnectionEnded, PacketSocket, Received
from migrd.direct.peer_process import PeerProcess
from migrd.engine.threads import in_thread
from migrd.errors import Conflict, Invalid, NotAuthorized, TooLarge, VmmUnreachable

log = structlog.get_logger(__name__)

_NO_DESCRIPTOR_LEFT_S: Final = 0.5
_MOST_REMEMBERED: Final = 256


@dataclass(frozen=True)
class HandoffLimits:
    """What the daemon takes from processes that it does not trust."""

    offer: OfferLimits = field(default_factory=OfferLimits)
    connections: int = 1024
    greeting: int = 64
    """Connections that have not handed over yet."""
    handover_s: float = 10.0
    """From connect to OFFER_END."""
    state_bytes: int = MOST_STATE_BYTES


class HandoffListener:
    """Listens at `path` inside `async with`; afterwards no connection and no socket file is left.

    Root, the daemon's own user and `uids` may hand over; `mode` and `gid` say who can connect.
    Raises ConfigError on entry when the socket cannot be made.
    """

    def __init__(
        self,
        path: Path,
        *,
        on_client: Callable[[HandedOver], None],
        on_gone: Callable[[HandedOver], None] = lambda _: None,
        mode: int = 0o660,
        gid: int | None = None,
        uids: Collection[int] = (),
        limits: HandoffLimits | None = None,
        kinds: DescriptorKinds | None = None,
    ) -> None:
        self._path = path
        self._on_client = on_client
        self._on_gone = on_gone
        self._mode = mode
        self._gid = gid
        self._uids = frozenset({0, os.getuid(), *uids})
        self._limits = limits or HandoffLimits()
        self._kinds = kinds or DescriptorKinds()
        self._names = NameHolders()
        self._clients: list[HandedOver] = []
        self._conversations: set[asyncio.Task[None]] = set()
        self._refused: set[tuple[int, str]] = set()
        self._greeting = 0
        self._listening: socket.socket | None = None
        self._inode = 0
        self._accepting: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        listening = await in_thread(listen, self._path, mode=self._mode, gid=self._gid)
        self._inode = (await in_thread(os.stat, self._path)).st_ino
        self._listening = listening
        self._accepting = asyncio.create_task(self._accept(listening), name="direct-accept")
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._listening is not None
        assert self._accepting is not None
        tasks = [self._accepting, *self._conversations]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._listening.close()
        self._names.close()
        await in_thread(unlink_own, self._path, self._inode)

    @property
    def clients(self) -> tuple[HandedOver, ...]:
        """All that are connected, in the order of their hand-over."""
        return tuple(client for client in self._clients if client.is_connected)

    def find(self, vm: str, *, instance: str | None = None) -> HandedOver | None:
        """The connected process of a VM: that of `instance` if one is given; else the one that is
        not departed, else a departed one."""
        found = [
            client
            for client in self.clients
            if client.vm == vm and instance in (None, client.instance)
        ]
        found.sort(key=lambda client: client.state is ClientState.DEPARTED)
        return found[0] if found else None

    async def _accept(self, listening: socket.socket) -> None:
        while True:
            try:
                plain, _ = await accepted(listening)
            except OSError as failure:  # no descriptor or memory left, or gone meanwhile
                log.warning("direct.accept_failed", why=failure.strerror)
                await asyncio.sleep(_NO_DESCRIPTOR_LEFT_S)
                continue
            connection = PacketSocket(plain)
            if (
                self._greeting >= self._limits.greeting
                or len(self._conversations) >= self._limits.connections
            ):
                text = "too many processes are connected; migrd takes more when some have ended"
                connection.refuse(ErrorCode.TOO_MANY, text)
                continue
            self._greeting += 1
            task = asyncio.create_task(self._converse(plain, connection), name="direct-client")
            self._conversations.add(task)
            task.add_done_callback(self._conversations.discard)

    async def _converse(self, plain: socket.socket, connection: PacketSocket) -> None:
        client: HandedOver | None = None
        try:
            try:
                async with asyncio.timeout(self._limits.handover_s):
                    client = await self._greet(plain, connection)
            finally:
                self._greeting -= 1
            await self._serve(client, connection)
        except (ConnectionEnded, VmmUnreachable) as failure:
            if client is not None:
                log.info("direct.disconnected", vm=client.vm, pid=client.pid, why=str(failure))
        except Exception as failure:
            code, text = _complaint(failure, self._limits)
            self._note_refusal(connection.peer_pid, client, code, text)
            connection.refuse(code, text)
        finally:
            connection.close()
            if client is not None:
                await self._part(client)

    def _note_refusal(
        self, pid: int, client: HandedOver | None, code: ErrorCode, text: str
    ) -> None:
        """In the log, once: a process that is refused tries again every second."""
        if len(self._refused) >= _MOST_REMEMBERED:
            self._refused.clear()
        level = logging.DEBUG if (pid, text) in self._refused else logging.WARNING
        self._refused.add((pid, text))
        vm = client.vm if client is not None else None
        log.log(level, "direct.refused", pid=pid, vm=vm, code=code.name.lower(), why=text)

    async def _greet(self, plain: socket.socket, connection: PacketSocket) -> HandedOver:
        """All of the hand-over, up to WELCOME."""
        process = await in_thread(PeerProcess.of, plain)
        offer: Offer | None = None
        try:
            if process.uid not in self._uids:
                raise NotAuthorized(
                    f"uid: {process.uid} may not hand over guests; add it to direct.allow_uids, or "
                    "run the VMM as another user"
                )
            hello = _checked_hello(await connection.receive())
            if hello.state is not ClientState.INCOMING or hello.features & Features.DEVICES:
                offer = await self._gather(connection, await connection.receive(), hello.state)
            self._names.claim(hello.vm, process, hello.state)
            await connection.send(Welcome(self._limits.state_bytes))
        except BaseException:
            process.close()
            if offer is not None:
                await in_thread(offer.close_descriptors)
            raise
        most_bytes = self._limits.state_bytes
        client = HandedOver(connection, process, hello, offer, self._kinds, most_bytes)
        self._take_in(client)
        return client

    def _take_in(self, client: HandedOver) -> None:
        for earlier in self._clients:
            if (earlier.vm, earlier.pid) == (client.vm, client.pid):
                earlier.broken("its process has connected anew")
        self._clients.append(client)
        self._names.note(client)
        state = client.state.name.lower()
        log.info("direct.handed_over", vm=client.vm, pid=client.pid, state=state)
        self._announce(client)

    def _announce(self, client: HandedOver) -> None:
        try:
            self._on_client(client)
        except Exception:  # who is told must not end the connection of who is told of
            log.exception("direct.not_announced", vm=client.vm, pid=client.pid)

    async def _part(self, client: HandedOver) -> None:
        client.broken("its connection ended")
        self._clients.remove(client)
        try:
            await client.end()
        finally:
            self._on_gone(client)

    async def _serve(self, client: HandedOver, connection: PacketSocket) -> None:
        while True:
            received = await connection.receive()
            if not isinstance(received.message, _OFFERING):
                client.take(received)
                continue
            if client.has_offered or client.state is not ClientState.RUNNING:
                received.close_fd()
                raise BadMessage(
                    f"{received.message.TYPE.name}: memory is handed over once, by a process that "
                    "runs its guest; to hand over anew, connect anew"
                )
            async with asyncio.timeout(self._limits.handover_s):
                client.accept(await self._gather(connection, received, client.state))
                await connection.send(Welcome(self._limits.state_bytes))
            self._announce(client)

    async def _gather(
        self, connection: PacketSocket, received: Received, state: ClientState
    ) -> Offer:
        """The offer that begins with this message."""
        builder = OfferBuilder(self._limits.offer, self._kinds, connection.peer_pid)
        try:
            while not isinstance(received.message, OfferEnd):
                if not isinstance(received.message, _OFFERED) or received.fd is None:
                    received.close_fd()
                    name = received.message.TYPE.name
                    raise BadMessage(f"{name}: an offer goes on to OFFER_END without it")
                builder.add(received.message, received.fd)
                received = await connection.receive()
            is_waiting = state is ClientState.INCOMING
            check = builder.checked_devices if is_waiting else builder.checked
            offer = await in_thread(check, received.message)
        except BaseException:
            await in_thread(builder.close)  # maybe the last of much memory, which is freed with it
            raise
        builder.release()
        return offer


_OFFERED: Final = (RegionMessage, SourceMessage, DeviceMessage)
_OFFERING: Final = (*_OFFERED, OfferEnd)


_CODES: Final[Mapping[type[Exception], ErrorCode]] = {  # the first that fits
    BadVersion: ErrorCode.VERSION,
    BadMessage: ErrorCode.BAD_MESSAGE,
    NotAuthorized: ErrorCode.NOT_ALLOWED,
    TooLarge: ErrorCode.TOO_MANY,
    Conflict: ErrorCode.NAME_TAKEN,
    Invalid: ErrorCode.BAD_HANDOVER,
}


def _checked_hello(received: Received) -> Hello:
    hello = received.message
    if not isinstance(hello, Hello):
        received.close_fd()
        raise BadMessage(f"{hello.TYPE.name}: a connection begins with HELLO")
    if not hello.vm:
        raise Invalid("vm: it is empty; name the guest")
    if hello.state is ClientState.INCOMING and not hello.instance:
        raise Invalid(
            "instance: it is empty, and only a process that migrd launched may wait for a guest; "
            "pass MIGRD_INSTANCE on"
        )
    if (hello.state is ClientState.DEPARTED) is not bool(hello.migration_id):
        raise Invalid(
            f"migration_id: it is {hello.migration_id!r} in state {hello.state.name.lower()}; it "
            "names the migration of a guest that departed, and is empty otherwise"
        )
    return hello


def _complaint(failure: Exception, limits: HandoffLimits) -> tuple[ErrorCode, str]:
    """What to tell the process."""
    for kind, code in _CODES.items():
        if isinstance(failure, kind):
            return code, str(failure)
    if isinstance(failure, TimeoutError):
        text = f"the hand-over was not over within {limits.handover_s:g} s; send it at once"
        return ErrorCode.TOO_SLOW, text
    log.error("direct.unexpected", exc_info=failure)
    return ErrorCode.BAD_HANDOVER, f"migrd failed at this hand-over: {type(failure).__name__}"
