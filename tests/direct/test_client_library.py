"""The client libraries by themselves: gate, tracked memory, and what an author may get wrong."""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from migrd.abi import pagemap as abi
from migrd.direct import client as client_module
from migrd.direct import guest_memory
from migrd.direct.client import DirectClient, GuestRegion, Vmm
from migrd.direct.departure import PAUSE_S
from migrd.direct.gate import Gate, GateStuck
from migrd.direct.guest_memory import WriteTracking
from migrd.direct.messages import ClientState
from migrd.errors import VmmRefused
from tests.direct.vmms import EXAMPLES, HEADER_DIRECTORY, MIB, ROOT, Host, until

PAGE = 4096


@contextmanager
def writing(gate: Gate, step: Callable[[], object]) -> Iterator[threading.Thread]:
    """A thread of the guest."""
    has_ended = threading.Event()

    def run() -> None:
        with gate.entered():
            while not has_ended.is_set():
                gate.checkpoint()
                step()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield thread
    finally:
        has_ended.set()
        gate.open()
        thread.join()


# ------------------------------------------------------------------------------------ the gate


def test_a_closed_gate_waits_for_the_slowest_thread() -> None:
    gate, in_step, go_on = Gate(is_open=True), threading.Event(), threading.Event()

    def slow() -> None:
        in_step.set()
        go_on.wait(30)

    with writing(gate, slow):
        assert in_step.wait(30)
        closing = threading.Thread(target=gate.close, kwargs={"within_s": 30})
        closing.start()
        closing.join(0.1)
        assert closing.is_alive()
        go_on.set()
        closing.join(30)
        assert not closing.is_alive()


def test_a_gate_that_a_thread_does_not_reach_is_open_again_and_says_so() -> None:
    gate, go_on = Gate(is_open=True), threading.Event()
    with writing(gate, lambda: go_on.wait(30)):
        with pytest.raises(GateStuck, match=r"1 threads of the guest did not stop within 0\.05 s"):
            gate.close(within_s=0.05)
        go_on.set()
        gate.close(within_s=30)


def test_a_thread_that_comes_to_a_closed_gate_waits_and_is_not_waited_for() -> None:
    gate, wrote = Gate(is_open=False), threading.Event()
    with writing(gate, wrote.set):
        gate.close(within_s=0)
        assert not wrote.wait(0.05)
        gate.open()
        assert wrote.wait(30)


def test_a_thread_that_left_is_not_waited_for() -> None:
    gate = Gate(is_open=True)
    with gate.entered():
        pass
    gate.close(within_s=0)


def test_a_throttled_thread_does_less() -> None:
    gate, counted = Gate(is_open=True), [0]

    def busy() -> None:
        counted[0] += sum(range(2000)) > 0

    with writing(gate, busy):
        rates = []
        for percent in (0, 90):
            gate.throttle(percent)
            before = counted[0]
            threading.Event().wait(0.3)
            rates.append(counted[0] - before)
    assert rates[1] < rates[0] / 2


# ------------------------------------------------------------------------------ tracked memory


def test_the_client_s_numbers_are_the_kernel_s() -> None:
    features = abi.uffd_features
    assert guest_memory.FEATURES == (
        features.PAGEFAULT_FLAG_WP
        | features.WP_HUGETLBFS_SHMEM
        | features.WP_UNPOPULATED
        | features.WP_ASYNC
    )
    for name in ("UFFD_API", "UFFD_USER_MODE_ONLY", "USERFAULTFD_IOC_NEW"):
        assert getattr(guest_memory, name) == getattr(abi, name), name
    assert guest_memory.UFFDIO_API == abi.UFFDIO_API
    assert guest_memory.UFFDIO_REGISTER == abi.UFFDIO_REGISTER
    assert int(abi.uffdio_register_modes.WP) == guest_memory.UFFDIO_REGISTER_MODE_WP


