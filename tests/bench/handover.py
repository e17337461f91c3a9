"""What the handover itself costs, beside the guest's memory: journals and round trips.

    engine ─ journal (SQLite, fsync)                         journal (SQLite, fsync) ─ engine
        └─ HttpPeer ─ mutual TLS ─► 0.5 ms each way (tests.bench.delaying) ─► PeerListener ┘
        └─ etcd (one member), 0.5 ms each way: the second column

Two engines in one process, each with a journal, a listener and a peer of the real kind. Their VMMs
are simulated and answer at once, so the time between two failpoints of the handover is the
handover's own: from both VMMs having completed until the guest runs at the destination, and until
`succeeded`. One clock; the steps follow each other, so they sum to the total. What a plain write
with fsync, a message and its answer cost is measured between the moves.
"""

import asyncio
import contextlib
import itertools
import os
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar
from unittest import mock

import structlog

from migrd.arbiter.arbiter import EtcdOptions, connect_arbiter
from migrd.core.facts import QemuStatus, VmSpec
from migrd.core.migration import Request
from migrd.core.phases import Phase
from migrd.engine.arbiter_port import Arbiter, NoArbiter
from migrd.engine.engine import Engine
from migrd.engine.options import EngineOptions
from migrd.engine.ports import SystemClock
from migrd.engine.stream import Stream
from migrd.engine.world import World
from migrd.failpoints import observing
from migrd.journal.sqlite import SqliteJournal, open_journal
from migrd.peer.client import HttpPeer
from migrd.peer.server import serve_peers
from tests.arbiter.etcd_server import Cluster
from tests.bench.children import helper
from tests.bench.figures import Figure, Judge, Table, percentile
from tests.fakes import vmm as fake_vmm
from tests.fakes.launcher import FakeHost, FakeLauncher, Ground
from tests.fakes.qemu_process import FakeQemu
from tests.peer.fleet import Fleet
from tests.setup import debian

T = TypeVar("T")

ONE_WAY_S: Final = 0.0005
MOVES_A_RUN: Final = 40
WARM_UP: Final = 5
VM: Final = "bench"
HOSTS: Final = ("host-a", "host-b")
BOUND_MS: Final = 60.0
FSYNC_BYTES: Final = 8192
COMPLETE: Final = "both sides complete"
RUNS: Final = "the guest runs at the destination"
SUCCEEDED: Final = "succeeded"

STEPS: Final[tuple[tuple[str, str], ...]] = (
    ("source.transfer_completed.deciding", "the source knows that both sides are complete"),
    ("source.transfer_completed.journalled", "journal: granted"),
    ("source.assign.done", "arbiter: the destination is to run it"),
    ("source.grant.deciding", "GRANT is made"),
    ("destination.grant_received.deciding", "GRANT travels"),
    ("destination.grant_received.journalled", "journal: owned"),
    ("destination.mark_started.done", "arbiter: started"),
    ("destination.start_ordered.journalled", "journal: starting (the same write without arbiter)"),
    ("destination.cont.deciding", "cont is made"),
    (RUNS, "the VMM takes cont"),
    ("destination.guest_ran.deciding", "seen to run"),
    ("destination.guest_ran.journalled", "journal: running"),
    ("source.grant.done", "the answer travels"),
    ("source.destination_ran.journalled", "journal: it ran there"),
    ("source.quit.deciding", "a last look at the source"),
    ("source.quit.done", "the source's VMM ends"),
    ("source.source_released.journalled", "journal: released"),
    (SUCCEEDED, "told"),
)
"""What ends a step -> what is done in it."""


@dataclass
class Moments:
    """When each was first reached in the move that goes on."""

    at_s: dict[str, float] = field(default_factory=dict)

    def reached(self, name: str) -> None:
        self.at_s.setdefault(name, time.perf_counter())

    def renew(self, name: str) -> None:
        self.at_s[name] = time.perf_counter()


