"""migrd as a driver: two real daemons, and a client that waits for events and polls nothing.

    POST /v1/migrations ─► 202 ─► events (opened before) ─► `succeeded` ─► GET: the whole answer

The clock starts before the POST and stops when the answer that says `succeeded` has been read.

Where the time goes is told by those who spent it: QEMU's own trace of both processes (its wall
clock), the API's timelines of both sides, and the daemons' log, whose line about a phase is written
once the phase is durable.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import aiohttp

from migrd.cli.seen import Json
from migrd.demo import hosts, processes
from migrd.demo.hosts import Host
from tests.bench.figures import Move
from tests.bench.guest import Guest
from tests.bench.stamper import Stamps

VM: Final = "bench"
TRACED: Final = (
    "vm_state_notify",
    "migrate_set_state",
    "qmp_enter_migrate",
    "qmp_enter_migrate_continue",
    "qmp_enter_cont",
    "qmp_enter_quit",
)
BANDWIDTH_BYTES_PER_S: Final = 0
"""Unlimited, as by default. QEMU keeps to a limit in steps of a tenth of a second, which would
hide what the drivers do."""
DOWNTIME_LIMIT_S: Final = 0.3
PROFILE: Final = """\
description = "The benchmarks' guest"
binary = "{binary}"
machine = "pc-i440fx-7.2"
accelerator = "tcg"
cpu = "qemu64"
memory_mib = {memory_mib}
arguments = [{arguments}]
"""


def extra_arguments(stamps: Stamps) -> list[str]:
    """What the measuring needs of a QEMU: heartbeat and trace."""
    return [
        *stamps.chardev(),
        *("-msg", "timestamp=on"),
        *(word for name in TRACED for word in ("-trace", name)),
    ]


def qemu_arguments(rom: Path, stamps: Stamps) -> list[str]:
    """What every QEMU gets beside machine, accelerator, CPU and memory."""
    return ["-nodefaults", "-display", "none", "-bios", str(rom), *extra_arguments(stamps)]


def command_of(pid: int, binary: Path) -> list[str]:
    """The command line that migrd gave this QEMU, less what is migrd's own: for other drivers, so
    that all guests are alike. Blocking."""
    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")[:-1]
    taken = iter(words[words.index("-no-user-config") :])  # before it: what a wrapper adds itself
    command = [str(binary)]
    for word in taken:
        if word in ("-qmp", "-name", "-D"):
            next(taken)
        else:
            command.append(word)
    return command


@dataclass
class MigrdRig:
    """Moves one guest from host to host and back. Make it with `migrd_rig`."""

    name = "migrd"
    directory: Path
    hosts: tuple[Host, Host]
    sessions: tuple[aiohttp.ClientSession, aiohttp.ClientSession]
    moves: int = 0
    timelines: dict[str, dict[str, float]] = field(default_factory=dict)
    """Of the last move: side -> phase -> wall time it was entered."""
    answers: list[dict[str, Any]] = field(default_factory=list)

    async def call(self, host: int, method: str, where: str, body: Json = None) -> Any:
        async with self.sessions[host].request(method, f"http://m/v1/{where}", json=body) as reply:
            answer = await reply.json()
            assert reply.status < 300, answer
            return answer

    async def start_guest(self) -> None:
        """Define and start it on the first host."""
        await self.call(0, "PUT", f"vms/{VM}", {"profile": "bench", "parameters": {}})
        await self.call(0, "POST", f"vms/{VM}:start")

    async def pid(self, host: int) -> int:
        return int((await self.call(host, "GET", f"vms/{VM}"))["pid"])

    async def move(self) -> Move:
        """Move the guest, from the request to the answer `succeeded`."""
        here, there = self.moves % 2, (self.moves + 1) % 2
        source_pid = await self.pid(here)
        body: dict[str, Json] = {
            "vm": VM,
            "destination": self.hosts[there].name,
            "policy": {
                "downtime_limit_ms": round(DOWNTIME_LIMIT_S * 1000),
                "max_bandwidth_bytes_per_s": BANDWIDTH_BYTES_PER_S,
                "deadline_s": 60,
            },
        }
        async with (
            asyncio.timeout(90.0),
            self.sessions[here].get("http://m/v1/events", params={"vm": VM}) as events,
        ):
            began_s = time.monotonic()
            id_ = (await self.call(here, "POST", "migrations", body))["id"]
            await _until_ended(events, id_)
            answer = await self.call(here, "GET", f"migrations/{id_}")
            ended_s = time.monotonic()
        assert answer["phase"] == "succeeded", answer
        self.moves += 1
        self.answers.append(answer)
        return Move(began_s, ended_s, source_pid, await self.pid(there))

    async def told(self) -> "Told":
        """What both sides say of the last move."""
        here, there = (self.moves - 1) % 2, self.moves % 2
        id_ = self.answers[-1]["id"]
        incoming = await self.call(there, "GET", f"migrations/{id_}")
        logs = [
            await asyncio.to_thread(_durable, self.hosts[host].log, id_) for host in (here, there)
        ]
        return Told(_entered(self.answers[-1]["timeline"]), _entered(incoming["timeline"]), *logs)

    async def metrics(self, host: int) -> str:
        async with self.sessions[host].get("http://m/metrics") as reply:
            return await reply.text()


@dataclass(frozen=True)
class Told:
    """When each phase was entered, and when that was durable; wall clock, by phase."""

    source: Mapping[str, float]
    destination: Mapping[str, float]
    source_durable: Mapping[str, float]
    destination_durable: Mapping[str, float]


async def _until_ended(events: aiohttp.ClientResponse, id_: str) -> None:
    while True:
        line = await events.content.readline()
        assert line, "the event stream has ended"
        if not line.startswith(b"data:") or id_.encode() not in line:
            continue
        phase = json.loads(line[5:])["body"].get("phase")
        if phase == "succeeded":
            return
        assert phase not in ("refused", "cancelled", "rolled_back", "guest_lost"), line


def _entered(timeline: list[dict[str, Any]]) -> dict[str, float]:
    return {entry["phase"]: wall_s(entry["entered_at"]) for entry in timeline}


def _durable(log: Path, id_: str) -> dict[str, float]:
    found = {}
    for line in log.read_text(errors="replace").splitlines():
        if id_ in line and '"phase"' in line:
            said = json.loads(line)
            if said.get("event") == "phase":
                found[said["phase"]] = wall_s(said["timestamp"])
    return found


def wall_s(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


@contextlib.asynccontextmanager
async def migrd_rig(
    directory: Path, binary: Path, guest: Guest, arguments: list[str], *, tls: bool
) -> AsyncIterator[MigrdRig]:
    """Two daemons with the guest running on the first."""
    pair = await asyncio.to_thread(
        hosts.lay_out,
        directory,
        names=("alpha", "beta"),
        binaries=(str(binary), str(binary)),
        machine="pc-i440fx-7.2",
        tls=tls,
    )
    for host in pair:
        words = [*arguments, "-D", f"{directory}/%d.trace"]
        profile = PROFILE.format(
            binary=binary,
            memory_mib=guest.memory_mib,
            arguments=", ".join(json.dumps(word) for word in words),
        )
        await asyncio.to_thread((host.directory / "profiles" / "bench.toml").write_text, profile)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(_end, directory, pair)
        await asyncio.gather(*(hosts.start(host) for host in pair))
        sessions = [
            await stack.enter_async_context(
                aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(host.socket)))
            )
            for host in pair
        ]
        rig = MigrdRig(directory, pair, (sessions[0], sessions[1]))
        await rig.start_guest()
        yield rig


async def _end(directory: Path, pair: tuple[Host, Host]) -> None:
    for host in pair:
        await hosts.stop(host)
    await asyncio.to_thread(lambda: processes.end(processes.qemus_of(directory)))