def written(tracking: WriteTracking, region: GuestRegion) -> list[int]:
    """Pages written since the last call."""
    found = (abi.page_region * 64)()
    flags = abi.pm_scan_flags
    argument = abi.pm_scan_arg(
        flags=flags.WP_MATCHING | flags.CHECK_WPASYNC,
        start=region.hva,
        end=region.hva + region.length_bytes,
        vec=ctypes.addressof(found),
        vec_len=len(found),
        category_mask=abi.page_categories.WRITTEN,
        return_mask=abi.page_categories.WRITTEN,
    )
    runs = fcntl.ioctl(tracking.pagemap_fd, abi.PAGEMAP_SCAN, argument)
    return [
        page
        for run in found[:runs]
        for page in range((run.start - region.hva) // PAGE, (run.end - region.hva) // PAGE)
    ]


def look_at_tracking() -> None:
    """Raises AssertionError unless every kind of write is seen, page by page."""
    region = GuestRegion.create(id=0, gpa=0, length_bytes=64 * PAGE)
    tracking = WriteTracking()
    tracking.watch(region)
    assert written(tracking, region) == list(range(64))
    assert written(tracking, region) == []
    region.memory[5 * PAGE] = 1
    assert written(tracking, region) == [5]
    zero = os.open("/dev/zero", os.O_RDONLY)
    view = memoryview(region.memory)
    assert os.readv(zero, [view[7 * PAGE + 1 : 9 * PAGE]]) == 2 * PAGE - 1
    assert os.readv(zero, [view[5 * PAGE : 5 * PAGE + 1]]) == 1
    assert written(tracking, region) == [5, 7, 8]


def test_every_write_of_the_process_is_seen() -> None:
    look_at_tracking()


AS_NOBODY = """
import ctypes, os
from tests.direct.test_client_library import look_at_tracking
os.setgroups([]); os.setgid(65534); os.setuid(65534)
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: as one that was nobody's all along
look_at_tracking()
print("seen")
"""


def test_a_process_without_any_privilege_can_have_its_writes_tracked() -> None:
    """Needs root to become nobody; falls back on UFFD_USER_MODE_ONLY."""
    done = subprocess.run(
        [sys.executable, "-c", AS_NOBODY], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "seen\n", done.stderr


# --------------------------------------------------------------------- what an author may do


class Author(Vmm):
    def __init__(self) -> None:
        self.problems: list[str] = []
        self.error = ""

    def pause(self) -> None:
        if self.error:
            raise RuntimeError(self.error)

    resume = save_state = pause  # type: ignore[assignment]  # one body for all that can fail

    def problem(self, text: str) -> None:
        self.problems.append(text)


@pytest.fixture
def host(short_tmp_path: Path) -> Host:
    return Host(short_tmp_path)


@pytest.fixture
def author() -> Author:
    return Author()


@pytest.fixture
def client(host: Host, author: Author) -> Iterator[DirectClient]:
    region = GuestRegion.create(id=0, gpa=0, length_bytes=MIB)
    client = DirectClient(author, regions=[region], vm="guest", socket_path=host.socket)
    client.start()
    yield client
    client.stop()
    client.stop()  # idempotent


async def test_a_callback_that_raises_refuses_the_ask_and_opens_the_gate(
    host: Host, client: DirectClient, author: Author
) -> None:
    async with host.up():
        handed = await host.client()
        author.error = "the disk is busy"
        with pytest.raises(VmmRefused, match="the disk is busy"):
            await handed.pause()
        assert await handed.ask_state() is client.state is ClientState.RUNNING
        with client.gate.entered():
            client.gate.checkpoint()  # would wait for ever
        author.error = ""
        await handed.pause()
        author.error = "cannot go on"
        with pytest.raises(VmmRefused, match="cannot go on"):
            await handed.resume()
        assert await handed.ask_state() is ClientState.PAUSED


async def test_a_guest_too_slow_to_pause_says_so_and_runs_on_before_migrd_gives_up(
    host: Host, client: DirectClient
) -> None:
    go_on = threading.Event()
    async with host.up():
        handed = await host.client()
        with writing(client.gate, lambda: go_on.wait(60)):
            try:
                with pytest.raises(VmmRefused, match="1 threads of the guest did not stop"):
                    await handed.pause(within_s=PAUSE_S)
                assert client.state is ClientState.RUNNING
            finally:
                go_on.set()


def test_both_libraries_give_up_a_pause_before_migrd_does() -> None:
    header = (HEADER_DIRECTORY / "migrd_direct.h").read_text()
    found = re.search(r"MIGRD__PAUSE_S = (\d+),", header)
    assert found is not None
    assert int(found[1]) == client_module._PAUSE_S < PAUSE_S


async def test_a_problem_is_told_once_while_it_lasts(
    host: Host, client: DirectClient, author: Author
) -> None:
    await until(lambda: bool(author.problems))
    await asyncio.sleep(0.3)  # several tries
    assert len(author.problems) == 1
    assert "No such file" in author.problems[0]
    async with host.up():
        await host.client()


async def test_a_refused_hand_over_is_told_to_the_author_and_the_guest_goes_on(
    host: Host, author: Author
) -> None:
    region = GuestRegion.create(id=0, gpa=0, length_bytes=MIB)
    client = DirectClient(author, regions=[region], vm="no such name", socket_path=host.socket)
    async with host.up():
        await asyncio.to_thread(client.start)
        await until(lambda: bool(author.problems))
        assert "refused: HELLO: vm is 'no such name'; take 1 to 64 letters" in author.problems[0]
        assert client.state is ClientState.RUNNING
        await asyncio.to_thread(client.stop)


async def test_an_end_by_its_own_will_is_announced(host: Host, client: DirectClient) -> None:
    async with host.up():
        handed = await host.client()
        await asyncio.to_thread(client.stop, "the guest shut down")
        await handed.gone()
        assert handed.is_going_away


# ----------------------------------------------------------------------------- the C header


@pytest.mark.parametrize(
    "compiler",
    [
        ("gcc", "-std=c11", "-xc"),
        ("gcc", "-std=gnu17", "-xc", "-Wshadow", "-Wstrict-prototypes"),
        ("g++", "-std=c++11", "-xc++"),
        ("g++", "-std=c++20", "-xc++"),
    ],
    ids=" ".join,
)
def test_the_header_compiles_without_a_warning(compiler: Sequence[str], tmp_path: Path) -> None:
    source = tmp_path / "vmm.c"
    source.write_text('#define MIGRD_DIRECT_IMPLEMENTATION\n#include "migrd_direct.h"\n')
    warnings = ["-Wall", "-Wextra", "-Werror", "-pedantic", "-O2"]
    command = [*compiler, *warnings, f"-I{HEADER_DIRECTORY}", "-c", str(source)]
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "vmm.o")], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_the_example_s_make_file_builds_it(tmp_path: Path) -> None:
    shutil.copytree(EXAMPLES, tmp_path / "direct")
    command = ["make", "-s", "-C", str(tmp_path / "direct"), f"INCLUDE={HEADER_DIRECTORY}"]
    subprocess.run(command, check=True, timeout=120)
    assert (tmp_path / "direct/counter").stat().st_mode & 0o100


def test_the_client_library_needs_nothing_but_the_standard_library() -> None:
    """So that a VMM can take its five files along."""
    own = ("client", "client_link", "gate", "guest_memory", "messages")
    assert client_module.__doc__
    command = [
        *(sys.executable, "-I", "-S", "-c"),  # no site-packages
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import migrd.direct.client; "
        "print(*sorted(m for m in sys.modules if m.startswith('migrd.direct.')))",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == [f"migrd.direct.{name}" for name in own], done.stderr
