"""Processes that answer late, twice, never, unasked or untruly, or die: each ask ends in the error
that says what is known, the connection outlives what it can, and the guest goes on.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from migrd.direct.client_link import sealed
from migrd.direct.handoff import HandedOver
from migrd.direct.handoff_listener import HandoffLimits
from migrd.direct.messages import (
    Answer,
    AskState,
    ClientState,
    Event,
    EventKind,
    Pause,
    Resume,
    SaveState,
    Status,
    encode,
)
from migrd.errors import VmmDied, VmmRefused, VmmTimedOut, VmmUnreachable
from tests.direct.raw_client import RawClient, open_descriptors
from tests.direct.vmms import Host, example, until
from tests.fakes.scripted_vmm import ScriptedVmm

PAUSED = ClientState.PAUSED


@pytest.fixture
def host(short_tmp_path: Path) -> Host:
    return Host(short_tmp_path)


@pytest.fixture
def vmm(host: Host) -> Iterator[ScriptedVmm]:
    with ScriptedVmm(host.socket) as scripted:
        yield scripted


def paused(
    status: Status = Status.DONE, state: ClientState = PAUSED
) -> Callable[[int], list[bytes]]:
    return lambda serial: [encode(Answer(status, state), serial)]


async def goes_on(vmm: ScriptedVmm) -> None:
    seen = len(vmm.beats())
    await until(lambda: len(vmm.beats()) > seen)


async def connected_anew(host: Host, before: HandedOver) -> HandedOver:
    await before.gone()
    await until(lambda: any(client is not before for client in host.listener.clients))
    return await host.client()


async def test_a_late_answer_is_dropped_but_its_state_is_believed(
    host: Host, vmm: ScriptedVmm
) -> None:
    answer_now = threading.Event()
    vmm.before_answer[Pause] = answer_now.wait
    async with host.up():
        client = await host.client()
        with pytest.raises(VmmTimedOut, match=r"pause within 0\.1 s; whether it took effect"):
            await client.pause(within_s=0.1)
        answer_now.set()
        assert await client.ask_state() is PAUSED
        assert client.is_connected
        await client.resume()
        await goes_on(vmm)


async def test_the_state_in_a_late_answer_is_closed(host: Host, vmm: ScriptedVmm) -> None:
    answer_now = threading.Event()
    vmm.before_answer[SaveState] = answer_now.wait
    async with host.up():
        client = await host.client()
        await client.pause()
        before = open_descriptors()
        with pytest.raises(VmmTimedOut):
            await client.save_state(within_s=0.1)
        answer_now.set()
        await client.ask_state()
        assert open_descriptors() <= before


@pytest.mark.parametrize(
    ("instead", "says"),
    [
        (lambda serial: paused()(serial) * 2, "serial 1 was never asked"),
        (lambda serial: paused()(serial + 7), "serial 8 was never asked"),
        (paused(state=ClientState.RUNNING), "PAUSE is done, and state is running, not paused"),
        (paused(state=ClientState.LOADED), "PAUSE is done, and state is loaded, not paused"),
        (lambda serial: [encode(Resume(), serial)], "RESUME: a VMM may send ANSWER and EVENT"),
        (lambda serial: [b"\xff" * 40], "another protocol"),
    ],
)
async def test_an_impossible_answer_ends_the_connection_with_the_reason(
    host: Host, vmm: ScriptedVmm, instead: Callable[[int], list[bytes]], says: str
) -> None:
    vmm.instead[Pause] = instead
    async with host.up():
        client = await host.client()
        await asyncio.gather(client.pause(), return_exceptions=True)  # the first answer may do
        await client.gone()
        with pytest.raises(VmmUnreachable):
            await client.ask_state()
        again = await connected_anew(host, client)
        assert says in vmm.errors[0]
        assert again.state is ClientState.RUNNING
        await goes_on(vmm)


async def test_a_refusal_is_told_with_its_reason_made_printable(
    host: Host, vmm: ScriptedVmm
) -> None:
    answer = Answer(Status.REFUSED, ClientState.RUNNING, text="busy\x1b[2J\nnow")
    vmm.instead[Pause] = lambda serial: [encode(answer, serial)]
    async with host.up():
        client = await host.client()
        with pytest.raises(VmmRefused, match=r"pause was refused: busy\?\[2J\?now"):
            await client.pause()
        await goes_on(vmm)


BAD_STATES: list[tuple[str, int, str]] = [
    ("unsealed", 8, "not a memfd sealed"),
    ("sealed", 9, "value says 9 bytes, and its file has 8"),
    ("large", 2048, "more than 1024"),
    ("pipe", 8, "not a memfd sealed"),
]


@pytest.mark.parametrize(("what", "value", "says"), BAD_STATES)
async def test_a_state_that_is_none_is_refused_and_closed(
    host: Host, what: str, value: int, says: str
) -> None:
    async with host.up(HandoffLimits(state_bytes=1024)):
        raw = RawClient(host.socket)
        await raw.hand_over()
        client = await host.client()
        before = open_descriptors()
        asked = asyncio.create_task(client.save_state())
        heard = await raw.hear()
        assert heard is not None
        fd, other = os.pipe()
        if what != "pipe":
            os.close(fd)
            fd = await asyncio.to_thread(sealed, b"x" * (2048 if what == "large" else 8))
        if what == "unsealed":
            os.close(fd)
            fd = os.memfd_create("state")
        raw.say(Answer(Status.DONE, PAUSED, value), heard[0], fds=[fd])
        with pytest.raises(VmmRefused, match=says):
            await asked
        os.close(fd)
        os.close(other)
        assert open_descriptors() <= before
        raw.close()


async def test_a_descriptor_that_was_not_asked_for_ends_the_connection(host: Host) -> None:
    async with host.up():
        raw = RawClient(host.socket)
        await raw.hand_over()
        client = await host.client()
        asked = asyncio.create_task(client.pause())
        heard = await raw.hear()
        assert heard is not None
        raw.say(Answer(Status.DONE, PAUSED), heard[0], fds=[0])
        assert "PAUSE with a descriptor" in (await raw.error()).text
        with pytest.raises(VmmUnreachable):
            await asked
        raw.close()


async def test_a_process_that_never_answers_is_given_up_after_so_many_asks(host: Host) -> None:
    async with host.up():
        raw = RawClient(host.socket)
        await raw.hand_over()
        client = await host.client()
        failures = []
        while client.is_connected:
            (failure,) = await asyncio.gather(
                client.ask_state(within_s=0.002), return_exceptions=True
            )
            failures.append(type(failure))
        assert failures == [VmmTimedOut] * 64 + [VmmUnreachable]
        assert not client.is_connected
        raw.close()


async def test_asks_to_a_process_that_does_not_read_time_out(host: Host) -> None:
    async with host.up():
        raw = RawClient(host.socket)
        await raw.hand_over()
        client = await host.client()
        asks = [client.ask_state(within_s=0.3) for _ in range(2000)]
        answers = await asyncio.gather(*asks, return_exceptions=True)
        assert {type(answer) for answer in answers} == {VmmTimedOut}
        raw.close()


async def test_a_process_that_floods_with_events_is_cut_off(host: Host) -> None:
    async with host.up():
        raw = RawClient(host.socket)
        await raw.hand_over()
        for _ in range(300):
            try:
                raw.say(Event(EventKind.GOING_AWAY))
            except (BlockingIOError, BrokenPipeError):
                await asyncio.sleep(0.01)
        assert "more than 256" in (await raw.error()).text
        raw.close()


async def test_a_cancelled_ask_leaves_the_connection_in_order(host: Host, vmm: ScriptedVmm) -> None:
    answer_now = threading.Event()
    vmm.before_answer[AskState] = answer_now.wait
    async with host.up():
        client = await host.client()
        asked = asyncio.create_task(client.ask_state())
        await asyncio.sleep(0.05)
        asked.cancel()
        await asyncio.wait([asked])
        answer_now.set()
        await client.pause()
        assert client.state is PAUSED


async def test_a_killed_process_is_known_to_be_dead(host: Host, tmp_path: Path) -> None:
    async with host.up():
        with example("c", host.socket, tmp_path / "beats") as child:
            client = await host.client()
            os.kill(child.pid, signal.SIGSTOP)
            asked = asyncio.create_task(client.pause())
            await asyncio.sleep(0.1)
            child.kill()
            with pytest.raises(VmmDied, match=f"process {child.pid} is dead"):
                await asked


async def test_a_stopped_process_is_not_taken_for_dead(host: Host, tmp_path: Path) -> None:
    async with host.up():
        with example("c", host.socket, tmp_path / "beats") as child:
            client = await host.client()
            os.kill(child.pid, signal.SIGSTOP)
            with pytest.raises(VmmTimedOut):
                await client.pause(within_s=0.1)
            assert not client.is_dead
            os.kill(child.pid, signal.SIGCONT)
            assert await client.ask_state() is PAUSED
            child.kill()


async def test_a_connection_that_breaks_in_an_ask_leaves_the_guest_alone(
    host: Host, vmm: ScriptedVmm
) -> None:
    vmm.before_answer[AskState] = vmm.hang_up
    async with host.up():
        client = await host.client()
        with pytest.raises(VmmUnreachable):
            await client.ask_state()
        again = await connected_anew(host, client)
        assert again.state is ClientState.RUNNING
        with pytest.raises(VmmUnreachable):
            await client.pause()
        await goes_on(vmm)


async def test_descriptors_stay_open_while_they_are_held(host: Host) -> None:
    async with host.up():
        raw = RawClient(host.socket)
        await raw.hand_over()
        client = await host.client()
        (fd,) = client.region_fds.values()
        with client.held():
            raw.close()
            await client.gone()
            assert len(os.pread(fd, 4096, 0)) == 4096
            assert not client.is_dead
        with pytest.raises(VmmUnreachable), client.held():
            pass
        await until(lambda: not Path(f"/proc/self/fd/{fd}").exists())


async def test_nothing_stays_open_behind_the_listener(host: Host, vmm: ScriptedVmm) -> None:
    before = open_descriptors()
    for _ in range(3):
        async with host.up():
            client = await host.client()
            await client.pause()
            os.close(await client.save_state())
            await client.resume()
    await until(lambda: open_descriptors() <= before)
