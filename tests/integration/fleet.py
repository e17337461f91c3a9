"""Two real migrd daemons with a real guest, and everything a test needs to break them.

    async with fleet(directory, binaries) as two:
        await two.start_guest("alpha")
        migration = await two.migrate("alpha", "beta")
        await two.ended("alpha", migration)
        await two.prove(1, on="beta")       # count, memory, one copy: the kernel is asked, not us

The stream of guest memory from alpha to beta goes through `two.stream` (a FreezingProxy) where the
fleet was made with `proxied=True`. Leaving the context ends daemons and QEMUs, by pid.
"""

import asyncio
import contextlib
import glob
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from migrd import failpoints
from migrd.cli.client import Reply, path
from migrd.cli.exits import CommandError
from migrd.cli.seen import Json
from migrd.demo import hosts, processes
from migrd.demo.hosts import Host
from migrd.demo.image import GuestImage, Pattern
from migrd.demo.proof import Continuity, SerialTap, prove_continuity
from migrd.qemu.profile import TCG_EXTRA_KIB
from tests.integration.small_disk import mounted
from tests.lab.freezing_proxy import FreezingProxy, freezing_proxy

VM = "guest"
MIB = 1 << 20
TERMINAL = {"succeeded", "rolled_back", "cancelled", "refused", "guest_lost"}
STREAM_HOST = "127.0.0.2"
HELD = Path(__file__).with_name("held.py")

SMALL = GuestImage(working_set_pages=8 * 256, pages_per_s=1000, pattern=Pattern.RANDOM, noise=True)
"""8 MiB dirtied at 4 MiB/s: gone in a moment."""
BUSY = GuestImage(
    working_set_pages=48 * 256, pages_per_s=20 * 256, pattern=Pattern.RANDOM, noise=True
)
"""48 MiB dirtied at 20 MiB/s: with a bandwidth limit below that it never converges."""
LIVELY = GuestImage(
    working_set_pages=6 * 256, pages_per_s=20 * 256, pattern=Pattern.RANDOM, noise=True
)
"""6 MiB dirtied at 20 MiB/s: below 8 MiB/s it does not converge, and shows that soon."""


