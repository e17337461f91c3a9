"""A QEMU that is all monitor: the rules of the real one's QMP, and faults on request.

Rules kept (each one seen on real QEMU 7.2 and 10.0, see tests/contract/test_qmp.py):
- one client per monitor; the next is greeted when the first has left;
- nothing but qmp_capabilities before the negotiation, nothing of it afterwards; per connection;
- in-band commands run one at a time, in order, over *all* monitors of the QEMU (one main loop);
- out-of-band commands run beside them, if negotiated and allowed;
- a monitor with eight in-band commands waiting stops reading: out-of-band lines included;
- events go to each negotiated client and are never repeated.

The migration behind it lives in tests/fakes/qemu_vm.py and plugs in through `Commands`.
"""

import array
import asyncio
import contextlib
import json
import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

OOB_COMMANDS = frozenset({"yank", "query-yank", "migrate-pause", "migrate-recover"})
QUEUE_LIMIT = 8


class Refusal(Exception):
    """A command's error answer."""

    def __init__(self, description: str, error_class: str = "GenericError") -> None:
        super().__init__(description)
        self.error_class = error_class


class Fault(Enum):
    """What happens to a reply instead of arriving; each is used up by one reply."""

    GARBAGE = b"\x00\xff this is no JSON\r\n"
    NOT_AN_OBJECT = b"[1, 2]\r\n"
    SILENCE = b""
    HALF_LINE = b'{"retu'
    OVERSIZED = b"x"
    EOF_MID_REPLY = b'{"return": {"sta'
    UNKNOWN_MESSAGE = b'{"weather": "fine"}\r\n'
    UNKNOWN_ID = b'{"return": {}, "id": 987654}\r\n'
    ODD_ID = b'{"return": {}, "id": ["not", "hashable"]}\r\n'


