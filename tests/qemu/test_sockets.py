"""Connecting without waiting, and descriptors that travel with their command."""

import asyncio
import contextlib
import os
import socket
from pathlib import Path

import pytest

from migrd.errors import VmmUnreachable
from migrd.qemu.qmp import connect_qmp
from migrd.qemu.wire import MonitorBusy, NotSent
from tests.fakes.qmp_server import FakeQmp
from tests.qemu.conftest import Served
from tests.qemu.test_qmp import connected, ignore


async def test_a_full_listen_queue_is_busy_and_not_a_false_connection(run_dir: Path) -> None:
    path = run_dir / "full"
    with socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as crowd:
        listener.bind(str(path))
        listener.listen(0)
        with contextlib.suppress(BlockingIOError):
            for _ in range(8):
                other = crowd.enter_context(socket.socket(socket.AF_UNIX))
                other.setblocking(False)
                other.connect(str(path))
        with pytest.raises(MonitorBusy, match="other clients wait"):
            await connect_qmp(path, ignore)


async def test_no_socket_and_nobody_listening_are_unreachable(run_dir: Path) -> None:
    with pytest.raises(VmmUnreachable, match="No such file") as caught:
        await connect_qmp(run_dir / "absent", ignore)
    assert caught.value.code == "qmp_no_socket"
    path = run_dir / "dead"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
    with pytest.raises(VmmUnreachable, match="refused"):
        await connect_qmp(path, ignore)


async def test_a_path_longer_than_a_sun_path_connects_all_the_same(run_dir: Path) -> None:
    deep = run_dir / ("d" * 120)
    deep.mkdir()
    short = run_dir / "short"
    (deep / "qmp").symlink_to(short)
    async with FakeQmp().serving(short), connected(deep / "qmp") as qmp:
        assert await qmp.execute("query-status")


async def test_a_descriptor_reaches_qemu_while_other_commands_are_under_way(
    served: Served,
) -> None:
    async with connected(served.path) as qmp:
        for n in range(30):
            reader, writer = os.pipe()
            chatter = [asyncio.create_task(qmp.execute("echo", {"n": m})) for m in range(4)]
            await qmp.send_fd(f"pipe{n}", writer)
            assert [answer["n"] for answer in await asyncio.gather(*chatter)] == [0, 1, 2, 3]
            os.close(writer)
            os.write(served.qemu.fds[f"pipe{n}"], b"through")
            assert os.read(reader, 16) == b"through"
            os.close(reader)


async def test_a_descriptor_waits_for_a_full_socket_and_splits_no_message(
    served: Served,
) -> None:
    async with connected(served.path) as qmp:
        served.qemu.block()
        big = {"text": "x" * 700_000}  # far more than a socket buffer holds
        calls = [asyncio.create_task(qmp.execute("echo", big, deadline_s=20)) for _ in range(3)]
        await asyncio.sleep(0)
        reader, writer = os.pipe()
        passing = asyncio.create_task(qmp.send_fd("late", writer, deadline_s=20))
        await asyncio.sleep(0)
        after = asyncio.create_task(qmp.execute("echo", {"n": 1}, deadline_s=20))
        await asyncio.sleep(0)
        served.qemu.unblock()
        await asyncio.gather(*calls, passing, after)
        assert after.result() == {"n": 1}
        assert "late" in served.qemu.fds
        os.close(reader)
        os.close(writer)


async def test_a_descriptor_that_cannot_be_sent_in_time_was_certainly_not_sent(
    run_dir: Path,
) -> None:
    path = run_dir / "deaf"
    release = asyncio.Event()

    async def greet_then_read_nothing(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        writer.write(b'{"QMP": {"version": {}, "capabilities": []}}\n')
        await reader.readline()
        writer.write(b'{"return": {}, "id": 1}\n')
        await release.wait()
        writer.close()

    async with await asyncio.start_unix_server(greet_then_read_nothing, path):
        async with connected(path) as qmp:
            stuffing = asyncio.create_task(qmp.execute("echo", {"text": "x" * 2_000_000}))
            await asyncio.sleep(0)
            with pytest.raises(NotSent, match="has read nothing"):
                await qmp.send_fd("never", 0, deadline_s=0.05)
            stuffing.cancel()
        release.set()
