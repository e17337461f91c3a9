"""Who may hand over, how many at once, and whose a name is: the listener's own rules."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from migrd.direct.descriptors import DescriptorKinds
from migrd.direct.handoff import HandedOver
from migrd.direct.handoff_listener import HandoffLimits, HandoffListener
from migrd.direct.messages import (
    ClientState,
    DeviceMessage,
    ErrorCode,
    Hello,
    OfferEnd,
    RangeMessage,
    RegionMessage,
    SourceKind,
    SourceMessage,
)
from migrd.direct.offer import OfferBuilder, OfferedDeviceLog, OfferedHwpt, OfferLimits
from tests.direct.raw_client import (
    HELLO,
    HVA,
    MIB,
    RawClient,
    memory,
    offer,
    open_descriptors,
    page_map,
)
from tests.direct.vmms import Host, example, until

REGION, SOURCE, END = offer()


@pytest.fixture
def host(short_tmp_path: Path) -> Host:
    return Host(short_tmp_path)


async def test_a_process_that_hands_over_too_slowly_is_cut_off(host: Host) -> None:
    async with host.up(HandoffLimits(handover_s=0.2)):
        raw = RawClient(host.socket)
        raw.say(HELLO)
        error = await raw.error()
        assert error.code == ErrorCode.TOO_SLOW
        assert "0.2 s" in error.text
        raw.close()


async def test_too_many_at_once_are_sent_away_and_the_others_served(host: Host) -> None:
    async with host.up(HandoffLimits(greeting=3)):
        waiting = [RawClient(host.socket) for _ in range(3)]
        late = RawClient(host.socket)
        assert (await late.error()).code == ErrorCode.TOO_MANY
        await waiting[0].hand_over()
        for raw in (*waiting, late):
            raw.close()


async def test_more_regions_than_allowed_are_refused(host: Host) -> None:
    limits = HandoffLimits(offer=OfferLimits(regions=3))
    async with host.up(limits):
        raw = RawClient(host.socket)
        raw.say(HELLO)
        with memory() as memfd:
            for number in range(4):
                raw.say(RegionMessage(number, number * MIB, MIB, 0, HVA), fds=[memfd])
        error = await raw.error()
        assert error.code == ErrorCode.TOO_MANY
        assert "more than 3" in error.text
        raw.close()


async def test_memory_is_handed_over_once_on_a_connection(host: Host) -> None:
    async with host.up():
        raw = RawClient(host.socket)
        await raw.hand_over()
        with memory() as memfd:
            raw.say(REGION, fds=[memfd])
        assert "handed over once" in (await raw.error()).text
        raw.close()


async def test_a_name_belongs_to_the_living_process_that_has_it(host: Host, tmp_path: Path) -> None:
    async with host.up():
        with example("c", host.socket, tmp_path / "beats") as owner:
            client = await host.client()
            thief = RawClient(host.socket)
            with pytest.raises(AssertionError, match=f"guest is the guest of process {owner.pid}"):
                await thief.hand_over()
            thief.close()
            assert host.listener.find("guest") is client
            await client.pause()  # it is served as before
        raw = RawClient(host.socket)  # the owner is dead
        await raw.hand_over()
        raw.close()


async def test_a_name_is_held_by_a_process_that_lost_its_connection(
    host: Host, tmp_path: Path
) -> None:
    async with host.up():
        with example("c", host.socket, tmp_path / "beats") as owner:
            client = await host.client()
            os.kill(owner.pid, 19)  # SIGSTOP: it cannot connect anew
            client.refuse(ErrorCode.BAD_MESSAGE, "planted")
            await client.gone()
            thief = RawClient(host.socket)
            with pytest.raises(AssertionError, match="is alive"):
                await thief.hand_over()
            thief.close()


async def test_a_guest_that_departed_may_come_back_into_another_process(
    host: Host, tmp_path: Path
) -> None:
    async with host.up():
        with example("c", host.socket, tmp_path / "beats"):
            departed = await host.client()
            await departed.pause()
            await departed.departed("m-1")
            raw = RawClient(host.socket)
            raw.say(Hello(ClientState.INCOMING, 0, "guest", "i-2"))
            await until(lambda: len(host.listener.clients) == 2)
            found = host.listener.find("guest")
            assert found is not None
            assert found.state is ClientState.INCOMING
            assert departed.is_connected
            raw.close()


async def test_a_process_that_connects_anew_replaces_its_own_connection(host: Host) -> None:
    async with host.up():
        raw = RawClient(host.socket)
        await raw.hand_over()
        first = await host.client()
        again = RawClient(host.socket)
        await again.hand_over()
        await first.gone()
        assert not first.is_connected
        assert (await host.client()) is not first
        raw.close()
        again.close()


OTHER_USER = """
import os, socket, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
plain = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
plain.connect(sys.argv[1])
print(plain.recv(65536)[20:].rstrip(b"\\0").decode())
"""


async def test_a_user_that_may_not_is_told_so(short_tmp_path: Path) -> None:
    os.chmod(short_tmp_path, 0o755)
    came: list[HandedOver] = []
    path = short_tmp_path / "direct.sock"
    async with HandoffListener(path, on_client=came.append, mode=0o666):
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", OTHER_USER, str(path), stdout=subprocess.PIPE
        )
        said, _ = await asyncio.wait_for(child.communicate(), 30)
        assert b"uid: 65534 may not hand over guests" in said
        assert came == []


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Where /dev/null is /dev/iommu, and /dev/zero a VFIO device."""
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/iommu").symlink_to("/dev/null")
    device = os.stat("/dev/zero").st_rdev
    number = tmp_path / f"sys/dev/char/{os.major(device)}:{os.minor(device)}"
    number.mkdir(parents=True)
    (tmp_path / "sys/class/vfio-dev").mkdir(parents=True)
    (number / "subsystem").symlink_to(tmp_path / "sys/class/vfio-dev")
    return tmp_path