@dataclass
class Rig:
    """Two hosts; the guest goes to and fro."""

    engines: tuple[Engine, Engine]
    peers: tuple[HttpPeer, HttpPeer]
    journals: tuple[SqliteJournal, SqliteJournal]
    moments: Moments
    directory: Path
    moves: list[dict[str, float]] = field(default_factory=list)
    fsyncs_s: list[float] = field(default_factory=list)
    hellos_s: list[float] = field(default_factory=list)

    async def move(self, turn: int) -> None:
        here = self.engines[turn % 2]
        wanted = Request(VM, HOSTS[(turn + 1) % 2])
        self.moments.at_s = {}
        view, _ = await here.service.create_migration(wanted, idempotency_key=None, body_digest="")
        migration = here.migrations.outgoing[view.id]
        ended = asyncio.Event()
        before = migration.on_ended

        def on_ended(m: Any) -> None:
            before(m)
            self.moments.reached(SUCCEEDED)
            ended.set()

        migration.on_ended = on_ended
        async with asyncio.timeout(60.0):
            await ended.wait()
        phase, cause = migration.state.phase, migration.state.cause
        assert phase is Phase.SUCCEEDED, (phase, cause)
        await self._settled()
        if turn >= WARM_UP:
            self.moves.append(dict(self.moments.at_s))
            await self._beside(turn)
        for journal in self.journals:  # as a daemon does by itself in its next idle seconds
            await journal.checkpoint()

    async def _settled(self) -> None:
        async with asyncio.timeout(30.0):
            while any(engine.migrations.active_of(VM) for engine in self.engines):  # noqa: ASYNC110 - both engines' tasks, and neither has an event for it
                await asyncio.sleep(0.01)

    async def _beside(self, turn: int) -> None:
        """What the ground costs, now."""
        self.fsyncs_s.append(await asyncio.to_thread(_fsync, self.directory / "plain"))
        began_s = time.perf_counter()
        await self.peers[turn % 2].hello()
        self.hellos_s.append(time.perf_counter() - began_s)


def _fsync(path: Path) -> float:
    """One write with its fsync, into blocks that the file has already. Blocking."""
    with path.open("r+b" if path.exists() else "w+b", buffering=0) as file:
        file.write(bytes(FSYNC_BYTES))
        os.fsync(file.fileno())
        file.seek(0)
        began_s = time.perf_counter()
        file.write(bytes(FSYNC_BYTES))
        os.fsync(file.fileno())
        return time.perf_counter() - began_s


def free_ports(count: int) -> list[int]:
    """Free a moment ago, which is as good as it gets."""
    with contextlib.ExitStack() as stack:
        taken = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in taken]


@contextlib.contextmanager
def _told(moments: Moments) -> Any:
    """Have failpoints, and what happens in the VMMs, noted in `moments`."""
    set_status, run = FakeQemu.set_status, FakeQemu.run

    def noted_status(self: FakeQemu, status: QemuStatus) -> None:
        if status is QemuStatus.COMPLETED and self.status is not status:
            moments.renew(COMPLETE)  # the later of the two
        set_status(self, status)

    def noted_run(self: FakeQemu) -> None:
        run(self)
        if self.incoming:
            moments.reached(RUNS)

    with (
        observing(moments.reached),
        mock.patch.object(FakeQemu, "set_status", noted_status),
        mock.patch.object(FakeQemu, "run", noted_run),
        mock.patch.object(fake_vmm, "LATENCY_S", 0.0),
    ):
        yield


@contextlib.asynccontextmanager
async def rig(directory: Path, etcd_port: int | None = None) -> AsyncIterator[Rig]:
    """`etcd_port`: where an etcd answers, at the end of a road of its own; None: no arbiter."""
    fleet, ground, moments = Fleet(directory / "tls"), Ground(), Moments()
    own, far = free_ports(2), free_ports(2)
    roads = [f"{far[n]}:{own[n]}" for n in (0, 1)]
    async with contextlib.AsyncExitStack() as stack:
        child = helper("delaying", str(ONE_WAY_S), *roads)
        await asyncio.to_thread(stack.enter_context, child)
        stack.enter_context(_told(moments))
        tls = [await fleet.tls(name) for name in HOSTS]
        peers, engines, journals = [], [], []
        for n, name in enumerate(HOSTS):
            other = HOSTS[1 - n]
            peer = HttpPeer(other, f"https://127.0.0.1:{far[1 - n]}", tls[n])
            stack.push_async_callback(peer.close)
            journal = await stack.enter_async_context(open_journal(directory / f"{name}.db"))
            arbiter = await _arbiter(stack, name, etcd_port)
            launcher = FakeLauncher(FakeHost(name, ground))
            stack.callback(launcher.close)
            stream = Stream(history=256, queue=256, wall_s=SystemClock().wall_s)
            options = EngineOptions(host=name, migrd_version="0", peers={other: "x"})
            world = World(options, journal, launcher, {other: peer}, stream, arbiter=arbiter)
            engine = await stack.enter_async_context(Engine(world))
            serving = serve_peers(engine.reception, {other}, tls[n], "127.0.0.1", own[n])
            await stack.enter_async_context(serving)
            peers.append(peer)
            engines.append(engine)
            journals.append(journal)
        for peer in peers:
            await peer.warm()
            warming = asyncio.create_task(peer.keep_warm())
            stack.push_async_callback(_end, warming)
        await engines[0].service.define_vm(VmSpec(VM, "tiny"), dry_run=False)
        await engines[0].service.start_vm(VM)
        yield Rig(_both(engines), _both(peers), _both(journals), moments, directory)


