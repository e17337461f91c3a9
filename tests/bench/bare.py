"""The reference: a bare QMP client, and an event-driven script that moves a guest with it.

    launch destination (-S, -incoming defer) ─► QMP ─► set up ┐
    source: capabilities, TLS, parameters ────────────────────┴► migrate ─► pre-switchover
      ─► migrate-continue ─► both sides completed ─► cont

What a good programmer would write in an afternoon: it waits for events, does what it can at the
same time, and trusts in everything. No journal, no second host, no deadline, no recovery, nothing
of migrd's code but the settings, which have to be the same.

Its QEMUs have sessions of their own, as every launcher gives them that is to outlive its terminal.
That counts: on a busy machine Linux shares out the processors by session (sched(7), autogroup), and
a new one begins with little.
"""

import asyncio
import itertools
import os
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import orjson

from migrd.core.facts import TransferSettings
from migrd.qemu import migration
from migrd.qemu.schema import read_schema
from tests.bench.figures import Move

SOCKET_POLL_S: Final = 0.001
TLS_KEYS: Final = frozenset({"tls-creds", "tls-hostname", "tls-authz"})


class QmpFailed(Exception):
    """QEMU's own words, or the end of the connection."""


class BareQmp(asyncio.Protocol):
    """A QMP connection without any safety: no deadline, no window, no cap."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self._ids = itertools.count(1)
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._waiting: dict[tuple[str, str], asyncio.Future[float]] = {}
        self._seen: dict[tuple[str, str], float] = {}
        self._partial = b""
        self._greeting: asyncio.Future[None] = loop.create_future()
        self._loop = loop
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, chunk: bytes) -> None:
        *lines, self._partial = (self._partial + chunk).split(b"\n")
        for line in lines:
            message = orjson.loads(line)
            if "event" in message:
                self._take(message)
            elif "return" in message:
                self._calls.pop(message["id"]).set_result(message["return"])
            elif "error" in message:
                failed = QmpFailed(message["error"]["desc"])
                self._calls.pop(message["id"]).set_exception(failed)
            elif "QMP" in message:
                self._greeting.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        for future in (*self._calls.values(), *self._waiting.values()):
            if not future.done():
                future.set_exception(QmpFailed("the connection has ended"))

    def _take(self, message: dict[str, Any]) -> None:
        status = message.get("data", {}).get("status", "")
        key = (message["event"], status)
        self._seen[key] = time.monotonic()
        waiter = self._waiting.pop(key, None)
        if waiter is not None:
            waiter.set_result(self._seen[key])
        if key == ("MIGRATION", "failed"):
            for future in self._waiting.values():
                future.set_exception(QmpFailed("the migration failed"))
            self._waiting.clear()

    def call(
        self, command: str, arguments: Mapping[str, object] | None = None
    ) -> asyncio.Future[Any]:
        """Send one command; the future is its answer."""
        assert self._transport is not None
        call_id = next(self._ids)
        message: dict[str, object] = {"execute": command, "id": call_id}
        if arguments:
            message["arguments"] = arguments
        future = self._calls[call_id] = self._loop.create_future()
        self._transport.write(orjson.dumps(message))
        return future

    def forget_events(self) -> None:
        self._seen.clear()

    async def event(self, name: str, status: str = "") -> float:
        """When it came, waiting for it if it has not come since `forget_events`."""
        if (name, status) in self._seen:
            return self._seen[name, status]
        waiter = self._waiting[name, status] = self._loop.create_future()
        at_s: float = await waiter
        return at_s

    async def negotiate(self) -> None:
        await self._greeting
        await self.call("qmp_capabilities")

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()


async def connect(path: Path) -> BareQmp:
    """Connect and negotiate, as soon as the socket is there."""
    while True:
        try:
            _, qmp = await asyncio.get_running_loop().create_unix_connection(
                BareQmp, os.fspath(path)
            )
        except (FileNotFoundError, ConnectionRefusedError):
            await asyncio.sleep(SOCKET_POLL_S)
        else:
            await qmp.negotiate()
            return qmp


@dataclass
class Qemu:
    """One QEMU of the script's."""

    child: "subprocess.Popen[bytes]"
    qmp: BareQmp
    has_tls: bool = False

    @property
    def pid(self) -> int:
        return self.child.pid

    def kill(self) -> None:
        self.qmp.close()
        self.child.kill()
        self.child.wait()


