"""Two hosts for many faulted migrations: daemons that are born quickly and kept alive, links that
can fail, journals whose disk can be full.

    alpha <-- 127.0.0.3:<peer port> [proxy] --> beta        the daemons' own link, each way
    alpha --- 127.0.0.2:<port> [proxy] -------> beta        the guest's stream, each way

Whoever dies is started again at once, or after `away_s`; each death is noted with its moment.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from migrd.cli.exits import CommandError
from migrd.demo import hosts
from migrd.demo.image import GuestImage, Pattern
from tests.integration.fleet import STREAM_HOST, Fleet, _lay_out, _prepare, in_service
from tests.lab.freezing_proxy import FreezingProxy, freezing_proxy
from tests.long.disks import Disk, disk_at
from tests.long.ground import Ground, with_monitor

PEER_HOST = "127.0.0.3"
NAMES = ("alpha", "beta")
READY_S = 30.0
MEMORY_MIB = 32
GUEST = GuestImage(
    working_set_pages=6 * 256, pages_per_s=20 * 256, pattern=Pattern.RANDOM, noise=True
)
"""6 MiB dirtied at 20 MiB/s: gone in a moment, and on a slow road never."""
SETTINGS = """\
stall_s = 4.0
switchover_deadline_s = 4.0
grant_deadline_s = 3.0
release_deadline_s = 20.0
"""


@dataclass
class Daemon:
    """A migrd that a nursery has forked: what `hosts.Host.process` is used for."""

    pid: int
    returncode: int | None = None
    is_ready: bool = False
    _ended: asyncio.Event = field(default_factory=asyncio.Event)

    def watch(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            pidfd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            self._over()
            return

        def gone() -> None:
            loop.remove_reader(pidfd)
            os.close(pidfd)
            self._over()

        loop.add_reader(pidfd, gone)

    def _over(self) -> None:
        self.returncode = 0  # nobody's child: how it ended is not known
        self._ended.set()

    async def wait(self) -> int:
        await self._ended.wait()
        return 0

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


class Nursery:
    """See tests.long.nursery."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._lock = asyncio.Lock()

    async def daemon(self, host: hosts.Host, holds: Path, failpoints: str) -> Daemon:
        order = {
            "config": str(host.config),
            "holds": str(holds),
            "log": str(host.log),
            "failpoints": failpoints,
        }
        async with self._lock:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            async with asyncio.timeout(READY_S):
                answer = await self._process.stdout.readline()
        born = Daemon(json.loads(answer)["pid"])
        born.watch()
        return born


