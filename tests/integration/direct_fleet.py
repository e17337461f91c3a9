"""Two real migrd daemons, and a process with a guest in it that hands over: no QEMU anywhere.

What `fleet` and `scenarios` have for QEMU's guests holds here too: a DirectFleet is a Fleet, and
what it calls QEMUs are processes with a guest.

MIGRD_TEST_DIRECT_MIB says how large the guest of these tests is (64 if it is not set); a
quarter of a larger one is not zero, or FULL of it, and every deadline of the tests grows with it:

    MIGRD_TEST_DIRECT_MIB=4096 python -m pytest -n0 tests/integration/test_direct_moving.py

Source and destination need that much each. With MIGRD_TEST_DIRECT_LOG=<file>, a line of JSON per
migration that ended is appended there: its phase, where the guest runs, its figures.
"""

import asyncio
import contextlib
import glob
import json
import os
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from migrd.cli.client import path
from migrd.cli.exits import CommandError
from migrd.cli.seen import Json
from migrd.demo import hosts, processes
from migrd.demo.direct_memory import Layout, prove_memory
from migrd.demo.hosts import Host
from migrd.demo.proof import Continuity, prove_continuity
from tests.integration.fleet import MIB, SMALL, STREAM_HOST, VM, Fleet, in_service
from tests.lab.freezing_proxy import freezing_proxy

GUEST = Path(__file__).with_name("direct_guest.py")
WORKERS = 2
PAGES = MIB // 4096
LEAST_MIB, MOST_MIB = 64, 65536


def memory_mib_of(environment: Mapping[str, str]) -> int:
    """The size of the tests' guest. Raises ValueError."""
    name = "MIGRD_TEST_DIRECT_MIB"
    said = environment.get(name, str(LEAST_MIB))
    if not said.isascii() or not said.isdigit() or not LEAST_MIB <= int(said) <= MOST_MIB:
        raise ValueError(f"{name}={said!r}: a number of MiB from {LEAST_MIB} to {MOST_MIB}")
    return int(said)


MEMORY_MIB = memory_mib_of(os.environ)
PATIENCE = max(1.0, MEMORY_MIB / 512)
"""Every deadline of the tests is so many times what it is with a small guest."""
CALM: dict[str, Json] = {
    "memory_mib": MEMORY_MIB,
    "working_set_mib": 8,
    "filling_mib": 8 if MEMORY_MIB == LEAST_MIB else MEMORY_MIB // 4,
    "dirty_mib_per_s": 4,
}
FULL: dict[str, Json] = {**CALM, "filling_mib": MEMORY_MIB - 32}
"""Hardly a page of it is zero."""
LIVELY: dict[str, Json] = {**CALM, "working_set_mib": 24, "dirty_mib_per_s": 16}
"""With a bandwidth limit below that it never converges."""


def switchover_deadline(least_s: float) -> str:
    """The line of a configuration. The guest takes the checksum of all its memory meanwhile, on
    both sides."""
    return f"switchover_deadline_s = {least_s + (MEMORY_MIB - LEAST_MIB) / 200}\n"


@dataclass
class DirectFleet(Fleet):
    """Two hosts; see the module."""

    parameters: dict[str, Json] = field(default_factory=lambda: dict(CALM))

    @property
    def layout(self) -> Layout:
        def pages(name: str) -> int:
            value = self.parameters[name]
            assert isinstance(value, int)
            return value * PAGES

        memory, working_set = pages("memory_mib"), pages("working_set_mib")
        return Layout(memory, working_set, pages("filling_mib"), WORKERS)

    async def define(self, host: str, **changes: Json) -> None:
        body: Json = {"profile": "demo", "parameters": {**self.parameters, **changes}}
        await self.call(host, "PUT", path("vms", VM), body=body)

    # A large guest takes its time -----------------------------------------------------------

    async def migrate(self, source: str, destination: str, **more: Json) -> str:
        policy = more.pop("policy", {})
        assert isinstance(policy, dict)
        policy = {"deadline_s": 60 * PATIENCE, **policy}
        return await super().migrate(source, destination, policy=policy, **more)

    async def until(
        self,
        host: str,
        migration_id: str,
        fits: Callable[[dict[str, Any]], bool],
        *,
        within_s: float = 30.0,
    ) -> dict[str, Any]:
        within_s *= PATIENCE
        return await super().until(host, migration_id, fits, within_s=within_s)

    async def ended(self, host: str, migration_id: str, within_s: float = 45.0) -> dict[str, Any]:
        seen = await super().ended(host, migration_id, within_s)
        await asyncio.to_thread(note, seen)
        return seen

    async def counts_on(self, host: str, beats: int = 10, *, within_s: float = 15.0) -> None:
        await super().counts_on(host, beats, within_s=within_s * PATIENCE)

    async def held(self, host: str, when: str, trigger: str, *, within_s: float = 30.0) -> None:
        await super().held(host, when, trigger, within_s=within_s * PATIENCE)

    async def only_qemus(self, count: int, *, within_s: float = 10.0) -> list[int]:
        return await super().only_qemus(count, within_s=within_s * PATIENCE)

    # The guest --------------------------------------------------------------------------------

    async def start_guest(self, host: str) -> None:
        await self.define(host)
        await self.call(host, "POST", path("vms", VM, verb="start"))
        await self.counts_on(host)

    async def stop_guest(self, host: str) -> None:
        """End it, and forget what it said: the next one is another guest."""
        await self.call(host, "POST", path("vms", VM, verb="stop"))
        await self.only_qemus(0)
        for name in self.hosts:
            with contextlib.suppress(CommandError):
                await self.call(name, "DELETE", path("vms", VM))
        self.taps.clear()

    def behave(self, host: str, behaviour: str) -> None:
        """How a process that is launched there from now on behaves; see `direct_guest`."""
        (self.hosts[host].directory / "behaviour").write_text(behaviour)

    def logs(self, host: Host) -> list[Path]:
        below = host.directory / "run" / "direct"
        return sorted(Path(found) for found in glob.glob(f"{below}/*/*/output.log"))

    async def qemus(self, host: str | None = None) -> list[int]:
        below = self.directory if host is None else self.hosts[host].directory
        return await asyncio.to_thread(_guests_below, below)

    async def prove(self, switches: int, *, on: str) -> Continuity:
        """Count without gap or repeat over so many moves, memory by its rule, one process, `on`,
        and nothing lost on the way."""
        await self.counts_on(on)
        pids = await self.qemus()
        assert len(pids) == 1, f"processes: {pids}"
        told = (await self.vm(on))["pid"]
        assert told == pids[0], f"the API says pid {told}, the kernel {pids}"
        await asyncio.to_thread(self._prove_memory, pids[0])
        self._prove_checksums(switches)
        return prove_continuity([tap for tap in self.taps if tap.chunks], switches=switches)

    def _prove_memory(self, pid: int) -> None:
        with processes.standing_still(pid):
            visits = prove_memory(pid, self.layout)
        assert visits > 0

    def _prove_checksums(self, switches: int) -> None:
        """What was loaded last is what was saved last, if it moved at all."""
        lines = self.told.read_text().split("\n") if self.told.exists() else []
        loaded = [line.split()[1] for line in lines if line.startswith("loaded")]
        saved = [line.split()[1] for line in lines if line.startswith("saved")]
        assert len(loaded) >= switches
        assert switches == 0 or set(loaded[-switches:]) <= set(saved), lines

    @property
    def told(self) -> Path:
        return self.directory / "told"


