"""kill -9 at any moment: what was acknowledged is there, in order, and nothing is there twice."""

import asyncio
import random
import sys
from pathlib import Path

from migrd.journal.sqlite import open_journal
from tests.journal.files import NAME
from tests.journal.samples import event

_WRITER = """
import asyncio, sys
from pathlib import Path
from migrd.journal.sqlite import open_journal
from tests.journal.samples import event, request, vm

async def main(path, id_):
    async with open_journal(Path(path)) as journal:
        await journal.create_outgoing(request(id_, vm=f"vm-{id_}"))
        count = 0
        while True:
            await asyncio.gather(
                journal.append_outgoing(id_, [event(wall_s=float(count))], vm(f"vm-{id_}")),
                journal.add_observations(id_, "round", [{"number": count}]),
            )
            print(count, flush=True)
            count += 1
            if count % 40 == 0:
                await journal.checkpoint()

asyncio.run(main(*sys.argv[1:]))
"""
_LIVES = 12


async def _live_and_die(path: Path, id_: str, until: int) -> int:
    """Run a writer, kill it once it has acknowledged `until` records; returns how many it did."""
    writer = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _WRITER, str(path), id_, stdout=asyncio.subprocess.PIPE
    )
    assert writer.stdout is not None
    acknowledged = 0
    async with asyncio.timeout(60):
        while acknowledged < until:
            line = await writer.stdout.readline()
            assert line, "the writer ended by itself"
            acknowledged = int(line) + 1
        writer.kill()
        async for line in writer.stdout:
            acknowledged = int(line) + 1
        await writer.wait()
    return acknowledged


async def test_every_acknowledged_record_survives_kill_9(tmp_path: Path) -> None:
    seed = random.randrange(1 << 32)
    chance = random.Random(seed)
    expected: dict[str, int] = {}
    for life in range(_LIVES):
        id_ = f"m{life}"
        expected[id_] = await _live_and_die(tmp_path / NAME, id_, chance.randrange(1, 90))
    async with open_journal(tmp_path / NAME) as journal:
        replay = await journal.replay()
    assert len(replay.vms) == _LIVES
    for stored, events in replay.outgoing:
        acknowledged = expected[stored.id]
        # one more may have been durable when the writer died before it could say so
        assert len(events) in (acknowledged, acknowledged + 1), f"seed {seed}, life {stored.id}"
        assert events == [event(wall_s=float(count)) for count in range(len(events))]
