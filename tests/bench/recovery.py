"""A daemon that starts again with many VMs, some in migrations: how long until all is decided?

    200 processes that speak QMP (tests.bench.monitors)
    a journal that knows them: 160 VMs at rest, 20 migrations away, 20 to here, in every phase
    the other side takes connections and says nothing: the worst that recovery may meet

Counted is what the daemon says of itself in its log: from the replayed journal to the last decision
(engine.recovery). The same journal, as it was written, is put back before each start.
"""

import asyncio
import contextlib
import json
import shutil
import socket
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from migrd.core.facts import TransferAddress, TransferSettings, VmSpec
from migrd.core.handover import DestinationEvent, DestinationTrigger
from migrd.core.migration import MigrationEvent, Request
from migrd.core.phases import Phase, Trigger
from migrd.demo import hosts
from migrd.demo.hosts import Host
from migrd.engine.ports import StoredIncoming, StoredRequest, StoredVm
from migrd.journal.sqlite import SqliteJournal, open_journal
from tests.bench.children import helper, rss_bytes
from tests.bench.figures import Figure, Judge, Table, median

VMS: Final = 200
AWAY: Final = 20
"""Of these so many are in a migration away, and as many in one to here."""
BOUND_S: Final = 2.0
SAID: Final = ("recovered", "migration taken up again")
BEFORE_PRECOPY: Final = (
    Trigger.STARTED,
    Trigger.PREFLIGHT_PASSED,
    Trigger.DESTINATION_PREPARED,
)
WAYS: Final[Sequence[Sequence[Trigger]]] = (
    BEFORE_PRECOPY[:2],
    BEFORE_PRECOPY,
    (*BEFORE_PRECOPY, Trigger.SWITCHOVER_REACHED),
    (*BEFORE_PRECOPY, Trigger.SWITCHOVER_REACHED, Trigger.TRANSFER_COMPLETED),
    (*BEFORE_PRECOPY, Trigger.STEP_FAILED),
)
"""To preparing, precopy, switchover, granted, rolling_back."""
WAYS_HERE: Final[Sequence[Sequence[DestinationTrigger]]] = (
    (),
    (DestinationTrigger.INCOMING_READY,),
    (DestinationTrigger.INCOMING_READY, DestinationTrigger.GUEST_LOADED),
)
"""To preparing, receiving, loaded."""
ADDRESS: Final = TransferAddress("127.0.0.1", 1)


@dataclass(frozen=True)
class Restart:
    """What one start came to, by the daemon's own log."""

    decisions_s: float
    replay_s: float
    taken_up: int
    processes: int
    memory_mib: float


async def run(runs: int, *, vms: int = VMS, moving: int = AWAY) -> Table:
    """`runs` starts from the same journal."""
    with tempfile.TemporaryDirectory(prefix="migrd-", dir="/tmp") as work:
        directory = Path(work)
        with helper("monitors", work, str(vms)), _silent() as port:
            host = await asyncio.to_thread(_lay_out, directory, port)
            written = directory / "written"
            await asyncio.to_thread(written.mkdir, mode=0o700)
            await _write(written, await _instances(host, vms), moving)
            starts = [await _restart(host, written) for _ in range(runs)]
    return _report(starts, vms, moving)


