"""The iommufd adapter on the real kernel: the contracts, and what no simulator can show.

Sharing an iommufd between processes, how long it keeps memory pinned, huge pages.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrd.errors import KernelGone, KernelRejected
from migrd.kernel.calls import system_ioctl
from migrd.kernel.iommufd import Iommufd, numbers_in
from tests.contract.iommufd import IommufdContract
from tests.contract.iommufd_bench import IOVA, LENGTH, PAGE, Bench, WithBench, numbers
from tests.contract.iommufd_raw import IommufdRawContract
from tests.lab.iommufd_test import SelftestKernel

PINNED = 64 << 20
GRACE_S = 60.0


class OnTheKernel:
    @pytest.fixture
    def rig(self) -> SelftestKernel:
        return SelftestKernel()


class TestVerbs(OnTheKernel, IommufdContract):
    pass


class TestAnswers(OnTheKernel, IommufdRawContract):
    def test_a_longer_struct_is_taken_if_its_tail_is_zero(self, bench: Bench) -> None:
        argument = bytearray(56)
        argument[0:8] = (56).to_bytes(4, "little") + bench.hwpt.id.to_bytes(4, "little")
        argument[8] = 1  # NO_CLEAR
        argument[16:40] = b"".join(n.to_bytes(8, "little") for n in (IOVA, LENGTH, PAGE))
        system_ioctl(bench.iommufd.fileno(), 0x3B8C, argument)
        argument[55] = 1
        with pytest.raises(OSError) as caught:  # noqa: PT011 - the number is looked at
            system_ioctl(bench.iommufd.fileno(), 0x3B8C, argument)
        assert caught.value.errno == errno.E2BIG


def test_the_device_node_opens() -> None:
    with Iommufd.open() as iommufd:
        assert iommufd.find_objects().ioases == ()
        assert not os.get_inheritable(iommufd.fileno())


def test_a_file_of_another_kind_is_not_adopted(tmp_path: Path) -> None:
    left, right = socket.socketpair()
    with right, contextlib.closing(left), pytest.raises(KernelRejected):
        Iommufd.adopt(os.dup(left.fileno()))
    with pytest.raises(KernelRejected):
        Iommufd.adopt(os.open(tmp_path, os.O_RDONLY))


class TestHugePages(OnTheKernel, WithBench):
    def test_one_write_makes_a_whole_huge_page_dirty(
        self, rig: SelftestKernel, iommufd: Iommufd
    ) -> None:
        huge = 2 << 20
        memory = mmap.mmap(-1, 4 * huge, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
        with memoryview(memory) as view:
            start = -ctypes.addressof(ctypes.c_char.from_buffer(view)) % huge
        view = memoryview(memory)[start : start + 2 * huge]
        ioas = iommufd.allocate_ioas()
        device = rig.mock_device(iommufd.fileno(), ioas.id, has_huge_pages=True)
        hwpt = iommufd.allocate_hwpt(device.dev_id, ioas, dirty_tracking=True)
        rig.attach(iommufd.fileno(), device.stdev_id, hwpt.id)
        ioas.map(view, IOVA)
        hwpt.set_tracking(True)
        rig.make_dirty(iommufd.fileno(), hwpt.id, IOVA, [3])
        found = hwpt.peek(IOVA, 2 * huge, PAGE)
        assert numbers(found) == list(range((1 << 20) // PAGE))  # the mock's huge page is 1 MiB


# ---- other processes

# It imports little and is run without `site`: under TCG each module costs.
VMM = """
import mmap, socket, sys
from migrd.kernel.iommufd import Iommufd
from tests.lab.iommufd_test import SelftestKernel

def say(*words):
    print(*words, flush=True)

kernel = SelftestKernel()
iova, page, length, *channels = map(int, sys.argv[1:])
iommufd = Iommufd(kernel.open())
ioas = iommufd.allocate_ioas()
device = kernel.mock_device(iommufd.fileno(), ioas.id)
hwpt = iommufd.allocate_hwpt(device.dev_id, ioas, dirty_tracking=True)
kernel.attach(iommufd.fileno(), device.stdev_id, hwpt.id)
memory = mmap.mmap(-1, length)
ioas.map(memory, iova)
hwpt.set_tracking(True)
kernel.make_dirty(iommufd.fileno(), hwpt.id, iova, [4, 10])
for channel in channels:
    socket.send_fds(socket.socket(fileno=channel), [b"x"], [iommufd.fileno()])
