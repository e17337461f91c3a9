"""What a process says is watched must be the region itself: its file, mapped shared, writable."""

from __future__ import annotations

import asyncio
import errno
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from migrd.direct import mapped as checking
from migrd.direct.client import DirectClient, GuestRegion, Vmm
from migrd.direct.mapped import Watched, check_mapped
from migrd.direct.messages import ClientState
from migrd.errors import Invalid
from migrd.processes.mappings import Mapping, parsed
from tests.direct.raw_client import HVA, MIB, mapped, memory, page_map
from tests.direct.vmms import Host, until

HALF = MIB // 2


@pytest.fixture
def fd() -> Iterator[int]:
    with memory(2 * MIB) as fd:
        yield fd


@pytest.fixture
def pagemap() -> Iterator[int]:
    with page_map() as fd:
        yield fd


def watched(fd: int, *, offset_bytes: int = 0, length_bytes: int = MIB) -> Watched:
    found = os.fstat(fd)
    return Watched(0, HVA, length_bytes, (found.st_dev, found.st_ino), offset_bytes)


def check(pagemap: int, wanted: Watched) -> None:
    check_mapped(os.getpid(), pagemap, [wanted])


def test_several_mappings_side_by_side_are_as_good_as_one(fd: int, pagemap: int) -> None:
    with (
        memory(4096) as other,
        mapped(other, 4096, address=HVA + MIB),
        mapped(fd, HALF, offset_bytes=4096),
        mapped(fd, HALF, offset_bytes=4096 + HALF, address=HVA + HALF),
    ):
        check(pagemap, watched(fd, offset_bytes=4096))


def test_a_range_may_lie_inside_a_larger_mapping(fd: int, pagemap: int) -> None:
    inner = watched(fd, offset_bytes=8192, length_bytes=4096)
    check(pagemap, Watched(0, HVA + 8192, 4096, inner.file, 8192))


Put = Callable[[int], AbstractContextManager[None]]
WRONG: list[tuple[str, Put]] = [
    ("its file mapped MAP_PRIVATE", lambda fd: mapped(fd, MIB, flags=mmap.MAP_PRIVATE)),
    (
        r"offset 0x2000 of its file \(not 0x0\) mapped",
        lambda fd: mapped(fd, MIB, offset_bytes=8192),
    ),
    (
        "memory of no file",
        lambda fd: mapped(-1, MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS),
    ),
    ("without PROT_WRITE", lambda fd: mapped(fd, MIB, protection=mmap.PROT_READ)),
    (
        f"offset 0x0 of its file .* at address {HVA + HALF:#x}",
        lambda fd: mapped(fd, HALF, address=HVA + HALF),
    ),
]


@pytest.mark.parametrize(("says", "put"), WRONG)
def test_what_is_not_the_region_is_refused_in_a_sentence(
    fd: int, pagemap: int, says: str, put: Put
) -> None:
    with put(fd), pytest.raises(Invalid, match=f"region 0: the process has .*{says}") as caught:
        check(pagemap, watched(fd))
    assert "map it MAP_SHARED, from the descriptor that you hand over" in str(caught.value)


def test_another_file_and_a_gap_are_named(fd: int, pagemap: int) -> None:
    with ExitStack() as stack:
        other = stack.enter_context(memory())
        with pytest.raises(Invalid, match=r"another file \(/memfd:guest"):
            check(pagemap, watched(fd))
        check(pagemap, watched(other))
    with pytest.raises(Invalid, match=f"nothing mapped at address {HVA:#x}"):  # both are gone
        check(pagemap, watched(fd))


def test_where_the_mappings_cannot_be_read_it_is_not_known_and_said_so(
    fd: int, pagemap: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(checking, "open_beside", lambda fd: None)
    with capture_logs() as logs, pytest.raises(Invalid, match="offset 0x0"):
        check(pagemap, watched(fd, offset_bytes=4096))  # by the pid
    monkeypatch.setattr(os, "open", denied)
    with capture_logs() as logs:
        check(pagemap, watched(fd, offset_bytes=4096))
    (line,) = logs
    assert line["event"] == "direct.mappings_unknown"
    assert (line["log_level"], line["why"]) == ("warning", "Permission denied")


def test_lines_of_another_form_are_passed_over() -> None:
    text = b"""nonsense
10000-20000 rw-s 00001000 00:01 1024                       /memfd:a name (deleted)
20000-30000 r--p 00000000 00:00 0
7fff00000000-ffffffffff600000 --xp 00000000 00:00 0 [vsyscall]
"""
    file = (os.makedev(0, 1), 1024)
    assert list(parsed(text))[:2] == [
        Mapping(0x10000, 0x20000, True, True, 0x1000, file, "/memfd:a name (deleted)"),
        Mapping(0x20000, 0x30000, False, False, 0, (0, 0), ""),
    ]
    assert len(list(parsed(text))) == 3


class Author(Vmm):
    def __init__(self) -> None:
        self.problems: list[str] = []

    def problem(self, text: str) -> None:
        self.problems.append(text)


def region_of(mistake: str) -> GuestRegion:
    """As an author may make it by himself."""
    fds = [os.memfd_create(name) for name in ("guest", "other")]
    for fd in fds:
        os.ftruncate(fd, 2 * MIB)
    flags = mmap.MAP_PRIVATE if mistake == "private" else mmap.MAP_SHARED
    memory = mmap.mmap(fds[mistake == "another file"], MIB, flags)
    os.close(fds[1])
    offset_bytes = 4096 if mistake == "offset" else 0
    return GuestRegion(id=0, gpa=0, memory=memory, fd=fds[0], offset_bytes=offset_bytes)


@pytest.mark.parametrize(
    ("mistake", "says"),
    [
        ("private", "its file mapped MAP_PRIVATE"),
        ("offset", "offset 0x0 of its file (not 0x1000) mapped"),
        ("another file", "another file (/memfd:other (deleted))"),
    ],
)
async def test_an_author_who_maps_something_else_is_told_and_the_guest_goes_on(
    short_tmp_path: Path, mistake: str, says: str
) -> None:
    author, host, region = Author(), Host(short_tmp_path), region_of(mistake)
    client = DirectClient(author, regions=[region], vm="guest", socket_path=host.socket)
    async with host.up():
        await asyncio.to_thread(client.start)
        await until(lambda: bool(author.problems))
        assert f"refused: region 0: the process has {says}" in author.problems[0]
        assert client.state is ClientState.RUNNING
        with client.gate.entered():
            client.gate.checkpoint()  # would wait for ever
            region.memory[0] = 1
        assert host.came == []
        await asyncio.to_thread(client.stop)


async def test_a_region_mapped_at_an_offset_of_its_file_is_taken(short_tmp_path: Path) -> None:
    author, host = Author(), Host(short_tmp_path)
    fd = os.memfd_create("guest")
    os.ftruncate(fd, 2 * MIB)
    region = GuestRegion.map(id=0, gpa=0, fd=fd, offset_bytes=8192, length_bytes=MIB)
    client = DirectClient(author, regions=[region], vm="guest", socket_path=host.socket)
    async with host.up():
        await asyncio.to_thread(client.start)
        await host.client()
        await asyncio.to_thread(client.stop)
