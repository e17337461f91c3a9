"""Two real migrd daemons in the lab guest, with QEMUs whose VFIO devices have page tables.

    alpha  ┐  one kernel, one set of mttys: both daemons see all devices, each test gives alpha's VM
    beta   ┘  one of them and says which other one takes its place on beta (destination_devices)

    with e2e_fleet() as two:                        both daemons, once for all tests
        async with mttys, two.vm_with(...):         one VM, `guest`, gone afterwards on both hosts

The daemons are processes of `tests.lab.guest.e2e_migrd`, not asyncio's, so that they outlive the
event loop of one test. QEMUs leave a trace each (`Lab.trace`), which says
what they asked of the kernel.

`QemuFds` are copies of descriptors of a running QEMU: through its iommufd a test plays the device
that writes to memory, through the device's own it reads and writes the device's registers.

Everything here runs ten times slower than outside: deadlines are generous, and no time is asserted.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
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
from migrd.demo import hosts, processes
from migrd.demo.hosts import Host
from migrd.demo.image import GuestImage
from migrd.demo.proof import SerialTap, prove_continuity
from migrd.kernel.iommufd import Iommufd, pidfd_getfd
from migrd.kernel.vfio import VfioDevice
from tests.lab.guest import raw
from tests.lab.guest.e2e_migrd import CLEARING, PEEK, SWITCHED
from tests.lab.guest.raw import MIB, Mtty
from tests.setup.debian import qemu_binaries

T = TypeVar("T")

VM = "guest"
TERMINAL = {"succeeded", "rolled_back", "cancelled", "refused", "guest_lost"}
CALL_S = 120.0
STEP_S = 120.0
END_S = 30.0
"""For what takes a few seconds at most when nothing else runs."""
MEMORY_MIB = 64
DMA_STEP_BYTES = MIB // 4
DMA_IOVA, DMA_BYTES = 16 * MIB, 12 * MIB
"""Where the devices of the tests write: memory full of what cannot be compressed, and that the
guest leaves alone."""
QUIET = GuestImage(
    working_set_pages=16,
    cold_pages=DMA_BYTES // 4096 - 16,
    pages_per_s=100,
    heartbeat_interval_s=0.05,
    noise=True,
)
"""It hardly dirties anything: what is dirty is the device's doing."""
SLOW: Mapping[str, Json] = {"max_bandwidth_bytes_per_s": 2 * MIB, "downtime_limit_ms": 100}
"""To copy the memory once takes six seconds."""
FAST: Mapping[str, Json] = {"max_bandwidth_bytes_per_s": 0, "downtime_limit_ms": 20_000}
IOMMUFD = Path("/dev/iommu")
SCRATCH_REGISTER = 7
"""Of the first port of an mtty, in its BAR 0: a byte that is kept and does nothing."""

_PROFILE = """\
    # mtty's own log of its DMA is a stub: left alone
    "-global", "vfio-pci.x-device-dirty-page-tracking=off",
    # slots of their own, which have no power before a guest gives it: a device leaves at once
    "-global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off",
    "-device", "pcie-root-port,id=port1,chassis=1,slot=1",
    "-device", "pcie-root-port,id=port2,chassis=2,slot=2",
    "-D", "{trace}",
{traces}
"""
_TRACES = (
    "iommufd_backend_alloc_hwpt",
    "iommufd_backend_set_dirty",
    "iommufd_backend_get_dirty_bitmap",
)
_PATIENT = """\
stall_s = 60.0
preflight_deadline_s = 90.0
prepare_deadline_s = 120.0
switchover_deadline_s = 90.0
rollback_deadline_s = 90.0
"""
_SAMPLING = """
[devices]
sample_interval_s = 1.0
"""