@dataclass
class Fleet:
    """Two hosts; see the module."""

    directory: Path
    hosts: dict[str, Host]
    image: GuestImage
    memory_mib: int
    stream: FreezingProxy | None = None
    namespaces: Mapping[str, str] = field(default_factory=dict)
    """Host -> network namespace in which its daemon, and so its QEMUs, live."""
    taps: list[SerialTap] = field(default_factory=list)
    armed: dict[str, str] = field(default_factory=dict)
    """Host -> failpoints (migrd.failpoints) that its next daemon is started with."""
    _listening: dict[Path, asyncio.Task[None]] = field(default_factory=dict)

    # Asking -----------------------------------------------------------------------------------

    async def call(
        self,
        host: str,
        method: str,
        where: str,
        *,
        body: Json = None,
        headers: Mapping[str, str] | None = None,
        query: Mapping[str, str] | None = None,
    ) -> Reply:
        async with self.hosts[host].client() as client:
            return await client.call(method, where, body=body, headers=headers, query=query)

    async def migrate(self, source: str, destination: str, **more: Json) -> str:
        """Ask for a migration; its id. Raises the client's errors."""
        policy: dict[str, Json] = {"downtime_limit_ms": 300, "deadline_s": 60}
        said = more.pop("policy", {})
        assert isinstance(said, dict)
        body: dict[str, Json] = {
            "vm": VM,
            "destination": destination,
            "policy": {**policy, **said},
            **more,
        }
        reply = await self.call(source, "POST", path("migrations"), body=body)
        assert isinstance(reply.body, dict)
        return str(reply.body["id"])

    async def migration(self, host: str, migration_id: str) -> dict[str, Any]:
        reply = await self.call(host, "GET", path("migrations", migration_id))
        assert isinstance(reply.body, dict)
        return reply.body

    async def vm(self, host: str) -> dict[str, Any]:
        reply = await self.call(host, "GET", path("vms", VM))
        assert isinstance(reply.body, dict)
        return reply.body

    async def until(
        self,
        host: str,
        migration_id: str,
        fits: Callable[[dict[str, Any]], bool],
        *,
        within_s: float = 30.0,
    ) -> dict[str, Any]:
        """The migration once it fits; also over a restart of the daemon."""
        give_up_at = time.monotonic() + within_s
        seen: dict[str, Any] = {}
        while time.monotonic() < give_up_at:
            with contextlib.suppress(CommandError):
                seen = await self.migration(host, migration_id)
                if fits(seen):
                    return seen
            await asyncio.sleep(0.02)
        raise AssertionError(f"not reached within {within_s:g} s; last seen: {seen}")

    async def phase(self, host: str, migration_id: str, *phases: str) -> dict[str, Any]:
        return await self.until(host, migration_id, lambda seen: seen["phase"] in phases)

    async def ended(self, host: str, migration_id: str, within_s: float = 45.0) -> dict[str, Any]:
        """The migration in its terminal phase."""
        return await self.until(
            host, migration_id, lambda seen: seen["phase"] in TERMINAL, within_s=within_s
        )

    # The guest --------------------------------------------------------------------------------

    async def start_guest(self, host: str) -> None:
        """Define and start it, and wait until it counts."""
        body: Json = {
            "profile": "demo",
            "parameters": {"memory_mib": self.memory_mib, "firmware": "guest.rom"},
        }
        await self.call(host, "PUT", path("vms", VM), body=body)
        await self.call(host, "POST", path("vms", VM, verb="start"))
        await self.counts_on(host)

    async def counts_on(self, host: str, beats: int = 10, *, within_s: float = 15.0) -> None:
        """The guest prints on this host, from now on."""
        give_up_at = time.monotonic() + within_s
        before = {tap.owner: tap.text().count(b"H ") for tap in self.taps}
        while time.monotonic() < give_up_at:
            for tap in self.taps:
                new = tap.text().count(b"H ") - before.get(tap.owner, 0)
                if tap.owner.startswith(f"{host}/") and new >= beats:
                    return
            await asyncio.sleep(0.02)
        heard = {tap.owner: (len(tap.chunks), tap.text()[-80:]) for tap in self.taps}
        raise AssertionError(f"the guest does not count on {host}; heard: {heard}")

    def beats(self, host: str) -> int:
        """Heartbeats printed on a host so far."""
        return sum(tap.text().count(b"H ") for tap in self.taps if tap.owner.startswith(f"{host}/"))

    async def stands_still(self, host: str, *, for_s: float = 0.7, within_s: float = 20.0) -> None:
        """The guest has stopped printing there (it prints every 10 ms)."""
        give_up_at, since, before = time.monotonic() + within_s, time.monotonic(), -1
        while time.monotonic() - since < for_s:
            if (now := self.beats(host)) != before:
                since, before = time.monotonic(), now
            assert time.monotonic() < give_up_at, f"the guest counts on, on {host}"
            await asyncio.sleep(0.02)

    async def listen(self) -> None:
        """Record every serial line there is, from its first byte; runs until cancelled."""
        while True:
            for host in self.hosts.values():
                found = await asyncio.to_thread(self.logs, host)
                for log in found:
                    if log not in self._listening:
                        tap = SerialTap(f"{host.name}/{log.parent.name}")
                        self.taps.append(tap)
                        self._listening[log] = asyncio.create_task(tap.follow(log))
            await asyncio.sleep(0.005)

    def logs(self, host: Host) -> list[Path]:
        """Where the guest's words on this host are written. Blocking."""
        # Not Path.glob: a directory that goes away while it looks is an error to it.
        below = host.directory / "run" / "vms"
        return sorted(Path(found) for found in glob.glob(f"{below}/*/*/serial.log"))

    async def stop_listening(self) -> None:
        for task in self._listening.values():
            task.cancel()
        if self._listening:
            await asyncio.wait(self._listening.values())

    # The proof --------------------------------------------------------------------------------

    async def prove(self, switches: int, *, on: str) -> Continuity:
        """Count without gap or repeat over so many moves, memory as predicted, one QEMU, `on`."""
        await self.counts_on(on)
        pids = await self.qemus()
        assert len(pids) == 1, f"QEMUs: {pids}"
        told = (await self.vm(on))["pid"]
        assert told == pids[0], f"the API says pid {told}, the kernel {pids}"
        await asyncio.to_thread(
            processes.verify_memory_of,
            pids[0],
            self.image,
            self.memory_mib * MIB + TCG_EXTRA_KIB * 1024,
            self.directory,
        )
        printed = [tap for tap in self.taps if tap.chunks]
        return prove_continuity(printed, switches=switches)

    async def qemus(self, host: str | None = None) -> list[int]:
        """Pids of the QEMUs, of one host or of both, as the kernel says."""
        below = self.directory if host is None else self.hosts[host].directory
        return await asyncio.to_thread(processes.qemus_of, below)

    async def only_qemus(self, count: int, *, within_s: float = 10.0) -> list[int]:
        """Wait until there are so many."""
        give_up_at = time.monotonic() + within_s
        while len(pids := await self.qemus()) != count:
            assert time.monotonic() < give_up_at, f"QEMUs: {pids}"
            await asyncio.sleep(0.05)
        return pids

    # Breaking ---------------------------------------------------------------------------------

    async def kill_daemon(self, host: str) -> None:
        """SIGKILL: nothing is tidied up."""
        process = self.hosts[host].process
        assert process is not None
        process.kill()
        await process.wait()

    async def start_daemon(self, host: str) -> None:
        await hosts.start(self.hosts[host], self.program(host))

    def program(self, host: str) -> tuple[str, ...]:
        """What is run as this host's migrd: one that can be held at its journal (`held`)."""
        inside = self.namespaces.get(host)
        entry = ("ip", "netns", "exec", inside) if inside else ()
        points = self.armed.pop(host, "")
        with_points = ("env", f"{failpoints.VARIABLE}={points}") if points else ()
        return (*entry, *with_points, sys.executable, str(HELD), str(self._holds(host)))

    def _holds(self, host: str) -> Path:
        return self.hosts[host].directory / "holds"

    def hold(self, host: str, when: str, trigger: str) -> None:
        """Make the daemon wait `before` or `after` the record of a trigger is durable."""
        self._mark(host, when, trigger).touch()

    async def held(self, host: str, when: str, trigger: str, *, within_s: float = 30.0) -> None:
        """The daemon has come to the point."""
        reached = self._mark(host, when, trigger).with_suffix(".reached")
        give_up_at = time.monotonic() + within_s
        while not await asyncio.to_thread(reached.exists):
            assert time.monotonic() < give_up_at, f"{host} never came to {reached.name}"
            await asyncio.sleep(0.01)

    def let_go(self, host: str, when: str, trigger: str) -> None:
        self._mark(host, when, trigger).unlink()

    def _mark(self, host: str, when: str, trigger: str) -> Path:
        return self._holds(host) / f"{when}-{trigger}"

    def signal_daemon(self, host: str, number: signal.Signals) -> None:
        process = self.hosts[host].process
        assert process is not None
        os.kill(process.pid, number)

    async def log_of(self, host: str) -> str:
        return await asyncio.to_thread(self.hosts[host].log.read_text, errors="replace")


