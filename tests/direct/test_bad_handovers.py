"""Hand-overs that are wrong, hostile, cut off or too much: each gets a sentence that names field,
value and cure; nothing of it is kept, and the next process is served as if nothing was.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

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
from tests.direct.vmms import Host, until

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
            await until(lambda: open_descriptors() <= before)
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
                await until(lambda: open_descriptors() <= before)
            assert swept > 300
        raw = RawClient(host.socket)
        await raw.hand_over()
        raw.close()