def note(seen: Mapping[str, Any]) -> None:
    """Append what is to be known of a migration to MIGRD_TEST_DIRECT_LOG, if there is one."""
    if path := os.environ.get("MIGRD_TEST_DIRECT_LOG"):
        test = os.environ.get("PYTEST_CURRENT_TEST", "")
        with Path(path).open("a") as file:
            file.write(json.dumps({"test": test, "memory_mib": MEMORY_MIB, **seen}) + "\n")


def _guests_below(directory: Path) -> list[int]:
    """Processes that were launched to hand over below a directory, as the kernel says."""
    found = []
    for entry in processes.PROC.iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and os.fsencode(GUEST) in (entry / "cmdline").read_bytes():
                mark = b"MIGRD_SOCKET=" + os.fsencode(directory) + b"/"
                if mark in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
    return sorted(found)


def profile_text(told: Path) -> str:
    """The demo's profile, for our guest."""
    ours = f'"{GUEST}", "--told", "{told}", "--behave", "{{dir}}/behaviour",'
    text = hosts.DIRECT_PROFILE.replace('"-m", "migrd.demo.direct_guest",', ours)
    assert ours in text
    return text


def _settings_for_size(settings: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, str]]:
    """A large guest takes its time where it stands still."""
    more = {name: dict(settings.get(name, {})) for name in ("alpha", "beta")}
    for lines in more.values() if MEMORY_MIB > LEAST_MIB else ():
        if "switchover_deadline_s" not in lines.get("migration", ""):
            lines["migration"] = lines.get("migration", "") + switchover_deadline(3.0)
    return more


@contextlib.asynccontextmanager
async def direct_fleet(
    directory: Path,
    *,
    parameters: Mapping[str, Json] = CALM,
    tls: bool = False,
    proxied: bool = False,
    settings: Mapping[str, Mapping[str, str]] | None = None,
    profiles: Mapping[str, str] | None = None,
) -> AsyncIterator[DirectFleet]:
    """Two daemons, ready, and no guest yet. `profiles`: further ones, by name."""
    more = _settings_for_size(settings or {})
    port = (await asyncio.to_thread(hosts.free_ports, 1))[0]
    if proxied:
        more["alpha"]["roster"] = f'migration_host = "{STREAM_HOST}"\n'
        ours = f"incoming_slots = 1\nport_range = [{port}, {port}]\n"
        more["beta"]["migration"] = more["beta"].get("migration", "") + ours
    pair = await asyncio.to_thread(
        hosts.lay_out,
        directory,
        names=("alpha", "beta"),
        profile=profile_text(directory / "told"),
        tls=tls,
        more=more,
    )
    two = DirectFleet(
        directory, {host.name: host for host in pair}, SMALL, 0, parameters=dict(parameters)
    )
    for host in pair:
        await asyncio.to_thread((host.directory / "holds").mkdir)
        two.behave(host.name, "well")
        for name, text in (profiles or {}).items():
            file = host.directory / "profiles" / f"{name}.toml"
            await asyncio.to_thread(file.write_text, text)
    async with contextlib.AsyncExitStack() as stack:
        if proxied:
            two.stream = await stack.enter_async_context(
                freezing_proxy((STREAM_HOST, port), ("127.0.0.1", port))
            )
        await stack.enter_async_context(in_service(two))
        yield two


@contextlib.asynccontextmanager
async def running(
    directory: Path,
    *,
    parameters: Mapping[str, Json] = CALM,
    tls: bool = False,
    proxied: bool = False,
    settings: Mapping[str, Mapping[str, str]] | None = None,
) -> AsyncIterator[DirectFleet]:
    """A fleet whose guest counts on alpha; the options are those of `direct_fleet`."""
    async with direct_fleet(
        directory, parameters=parameters, tls=tls, proxied=proxied, settings=settings
    ) as two:
        await two.start_guest("alpha")
        yield two