def _lay_out(
    directory: Path,
    binaries: tuple[Path, Path],
    tls: bool,
    proxied_port: int | None,
    settings: Mapping[str, Mapping[str, str]],
) -> tuple[Host, Host]:
    """Blocking."""
    more = {name: dict(settings.get(name, {})) for name in ("alpha", "beta")}
    if proxied_port is not None:
        more["alpha"]["roster"] = f'migration_host = "{STREAM_HOST}"\n'
        more["beta"]["migration"] = more["beta"].get("migration", "") + (
            f"incoming_slots = 1\nport_range = [{proxied_port}, {proxied_port}]\n"
        )
    return hosts.lay_out(
        directory,
        names=("alpha", "beta"),
        binaries=(str(binaries[0]), str(binaries[1])),
        machine="pc-i440fx-7.2",
        tls=tls,
        more=more,
    )


def _prepare(two: Fleet, no_reboot: bool) -> None:
    """Blocking."""
    two.image.write_rom(two.directory / "firmware" / "guest.rom")
    for host in two.hosts.values():
        (host.directory / "holds").mkdir()
        if no_reboot:
            profile = host.directory / "profiles" / "demo.toml"
            text = profile.read_text()
            profile.write_text(text.replace('"-nodefaults",', '"-nodefaults", "-no-reboot",'))


