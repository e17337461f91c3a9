"""Carries out what a schedule has in store for one migration."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from migrd.cli.client import path
from migrd.cli.exits import CommandError
from migrd.cli.seen import Json
from tests.integration.fleet import TERMINAL
from tests.integration.scenarios import is_stopped
from tests.integration.small_disk import fill
from tests.long.disks import DISK_BYTES
from tests.long.field import NAMES, Field
from tests.long.schedule import Blow, Schedule

SLOW_BYTES_PER_S = 1 << 20
SLOW: dict[str, Json] = {"max_bandwidth_bytes_per_s": SLOW_BYTES_PER_S, "deadline_s": 300}
FAST: dict[str, Json] = {"max_bandwidth_bytes_per_s": 0}
PATIENT: dict[str, Json] = {"downtime_limit_ms": 20_000, "deadline_s": 300}
QUICK: dict[str, Json] = {"deadline_s": 300}
POSTCOPY: dict[str, Json] = {**SLOW, "when_not_converging": "postcopy"}
POLICIES = {"quick": QUICK, "slow": SLOW, "stopped": PATIENT, "postcopy": POSTCOPY}
ROAD_S = 0.015
"""What each 64 KiB takes on a slow road: all of the guest some two seconds."""
PHASE_S = 15.0
BLOWS_S = 60.0
STRUCK_S = 12.0
MOUNTED_S = 1.0
"""A daemon stays down for so long while its disk is mounted anew."""
FILLED_S = 8.0
LOOK_S = 0.02
_ACTION = {"killed_at": "kill", "stopped_at": "stop"}


@dataclass
class Fight:
    """One faulted migration while it goes on."""

    two: Field
    schedule: Schedule
    source: str
    destination: str
    id: str | None = None
    phase: str | None = None
    seen: set[str] = field(default_factory=set)
    killed: dict[int, str] = field(default_factory=dict)
    """QEMUs that were killed -> their host."""
    struck: list[str] = field(default_factory=list)
    began_wall_s: float = field(default_factory=time.time)
    _known: set[str] = field(default_factory=set)
    _over: asyncio.Event = field(default_factory=asyncio.Event)
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def host(self, side: str) -> str:
        return self.source if side == "source" else self.destination

    def hosts(self, side: str) -> tuple[str, ...]:
        return NAMES if side == "both" else (self.host(side),)

    @property
    def is_over(self) -> bool:
        return self.phase in TERMINAL

    # The course of it -------------------------------------------------------------------------

    async def go(self) -> None:
        """Ask for it, strike, and let everything work again."""
        two, blows = self.two, self.schedule.blows
        for name in NAMES:
            self._known |= {view["id"] for view in await self.listed(name)}
        points = [blow for blow in blows if blow.point]
        timed = [blow for blow in blows if not blow.point]
        has_storm = any(blow.what == "storm" for blow in blows)
        if self.schedule.pace == "stopped":
            two.streams[self.destination].to_target.delay_s = ROAD_S
        if not has_storm:
            await self._arm(points)
        self._tasks.append(asyncio.create_task(self._look()))
        for name in NAMES:
            mine = [b for b in points if b.what == "stopped_at" and self.host(b.side) == name]
            self._tasks.append(asyncio.create_task(self._wake(name, mine)))
        for blow in (blow for blow in timed if blow.what == "absent"):
            await self._kill(blow)
        await self._ask()
        await self._strike_all(timed)
        if has_storm:
            await self._arm(points)
        if points:
            if all(blow.what != "cancel" for blow in blows):
                await self.hurry()
            await self._over_within(STRUCK_S)
        await self._calm()

    async def end(self) -> None:
        """Nothing of it is left: no task, no failpoint."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        two = self.two
        two.away_s.clear()
        two.armed_next.clear()
        for name in NAMES:
            two.daemon(name).send_signal(signal.SIGCONT)
        await two.ready()
        for name in NAMES:
            await two.arm(name, "")
        await two.ready()

    def was_struck_at(self, blow: Blow) -> bool:
        """Has a daemon come to this failpoint?"""
        if blow.what == "stopped_at":
            return f"{blow.point} stood" in self.struck
        return any(death.host == self.host(blow.side) for death in self.two.deaths)

    async def _ask(self) -> None:
        policy = POLICIES[self.schedule.pace]
        with contextlib.suppress(CommandError):
            self.id = await self.two.migrate(
                self.source,
                self.destination,
                policy=policy,
                allow_postcopy=self.schedule.pace == "postcopy",
            )

    async def listed(self, host: str) -> list[dict[str, Any]]:
        """Migrations away from a host, as it tells."""
        reply = await self.two.call(host, "GET", path("migrations"), query={"limit": "100"})
        assert isinstance(reply.body, dict)
        items: Any = reply.body["items"]
        return [view for view in items if view["role"] == "source"]

    async def begun(self) -> list[tuple[str, dict[str, Any]]]:
        """(host, view) of each migration that came of this, oldest first."""
        found = [
            (name, view)
            for name in NAMES
            for view in await self.listed(name)
            if view["id"] not in self._known
        ]
        return sorted(found, key=lambda one: str(one[1]["created_at"]))

    async def _look(self) -> None:
        while True:
            with contextlib.suppress(CommandError):
                if self.id is None:
                    found = [view["id"] for host, view in await self.begun() if host == self.source]
                    self.id = found[0] if found else None
                else:
                    self.phase = str((await self.two.migration(self.source, self.id))["phase"])
                    self.seen.add(self.phase)
                    if self.is_over:
                        self._over.set()
            await asyncio.sleep(LOOK_S)

    async def hurry(self) -> None:
        """Nothing limits it any more."""
        if self.id is not None and self.schedule.pace == "slow":
            with contextlib.suppress(CommandError):
                await self.two.call(
                    self.source, "PATCH", f"/v1/migrations/{self.id}/policy", body=FAST
                )

    async def _over_within(self, limit_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                await self._over.wait()

    async def _calm(self) -> None:
        self.two.calm()
        self.two.away_s.clear()
        for pid in await self.two.qemus():
            _signal(pid, signal.SIGCONT)

    # Failpoints -------------------------------------------------------------------------------

    async def _arm(self, points: list[Blow]) -> None:
        for name in NAMES:
            mine = [blow for blow in points if self.host(blow.side) == name]
            if not mine:
                continue
            await self.two.ready(name)
            first, *others = [f"{blow.point}={_ACTION[blow.what]}" for blow in mine]
            self.two.away_s[name] = mine[0].for_s if mine[0].what == "killed_at" else 0.0
            if others and mine[0].what == "killed_at":
                self.two.armed_next[name] = others[0]
                others = []
            await self.two.arm(name, ",".join((first, *others)))

    async def _wake(self, host: str, blows: list[Blow]) -> None:
        """A daemon that stopped itself at failpoints goes on after its time, at each in turn."""
        for blow in blows:
            await self._until_stopped(host, True)
            self.struck.append(f"{blow.point} stood")
            await asyncio.sleep(max(0.1, blow.for_s))
            self.two.daemon(host).send_signal(signal.SIGCONT)
            await self._until_stopped(host, False)

    async def _until_stopped(self, host: str, wanted: bool) -> None:
        while True:
            if await asyncio.to_thread(is_stopped, self.two.daemon(host).pid) is wanted:
                return
            await asyncio.sleep(LOOK_S)

    # Blows ------------------------------------------------------------------------------------

    async def _strike_all(self, blows: list[Blow]) -> None:
        async with asyncio.timeout(BLOWS_S), asyncio.TaskGroup() as group:
            for blow in blows:
                group.create_task(self._strike(blow))

    async def _strike(self, blow: Blow) -> None:
        give_up_at = time.monotonic() + PHASE_S
        while blow.after is not None and blow.after not in self.seen and not self.is_over:
            if time.monotonic() > give_up_at:
                return
            await asyncio.sleep(LOOK_S)
        await asyncio.sleep(blow.at_s)
        self.struck.append(f"{blow.what} in {self.phase}")
        await getattr(self, f"_{blow.what}")(blow)

    async def _storm(self, blow: Blow) -> None:
        for number, side in enumerate(blow.sides):
            await self.two.ready()
            await asyncio.sleep(number * 37 % 100 / 500)
            if self.is_over:
                return
            killed = [self.two.daemon(host) for host in self.hosts(side)]
            for daemon in killed:
                daemon.kill()
            for daemon in killed:
                await daemon.wait()
        await self.two.ready()

    async def _absent(self, _: Blow) -> None:
        """It was killed before anybody asked."""

    async def _force(self, _: Blow) -> None:
        with contextlib.suppress(CommandError):
            await self.two.call(self.source, "POST", f"/v1/migrations/{self.id}:switchover")

    async def _kill(self, blow: Blow) -> None:
        for host in self.hosts(blow.side):
            self.two.away_s[host] = blow.for_s
            self.two.daemon(host).kill()

    async def _qemu_dies(self, blow: Blow) -> None:
        for pid in await self.two.qemus(self.host(blow.side)):
            self.killed[pid] = self.host(blow.side)
            _signal(pid, signal.SIGKILL)

    async def _qemu_stands(self, blow: Blow) -> None:
        pids = await self.two.qemus(self.host(blow.side))
        for pid in pids:
            _signal(pid, signal.SIGSTOP)
        await asyncio.sleep(blow.for_s)
        for pid in pids:
            _signal(pid, signal.SIGCONT)

    async def _stream_cut(self, _: Blow) -> None:
        self.two.streams[self.destination].cut(abruptly=True)

    async def _stream_frozen(self, blow: Blow) -> None:
        stream = self.two.streams[self.destination]
        stream.freeze()
        await asyncio.sleep(blow.for_s)
        stream.resume()

    async def _peers_apart(self, blow: Blow) -> None:
        for proxy in self.two.peers.values():
            proxy.freeze()
        await asyncio.sleep(blow.for_s)
        for proxy in self.two.peers.values():
            proxy.resume()

    async def _partition(self, blow: Blow) -> None:
        self.two.streams[self.destination].freeze()
        await self._peers_apart(blow)
        self.two.streams[self.destination].resume()

    async def _one_way(self, blow: Blow) -> None:
        """What the side answers does not arrive."""
        proxy = self.two.peers[self.host(blow.side)]
        proxy.to_client.freeze()
        await asyncio.sleep(blow.for_s)
        proxy.resume()

    async def _cancel(self, _: Blow) -> None:
        with contextlib.suppress(CommandError):
            await self.two.call(self.source, "POST", f"/v1/migrations/{self.id}:cancel")

    async def _second(self, _: Blow) -> None:
        with contextlib.suppress(CommandError):
            await self.two.migrate(self.source, self.destination)

    async def _opposite(self, _: Blow) -> None:
        with contextlib.suppress(CommandError):
            await self.two.migrate(self.destination, self.source)

    async def _disk_breaks(self, blow: Blow) -> None:
        await self._disk_fails(blow, self.two.disks[self.host(blow.side)].break_)

    async def _disk_read_only(self, blow: Blow) -> None:
        await self._disk_fails(blow, self.two.disks[self.host(blow.side)].forbid)

    async def _disk_fails(self, blow: Blow, fail: Callable[[], None]) -> None:
        """Until somebody ends the daemon and mounts the disk anew."""
        two, host = self.two, self.host(blow.side)
        await two.ready(host)
        await asyncio.to_thread(fail)
        await asyncio.sleep(blow.for_s)
        two.away_s[host] = MOUNTED_S
        daemon = two.daemon(host)
        daemon.kill()
        await daemon.wait()
        await two.disks[host].unmount()
        await two.disks[host].mount()

    async def _disk_full(self, blow: Blow) -> None:
        """The journal has room of its own for a while: that is used up too."""
        host = self.host(blow.side)
        filler = self.two.hosts[host].directory / "state" / "filler"
        await asyncio.to_thread(fill, filler, DISK_BYTES)
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FILLED_S):
                    await self._until_refused(host)
                self.struck.append("the disk is full")
                await asyncio.sleep(blow.for_s)
        finally:
            await asyncio.to_thread(filler.unlink)

    async def _until_refused(self, host: str) -> None:
        with contextlib.suppress(CommandError):
            for number in range(3000):
                size: Json = {"memory_mib": 16 + number, "firmware": "guest.rom"}
                body: Json = {"profile": "demo", "parameters": size}
                await self.two.call(host, "PUT", "/v1/vms/filler", body=body)


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
