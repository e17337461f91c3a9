import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.lab.bare_qemu import until
from tests.lab.freezing_proxy import Address, FreezingProxy, freezing_proxy

Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@contextlib.asynccontextmanager
async def echo_server(address: Address) -> AsyncIterator[Address]:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while piece := await reader.read(1000):
                writer.write(piece)
                await writer.drain()
        writer.close()

    if isinstance(address, Path):
        server = await asyncio.start_unix_server(echo, str(address))
    else:
        server = await asyncio.start_server(echo, *address)
        address = server.sockets[0].getsockname()[:2]
    async with server:
        yield address


async def dial(address: Address) -> Stream:
    if isinstance(address, Path):
        return await asyncio.open_unix_connection(str(address))
    return await asyncio.open_connection(*address)


@pytest.fixture(params=["tcp", "unix"])
async def proxy(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[FreezingProxy]:
    tcp = request.param == "tcp"
    behind: Address = ("127.0.0.1", 0) if tcp else tmp_path / "behind"
    front: Address = ("127.0.0.1", 0) if tcp else tmp_path / "front"
    async with echo_server(behind) as target, freezing_proxy(front, target) as proxy:
        yield proxy


@pytest.fixture
async def client(proxy: FreezingProxy) -> AsyncIterator[Stream]:
    reader, writer = await dial(proxy.address)
    yield reader, writer
    writer.close()


async def is_silent(reader: asyncio.StreamReader) -> bool:
    try:
        async with asyncio.timeout(0.1):
            await reader.readexactly(1)
    except TimeoutError:
        return True
    return False


async def test_bytes_pass_and_are_counted(proxy: FreezingProxy, client: Stream) -> None:
    reader, writer = client
    writer.write(b"hello")
    assert await reader.readexactly(5) == b"hello"
    assert (proxy.to_target.passed_bytes, proxy.to_client.passed_bytes) == (5, 5)
    assert proxy.connections == 1


@pytest.mark.parametrize("direction", ["to_target", "to_client"])
async def test_a_frozen_direction_passes_nothing_and_loses_nothing(
    proxy: FreezingProxy, client: Stream, direction: str
) -> None:
    reader, writer = client
    wire = proxy.to_target if direction == "to_target" else proxy.to_client
    wire.freeze()
    writer.write(b"hello")
    assert await is_silent(reader)
    assert wire.passed_bytes == 0
    assert proxy.connections == 1
    wire.resume()
    assert await reader.readexactly(5) == b"hello"


async def test_it_can_freeze_by_itself_in_the_middle_of_a_message(
    proxy: FreezingProxy, client: Stream
) -> None:
    reader, writer = client
    proxy.to_client.freeze_after_bytes = 3
    writer.write(b"hello")
    assert await reader.readexactly(3) == b"hel"
    assert await is_silent(reader)
    assert proxy.to_client.is_frozen
    proxy.resume()
    assert await reader.readexactly(2) == b"lo"


async def test_a_limit_that_has_passed_already_freezes_with_the_next_byte(
    proxy: FreezingProxy, client: Stream
) -> None:
    reader, writer = client
    writer.write(b"hello")
    assert await reader.readexactly(5) == b"hello"
    proxy.to_client.freeze_after_bytes = 3
    writer.write(b"again")
    assert await is_silent(reader)
    assert proxy.to_client.is_frozen
    proxy.resume()
    assert await reader.readexactly(5) == b"again"


@pytest.mark.parametrize("abruptly", [False, True])
async def test_a_cut_ends_both_ends_and_the_next_connection_works(
    proxy: FreezingProxy, client: Stream, abruptly: bool
) -> None:
    reader, writer = client
    writer.write(b"a")
    await reader.readexactly(1)
    proxy.cut(abruptly=abruptly)
    if abruptly and not isinstance(proxy.address, Path):
        with pytest.raises(ConnectionResetError):
            await reader.readexactly(1)
    else:
        assert await reader.read(1) == b""

    async def is_gone() -> bool:
        return proxy.connections == 0

    await until(is_gone, "the connection is gone")
    again_reader, again_writer = await dial(proxy.address)
    again_writer.write(b"b")
    assert await again_reader.readexactly(1) == b"b"
    again_writer.close()


async def test_a_refused_connection_ends_at_once(proxy: FreezingProxy) -> None:
    proxy.refuse = True
    reader, writer = await dial(proxy.address)
    with contextlib.suppress(ConnectionResetError):
        assert await reader.read() == b""
    writer.close()
    assert proxy.accepted == 1


async def test_a_delay_is_kept(proxy: FreezingProxy, client: Stream) -> None:
    reader, writer = client
    proxy.to_target.delay_s = 0.1
    started_s = asyncio.get_running_loop().time()
    writer.write(b"x")
    await reader.readexactly(1)
    assert asyncio.get_running_loop().time() - started_s >= 0.1
