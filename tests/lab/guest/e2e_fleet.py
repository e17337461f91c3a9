"""Two real migrd daemons in the lab guest, with QEMUs whose VFIO devices have page tables.

    alpha  ┐  one kernel, one set of mttys: both daemons see all devices, each test gives alpha's VM
    beta   ┘  one of them and says which other one takes its place on beta (destination_devices)

    with e2e_fleet() as two:                                       both daemons, once for all tests
        async with given(two, True, False) as (able, unable):      devices, and one VM at a time
                                                                   (`guest`), gone afterwards

The daemons are processes of `tests.lab.guest.e2e_migrd`, not asyncio's, so that they outlive the
event loop of one test. Each QEMU leaves a trace (`Lab.trace`) of what it asked of the kernel.

Everything here runs ten times slower than outside: deadlines are generous, and no time is asserted.
"""

from __future__ import annotations

import asyncio
import contextlib
import glob
import json
import os
import re
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from migrd.cli.client import Problem, Reply, path
from migrd.cli.exits import CommandError
from migrd.cli.seen import Json
from migrd.demo import processes
from migrd.demo.hosts import Host
from migrd.demo.proof import SerialTap, prove_continuity
from tests.lab.guest import raw
from tests.lab.guest.e2e_devices import IOMMUFD, held_by, mttys
from tests.lab.guest.e2e_hosts import lay_out, nursery
from tests.lab.guest.e2e_migrd import CLEARING, PEEK, SWITCHED
from tests.lab.guest.raw import MIB, Mtty

T = TypeVar("T")

