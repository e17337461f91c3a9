"""What one poll of a VM costs in CPU: ours, a bare protocol, and QEMU's own client.

All three ask the same server (another process) for query-migrate in turns, so that noise meets them
alike; medians of nine turns; CPU time of this process only. What is compared is the ratio:

    ours / bare          goal 1.5, gate 2.0   time limits, late replies, the window, events, fds
    qemu.qmp / ours      goal 3, gate 2

Run with `-s` to see the figures.
"""

import asyncio
import json
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
from qemu.qmp import QMPClient

from migrd.qemu.qmp import connect_qmp

TURNS = 9
CALLS = 400
SERVER = Path(__file__).with_name("qmp_answering.py")

Poll = Callable[[], Awaitable[object]]


class BareClient(asyncio.Protocol):
    """The least that can ask and answer: no limit, no event, no error, no reconnect."""

    def __init__(self) -> None:
        self._partial = b""
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._last_id = 0
        self._loop = asyncio.get_running_loop()
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, chunk: bytes) -> None:
        self._partial += chunk
        while (end := self._partial.find(b"\n")) >= 0:
            line, self._partial = self._partial[:end], self._partial[end + 1 :]
            message = orjson.loads(line)
            if "id" in message:
                self._calls.pop(message["id"]).set_result(message["return"])

    async def execute(self, command: str) -> Any:
        assert self.transport is not None
        self._last_id += 1
        future = self._calls[self._last_id] = self._loop.create_future()
        self.transport.write(orjson.dumps({"execute": command, "id": self._last_id}) + b"\n")
        return await future


@pytest.fixture
async def server(short_tmp_path: Path) -> AsyncIterator[Path]:
    """A QMP server in a process of its own, that answers query-migrate as a busy source does."""
    path = short_tmp_path / "qmp"
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(SERVER), str(path), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    assert await process.stdout.readline() == b"listening\n"
    yield path
    process.kill()
    await process.wait()
    path.unlink()


async def cpu_us(poll: Poll, calls: int) -> float:
    started_s = time.process_time()
    for _ in range(calls):
        await poll()
    return (time.process_time() - started_s) / calls * 1e6


async def test_a_poll_costs_little_more_than_the_bare_least(server: Path) -> None:
    loop = asyncio.get_running_loop()
    _, bare = await loop.create_unix_connection(BareClient, str(server))
    await bare.execute("qmp_capabilities")
    ours = await connect_qmp(server, lambda event: None)
    theirs = QMPClient("theirs")
    await theirs.connect(str(server))
    polls: dict[str, Poll] = {
        "bare": lambda: bare.execute("query-migrate"),
        "ours": lambda: ours.execute("query-migrate"),
        "qemu.qmp": lambda: theirs.execute("query-migrate"),
    }
    costs: dict[str, list[float]] = {name: [] for name in polls}
    for _ in range(TURNS):
        for name, poll in polls.items():
            costs[name].append(await cpu_us(poll, CALLS))
    await ours.end()
    await theirs.disconnect()
    assert bare.transport is not None
    bare.transport.abort()
    median = {name: statistics.median(values) for name, values in costs.items()}
    sys.stdout.write(f"\nCPU us per query-migrate: {json.dumps(median)}\n")
    assert median["ours"] <= 2.0 * median["bare"], median
    assert median["qemu.qmp"] >= 2.0 * median["ours"], median