Reply = Any
Commands = Callable[[str, Mapping[str, Any]], Awaitable[Reply]]
GREETING = {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": "fake"}


@dataclass
class _Client:
    sock: socket.socket
    negotiated: bool = False
    oob: bool = False
    queued: int = 0
    room: asyncio.Event = field(default_factory=asyncio.Event)
    fds: list[int] = field(default_factory=list)
    sending: asyncio.Lock = field(default_factory=asyncio.Lock)


class FakeMonitor:
    """One monitor socket. `run` serves until cancelled."""

    def __init__(self, path: Path, qemu: "FakeQmp") -> None:
        self.path = path
        self._qemu = qemu
        self.client: _Client | None = None
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self._listener.bind(str(path))
        self._listener.listen(1)

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while True:
                sock, _ = await loop.sock_accept(self._listener)
                sock.setblocking(False)
                self.client = _Client(sock)
                try:
                    await self._serve(self.client)
                except (ConnectionError, BrokenPipeError, OSError):
                    pass  # the client has left
                finally:
                    self._leave()
        finally:
            self._listener.close()
            with contextlib.suppress(FileNotFoundError):
                self.path.unlink()

    def _leave(self) -> None:
        if self.client is not None:
            for fd in self.client.fds:
                os.close(fd)
            self.client.sock.close()
            self.client = None

    def hang_up(self) -> None:
        """End the connection from this side, as a QEMU that exits does."""
        if self.client is not None:
            self.client.sock.shutdown(socket.SHUT_RDWR)

    async def _serve(self, client: _Client) -> None:
        if self._qemu.greets:
            offers = ["oob"] if self._qemu.offers_oob else []
            await self.write(client, {"QMP": {"version": GREETING, "capabilities": offers}})
        decoder = json.JSONDecoder()
        text = ""
        async with asyncio.TaskGroup() as lane:
            lane_queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
            worker = lane.create_task(self._run_in_band(client, lane_queue))
            while chunk := await self._receive(client):
                text += chunk.decode()
                while text := text.lstrip():
                    try:
                        message, end = decoder.raw_decode(text)
                    except json.JSONDecodeError:
                        break  # not all of it is here yet
                    text = text[end:]
                    await self._take(client, message, lane_queue)
            worker.cancel()

    async def _receive(self, client: _Client) -> bytes:
        loop = asyncio.get_running_loop()
        space = socket.CMSG_SPACE(array.array("i").itemsize * 4)
        while True:
            try:
                chunk, ancillary, _, _ = client.sock.recvmsg(65536, space)
            except BlockingIOError:
                ready = asyncio.Event()
                loop.add_reader(client.sock, ready.set)
                try:
                    await ready.wait()
                finally:
                    loop.remove_reader(client.sock)
                continue
            for _level, _kind, body in ancillary:
                client.fds.extend(array.array("i", body[: len(body) - len(body) % 4]))
            return chunk

    async def _take(
        self, client: _Client, message: dict[str, Any], lane: asyncio.Queue[dict[str, Any]]
    ) -> None:
        command = message.get("execute", message.get("exec-oob"))
        self._qemu.received.append(str(command))
        if "exec-oob" in message:
            await self._run(client, message, command, is_oob=True)
            return
        client.queued += 1
        lane.put_nowait(message)
        while client.queued >= QUEUE_LIMIT:  # the monitor is suspended: it reads nothing now
            client.room.clear()
            await client.room.wait()

    async def _run_in_band(self, client: _Client, lane: asyncio.Queue[dict[str, Any]]) -> None:
        while True:
            message = await lane.get()
            async with self._qemu.main_loop:
                await self._run(client, message, message.get("execute"), is_oob=False)
            client.queued -= 1
            client.room.set()

    async def _run(
        self, client: _Client, message: dict[str, Any], command: object, *, is_oob: bool
    ) -> None:
        arguments = message.get("arguments", {})
        echoed = {"id": message["id"]} if "id" in message else {}
        try:
            if client.negotiated and not is_oob:
                await self._qemu.unblocked.wait()
            result = await self._answer(client, str(command), arguments, is_oob)
            reply: dict[str, Any] = {"return": result, **echoed}
        except Refusal as refusal:
            error = {"class": refusal.error_class, "desc": str(refusal)}
            reply = {**echoed, "error": error}
        await self._reply(client, reply)

    async def _answer(
        self, client: _Client, command: str, arguments: dict[str, Any], is_oob: bool
    ) -> Reply:
        if not client.negotiated:
            if command != "qmp_capabilities":
                text = "Expecting capabilities negotiation with 'qmp_capabilities'"
                raise Refusal(text, "CommandNotFound")
            wanted = arguments.get("enable", [])
            if set(wanted) - ({"oob"} if self._qemu.offers_oob else set()):
                raise Refusal("Capability 'oob' is not available")
            client.negotiated, client.oob = True, "oob" in wanted
            return {}
        if command == "qmp_capabilities":
            text = "Capabilities negotiation is already complete, command ignored"
            raise Refusal(text, "CommandNotFound")
        if is_oob and (not client.oob or command not in OOB_COMMANDS):
            raise Refusal(f"The command {command} does not support OOB")
        if command == "getfd":
            return self._qemu.keep_fd(str(arguments["fdname"]), client.fds)
        return await self._qemu.commands(command, arguments)

    async def _reply(self, client: _Client, reply: dict[str, Any]) -> None:
        fault = self._qemu.next_fault()
        if fault is None or not client.negotiated:
            await self.write(client, reply)
        elif fault is Fault.OVERSIZED:
            await self._send(client, b"x" * (self._qemu.oversize_bytes + 1))
        elif fault is Fault.SILENCE:
            return
        else:
            await self._send(client, fault.value)
            if fault is Fault.EOF_MID_REPLY:
                self.hang_up()
            elif fault in {Fault.UNKNOWN_MESSAGE, Fault.UNKNOWN_ID, Fault.ODD_ID}:
                await self.write(client, reply)

    async def write(self, client: _Client, message: Mapping[str, Any]) -> None:
        await self._send(client, json.dumps(message).encode() + b"\r\n")

    async def _send(self, client: _Client, payload: bytes) -> None:
        with contextlib.suppress(ConnectionError, OSError):
            async with client.sending:
                await asyncio.get_running_loop().sock_sendall(client.sock, payload)


class FakeQmp:
    """The QMP side of one fake QEMU, with as many monitors as paths are given."""

    def __init__(self, commands: Commands | None = None) -> None:
        self.commands: Commands = commands if commands is not None else _echo
        self.main_loop = asyncio.Lock()
        self.unblocked = asyncio.Event()
        self.unblocked.set()
        self.monitors: list[FakeMonitor] = []
        self.faults: list[Fault | None] = []
        """Used up one per reply, oldest first; None lets a reply through."""
        self.lost_events: set[str] = set()
        """Names of events that will not be sent."""
        self.greets = True
        self.offers_oob = True
        self.oversize_bytes = 1 << 20
        self.received: list[str] = []
        self.fds: dict[str, int] = {}

    def next_fault(self) -> Fault | None:
        return self.faults.pop(0) if self.faults else None

    def keep_fd(self, name: str, arrived: list[int]) -> Reply:
        if not arrived:
            raise Refusal("No file descriptor supplied via SCM_RIGHTS")
        if name in self.fds:
            os.close(self.fds[name])  # the new one takes its place
        self.fds[name] = arrived.pop(0)
        return {}

    def block(self) -> None:
        """In-band commands hang from now on, on every monitor, until `unblock`."""
        self.unblocked.clear()

    def unblock(self) -> None:
        self.unblocked.set()

    async def emit(self, name: str, fields: Mapping[str, Any] | None = None) -> None:
        """Send an event to every negotiated client."""
        if name in self.lost_events:
            return
        now_s = time.time()
        stamp = {"seconds": int(now_s), "microseconds": int(now_s % 1 * 1e6)}
        message: dict[str, Any] = {"timestamp": stamp, "event": name}
        if fields is not None:
            message["data"] = dict(fields)
        for monitor in self.monitors:
            if monitor.client is not None and monitor.client.negotiated:
                await monitor.write(monitor.client, message)

    @contextlib.asynccontextmanager
    async def serving(self, *paths: Path) -> AsyncIterator["FakeQmp"]:
        """Listen on each path until the block ends."""
        self.monitors = [FakeMonitor(path, self) for path in paths]
        tasks = [asyncio.create_task(monitor.run()) for monitor in self.monitors]
        try:
            yield self
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for fd in self.fds.values():
                os.close(fd)
            self.fds.clear()


async def _echo(command: str, arguments: Mapping[str, Any]) -> Reply:
    if command == "query-status":
        return {"status": "prelaunch", "running": False}
    if command == "echo":
        return dict(arguments)
    raise Refusal(f"The command {command} has not been found", "CommandNotFound")
