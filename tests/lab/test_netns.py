import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.lab.bare_qemu import until
from tests.lab.netns import RIGHT_ADDRESS, TwoHosts, two_hosts

pytestmark = pytest.mark.netns

LISTEN = """
import socket
listener = socket.create_server(("{address}", 7777))
print(0, flush=True)
connection, _ = listener.accept()
while piece := connection.recv(65536):
    print(len(piece), flush=True)
"""
SEND = """
import socket, time
connection = socket.create_connection(("{address}", 7777))
while True:
    connection.sendall(bytes({size}))
    time.sleep({pause_s})
"""


class Heard:
    """How much the right host has heard from the left one."""

    def __init__(self) -> None:
        self.bytes = -1  # not listening yet

    async def listen(self, stream: asyncio.StreamReader) -> None:
        while line := await stream.readline():
            self.bytes = max(self.bytes, 0) + int(line)

    async def wait_for_more(self) -> None:
        before = self.bytes

        async def more() -> bool:
            return self.bytes > before

        await until(more, "the other host is heard")


@contextlib.asynccontextmanager
async def conversation(hosts: TwoHosts, *, size: int, pause_s: float) -> AsyncIterator[Heard]:
    async def python(namespace: str, program: str) -> asyncio.subprocess.Process:
        program = program.format(address=RIGHT_ADDRESS, size=size, pause_s=pause_s)
        command = hosts.command_in(namespace, [sys.executable, "-c", program])
        return await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)

    heard = Heard()
    listener = await python(hosts.right, LISTEN)
    assert listener.stdout is not None
    listening = asyncio.create_task(heard.listen(listener.stdout))
    sender = None
    try:
        await heard.wait_for_more()
        sender = await python(hosts.left, SEND)
        await heard.wait_for_more()
        yield heard
    finally:
        for child in (listener, sender):
            if child is not None:
                child.kill()
                await child.wait()
        await listening


async def test_a_partition_silences_the_link_and_healing_brings_it_back() -> None:
    async with two_hosts() as hosts, conversation(hosts, size=100, pause_s=0.01) as heard:
        await hosts.partition()
        await asyncio.sleep(0.1)  # what was on its way arrives
        silent_since = heard.bytes
        await asyncio.sleep(0.3)
        assert heard.bytes == silent_since
        await hosts.heal()
        await heard.wait_for_more()


async def test_the_rate_is_limited() -> None:
    async with two_hosts() as hosts:
        await hosts.limit_rate(2_000_000)
        async with conversation(hosts, size=100_000, pause_s=0) as heard:
            before, started_s = heard.bytes, asyncio.get_running_loop().time()
            await asyncio.sleep(1)
            took_s = asyncio.get_running_loop().time() - started_s
            rate_bytes_per_s = (heard.bytes - before) / took_s
        assert 0.5e6 < rate_bytes_per_s < 2.6e6  # a burst of 256 kB may come on top


async def test_how_soon_tcp_gives_up_is_set_in_the_namespaces_only() -> None:
    setting = "/proc/sys/net/ipv4/tcp_retries2"
    here = read(setting)
    async with two_hosts() as hosts:
        await hosts.give_up_after_retries(3)
        reading = await asyncio.create_subprocess_exec(
            *hosts.command_in(hosts.left, ["cat", setting]), stdout=asyncio.subprocess.PIPE
        )
        there, _ = await reading.communicate()
    assert there == b"3\n"
    assert read(setting) == here


def read(path: str) -> str:
    return Path(path).read_text()


def exists(namespace: str) -> bool:
    return Path("/run/netns", namespace).exists()


async def fail_inside(seen: list[TwoHosts]) -> None:
    async with two_hosts() as hosts:
        assert exists(hosts.left)
        seen.append(hosts)
        raise RuntimeError("provoked")


async def test_nothing_of_the_namespaces_is_left_even_after_a_failure() -> None:
    seen: list[TwoHosts] = []
    with pytest.raises(RuntimeError, match="provoked"):
        await fail_inside(seen)
    assert not exists(seen[0].left)
    assert not exists(seen[0].right)