@contextlib.asynccontextmanager
async def fleet(
    directory: Path,
    binaries: tuple[Path, Path],
    *,
    image: GuestImage = SMALL,
    memory_mib: int = 96,
    tls: bool = False,
    proxied: bool = False,
    settings: Mapping[str, Mapping[str, str]] | None = None,
    links: Mapping[str, tuple[str, str]] | None = None,
    no_reboot: bool = False,
    small_disk: str | None = None,
) -> AsyncIterator[Fleet]:
    """Two daemons, ready. `settings` are further lines of TOML, as `hosts.lay_out` takes them.

    `links`: host -> (network namespace, its address there); else both are on the loopback.
    `no_reboot`: a guest that resets its machine ends its QEMU. `small_disk`: the host whose state
    is on a disk of a few MiB of its own.
    """
    port = (await asyncio.to_thread(hosts.free_ports, 1))[0]
    pair = await asyncio.to_thread(
        _lay_out, directory, binaries, tls, port if proxied else None, settings or {}
    )
    two = Fleet(directory, {host.name: host for host in pair}, image, memory_mib)
    await asyncio.to_thread(_prepare, two, no_reboot)
    if links is not None:
        two.namespaces = {name: namespace for name, (namespace, _) in links.items()}
        await asyncio.to_thread(_move_to, pair, {name: links[name][1] for name in two.hosts})
    async with contextlib.AsyncExitStack() as stack:
        if small_disk is not None:
            await stack.enter_async_context(mounted(two.hosts[small_disk].directory / "state"))
        if proxied:
            two.stream = await stack.enter_async_context(
                freezing_proxy((STREAM_HOST, port), ("127.0.0.1", port))
            )
        async with in_service(two):
            yield two


@contextlib.asynccontextmanager
async def in_service(two: Fleet) -> AsyncIterator[None]:
    """Both daemons ready, the guest heard; at the end nothing of it is left."""
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(_end, two)
        listening = asyncio.create_task(two.listen())
        stack.push_async_callback(_end_listening, two, listening)
        await asyncio.gather(*(two.start_daemon(name) for name in two.hosts))
        yield


def _move_to(pair: tuple[Host, Host], addresses: Mapping[str, str]) -> None:
    """Rewrite both configurations for addresses of their own."""
    for host, other in (pair, reversed(pair)):
        text = host.config.read_text()
        text = text.replace('listen_host = "127.0.0.1"', f'listen_host = "{addresses[host.name]}"')
        text = text.replace("https://127.0.0.1:", f"https://{addresses[other.name]}:")
        host.config.write_text(text)


async def _end_listening(two: Fleet, listening: asyncio.Task[None]) -> None:
    deaf = listening.done()
    listening.cancel()
    await asyncio.wait([listening])
    await two.stop_listening()
    if deaf:
        await listening  # what ended it is why the test heard nothing


async def _end(two: Fleet) -> None:
    for host in two.hosts.values():
        with contextlib.suppress(AssertionError, ProcessLookupError):
            two.signal_daemon(host.name, signal.SIGCONT)
        await hosts.stop(host)
    await asyncio.to_thread(processes.end, await two.qemus())
