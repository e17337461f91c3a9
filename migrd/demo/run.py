"""The main job, shown: two daemons, one guest that counts aloud, a live migration, and the proof.

    lay out -> start both daemons -> start the guest -> migrate (live progress) -> prove -> clean up

Proof: the guest's count on both serial lines reads as one; every byte of its memory is what its own
rules predict; the kernel knows of exactly one QEMU. migrd's own word is shown beside, never
taken for it.
"""

import asyncio
import contextlib
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from migrd.cli.client import path
from migrd.cli.seen import Json, Seen
from migrd.demo import hosts, processes
from migrd.demo.errors import DemoFailed, ImageError, ProofFailed
from migrd.demo.hosts import Host
from migrd.demo.image import PAGE_BYTES, GuestImage, Pattern
from migrd.demo.proof import Continuity, SerialTap, heartbeats, prove_continuity
from migrd.engine.threads import in_thread
from migrd.qemu.profile import TCG_EXTRA_KIB

VM: Final = "guest"
MIB: Final = 1 << 20
HEARTBEATS_BEFORE: Final = 50
HEARTBEATS_AFTER: Final = 50
HEARTBEATS_S: Final = 30.0
KEEP_NOTE: Final = "keep.txt"


@dataclass(frozen=True)
class Plan:
    """What the demo was asked to do."""

    engine: str = "qemu"
    memory_mib: int = 256
    working_set_mib: int = 96
    dirty_mib_per_s: float = 20.0
    bandwidth_mib_per_s: int = 64
    """0: unlimited. The loopback is so quick that there would be little to see."""
    pattern: Pattern = Pattern.RANDOM
    downtime_limit_ms: int = 300
    when_not_converging: str = "throttle"
    multifd: int = 0
    tls: bool = True
    binary: str = "/usr/bin/qemu-system-x86_64"
    machine: str = "pc-i440fx-7.2"
    directory: Path | None = None
    keep: bool = False

    def image(self) -> GuestImage:
        """The guest's boot image. Raises ImageError for what it cannot be."""
        return GuestImage(
            working_set_pages=self.working_set_mib * MIB // PAGE_BYTES,
            pages_per_s=max(1, round(self.dirty_mib_per_s * MIB / PAGE_BYTES)),
            pattern=self.pattern,
            noise=True,
        )


async def run(plan: Plan, console: Console) -> int:
    """Run the demo; the exit code of `migrd demo`."""
    try:
        directory = await in_thread(_make_directory, plan.directory)
    except (DemoFailed, OSError) as exc:
        console.print(f"[bold red]The demo cannot begin:[/] {exc}", highlight=False)
        return 1
    demo = _demo(plan, directory, console)
    done = False
    try:
        code = await demo.run()
        done = True
    except (DemoFailed, ImageError, ProofFailed) as exc:
        console.print(f"[bold red]The demo failed:[/] {exc}", highlight=False)
        code = 1
    finally:
        if plan.keep and done:
            await demo.say_what_is_kept()
        else:
            await demo.clean_up()
    return code


def _demo(plan: Plan, directory: Path, console: Console) -> "Demo":
    if plan.engine == "direct":
        from migrd.demo.direct_run import DirectDemo  # which is a Demo

        return DirectDemo(plan, directory, console)
    return Demo(plan, directory, console)


def _make_directory(wanted: Path | None) -> Path:
    """A short path: unix sockets below it may be 107 bytes long."""
    if wanted is None:
        return Path(tempfile.mkdtemp(prefix="migrd-demo-", dir="/tmp"))
    if wanted.exists() and any(wanted.iterdir()):
        raise DemoFailed(f"{wanted} is not empty: name another directory")
    wanted.mkdir(parents=True, exist_ok=True, mode=0o700)
    return wanted.resolve()