say(iommufd.fileno(), ioas.id, hwpt.id)
for line in sys.stdin:
    if line.strip() == "read":
        say(hwpt.peek(iova, length, page).dirty_pages)
    elif line.strip() == "unmap":
        ioas.unmap(ioas.mappings[0], drop_dirty=True)
        say("unmapped")
"""


class Vmm:
    """A process that has memory mapped, tracking on, and pages 2 and 5 dirty."""

    def __init__(self, length: int, *, channel: socket.socket | None = None) -> None:
        passed = [] if channel is None else [channel.fileno()]
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-c", VMM, *map(str, [IOVA, PAGE, length, *passed])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=passed,
        )
        self.pid = self._process.pid
        self.pidfd = os.pidfd_open(self.pid)
        self.number, self.ioas_id, self.hwpt_id = map(int, self._line().split())

    def ask(self, word: str) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()
        return self._line()

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(GRACE_S)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate(timeout=GRACE_S)
        os.close(self.pidfd)

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


@pytest.fixture
def vmm() -> Iterator[Vmm]:
    with contextlib.closing(Vmm(LENGTH)) as vmm:
        yield vmm


def _peeked(iommufd: Iommufd, vmm: Vmm, length: int = LENGTH) -> list[int] | None:
    found = iommufd.foreign_hwpt(vmm.hwpt_id, (vmm.ioas_id,)).peek(IOVA, length, PAGE)
    return None if found is None else numbers(found)


def test_an_iommufd_is_taken_from_a_process_that_does_nothing_for_it(vmm: Vmm) -> None:
    with Iommufd.from_process(vmm.pidfd, vmm.number) as iommufd:
        assert not os.get_inheritable(iommufd.fileno())
        found = iommufd.find_objects()
        assert found.ioases == (vmm.ioas_id,)
        assert found.tracking_hwpts == (vmm.hwpt_id,)
        assert len(found.devices) == 1
        assert _peeked(iommufd, vmm) == [2, 5]
        assert vmm.ask("read") == "2"
        vmm.ask("unmap")
        assert _peeked(iommufd, vmm) is None


def test_a_vmms_iommufd_is_found_among_its_descriptors(vmm: Vmm) -> None:
    assert numbers_in(vmm.pid) == (vmm.number,)
    vmm.kill()
    with pytest.raises(KernelGone):
        numbers_in(vmm.pid)


def test_what_cannot_be_taken_is_said_to_be_gone(vmm: Vmm) -> None:
    with pytest.raises(KernelGone) as caught:
        Iommufd.from_process(vmm.pidfd, 999)
    assert caught.value.code == "descriptor_gone"
    with pytest.raises(KernelRejected) as rejected:
        Iommufd.from_process(vmm.pidfd, 0)
    assert rejected.value.code == "not_an_iommufd"
    vmm.kill()
    with pytest.raises(KernelGone) as caught:
        Iommufd.from_process(vmm.pidfd, vmm.number)
    assert caught.value.code == "process_gone"


def test_an_iommufd_sent_over_a_socket_is_shared() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs, contextlib.closing(Vmm(LENGTH, channel=theirs)) as vmm:
        _, [fd], _, _ = socket.recv_fds(ours, 1, 1)
        with Iommufd.adopt(fd) as iommufd:
            assert _peeked(iommufd, vmm) == [2, 5]
            assert vmm.ask("read") == "2"


def test_a_killed_vmms_memory_stays_pinned_until_the_iommufd_is_closed() -> None:
    with contextlib.closing(Vmm(PINNED)) as vmm:
        with Iommufd.from_process(vmm.pidfd, vmm.number) as iommufd:
            vmm.kill()
            assert _peeked(iommufd, vmm, PINNED) == [2, 5]
            held = _settled_available_bytes()
        deadline_s = time.monotonic() + GRACE_S
        while _available_bytes() < held + PINNED * 3 // 4:
            assert time.monotonic() < deadline_s, "closing gave no memory back"
            time.sleep(0.1)


def _settled_available_bytes() -> int:
    """After an exit, memory comes back for a while."""
    deadline_s = time.monotonic() + GRACE_S
    before = _available_bytes()
    while time.monotonic() < deadline_s:
        time.sleep(0.5)
        now = _available_bytes()
        if now - before < 1 << 20:
            return now
        before = now
    raise AssertionError("the memory in use does not settle")


def _available_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    [available] = [line for line in lines if line.startswith("MemAvailable:")]
    return int(available.split()[1]) << 10
