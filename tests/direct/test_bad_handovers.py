"""Hand-overs that are wrong, hostile, cut off or too much: each gets a sentence that names field,
value and cure; nothing of it is kept, and the next process is served as if nothing was.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from migrd.direct.descriptors import DescriptorKinds
from migrd.direct.handoff import HandedOver
from migrd.direct.handoff_listener import HandoffLimits, HandoffListener
from migrd.direct.messages import (
    AskState,
    ClientState,
    DeviceMessage,
    ErrorCode,
    Hello,
    Message,
    OfferEnd,
    Pause,
    RangeMessage,
    RegionMessage,
    SourceKind,
    SourceMessage,
    encode,
)
from migrd.direct.offer import OfferedDeviceLog, OfferedHwpt, OfferLimits
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
assert isinstance(REGION, RegionMessage)
assert isinstance(SOURCE, SourceMessage)
assert isinstance(END, OfferEnd)


@pytest.fixture
def host(short_tmp_path: Path) -> Host:
    return Host(short_tmp_path)


def watching(*ranges: RangeMessage, kind: SourceKind = SourceKind.PROCESS) -> SourceMessage:
    return SourceMessage(kind, 0, 4096, ranges)


@dataclass(frozen=True)
class Bad:
    """Messages behind HELLO; M, P, Z stand for a memfd, the page map, /dev/zero."""

    what: str
    says: str
    messages: Sequence[tuple[Message, str]]
    code: ErrorCode = ErrorCode.BAD_HANDOVER
    seals: int = 0


def with_region(region: RegionMessage) -> list[tuple[Message, str]]:
    return [(region, "M"), (SOURCE, "P"), (END, "")]


def with_source(source: SourceMessage, fd: str = "P") -> list[tuple[Message, str]]:
    return [(REGION, "M"), (source, fd), (END, "")]


ALL = RangeMessage(0, 0, HVA, MIB)
BAD = [
    Bad("no region", "regions: none", [(OfferEnd(0, 0, 0), "")]),
    Bad("a region that is empty", "is empty", with_region(replace(REGION, length_bytes=0))),
    Bad("a length in bytes", "multiple of 4096", with_region(replace(REGION, length_bytes=4097))),
    Bad("an unaligned gpa", "multiple of 4096", with_region(replace(REGION, gpa=1))),
    Bad("a gpa beyond all memory", "beyond", with_region(replace(REGION, gpa=2**64 - 4096))),
    Bad("a huge region", "at most", with_region(replace(REGION, length_bytes=32 << 40))),
    Bad("a region that wraps", "beyond", with_region(replace(REGION, length_bytes=2**64 - 4096))),
    Bad("an unaligned offset", "offset is 0x1;", with_region(replace(REGION, offset_bytes=1))),
    Bad(
        "a region beyond its file",
        "ends at byte 1052672 of its file, which has 1048576",
        with_region(replace(REGION, offset_bytes=4096)),
    ),
    Bad(
        "an offset that wraps",
        "of its file",
        with_region(replace(REGION, offset_bytes=2**64 - 4096)),
    ),
    Bad(
        "regions that overlap in the guest",
        "overlaps region 0",
        [
            (REGION, "M"),
            (replace(REGION, id=1, gpa=4096), "M"),
            (SOURCE, "P"),
            (OfferEnd(2, 1, 0), ""),
        ],
    ),
    Bad(
        "regions that overlap in their file",
        "shares pages of its file with region",
        [
            (REGION, "M"),
            (replace(REGION, id=1, gpa=MIB, length_bytes=4096), "M"),
            (SOURCE, "P"),
            (OfferEnd(2, 1, 0), ""),
        ],
    ),
    Bad(
        "an id twice",
        "id is another region's",
        [(REGION, "M"), (replace(REGION, gpa=MIB), "M"), (SOURCE, "P"), (OfferEnd(2, 1, 0), "")],
    ),
    Bad(
        "a region in no memory",
        "is /dev/zero; pass a memfd",
        [(REGION, "Z"), (SOURCE, "P"), (END, "")],
    ),
    Bad(
        "a page map for memory", "pagemap; pass a memfd", [(REGION, "P"), (SOURCE, "P"), (END, "")]
    ),
    Bad("a memfd for a page map", "not a process's page map", with_source(SOURCE, "M")),
    Bad(
        "a memfd for an iommufd",
        "pass one of /dev/iommu",
        with_source(replace(SOURCE, kind=SourceKind.HWPT), "M"),
    ),
    Bad(
        "zeros for a device",
        "not a VFIO device",
        with_source(replace(SOURCE, kind=SourceKind.DEVICE_LOG), "Z"),
    ),
    Bad(
        "memory sealed against writing",
        "F_SEAL_WRITE",
        with_region(REGION),
        seals=fcntl.F_SEAL_WRITE,
    ),
    Bad(
        "a source of no region",
        "watches region 7",
        with_source(watching(replace(ALL, region_id=7))),
    ),
    Bad(
        "a source beyond its region",
        "ends at 0x101000",
        with_source(watching(replace(ALL, offset_bytes=4096))),
    ),
    Bad(
        "a source whose offset wraps",
        "ends at",
        with_source(watching(replace(ALL, offset_bytes=2**64 - 4096))),
    ),
    Bad(
        "a source with an unaligned address",
        "address is 0x1",
        with_source(watching(replace(ALL, address=1))),
    ),
    Bad(
        "a source whose address wraps",
        "beyond 64 bits",
        with_source(watching(replace(ALL, address=2**64 - 4096))),
    ),
    Bad(
        "a source of nothing", "is empty", with_source(watching(ALL, replace(ALL, length_bytes=0)))
    ),
    Bad("an address twice", "in two ranges", with_source(watching(ALL, ALL))),
    Bad(
        "pages nobody watches",
        "at offset 0x1000",
        with_source(watching(replace(ALL, length_bytes=4096))),
    ),
    Bad("no process source", "no process source", [(REGION, "M"), (OfferEnd(1, 0, 0), "")]),
    Bad(
        "a page size that is none",
        "page_size is 4097",
        with_source(replace(SOURCE, page_size_bytes=4097)),
    ),
    Bad(
        "a count that is wrong",
        "says 2 regions",
        [(REGION, "M"), (SOURCE, "P"), (OfferEnd(2, 1, 0), "")],
    ),
    Bad(
        "a device that is none",
        "device nic: its descriptor is /dev/zero",
        [(REGION, "M"), (SOURCE, "P"), (DeviceMessage("nic"), "Z"), (OfferEnd(1, 1, 1), "")],
    ),
    Bad(
        "a region without its file", "descriptor is missing", [(REGION, "")], ErrorCode.BAD_MESSAGE
    ),
    Bad("two files for a region", "2 descriptors", [(REGION, "MM")], ErrorCode.BAD_MESSAGE),
    Bad("a heap of files", "did not all arrive", [(REGION, "M" * 200)], ErrorCode.BAD_MESSAGE),
    Bad(
        "a file too many", "takes no descriptor", [(REGION, "M"), (END, "Z")], ErrorCode.BAD_MESSAGE
    ),
    Bad(
        "a second HELLO",
        "HELLO: an offer goes on",
        [(REGION, "M"), (HELLO, "")],
        ErrorCode.BAD_MESSAGE,
    ),
    Bad("what only migrd says", "PAUSE: an offer goes on", [(Pause(), "")], ErrorCode.BAD_MESSAGE),
]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.what)
async def test_a_bad_hand_over_gets_a_clear_error_and_leaves_nothing(host: Host, bad: Bad) -> None:
    zero = os.open("/dev/zero", os.O_RDWR)
    async with host.up():
        with memory(seals=bad.seals) as memfd, page_map() as pagemap:
            fds = {"M": memfd, "P": pagemap, "Z": zero}
            before = open_descriptors()
            raw = RawClient(host.socket)
            raw.say(HELLO)
            for message, passed in bad.messages:
                raw.say(message, fds=[fds[one] for one in passed])
            error = await raw.error()
            assert bad.says in error.text
            assert error.code == bad.code
            raw.close()
            await until(lambda: open_descriptors() == before)
        assert host.came == []
    os.close(zero)


HELLOS = [
    (Hello(ClientState.RUNNING, 0, ""), "vm: it is empty"),
    (Hello(ClientState.INCOMING, 0, "guest"), "instance: it is empty"),
    (Hello(ClientState.DEPARTED, 0, "guest"), "migration_id: it is ''"),
    (Hello(ClientState.RUNNING, 0, "guest", "", "m-1"), "migration_id: it is 'm-1'"),
]


@pytest.mark.parametrize(("hello", "says"), HELLOS)
async def test_a_hello_that_contradicts_itself_is_refused(
    host: Host, hello: Hello, says: str
) -> None:
    async with host.up():
        raw = RawClient(host.socket)
        raw.say(hello)
        assert says in (await raw.error()).text
        raw.close()


@pytest.mark.parametrize(
    ("packet", "says"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "another protocol"),
        (b"x", "no header"),
        (b"x" * (70 << 10), "more than 65536 bytes"),
        (encode(AskState(), 1), "begins with HELLO"),
        (struct.pack("<IHHII", 0x4452474D, 77, 1, 0, 0), "type 77 is no message"),
        (encode(HELLO)[:-1], "length is 224, and 223 bytes follow"),
    ],
)
async def test_what_is_no_hand_over_at_all_is_told_so(host: Host, packet: bytes, says: str) -> None:
    async with host.up():
        raw = RawClient(host.socket)
        raw.send(packet)
        assert says in (await raw.error()).text
        raw.close()


async def test_another_version_is_told_both_versions(host: Host) -> None:
    async with host.up():
        raw = RawClient(host.socket)
        raw.send(encode(HELLO, version=2))
        error = await raw.error()
        assert error.code == ErrorCode.VERSION
        assert "version 2" in error.text
        assert "version 1" in error.text
        raw.close()


async def test_a_process_that_breaks_off_at_any_byte_of_any_message_leaves_nothing(
    host: Host,
) -> None:
    async with host.up():
        raw = RawClient(host.socket)
        await raw.hand_over()  # so that the name is this process' own already
        raw.close()
        await until(lambda: len(host.gone) == 1)
        with memory() as memfd, page_map() as pagemap:
            packets = [
                (encode(HELLO), []),
                *zip(map(encode, offer()), ([memfd], [pagemap], []), strict=True),
            ]
            before = open_descriptors()
            swept = 0
            for number, (packet, fds) in enumerate(packets):
                for cut in range(len(packet) + 1):
                    raw = RawClient(host.socket)
                    for whole, passed in packets[:number]:
                        raw.send(whole, passed)
                    raw.send(packet[:cut], fds)
                    raw.close()
                    swept += 1
                    await asyncio.sleep(0)  # so that not all of them wait at once
                await until(lambda: open_descriptors() == before)
            assert swept > 300
        raw = RawClient(host.socket)
        await raw.hand_over()
        raw.close()


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
        with memory() as memfd, page_map() as pagemap:
            raw.say(REGION, fds=[memfd])
            raw.say(SOURCE, fds=[pagemap])
        some = (RangeMessage(0, 8192, 0x10000, 4096),)
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