VM = "guest"
TERMINAL = {"succeeded", "rolled_back", "cancelled", "refused", "guest_lost"}
CALL_S = 120.0
STEP_S = 120.0
"""For what takes a few seconds at most when nothing else runs."""
END_S = 30.0
MEMORY_MIB = 64
HELD: Mapping[str, Json] = {"max_bandwidth_bytes_per_s": MIB // 8, "downtime_limit_ms": 100}
"""To copy the memory once takes a minute: something else happens first."""
SLOW: Mapping[str, Json] = {"max_bandwidth_bytes_per_s": MIB, "downtime_limit_ms": 100}
"""Half of what a Dma writes: it never converges."""
FAST: Mapping[str, Json] = {"max_bandwidth_bytes_per_s": 0, "downtime_limit_ms": 20_000}


@dataclass
class Lab:
    """Two hosts; see the module."""

    directory: Path
    hosts: dict[str, Host]
    nursery: subprocess.Popen[str]
    """Where daemons come from (e2e_migrd)."""
    daemons: dict[str, int] = field(default_factory=dict)
    """Pids."""
    serial: dict[Path, tuple[SerialTap, int]] = field(default_factory=dict)
    """What each QEMU's guest printed: by the file, which is read on after it was removed."""

    # Asking -----------------------------------------------------------------------------------

    async def call(
        self, host: str, method: str, where: str, *, body: Json = None, within_s: float = CALL_S
    ) -> Reply:
        async with self.hosts[host].client() as client:
            return await client.call(method, where, body=body, deadline_s=within_s)

    async def said(self, host: str, method: str, where: str, body: Json = None) -> dict[str, Any]:
        """The object that the call is answered with."""
        reply = await self.call(host, method, where, body=body)
        assert isinstance(reply.body, dict)
        return reply.body

    async def ask(self, host: str, *segments: str) -> dict[str, Any]:
        return await self.said(host, "GET", path(*segments))

    async def vm(self, host: str) -> dict[str, Any]:
        return await self.ask(host, "vms", VM)

    async def denied(self, host: str, method: str, where: str, *, body: Json = None) -> Problem:
        """The problem that the call is answered with."""
        try:
            reply = await self.call(host, method, where, body=body)
        except Problem as problem:
            return problem
        raise AssertionError(f"{method} {where} was not refused: {reply.body}")

    async def vm_until(
        self, host: str, fits: Callable[[dict[str, Any]], bool], *, within_s: float = STEP_S
    ) -> dict[str, Any]:
        return await _until(lambda: self.vm(host), fits, within_s)

    async def until(
        self,
        migration: str,
        fits: Callable[[dict[str, Any]], bool],
        *,
        host: str = "alpha",
        within_s: float = STEP_S,
    ) -> dict[str, Any]:
        """The migration once it fits; also over a restart of the daemon."""
        return await _until(lambda: self.ask(host, "migrations", migration), fits, within_s)

    async def ended(self, migration: str, *, host: str = "alpha") -> dict[str, Any]:
        return await self.until(migration, lambda seen: seen["phase"] in TERMINAL, host=host)

    async def sees(self, *devices: Mtty) -> None:
        """Both daemons know the devices."""
        for host in self.hosts:
            for device in devices:
                look = partial(self.ask, host, "devices", device.sysfs.name)
                await _until(look, lambda seen: bool(seen["driver"]))

    # One VM -----------------------------------------------------------------------------------

    async def define(
        self, devices: Mapping[str, Mtty], *, host: str = "alpha", **more: Json
    ) -> dict[str, Any]:
        """PUT the VM with devices by QEMU id; what the daemon says of it."""
        await self.sees(*devices.values())
        return await self.said(host, "PUT", path("vms", VM), _definition(devices, more))

    async def refused_definition(self, devices: Mapping[str, Mtty], **more: Json) -> Problem:
        return await self.denied("alpha", "PUT", path("vms", VM), body=_definition(devices, more))

    async def start(self, *, host: str = "alpha") -> dict[str, Any]:
        """The VM, once its guest counts."""
        started = await self.said(host, "POST", path("vms", VM, verb="start"))
        await self.counts_on(host)
        return started

    async def migrate(
        self, to: Mapping[str, Mtty], *, policy: Mapping[str, Json] = FAST, **more: Json
    ) -> str:
        """From alpha to beta, `to` other devices by QEMU id; its id."""
        body: dict[str, Json] = {"vm": VM, **_move(to, policy, more)}
        return str((await self.said("alpha", "POST", path("migrations"), body))["id"])

    async def what_if(self, to: Mapping[str, Mtty], **more: Json) -> dict[str, Any]:
        """The plan of such a migration; nothing is touched."""
        where = path("vms", VM, verb="plan")
        return await self.said("alpha", "POST", where, _move(to, FAST, more))

    async def policy(self, migration: str, change: Mapping[str, Json]) -> None:
        await self.call("alpha", "PATCH", f"/v1/migrations/{migration}/policy", body=change)

    async def precopies(
        self, migration: str, *, rounds: int = 1, transferred_bytes: int = 0
    ) -> dict[str, Any]:
        """It copies memory, has had so many rounds and sent so much: QEMU has switched tracking
        on. Fails when the migration is over."""

        def fits(seen: dict[str, Any]) -> bool:
            assert seen["phase"] not in TERMINAL, (seen["phase"], seen["cause"], seen["refusals"])
            progress = seen["progress"]
            has_sent = (progress["transferred_bytes"] or 0) >= transferred_bytes
            return seen["phase"] == "precopy" and progress["rounds"] >= rounds and has_sent

        return await self.until(migration, fits)

    async def forget(self) -> None:
        """Nothing is left of the VM on either host."""
        for host in self.hosts:
            with contextlib.suppress(CommandError):
                await self.call(host, "POST", path("vms", VM, verb="stop"))
        await asyncio.to_thread(processes.end, await self.qemus())
        for host in self.hosts:
            await _until(partial(self._forgotten, host), bool)
        for _, fd in self.serial.values():
            os.close(fd)
        self.serial.clear()

    async def _forgotten(self, host: str) -> bool:
        try:
            await self.call(host, "DELETE", path("vms", VM))
        except Problem as problem:
            return problem.status == 404
        return True

    # The guest --------------------------------------------------------------------------------

    def listen(self) -> None:
        """Take what guests have printed since the last time."""
        for host in self.hosts.values():
            # Not Path.glob: a directory that goes away while it looks is an error to it.
            for found in sorted(glob.glob(f"{host.directory}/run/vms/*/*/serial.log")):
                log = Path(found)
                if log not in self.serial:
                    fd = os.open(log, os.O_RDONLY | os.O_CLOEXEC)
                    self.serial[log] = SerialTap(f"{host.name}/{log.parent.name}"), fd
        for tap, fd in self.serial.values():
            while received := os.read(fd, 65536):
                tap.record(received)

    def beats(self, host: str) -> int:
        """Heartbeats printed on a host so far."""
        self.listen()
        taps = (tap for tap, _ in self.serial.values() if tap.owner.startswith(f"{host}/"))
        return sum(tap.text().count(b"H ") for tap in taps)

    async def counts_on(self, host: str, *, beats: int = 3) -> None:
        """The guest prints on this host, from now on."""
        before = self.beats(host)

        async def new() -> int:
            return self.beats(host) - before

        await _until(new, lambda count: count >= beats)

    async def runs_only_on(self, host: str, *, switches: int = 0) -> dict[str, Any]:
        """It counts on there without a gap or a repeat, in the only QEMU there is; the VM."""
        await self.counts_on(host)
        pids = await _until(self.qemus, lambda pids: len(pids) == 1)
        seen = await self.vm_until(host, lambda vm: vm["state"] == "running")
        assert seen["pid"] == pids[0]
        printed = [tap for tap, _ in self.serial.values() if tap.chunks]
        prove_continuity(printed, switches=switches)
        return seen

    async def qemus(self, host: str | None = None) -> list[int]:
        """Pids of the QEMUs, of one host or of both, as the kernel says."""
        below = self.directory if host is None else self.hosts[host].directory
        return await asyncio.to_thread(processes.qemus_of, below)

    def trace(self, pid: int, event: str) -> list[str]:
        """What a QEMU wrote of one trace event, in order."""
        lines = (self.directory / f"trace-{pid}").read_text(errors="replace").splitlines()
        return [line.partition(event)[2].strip() for line in lines if f"{event} " in line]

    def page_tables(self, pid: int) -> list[bool]:
        """Those that a QEMU has allocated, in order: do they track?"""
        lines = self.trace(pid, "iommufd_backend_alloc_hwpt")
        found = [re.search(r"flags=0x(\w+)", line) for line in lines]
        return [bool(int(flags.group(1), 16) & raw.DIRTY_TRACKING) for flags in found if flags]

    def switched_on(self, pid: int) -> bool:
        """A QEMU has switched tracking on for one of its page tables."""
        return any("enable=1" in line for line in self.trace(pid, "iommufd_backend_set_dirty"))

    # The daemons ------------------------------------------------------------------------------

    def calls(self, host: str) -> list[str]:
        """The dirty-tracking calls that the daemon has made of the kernel, in order."""
        return (self.directory / f"calls-{host}").read_text().splitlines()

    def only_peeked(self, *hosts: str) -> None:
        """The daemons looked, and took or switched nothing."""
        for host in hosts:
            made = self.calls(host)
            assert PEEK in made, f"{host} has never looked"
            assert CLEARING not in made
            assert SWITCHED not in made

    def holds(self, host: str, node: Path = IOMMUFD) -> int:
        """How many descriptors its daemon has open on a character device."""
        return held_by(self.daemons[host], node)

    async def free(self, device: Mtty, *, host: str = "alpha") -> None:
        """The daemon holds no iommufd any more, and the kernel gives the device to whoever asks."""

        async def held() -> int:
            return self.holds(host)

        await _until(held, lambda count: count == 0)
        await self.probe(device, host=host)

    async def probe(self, device: Mtty, *, host: str = "alpha") -> None:
        """The kernel is asked, and answers: nobody has the device."""
        await self.call(host, "POST", path("devices", device.sysfs.name, verb="probe"))

    def begin_daemon(self, host: str) -> None:
        """Blocking; it is not ready yet."""
        at, calls = self.hosts[host], self.directory / f"calls-{host}"
        wanted = {"config": str(at.config), "log": str(at.log), "calls": str(calls)}
        assert self.nursery.stdin is not None
        assert self.nursery.stdout is not None
        self.nursery.stdin.write(json.dumps(wanted) + "\n")
        self.nursery.stdin.flush()
        self.daemons[host] = int(self.nursery.stdout.readline())

    async def ready(self, host: str) -> None:
        async def is_ready() -> bool:
            assert self.lives(host), f"migrd ended at its start: {self.words(host)}"
            await self.call(host, "GET", "/readyz", within_s=10.0)
            return True

        await _until(is_ready, bool)

    def lives(self, host: str) -> bool:
        return Path(f"/proc/{self.daemons[host]}").exists()

    def words(self, host: str) -> str:
        """The daemon's last."""
        return "\n".join(self.hosts[host].log.read_text(errors="replace").splitlines()[-30:])

    def end_daemon(self, host: str, number: signal.Signals) -> None:
        """Blocking. It is killed if that number does not end it."""
        try:
            pidfd = os.pidfd_open(self.daemons.pop(host))
        except ProcessLookupError:
            return
        try:
            for each in (number, signal.SIGKILL):
                signal.pidfd_send_signal(pidfd, each)
                if select.select([pidfd], [], [], END_S)[0]:
                    return
        finally:
            os.close(pidfd)


async def _until(
    look: Callable[[], Awaitable[T]], fits: Callable[[T], bool], within_s: float = STEP_S
) -> T:
    """What is seen, once it fits; asked again and again."""
    give_up_at = time.monotonic() + within_s
    last: object = None
    while time.monotonic() < give_up_at:
        try:
            last = seen = await look()
            if fits(seen):
                return seen
        except CommandError as error:
            last = error
        await asyncio.sleep(0.1)
    raise AssertionError(f"not within {within_s:g} s; last seen: {last}")


def _definition(devices: Mapping[str, Mtty], more: Mapping[str, Json]) -> dict[str, Json]:
    return {
        "profile": "demo",
        "parameters": {"memory_mib": MEMORY_MIB, "firmware": "guest.rom"},
        "devices": [
            {"id": id_, "address": device.sysfs.name, "guest_bus": f"port{number}"}
            for number, (id_, device) in enumerate(devices.items(), start=1)
        ],
        **more,
    }


def _move(
    to: Mapping[str, Mtty], policy: Mapping[str, Json], more: Mapping[str, Json]
) -> dict[str, Json]:
    return {
        "destination": "beta",
        "policy": {"deadline_s": 240, **policy},
        "destination_devices": {id_: device.sysfs.name for id_, device in to.items()},
        **more,
    }


@contextlib.contextmanager
def e2e_fleet() -> Iterator[Lab]:
    """Both daemons, ready."""
    directory = Path(tempfile.mkdtemp(prefix="e2e-", dir="/tmp"))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, directory)
        two = Lab(directory, lay_out(directory), stack.enter_context(nursery()))
        stack.callback(_end, two)
        for host in two.hosts:
            two.begin_daemon(host)
        asyncio.run(_all_ready(two))
        yield two


def _end(two: Lab) -> None:
    for host in list(two.daemons):
        two.end_daemon(host, signal.SIGTERM)
    processes.end(processes.qemus_of(two.directory))


async def _all_ready(two: Lab) -> None:
    for host in two.hosts:
        await two.ready(host)


@contextlib.asynccontextmanager
async def given(two: Lab, *tracked: bool) -> AsyncIterator[Sequence[Mtty]]:
    """Devices for one test; the VM that has them is gone before they are."""
    with mttys(*tracked) as made:
        try:
            yield made
        finally:
            await two.forget()