class QemuFds:
    """Copies of a QEMU's descriptors; see the module. Let go of by `with`, or with the test."""

    def __init__(self, pid: int) -> None:
        self._pidfd = os.pidfd_open(pid)
        self._pid = pid
        self._held = contextlib.ExitStack()
        self._held.callback(os.close, self._pidfd)

    def __enter__(self) -> QemuFds:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._held.close()

    def of(self, node: Path) -> list[int]:
        """Copies of those that are open on a character device, by QEMU's own numbers."""
        found = []
        for entry in sorted(Path(f"/proc/{self._pid}/fd").iterdir(), key=lambda one: int(one.name)):
            if _target(entry) == str(node):
                found.append(pidfd_getfd(self._pidfd, int(entry.name)))
                self._held.callback(os.close, found[-1])
        return found

    def iommufd(self) -> raw.Iommufd:
        """The first one. Not to be closed by itself."""
        return raw.Iommufd(self.of(IOMMUFD)[0])

    def register(self, mtty: Mtty) -> int:
        return os.pread(self.of(mtty.node)[0], 1, SCRATCH_REGISTER)[0]

    def set_register(self, mtty: Mtty, value: int) -> None:
        os.pwrite(self.of(mtty.node)[0], bytes([value]), SCRATCH_REGISTER)


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

    async def ask(self, host: str, *segments: str) -> dict[str, Any]:
        reply = await self.call(host, "GET", path(*segments))
        assert isinstance(reply.body, dict)
        return reply.body

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
        ports = {id_: f"port{number}" for number, id_ in enumerate(devices, start=1)}
        body: dict[str, Json] = {
            "profile": "demo",
            "parameters": {"memory_mib": MEMORY_MIB, "firmware": "guest.rom"},
            "devices": [
                {"id": id_, "address": device.sysfs.name, "guest_bus": ports[id_]}
                for id_, device in devices.items()
            ],
            **more,
        }
        reply = await self.call(host, "PUT", path("vms", VM), body=body)
        assert isinstance(reply.body, dict)
        return reply.body

    async def start(self, *, host: str = "alpha") -> dict[str, Any]:
        """The VM, once its guest counts."""
        reply = await self.call(host, "POST", path("vms", VM, verb="start"))
        assert isinstance(reply.body, dict)
        await self.counts_on(host)
        return reply.body

    async def migrate(
        self, to: Mapping[str, Mtty], *, policy: Mapping[str, Json] = FAST, **more: Json
    ) -> str:
        """From alpha to beta, `to` other devices by QEMU id; its id."""
        body: dict[str, Json] = {
            "vm": VM,
            "destination": "beta",
            "policy": {"deadline_s": 240, **policy},
            "destination_devices": {id_: device.sysfs.name for id_, device in to.items()},
            **more,
        }
        reply = await self.call("alpha", "POST", path("migrations"), body=body)
        assert isinstance(reply.body, dict)
        return str(reply.body["id"])

    async def policy(self, migration: str, change: Mapping[str, Json]) -> None:
        await self.call("alpha", "PATCH", f"/v1/migrations/{migration}/policy", body=change)

    async def precopies(self, migration: str, *, rounds: int = 1) -> dict[str, Any]:
        """It copies memory, and that many rounds are over: QEMU has switched tracking on."""
        return await self.until(
            migration,
            lambda seen: (
                _not_over(seen)
                and seen["phase"] == "precopy"
                and (seen["progress"]["rounds"] or 0) >= rounds
            ),
        )

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
            for log in sorted((host.directory / "run" / "vms").glob("*/*/serial.log")):
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

        await _until(new, lambda count: count >= beats, STEP_S)

    async def runs_only_on(self, host: str, *, switches: int = 0) -> dict[str, Any]:
        """It counts on there without a gap or a repeat, in the only QEMU there is; the VM."""
        await self.counts_on(host)
        pids = await _until(self.qemus, lambda pids: len(pids) == 1, STEP_S)
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

    def held_by(self, pid: int, node: Path) -> int:
        """How many descriptors a process has open on a character device."""
        return sum(_target(entry) == str(node) for entry in Path(f"/proc/{pid}/fd").iterdir())

    def holds(self, host: str, node: Path = IOMMUFD) -> int:
        """... and the daemon of a host."""
        return self.held_by(self.daemons[host], node)

    async def free(self, device: Mtty, *, host: str = "alpha") -> None:
        """The daemon holds no iommufd any more, and the kernel gives the device to whoever asks."""

        async def is_let_go() -> bool:
            return self.holds(host) == 0

        await _until(is_let_go, bool, STEP_S)
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

        await _until(is_ready, bool, STEP_S)

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


def _target(link: Path) -> str:
    with contextlib.suppress(FileNotFoundError):
        return os.readlink(link)
    return ""


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