@contextlib.asynccontextmanager
async def nursery() -> AsyncIterator[Nursery]:
    """Ends with the context, its daemons do not."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.long.nursery"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    try:
        yield Nursery(process)
    finally:
        process.kill()
        await process.wait()


@dataclass(frozen=True)
class Death:
    """A daemon ended, by whatever."""

    host: str
    wall_s: float
    was_ready: bool


@dataclass
class Field(Fleet):
    """A fleet that mends itself; see the module."""

    births: Nursery | None = None
    ground: Ground | None = None
    streams: dict[str, FreezingProxy] = field(default_factory=dict)
    """By the host that the guest goes to."""
    peers: dict[str, FreezingProxy] = field(default_factory=dict)
    """By the host that is asked."""
    disks: dict[str, Disk] = field(default_factory=dict)
    """Where journals have disks of their own."""
    deaths: list[Death] = field(default_factory=list)
    away_s: dict[str, float] = field(default_factory=dict)
    read_bytes: dict[str, int] = field(default_factory=dict)
    """How much of each log has been looked through."""
    armed_next: dict[str, str] = field(default_factory=dict)
    """Failpoints that the next daemon of a host is started with."""

    def daemon(self, host: str) -> Daemon:
        return cast("Daemon", self.hosts[host].process)

    async def start_daemon(self, host: str) -> None:
        """Returns when it is ready, or was ended before that."""
        assert self.births is not None
        armed = self.armed_next.pop(host, "")
        born = await self.births.daemon(self.hosts[host], self._holds(host), armed)
        self.hosts[host].process = cast("Any", born)
        give_up_at = time.monotonic() + READY_S
        while born.returncode is None:
            try:
                async with self.hosts[host].client() as client:
                    await client.call("GET", "/readyz", deadline_s=2.0)
                born.is_ready = True
                return
            except CommandError:
                await asyncio.sleep(0.02)
            assert time.monotonic() < give_up_at, f"migrd on {host} does not become ready"

    async def keep(self, host: str) -> None:
        """Start it again whenever it has ended, until cancelled."""
        quick = 0
        while True:
            daemon = self.daemon(host)
            await daemon.wait()
            quick = 0 if daemon.is_ready else quick + 1
            assert quick < 20, f"migrd on {host} ends at its start: {await self.log_of(host)}"
            self.deaths.append(Death(host, time.time(), daemon.is_ready))
            await asyncio.sleep(self.away_s.pop(host, 0.0))
            await self.start_daemon(host)

    async def ready(self, *names: str) -> None:
        """Both daemons live and answer."""
        give_up_at = time.monotonic() + 3 * READY_S
        while any(
            self.daemon(h).returncode is not None or not self.daemon(h).is_ready
            for h in names or NAMES
        ):
            assert time.monotonic() < give_up_at, "the daemons do not come back"
            await asyncio.sleep(0.01)

    async def arm(self, host: str, text: str) -> None:
        """Have failpoints in place of those that were armed."""
        asked = self._holds(host) / "failpoints"
        asked.write_text(text)
        self.daemon(host).send_signal(signal.SIGUSR2)
        give_up_at = time.monotonic() + READY_S
        while asked.exists() and self.daemon(host).returncode is None:
            assert time.monotonic() < give_up_at, f"{host} does not arm {text}"
            await asyncio.sleep(0.005)

    def other(self, host: str) -> str:
        return NAMES[1 - NAMES.index(host)]

    async def home(self) -> str:
        """The host of the only QEMU."""
        (found,) = [name for name in NAMES if await self.qemus(name)]
        return found

    def calm(self) -> None:
        """No fault goes on."""
        for proxy in (*self.streams.values(), *self.peers.values()):
            proxy.to_target.delay_s = 0.0
            if proxy.to_target.is_frozen or proxy.to_client.is_frozen:
                proxy.cut(abruptly=True)
            proxy.resume()
            proxy.refuse = False


def _rewrite(two: Field) -> None:
    """The other daemon is reached through its proxy. Blocking."""
    for host in two.hosts.values():
        text = host.config.read_text()
        host.config.write_text(text.replace("https://127.0.0.1:", f"https://{PEER_HOST}:"))


def _settings(ports: tuple[int, int]) -> dict[str, dict[str, str]]:
    return {
        name: {
            "roster": f'migration_host = "{STREAM_HOST}"\n',
            "migration": f"{SETTINGS}incoming_slots = 1\nport_range = [{port}, {port}]\n",
        }
        for name, port in zip(NAMES, ports, strict=True)
    }


@contextlib.asynccontextmanager
async def field_of(
    directory: Path, binary: Path, births: Nursery, *, small_disks: bool
) -> AsyncIterator[Field]:
    """Two daemons, ready, and kept alive; no guest yet."""
    ports = tuple(await asyncio.to_thread(hosts.free_ports, 2))
    script = await asyncio.to_thread(with_monitor, binary, directory / "ground")
    settings = _settings((ports[0], ports[1]))
    pair = await asyncio.to_thread(_lay_out, directory, (script, script), False, None, settings)
    two = Field(directory, {host.name: host for host in pair}, GUEST, MEMORY_MIB, births=births)
    two.ground = Ground(directory / "ground")
    await asyncio.to_thread(_prepare, two, False)
    await asyncio.to_thread(_rewrite, two)
    async with contextlib.AsyncExitStack() as stack:
        for host, port in zip(pair, ports, strict=True):
            if small_disks:
                disk = disk_at(host.directory / "state")
                two.disks[host.name] = await stack.enter_async_context(disk)
            two.streams[host.name] = await stack.enter_async_context(
                freezing_proxy((STREAM_HOST, port), ("127.0.0.1", port))
            )
            two.peers[host.name] = await stack.enter_async_context(
                freezing_proxy((PEER_HOST, host.port), ("127.0.0.1", host.port))
            )
        await stack.enter_async_context(in_service(two))
        tasks = [asyncio.create_task(two.keep(name)) for name in NAMES]
        tasks.append(asyncio.create_task(two.ground.watch()))
        stack.push_async_callback(_cancelled, two, tasks)
        yield two


async def _cancelled(two: Field, tasks: list[asyncio.Task[None]]) -> None:
    with contextlib.suppress(AssertionError):  # one that does not come back is told of already
        await two.ready()  # no birth is under way
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