async def _arbiter(stack: contextlib.AsyncExitStack, name: str, etcd_port: int | None) -> Arbiter:
    if etcd_port is None:
        return NoArbiter()
    at = EtcdOptions(name, (f"http://127.0.0.1:{etcd_port}",), prefix="/bench")
    return await stack.enter_async_context(connect_arbiter(at))


def _both(two: Sequence[T]) -> tuple[T, T]:
    return two[0], two[1]


async def _end(task: "asyncio.Task[None]") -> None:
    task.cancel()
    await asyncio.wait([task])


async def run(runs: int, *, moves_a_run: int = MOVES_A_RUN) -> Table:
    moves = max(1, runs * moves_a_run)
    silent = structlog.testing.capture_logs()
    with silent, tempfile.TemporaryDirectory(prefix="migrd-", dir="/tmp") as work:
        two = Path(work) / "two"
        two.mkdir()
        async with rig(two) as alone:
            for turn in range(moves + WARM_UP):
                await alone.move(turn)
        with_etcd = Path(work) / "etcd"
        with_etcd.mkdir()
        cluster = Cluster(await asyncio.to_thread(debian.etcd), with_etcd)
        try:
            await asyncio.to_thread(cluster.start)
            (road,) = free_ports(1)
            at = f"{road}:{cluster.members[0].client_port}"
            with helper("delaying", str(ONE_WAY_S), at):
                async with rig(with_etcd, road) as third:
                    for turn in range(moves + WARM_UP):
                        await third.move(turn)
        finally:
            await asyncio.to_thread(cluster.close)
    return table_of(runs, alone, third)


def table_of(runs: int, alone: Rig, third: Rig) -> Table:
    fsync = [*alone.fsyncs_s, *third.fsyncs_s]
    figures = []
    for rig_, name in ((alone, "two journals"), (third, "two journals and etcd")):
        for end, until in ((RUNS, "until it runs there"), (SUCCEEDED, "until succeeded")):
            for share in (0.5, 0.99):
                took_ms = [1000 * (move[end] - move[COMPLETE]) for move in rig_.moves]
                figures.append(
                    Figure(
                        f"handover, {name}, {until}, p{100 * share:.0f}",
                        "ms",
                        percentile(took_ms, share),
                        1000 * percentile(fsync, share),
                        f"write + fsync of {FSYNC_BYTES} bytes",
                        Judge.VALUE,
                        BOUND_MS,
                    )
                )
    notes = [
        breakdown("two journals", alone),
        breakdown("two journals and etcd", third),
        _ground(fsync, [*alone.hellos_s, *third.hellos_s]),
    ]
    return Table.of("handover", runs, figures, notes)


def steps_of(move: dict[str, float]) -> list[tuple[str, float]]:
    """(what, seconds) of each step of one move; their sum is the time from first to last."""
    taken = [(name, what) for name, what in STEPS if name in move]
    moments = [move[COMPLETE], *(move[name] for name, _ in taken)]
    lasted = [later - earlier for earlier, later in itertools.pairwise(moments)]
    return [(what, took_s) for (_, what), took_s in zip(taken, lasted, strict=True)]


def breakdown(name: str, rig_: Rig) -> str:
    """Means of the steps, which sum to the mean of the total."""
    rows = [dict(steps_of(move)) for move in rig_.moves]
    whole = [1000 * (move[SUCCEEDED] - move[COMPLETE]) for move in rig_.moves]
    lines = [f"{len(rows)} handovers, {name}, ms: mean, p50, p99 of each step"]
    total_ms = 0.0
    for _, what in STEPS:
        each_ms = [1000 * row[what] for row in rows if what in row]
        if each_ms:
            mean_ms = sum(each_ms) / len(rows)
            total_ms += mean_ms
            lines.append(_line(what, mean_ms, each_ms))
    lines.append(_line("sum of the steps", total_ms, whole))
    return "\n".join(lines)


def _line(what: str, mean_ms: float, each_ms: Sequence[float]) -> str:
    return (
        f"  {what:55} {mean_ms:7.2f} {percentile(each_ms, 0.5):7.2f} "
        f"{percentile(each_ms, 0.99):7.2f}"
    )


def _ground(fsyncs_s: Sequence[float], hellos_s: Sequence[float]) -> str:
    load = ", ".join(f"{one:.1f}" for one in os.getloadavg())
    lines = [f"beside it, in the same run, ms: p50, p99 (load of the machine: {load})"]
    for what, each in (
        (f"a write of {FSYNC_BYTES} bytes with its fsync on this disk", fsyncs_s),
        (f"a message and its answer ({2000 * ONE_WAY_S:g} ms of road)", hellos_s),
    ):
        p50, p99 = (1000 * percentile(each, share) for share in (0.5, 0.99))
        lines.append(f"  {what:63} {p50:7.2f} {p99:7.2f}")
    return "\n".join(lines)