@dataclass
class BareScript:
    """Moves one guest again and again. Use as an async context manager."""

    name = "script"
    command: list[str]
    """QEMU's, without monitor and -incoming."""
    directory: Path
    settings: TransferSettings
    tls_dirs: tuple[str, str] | None
    """Credentials of the two hosts (QEMU's names of files), which take turns; None: no TLS."""
    names: tuple[str, str]
    guest: Qemu | None = None
    moves: int = 0
    _schema: Any = None
    _count: Callable[[], int] = field(default_factory=lambda: itertools.count().__next__)

    async def __aenter__(self) -> "BareScript":
        self.directory.mkdir()
        self.guest = await self._launch()
        self._schema = read_schema(await self.guest.qmp.call("query-qmp-schema"))
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.guest is not None:
            await asyncio.to_thread(self.guest.kill)

    async def _launch(self, *arguments: str) -> Qemu:
        qmp_path = self.directory / f"{self._count()}.qmp"
        command = [
            *self.command,
            *("-D", f"{self.directory}/%d.trace"),
            *("-qmp", f"unix:{qmp_path},server=on,wait=off"),
            *arguments,
        ]
        with (self.directory / "log").open("ab") as log:
            child = await asyncio.to_thread(
                subprocess.Popen,
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # see the module
            )
        try:
            async with asyncio.timeout(20.0):
                return Qemu(child, await connect(qmp_path))
        except BaseException:
            child.kill()
            raise

    async def move(self) -> Move:
        """Move the guest, from the order to the answer of `cont`."""
        source = self.guest
        assert source is not None
        began_s = time.monotonic()
        source.qmp.forget_events()
        destination, _ = await asyncio.gather(
            self._launch("-S", "-incoming", "defer"), self._set_up(source, is_outgoing=True)
        )
        try:
            async with asyncio.timeout(60.0):
                await self._transfer(source, destination)
        except BaseException:
            destination.kill()
            raise
        move = Move(began_s, time.monotonic(), source.pid, destination.pid)
        self.guest = destination
        self.moves += 1
        await asyncio.to_thread(source.kill)
        return move

    async def _transfer(self, source: Qemu, destination: Qemu) -> None:
        await self._set_up(destination, is_outgoing=False)
        await destination.qmp.call("migrate-incoming", {"uri": "tcp:127.0.0.1:0"})
        listening = (await destination.qmp.call("query-migrate"))["socket-address"][0]
        await source.qmp.call("migrate", {"uri": f"tcp:127.0.0.1:{listening['port']}"})
        await source.qmp.event("MIGRATION", "pre-switchover")
        await source.qmp.call("migrate-continue", {"state": "pre-switchover"})
        await asyncio.gather(
            source.qmp.event("MIGRATION", "completed"),
            destination.qmp.event("MIGRATION", "completed"),
        )
        await destination.qmp.call("cont")

    async def _set_up(self, qemu: Qemu, *, is_outgoing: bool) -> None:
        """The same capabilities and parameters that migrd sets."""
        here, there = self.moves % 2, (self.moves + 1) % 2
        own, other = (here, there) if is_outgoing else (there, here)
        settings = replace(self.settings, peer_name=self.names[other], tls=bool(self.tls_dirs))
        schema = self._schema
        states = migration.capabilities(schema, settings)
        calls = [qemu.qmp.call("migrate-set-capabilities", migration.capability_list(states))]
        chosen = migration.parameters(schema, settings, is_outgoing=is_outgoing)
        if self.tls_dirs is not None:
            if qemu.has_tls:  # of the other direction
                calls += [
                    qemu.qmp.call("object-del", {"id": id_})
                    for id_ in (migration.TLS_ID, migration.AUTHZ_ID)
                ]
            objects = migration.tls_objects(
                schema, settings, self.tls_dirs[own], is_outgoing=is_outgoing
            )
            calls += [qemu.qmp.call("object-add", one) for one in objects]
            qemu.has_tls = True
        calls.append(qemu.qmp.call("migrate-set-parameters", chosen))
        await asyncio.gather(*calls)