class Demo:
    """One run of it."""

    what = "QEMU"
    """What the guest runs in."""

    def __init__(self, plan: Plan, directory: Path, console: Console) -> None:
        self._plan = plan
        self._directory = directory
        self._console = console
        self._image = plan.image()
        self._hosts: tuple[Host, ...] = ()
        self._taps = {name: SerialTap(name) for name in ("alpha", "beta")}

    async def run(self) -> int:
        """Everything in order. Raises DemoFailed, ProofFailed."""
        await self._check_machine()
        await self._start_hosts()
        alpha, beta = self._hosts
        async with self._listening():
            await self._start_guest(alpha)
            began_s = time.monotonic()
            code = await self._migrate(alpha)
            took_s = time.monotonic() - began_s
            if code != 0:
                return code
            await self._heartbeats(beta, HEARTBEATS_AFTER)
            await self._prove(alpha, beta, took_s)
        return 0

    async def _check_machine(self) -> None:
        if shutil.which(self._plan.binary) is None:
            raise DemoFailed(
                f"{self._plan.binary} is not here: install QEMU (Debian: apt-get install "
                "qemu-system-x86), or name another with --qemu"
            )
        if self._image.memory_needed_bytes > self._plan.memory_mib * MIB:
            raise DemoFailed("the working set does not fit into the guest's memory: raise --memory")

    async def _start_hosts(self) -> None:
        plan = self._plan
        self._say("Laying out two hosts, alpha and beta, in", str(self._directory))
        self._hosts = await in_thread(
            hosts.lay_out,
            self._directory,
            names=("alpha", "beta"),
            binaries=(plan.binary, plan.binary),
            machine=plan.machine,
            tls=plan.tls,
        )
        rom = await in_thread(self._image.rom)
        await in_thread((self._directory / "firmware" / "guest.rom").write_bytes, rom)
        await asyncio.gather(*(hosts.start(host) for host in self._hosts))
        self._say("Two migrd daemons are ready", "mutual TLS between them, a throw-away CA")

    async def _start_guest(self, alpha: Host) -> None:
        plan = self._plan
        definition: dict[str, Json] = {
            "profile": "demo",
            "parameters": {"memory_mib": plan.memory_mib, "firmware": "guest.rom"},
        }
        async with alpha.client() as client:
            await client.call("PUT", path("vms", VM), body=definition)
            await client.call("POST", path("vms", VM, verb="start"))
        await self._heartbeats(alpha, HEARTBEATS_BEFORE)
        self._say(
            "The guest runs on alpha",
            f"{plan.memory_mib} MiB, dirtying {plan.dirty_mib_per_s:g} MiB/s of "
            f"{plan.working_set_mib} MiB ({plan.pattern.value}), counting aloud",
        )

    async def _migrate(self, alpha: Host) -> int:
        plan = self._plan
        self._console.print()
        arguments = [
            "migrate",
            VM,
            "beta",
            "--watch",
            "--downtime-limit-ms",
            str(plan.downtime_limit_ms),
            "--when-not-converging",
            plan.when_not_converging,
        ]
        if plan.bandwidth_mib_per_s:
            arguments += ["--max-bandwidth", f"{plan.bandwidth_mib_per_s}MiB/s"]
        if plan.multifd:
            arguments += ["--multifd", str(plan.multifd)]
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "migrd", "--socket", str(alpha.socket), *arguments
        )
        try:
            code = await process.wait()
        finally:
            if process.returncode is None:
                process.terminate()
                await process.wait()
        self._console.print()
        return code

    # The proof --------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _listening(self) -> AsyncIterator[None]:
        """Record both serial lines, from their first byte."""
        tasks = [asyncio.create_task(self._listen(host)) for host in self._hosts]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def _listen(self, host: Host) -> None:
        while True:
            found = await in_thread(self._logs, host)
            if found:
                await self._taps[host.name].follow(found[0])
            await asyncio.sleep(0.005)

    def _logs(self, host: Host) -> list[Path]:
        """What the guest prints into, on this host. Blocking."""
        return sorted((host.directory / "run" / "vms").glob(f"{VM}/*/serial.log"))

    async def _heartbeats(self, host: Host, count: int) -> None:
        """Wait until the guest has counted so often on this host."""
        tap = self._taps[host.name]
        give_up_at = time.monotonic() + HEARTBEATS_S
        while tap.text().count(b"H ") < count:
            if time.monotonic() > give_up_at:
                raise ProofFailed(f"the guest does not count on {host.name}")
            await asyncio.sleep(0.02)

    async def _prove(self, alpha: Host, beta: Host, took_s: float) -> None:
        taps = [self._taps[alpha.name], self._taps[beta.name]]
        continuity = prove_continuity(taps, switches=1)
        pids = await in_thread(self._guests)
        if len(pids) != 1:
            raise ProofFailed(f"{len(pids)} copies run instead of one: {self.what} pids {pids}")
        began_s = time.monotonic()
        await in_thread(self._compare_memory, pids[0])
        compared_s = time.monotonic() - began_s
        async with alpha.client() as client:
            listed = (await client.get("migrations")).seen
        self._report(continuity, pids[0], compared_s, took_s, _newest(listed))

    def _guests(self) -> list[int]:
        """Pids of what has a guest in it, as the kernel says. Blocking."""
        return processes.qemus_of(self._directory)

    def _compare_memory(self, pid: int) -> None:
        """Blocking. Raises ProofFailed."""
        memory_bytes = self._plan.memory_mib * MIB + TCG_EXTRA_KIB * 1024
        processes.verify_memory_of(pid, self._image, memory_bytes, self._directory)

    def _report(
        self, continuity: Continuity, pid: int, compared_s: float, took_s: float, said: Seen
    ) -> None:
        source = len(heartbeats([self._taps["alpha"]]))
        blackout_ms = continuity.blackouts_s[0] * 1000
        table = Table(
            title="Proof, from outside", title_justify="left", show_header=False, box=None
        )
        table.add_row(
            "count",
            f"{continuity.heartbeats} heartbeats, no gap, no repeat: {source} on alpha, then beta",
        )
        table.add_row(
            "memory",
            f"{self._plan.memory_mib} MiB compared byte for byte in "
            f"{compared_s:.2f} s: equal to the prediction",
        )
        table.add_row("copies", f"exactly one {self.what} runs (pid {pid}, on beta)")
        table.add_row(
            "blackout",
            f"{blackout_ms:.1f} ms seen by the guest "
            f"(± {continuity.jitter_s * 1000:.1f} ms); migrd says at most "
            f"{said.number('blackout_ms') or 0:.1f} ms",
        )
        moved = said.part("progress").number("transferred_bytes") or 0
        table.add_row(
            "total",
            f"{(said.number('total_ms') or 0) / 1000:.2f} s from request to "
            f"succeeded, {moved / MIB:.1f} MiB moved "
            f"({took_s:.2f} s with the command line)",
        )
        self._console.print(table)

    # The end ----------------------------------------------------------------------------------

    async def say_what_is_kept(self) -> None:
        """--keep: where things are, what to try, how to end it."""
        alpha, beta = self._hosts
        await in_thread(
            (self._directory / KEEP_NOTE).write_text,
            "\n".join(str(host.process.pid) for host in self._hosts if host.process),
        )
        migrd = f"{sys.executable} -m migrd"
        self._console.print()
        self._say("Both daemons go on", "try:")
        for line in (
            f"{migrd} --socket {beta.socket} vms",
            f"{migrd} --socket {beta.socket} migrate {VM} alpha --watch",
            f"{migrd} --socket {alpha.socket} migrations",
            f"{migrd} --socket {alpha.socket} host",
            f"curl --unix-socket {alpha.socket} http://migrd/metrics",
            f"tail -f {alpha.log} {beta.log}",
            f"{migrd} demo --end {self._directory}      # ends it all",
        ):
            self._console.print("  " + line, highlight=False, soft_wrap=True)

    async def clean_up(self) -> None:
        """Leave nothing: daemons, QEMUs, files. Only what this demo started."""
        await asyncio.gather(*(hosts.stop(host) for host in self._hosts))
        await in_thread(remove, self._directory)

    def _say(self, what: str, more: str = "") -> None:
        self._console.print(f"[bold]{what}[/] {more}", highlight=False, soft_wrap=True)


def _newest(listed: Seen) -> Seen:
    items = listed.parts("items")
    return items[0] if items else Seen({})


def remove(directory: Path) -> None:
    """End what has a guest in it below a demo's directory, and remove it. Blocking."""
    processes.end([*processes.qemus_of(directory), *processes.guests_of(directory)])
    shutil.rmtree(directory, ignore_errors=True)


def end_kept(directory: Path) -> None:
    """End what `--keep` left: the daemons it noted, their QEMUs, the directory. Blocking."""
    note = directory / KEEP_NOTE
    if not note.is_file():
        raise DemoFailed(f"{directory} is not a demo that was kept: it has no {KEEP_NOTE}")
    pids = [int(word) for word in note.read_text().split()]
    processes.end([pid for pid in pids if processes.is_daemon_of(pid, directory)])
    remove(directory)
