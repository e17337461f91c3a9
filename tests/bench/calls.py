"""Single calls: a QMP command, a journal record, a message to a peer, each beside the barest way.

QMP       our client, a bare Protocol, and QEMU's own `qemu.qmp`: processor time per command
journal   a record appended and durable, beside write + fsync of as many bytes: time on the clock
peer      `hello` over mutual TLS, beside one line over bare TLS streams: time on the clock
"""

import asyncio
import contextlib
import os
import ssl
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Final

from qemu.qmp import QMPClient

from migrd.core.phases import Trigger
from migrd.engine.peer_service import HelloFacts
from migrd.journal.sqlite import open_journal
from migrd.qemu.qmp import connect_qmp
from tests.bench.bare import connect
from tests.bench.children import helper
from tests.bench.figures import Figure, Judge, Table, median, percentile
from tests.journal import samples
from tests.peer.fleet import Fleet, host, peer_at

COMMANDS: Final = 300
RECORDS: Final = 40
HELLOS: Final = 40

Once = Callable[[], Awaitable[Any]]


async def run(runs: int) -> Table:
    table = await qmp(runs)
    table.add(await journal(runs))
    table.add(await peer(runs))
    return table


async def in_turns(
    runs: int, times: int, clock: Callable[[], float], *calls: Once
) -> list[list[float]]:
    """Time per call in µs, of each, in each round; a first round is not counted."""
    each_us: list[list[float]] = [[] for _ in calls]
    for turn in range(runs + 1):
        for side, call in enumerate(calls):
            began_s = clock()
            for _ in range(times):
                await call()
            if turn:
                each_us[side].append((clock() - began_s) / times * 1e6)
    return each_us


# QMP ----------------------------------------------------------------------------------------------


async def qmp(runs: int) -> Table:
    with (
        tempfile.TemporaryDirectory(prefix="migrd-", dir="/tmp") as work,
        helper("monitors", work, "2"),
    ):
        directory = Path(work)
        ours = await connect_qmp(directory / "adopt" / "vm-0.qmp", lambda _: None)
        bare = await connect(directory / "plain" / "vm-0.qmp")
        theirs = QMPClient("bench")
        await theirs.connect(str(directory / "adopt" / "vm-1.qmp"))
        try:
            each_us = await in_turns(
                runs,
                COMMANDS,
                time.process_time,
                lambda: ours.execute("query-status"),
                lambda: bare.call("query-status"),
                lambda: theirs.execute("query-status"),
            )
        finally:
            await theirs.disconnect()
            bare.close()
            await ours.end()
    mine, plain, official = (median(each) for each in each_us)
    what = "a QMP command: CPU"
    return Table.of(
        "calls",
        runs,
        [
            Figure(what, "µs", mine, official, "qemu.qmp", Judge.FASTER, 3.0),
            Figure(what, "µs", mine, plain, "bare Protocol + orjson", Judge.RATIO, 2.0),
        ],
        [],
    )


# Journal ------------------------------------------------------------------------------------------


async def journal(runs: int) -> Table:
    """Records as a grant writes them: one event and what becomes of the VM."""
    with tempfile.TemporaryDirectory(prefix="migrd-", dir="/tmp") as work:
        path = Path(work) / "journal.db"
        async with open_journal(path) as opened:
            await opened.create_outgoing(samples.request())
            event, vm = samples.event(Trigger.STARTED), samples.vm()
            before = _written_bytes()
            await opened.append_outgoing("m1", [event], vm)
            size = _written_bytes() - before
            ours_s, bare_s = [], []
            with (Path(work) / "bare").open("wb", buffering=0) as file:
                content = bytes(size)
                for _ in range(runs * RECORDS):
                    began_s = time.perf_counter()
                    await opened.append_outgoing("m1", [event], vm)
                    between_s = time.perf_counter()
                    file.write(content)
                    os.fsync(file.fileno())
                    ours_s.append(between_s - began_s)
                    bare_s.append(time.perf_counter() - between_s)
    fsync = f"write + fsync of {size} bytes"
    values = [
        (share, percentile(ours_s, share) * 1000, percentile(bare_s, share) * 1000)
        for share in (0.5, 0.99)
    ]
    figures = [
        Figure(f"a journal record, p{share * 100:.0f}, added", *("ms", ours, bare, fsync), *bound)
        for (share, ours, bare), bound in zip(
            values, ((Judge.MORE, 2.0), (Judge.MORE, 10.0)), strict=True
        )
    ]
    return Table.of("calls", runs, figures, [])


def _written_bytes() -> int:
    """All that this process has handed to write(2) and its kin."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("wchar:")).split()[1])


# Peer ---------------------------------------------------------------------------------------------


class Answers:
    """As much of a PeerService as `hello` needs."""

    def hello(self) -> HelloFacts:
        return HelloFacts("host-b", "0")


async def peer(runs: int) -> Table:
    with tempfile.TemporaryDirectory(prefix="migrd-", dir="/tmp") as work:
        fleet = Fleet(Path(work))
        service: Any = Answers()
        async with host(fleet, service) as listener:
            here, there = await fleet.tls("host-a"), await fleet.tls("host-b")
            async with (
                peer_at(listener.port, here) as ours,
                bare_tls(here.client, there.server) as exchange,
            ):
                each_us = await in_turns(runs, HELLOS, time.perf_counter, ours.hello, exchange)
    mine, plain = (median(each) / 1000 for each in each_us)
    figure = Figure(
        "a message to a peer and its answer, added",
        *("ms", mine, plain, "a line over bare TLS streams", Judge.MORE, 5.0),
    )
    return Table.of("calls", runs, [figure], [])


@contextlib.asynccontextmanager
async def bare_tls(client: ssl.SSLContext, server: ssl.SSLContext) -> AsyncIterator[Once]:
    """One kept connection with our certificates, and nothing else around it."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while line := await reader.readline():
                writer.write(line)
        writer.close()

    listening = await asyncio.start_server(echo, "127.0.0.1", 0, ssl=server)
    port = listening.sockets[0].getsockname()[1]
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", port, ssl=client, server_hostname="host-b"
    )

    async def exchange() -> None:
        writer.write(b"{}" + bytes(300).replace(b"\0", b" ") + b"\n")
        await reader.readline()

    try:
        yield exchange
    finally:
        writer.close()
        listening.close()
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            await writer.wait_closed()
        await listening.wait_closed()