async def test_devices_and_who_watches_their_dma_are_handed_over(
    short_tmp_path: Path, root: Path
) -> None:
    came: list[HandedOver] = []
    path = short_tmp_path / "direct.sock"
    null, zero = os.open("/dev/null", os.O_RDWR), os.open("/dev/zero", os.O_RDWR)
    listener = HandoffListener(path, on_client=came.append, kinds=DescriptorKinds(root))
    async with listener:
        raw = RawClient(path)
        raw.say(HELLO)
        some = (RangeMessage(0, 8192, 0x10000, 4096),)
        with memory() as memfd, page_map() as pagemap:
            raw.say(REGION, fds=[memfd])
            raw.say(SOURCE, fds=[pagemap])
            raw.say(SourceMessage(SourceKind.HWPT, 5, 1 << 21, some), fds=[null])
            raw.say(SourceMessage(SourceKind.DEVICE_LOG, 0, 4096, some), fds=[zero])
            raw.say(DeviceMessage("nic"), fds=[zero])
            raw.say(OfferEnd(1, 3, 1))
            await until(lambda: bool(came))
        _, hwpt, log = came[0].sources
        assert isinstance(hwpt, OfferedHwpt)
        assert (hwpt.hwpt_id, hwpt.page_size_bytes) == (5, 1 << 21)
        assert [(r.address, r.first_page) for r in hwpt.ranges] == [(0x10000, 2)]
        assert isinstance(log, OfferedDeviceLog)
        assert [device.id for device in came[0].devices] == ["nic"]
        raw.close()
    os.close(null)
    os.close(zero)


async def test_a_socket_that_a_dead_daemon_left_is_replaced_and_a_living_one_is_not(
    short_tmp_path: Path,
) -> None:
    host = Host(short_tmp_path)
    left = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    left.bind(os.fspath(host.socket))
    left.close()
    async with host.up():
        assert host.socket.stat().st_mode & 0o777 == 0o660
        with pytest.raises(Exception, match="somebody listens"):
            async with Host(short_tmp_path).up():
                pass
        raw = RawClient(host.socket)
        await raw.hand_over()
        raw.close()
    assert not host.socket.exists()


@pytest.mark.parametrize("is_held", [False, True])
async def test_memory_is_let_go_of_in_a_thread_for_that_may_free_all_of_it(
    host: Host, monkeypatch: pytest.MonkeyPatch, is_held: bool
) -> None:
    closed_in: dict[int, threading.Thread] = {}
    close = os.close

    def noting(fd: int) -> None:
        closed_in[fd] = threading.current_thread()
        close(fd)

    async with host.up():
        raw = RawClient(host.socket)
        await raw.hand_over()
        client = await host.client()
        (fd,) = client.region_fds.values()
        monkeypatch.setattr(os, "close", noting)
        with client.held() if is_held else contextlib.nullcontext():
            raw.close()
            await client.gone()
            assert not is_held or fd not in closed_in
        await until(lambda: fd in closed_in)
    assert closed_in[fd] is not threading.main_thread()


async def test_memory_of_a_bad_hand_over_is_let_go_of_in_a_thread(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed_in: list[threading.Thread] = []
    close = OfferBuilder.close

    def noting(builder: OfferBuilder) -> None:
        closed_in.append(threading.current_thread())
        close(builder)

    monkeypatch.setattr(OfferBuilder, "close", noting)
    before = open_descriptors()
    async with host.up():
        raw = RawClient(host.socket)
        raw.say(HELLO)
        with memory() as memfd:
            raw.say(REGION, fds=[memfd])
        raw.say(OfferEnd(2, 1, 0))
        assert (await raw.error()).code == ErrorCode.BAD_HANDOVER
        raw.close()
    assert closed_in != []
    assert threading.main_thread() not in closed_in
    assert open_descriptors() <= before