def _not_over(seen: Mapping[str, Any]) -> bool:
    assert seen["phase"] not in TERMINAL, (seen["phase"], seen["cause"], seen["refusals"])
    return True


@contextlib.contextmanager
def e2e_fleet() -> Iterator[Lab]:
    """Both daemons, ready."""
    directory = Path(tempfile.mkdtemp(prefix="e2e-", dir="/tmp"))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, directory)
        two = Lab(directory, _lay_out(directory), stack.enter_context(_nursery()))
        stack.callback(_end, two)
        for host in two.hosts:
            two.begin_daemon(host)
        asyncio.run(_all_ready(two))
        yield two


@contextlib.contextmanager
def _nursery() -> Iterator[subprocess.Popen[str]]:
    # what names settings of this run's would be taken for settings of migrd's
    environment = {name: it for name, it in os.environ.items() if not name.startswith("MIGRD_")}
    with subprocess.Popen(
        [sys.executable, "-m", "tests.lab.guest.e2e_migrd"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as nursery:
        assert nursery.stdout is not None
        assert nursery.stdout.readline() == "ready\n"
        yield nursery
        # its end follows from that of its stdin


def _end(two: Lab) -> None:
    for host in list(two.daemons):
        two.end_daemon(host, signal.SIGTERM)
    processes.end(processes.qemus_of(two.directory))


async def _all_ready(two: Lab) -> None:
    for host in two.hosts:
        await two.ready(host)


def _lay_out(directory: Path) -> dict[str, Host]:
    binary = str(qemu_binaries()["10"])
    lines = {"migration": _PATIENT, "end": _SAMPLING}
    pair = hosts.lay_out(
        directory,
        names=("alpha", "beta"),
        binaries=(binary, binary),
        machine="pc-q35-10.0",
        tls=False,
        more={"alpha": lines, "beta": lines},
    )
    traces = "".join(f'    "-trace", "{event}",\n' for event in _TRACES)
    more = _PROFILE.format(trace=directory / "trace-%d", traces=traces)
    for host in pair:
        profile = host.directory / "profiles" / "demo.toml"
        text = profile.read_text().replace('    "-nodefaults",\n', f'    "-nodefaults",\n{more}')
        profile.write_text(text + "\n[passthrough]\nallowed = true\n")
    QUIET.write_rom(directory / "firmware" / "guest.rom")
    return {host.name: host for host in pair}


class Dma:
    """A device that writes to memory, piece after piece: `async with Dma(iommufd, hwpt)`."""

    def __init__(self, iommufd: raw.Iommufd, hwpt: int) -> None:
        self._iommufd = iommufd
        self._hwpt = hwpt
        self._task: asyncio.Task[None] | None = None
        self.written_bytes = 0

    async def _write(self) -> None:
        while True:
            with contextlib.suppress(OSError):  # EINVAL while tracking is off
                await asyncio.to_thread(self._once)
            await asyncio.sleep(0.03)

    def _once(self) -> None:
        at = DMA_IOVA + self.written_bytes % DMA_BYTES
        self._iommufd.make_dirty(self._hwpt, at, DMA_STEP_BYTES)
        self.written_bytes += DMA_STEP_BYTES

    async def __aenter__(self) -> Dma:
        self._task = asyncio.create_task(self._write())
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.wait([self._task])


@contextlib.contextmanager
def opened(mtty: Mtty) -> Iterator[VfioDevice]:
    """A device that nobody else has."""
    with Iommufd.open() as iommufd, VfioDevice.open(str(mtty.node), mtty.sysfs.name) as device:
        device.bind(iommufd.fileno())
        yield device


@contextlib.contextmanager
def mttys(*tracked: bool) -> Iterator[Sequence[Mtty]]:
    """Fresh devices, one for each answer to: can its IOMMU track?"""
    with contextlib.ExitStack() as held:
        yield [held.enter_context(raw.mtty(tracked=one)) for one in tracked]


@contextlib.asynccontextmanager
async def given(two: Lab, *tracked: bool) -> AsyncIterator[Sequence[Mtty]]:
    """Devices for one test; the VM that has them is gone before they are."""
    with mttys(*tracked) as made:
        try:
            yield made
        finally:
            await two.forget()