@contextlib.contextmanager
def _silent() -> Iterator[int]:
    """A port that takes connections, and nothing comes of them."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(512)
        yield listener.getsockname()[1]


def _lay_out(directory: Path, port: int) -> Host:
    host, other = hosts.lay_out(directory, names=("bench", "other"), tls=False)
    (host.directory / "profiles" / "demo.toml").unlink()  # nothing is launched
    text = host.config.read_text(encoding="utf-8")
    text = text.replace("[host]\n", f'[host]\nadopt_dir = "{directory}/adopt"\n', 1)
    text = text.replace(f"https://127.0.0.1:{other.port}", f"https://127.0.0.1:{port}")
    host.config.write_text(text, encoding="utf-8")
    return host


@contextlib.asynccontextmanager
async def _running(host: Host) -> AsyncIterator[None]:
    try:
        await hosts.start(host)
        yield
    finally:
        await hosts.stop(host)


async def _instances(host: Host, vms: int) -> dict[str, str]:
    """VM -> instance, as a daemon names them that has adopted all."""
    found: dict[str, str] = {}
    async with _running(host):
        async with asyncio.timeout(60.0):
            while len(found) < vms:
                await asyncio.sleep(0.2)
                async with host.client() as client:
                    reply = await client.call("GET", "/v1/vms", query={"limit": "1000"})
                assert isinstance(reply.body, dict)
                items: Any = reply.body["items"]
                found = {vm["name"]: _instance(vm["pid"]) for vm in items if vm["pid"]}
    return found


def _instance(pid: int) -> str:
    """See qemu.adoption: the process and when it was started (proc(5), field 22 of stat)."""
    stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii")
    return f"adopted-{pid}-{stat.rpartition(')')[2].split()[19]}"


# The journal --------------------------------------------------------------------------------------


async def _write(state: Path, instances: dict[str, str], moving: int) -> None:
    names = sorted(instances)
    here, coming = names[moving:], names[:moving]
    async with open_journal(state / "journal.db") as journal:
        for name in here:
            await journal.put_vm(StoredVm(VmSpec(name, None), 1, True, instances[name]))
        for number, name in enumerate(here[:moving]):
            await _away(journal, name, WAYS[number % len(WAYS)])
        for number, name in enumerate(coming):
            way = WAYS_HERE[number % len(WAYS_HERE)]
            await _to_here(journal, name, instances[name], way)


async def _away(journal: SqliteJournal, vm: str, way: Sequence[Trigger]) -> None:
    id_, spec = str(uuid.uuid4()), VmSpec(vm, None)
    await journal.create_outgoing(StoredRequest(id_, Request(vm, "other"), spec, 2, 1.0, 1.0))
    events = [
        MigrationEvent(
            trigger, 2.0, 2.0, address=ADDRESS if trigger is BEFORE_PRECOPY[-1] else None
        )
        for trigger in way
    ]
    await journal.append_outgoing(id_, events)


async def _to_here(
    journal: SqliteJournal, vm: str, instance: str, way: Sequence[DestinationTrigger]
) -> None:
    id_, settings = str(uuid.uuid4()), TransferSettings(0.3, 0)
    stored = StoredIncoming(id_, "other", VmSpec(vm, None), 2, instance, settings, 1.0)
    await journal.create_incoming(stored)
    await journal.append_incoming(id_, [DestinationEvent(one, 2.0, 2.0, ADDRESS) for one in way])


# A start ------------------------------------------------------------------------------------------


async def _restart(host: Host, written: Path) -> Restart:
    state = host.directory / "state"
    await asyncio.to_thread(shutil.rmtree, state, ignore_errors=True)
    await asyncio.to_thread(shutil.copytree, written, state)
    await asyncio.to_thread(host.log.unlink, missing_ok=True)
    async with _running(host):
        assert host.process is not None
        memory_mib = rss_bytes(host.process.pid) / (1 << 20)
        text = await asyncio.to_thread(host.log.read_text, encoding="utf-8")
    said = [json.loads(line) for line in text.splitlines() if line[:1] == "{"]
    lines = {event: [one for one in said if one.get("event") == event] for event in SAID}
    [recovered] = lines[SAID[0]]
    return Restart(
        recovered["decisions_s"],
        recovered["replay_s"],
        len(lines[SAID[1]]),
        recovered["processes"],
        memory_mib,
    )


def _report(starts: Sequence[Restart], vms: int, moving: int) -> Table:
    for one in starts:
        assert one.processes == vms, f"{one.processes} processes were found"
        assert one.taken_up == 2 * moving, f"{one.taken_up} migrations were taken up"
    who = f"restart with {vms} VMs, {2 * moving} in migrations, silent peer"
    decisions_s = [one.decisions_s for one in starts]
    memory_mib = median([one.memory_mib for one in starts])
    figures = [
        Figure(f"{who}: decided, the slowest", "s", max(decisions_s), *_NONE, Judge.VALUE, BOUND_S),
        Figure(f"{who}: memory", "MiB", memory_mib, *_NONE, Judge.VALUE, 200.0),
    ]
    slowest_replay_s = max(one.replay_s for one in starts)
    phases = ", ".join(phase.value for phase in (Phase.PREPARING, Phase.PRECOPY, Phase.SWITCHOVER))
    notes = [
        f"from the replay to the last decision, s: {' '.join(f'{s:.2f}' for s in decisions_s)} "
        f"(replay and finding the processes before it: at most {slowest_replay_s:.2f})",
        f"migrations away in {phases}, granted and rolling_back; to here in preparing, receiving "
        "and loaded",
    ]
    return Table.of("recovery", len(starts), figures, notes)


_NONE: Final = (None, "")
