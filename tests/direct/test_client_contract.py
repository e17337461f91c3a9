"""What every process that hands its guest over must do: one body for both client libraries (their
examples, as processes of their own) and for a VMM that was written from the protocol's page alone.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrd.core.memory_map import MemoryMap
from migrd.direct.descriptors import STATE_SEALS
from migrd.direct.handoff import HandedOver
from migrd.direct.messages import ClientState
from migrd.direct.offer import OfferedProcess
from migrd.errors import VmmRefused
from tests.direct.vmms import MIB, GuestVmm, Host, until, vmm

KINDS = ("python", "c", "scripted")


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def host(short_tmp_path: Path) -> Host:
    return Host(short_tmp_path)


@pytest.fixture
def guest(kind: str, host: Host, tmp_path: Path) -> Iterator[GuestVmm]:
    with vmm(kind, host.socket, tmp_path / "beats") as started:
        yield started


@pytest.fixture
def empty(kind: str, host: Host, tmp_path: Path) -> Iterator[GuestVmm]:
    """Launched to be given a guest."""
    with vmm(kind, host.socket, tmp_path / "beats", instance="i-1", is_incoming=True) as started:
        yield started


def contents(client: HandedOver) -> bytes:
    return os.pread(client.region_fds[0], MIB, 0)


def arriving(memory: bytes = b"", *, counted: int = 0) -> tuple[MemoryMap, int]:
    """Memory for an incoming guest, which has counted so far; the file is the caller's."""
    fd = os.memfd_create("arriving")
    os.pwrite(fd, memory, 0)
    os.pwrite(fd, counted.to_bytes(8, "little"), 0)
    os.ftruncate(fd, MIB)
    return MemoryMap.of([(0, 0, MIB)]), fd


async def arrive(source: HandedOver, destination: HandedOver, *, counted: int) -> None:
    """Move a guest, up to the point where it is loaded."""
    await source.pause()
    state_fd = await source.save_state()
    memory, fd = arriving(contents(source), counted=counted)
    await destination.give_regions(memory, {0: fd})
    await destination.load_state(state_fd)
    os.close(fd)
    os.close(state_fd)


@pytest.fixture
def other(short_tmp_path: Path) -> Host:
    """Where a guest arrives."""
    (short_tmp_path / "other").mkdir()
    return Host(short_tmp_path / "other")


@pytest.fixture
def arrived(kind: str, other: Host, tmp_path: Path) -> Iterator[GuestVmm]:
    """Launched over there, to be given a guest."""
    (tmp_path / "other").mkdir()
    out = tmp_path / "other" / "beats"
    with vmm(kind, other.socket, out, instance="i-1", is_incoming=True) as started:
        yield started


async def test_it_hands_over_its_memory_and_the_source_that_watches_all_of_it(
    host: Host, guest: GuestVmm
) -> None:
    async with host.up():
        client = await host.client()
        assert (client.vm, client.instance, client.pid) == ("guest", "", guest.pid)
        assert client.state is ClientState.RUNNING
        assert client.memory.bytes == MIB
        (source,) = client.sources
        assert isinstance(source, OfferedProcess)
        assert [(r.first_page, r.length_bytes) for r in source.ranges] == [(0, MIB)]
        assert client.features == {"throttle"}
        assert not any(os.get_inheritable(fd) for fd in client.offer.descriptors())


async def test_a_paused_guest_writes_nothing_until_it_is_resumed(
    host: Host, guest: GuestVmm
) -> None:
    async with host.up():
        client = await host.client()
        await until(lambda: len(guest.beats()) > 3)
        await client.pause()
        before = contents(client)
        await asyncio.sleep(0.3)
        beats = guest.beats()  # what it had said is heard by now
        await asyncio.sleep(0.3)
        assert contents(client) == before
        assert guest.beats() == beats
        await client.resume()
        await until(lambda: len(guest.beats()) > len(beats) + 3)
        assert guest.beats() == list(range(1, len(guest.beats()) + 1))


async def test_the_state_is_a_sealed_memfd_which_the_asker_owns(
    host: Host, guest: GuestVmm
) -> None:
    async with host.up():
        client = await host.client()
        await client.pause()
        fd = await client.save_state()
        assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & STATE_SEALS == STATE_SEALS
        assert os.fstat(fd).st_size > 0
        os.close(fd)


async def test_what_its_state_does_not_allow_is_refused_and_changes_nothing(
    host: Host, guest: GuestVmm
) -> None:
    memory, fd = arriving()
    async with host.up():
        client = await host.client()
        for ask in (
            lambda: client.save_state(),
            lambda: client.departed("m-1"),
            lambda: client.give_regions(memory, {0: fd}),
            lambda: client.load_state(fd),
        ):
            with pytest.raises(VmmRefused, match="running"):
                await ask()
        assert await client.ask_state() is ClientState.RUNNING
        seen = len(guest.beats())
        await until(lambda: len(guest.beats()) > seen)
    os.close(fd)


async def test_asking_twice_is_asking_once(host: Host, guest: GuestVmm) -> None:
    async with host.up():
        client = await host.client()
        await client.resume()
        await client.pause()
        await client.pause()
        await client.departed("m-1")
        await client.departed("m-1")
        with pytest.raises(VmmRefused):
            await client.departed("m-2")
        assert (client.state, client.migration_id) == (ClientState.DEPARTED, "m-1")


@pytest.mark.parametrize("state", [ClientState.RUNNING, ClientState.PAUSED, ClientState.DEPARTED])
async def test_a_restarted_daemon_learns_where_it_stands_and_nothing_has_changed(
    host: Host, guest: GuestVmm, state: ClientState
) -> None:
    async with host.up():
        client = await host.client()
        if state is not ClientState.RUNNING:
            await client.pause()
        if state is ClientState.DEPARTED:
            await client.departed("m-7")
        counted = guest.beats()
    await asyncio.sleep(0.2)
    assert (len(guest.beats()) > len(counted)) is (state is ClientState.RUNNING)
    async with host.up():
        client = await host.client()
        assert client.state is state
        assert client.migration_id == ("m-7" if state is ClientState.DEPARTED else "")
        assert client.memory.bytes == MIB
        before = len(guest.beats())
        await asyncio.sleep(0.2)
        assert await client.ask_state() is state
        assert (len(guest.beats()) > before) is (state is ClientState.RUNNING)
        await client.resume()  # for one that departed: a rollback
        await until(lambda: len(guest.beats()) > len(counted) + 3)
        assert guest.beats() == list(range(1, len(guest.beats()) + 1))
        assert client.migration_id == ""


async def test_an_empty_process_runs_its_guest_only_when_it_is_resumed(
    host: Host, guest: GuestVmm, other: Host, arrived: GuestVmm
) -> None:
    async with host.up(), other.up():
        client = await other.client()
        assert (client.state, client.instance) == (ClientState.INCOMING, "i-1")
        assert not client.has_offered
        with pytest.raises(VmmRefused):
            await client.resume()
        await arrive(await host.client(), client, counted=500)
        assert client.state is ClientState.LOADED
        await asyncio.sleep(0.2)
        assert arrived.beats() == []
        await client.resume()
        await until(lambda: len(arrived.beats()) > 3)
        assert arrived.beats()[:3] == [501, 502, 503]
        await until(lambda: client.has_offered)
        assert other.came == [client, client]
        assert client.memory.bytes == MIB


async def test_state_is_refused_before_the_memory_is_there(host: Host, empty: GuestVmm) -> None:
    _, fd = arriving()
    async with host.up():
        client = await host.client()
        with pytest.raises(VmmRefused):
            await client.load_state(fd)
        assert client.state is ClientState.INCOMING
    os.close(fd)


async def test_a_loaded_process_stays_loaded_over_a_restart_of_the_daemon(
    host: Host, guest: GuestVmm, other: Host, arrived: GuestVmm
) -> None:
    async with host.up(), other.up():
        await arrive(await host.client(), await other.client(), counted=70)
    async with other.up():
        client = await other.client()
        assert (client.state, client.instance) == (ClientState.LOADED, "i-1")
        assert arrived.beats() == []
        await client.resume()
        await until(lambda: len(arrived.beats()) > 1)
        assert arrived.beats()[0] == 71


async def test_an_empty_process_takes_one_guest_in_its_life(host: Host, empty: GuestVmm) -> None:
    memory, fd = arriving()
    async with host.up():
        client = await host.client()
        await client.give_regions(memory, {0: fd})
        with pytest.raises(VmmRefused):
            await client.give_regions(memory, {0: fd})
        assert client.state is ClientState.INCOMING
    os.close(fd)


async def test_it_ends_when_it_is_told_to_quit(host: Host, guest: GuestVmm) -> None:
    async with host.up():
        client = await host.client()
        await client.quit()
        await until(guest.has_ended)
        await client.gone()
        assert not client.is_connected


async def test_it_connects_when_the_daemon_comes_later_than_itself(
    host: Host, guest: GuestVmm
) -> None:
    await until(lambda: len(guest.beats()) > 3)
    async with host.up():
        client = await host.client()
        assert client.state is ClientState.RUNNING
