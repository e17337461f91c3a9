"""A real process whose memory is watched: it registers it as a client would, and writes on command.

    Writer ── socket ──► python -m tests.contract.dirty_writer   (memory, userfaultfd, threads)
      └── pagemap descriptor, addresses ◄──┘

Each page has a count of the writes to it in its first eight bytes, so that a copy of the memory,
made page by page as they are told of, is the memory itself if and only if none was missed.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import fcntl
import mmap
import os
import pickle
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from migrd.abi import pagemap as abi

PAGE: Final = 4096
HUGE: Final = 2 << 20
KINDS: Final = ("anonymous", "memfd", "huge")
WISH: Final = (
    abi.uffd_features.WP_ASYNC
    | abi.uffd_features.WP_UNPOPULATED
    | abi.uffd_features.WP_HUGETLBFS_SHMEM
    | abi.uffd_features.PAGEFAULT_FLAG_WP
)
_PATIENCE_S = 60.0
_FEW = 4096
_MADV_DONTNEED: Final = 4


@dataclass(frozen=True)
class Where:
    """One region in the process."""

    hva: int
    length_bytes: int


class Writer:
    """The process, from outside. A context manager: leaving it kills the process."""

    def __init__(self, kind: str, lengths: list[int], *, registered: bool = True) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket = ours
        ours.settimeout(_PATIENCE_S)
        # Without `site`, and without numpy until it is needed: most tests write few pages.
        words = [sys.executable, "-S", "-m", __name__, str(theirs.fileno()), kind]
        with theirs:
            self.process = subprocess.Popen(
                [*words, str(int(registered)), *map(str, lengths)],
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(["", *sys.path])},
            )
        body, fds, _, _ = socket.recv_fds(ours, 65536, 1)
        (self.pagemap_fd,) = fds
        self.regions: list[Where] = pickle.loads(body)
        self._mem: int | None = None

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._socket.close()
        os.close(self.pagemap_fd)
        if self._mem is not None:
            os.close(self._mem)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(_PATIENCE_S)

    def ask(self, verb: str, *words: Any) -> Any:
        """Make it do something, and wait until it has."""
        _send(self._socket, (verb, words))
        return _receive(self._socket)

    def write(self, region: int, pages: Sequence[int]) -> None:
        self.ask("write", region, array.array("q", pages).tobytes())

    def read(self, region: int, page: int, pages: int = 1) -> bytes:
        """What is there."""
        if self._mem is None:
            self._mem = os.open(f"/proc/{self.process.pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        return os.pread(self._mem, pages * PAGE, self.regions[region].hva + page * PAGE)

    def counts(self, region: int, page: int, pages: int) -> Any:
        """Of writes to these pages, as an array."""
        import numpy as np

        found = np.frombuffer(self.read(region, page, pages), np.uint64)
        return found.reshape(-1, PAGE // 8)[:, 0].copy()


# ---- in the process


class _Memory:
    """One region, registered."""

    def __init__(self, kind: str, length: int) -> None:
        self.fd = -1
        if kind == "memfd":
            self.fd = os.memfd_create("guest")
            os.ftruncate(self.fd, length)
            self.memory = mmap.mmap(self.fd, length, flags=mmap.MAP_SHARED)
        else:
            self.memory = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self.memory.madvise(mmap.MADV_HUGEPAGE if kind == "huge" else mmap.MADV_NOHUGEPAGE)
        self.hva = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.length = length
        self.first_bytes = memoryview(self.memory).cast("Q")[:: PAGE // 8]

    @cached_property
    def counts(self) -> Any:
        import numpy as np

        return np.frombuffer(self.memory, np.uint64).reshape(-1, PAGE // 8)[:, 0]

    def write(self, pages: Any) -> None:
        """An array of different pages."""
        self.counts[pages] += 1


class WatchedMemory:
    """Memory of this process, registered."""

    def __init__(self, kind: str, lengths: list[int], *, registered: bool = True) -> None:
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self.libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self.memories = [_Memory(kind, length) for length in lengths]
        self.uffd = self.userfaultfd()
        self.storming = threading.Event()
        self.storms: list[threading.Thread] = []
        for memory in self.memories if registered else []:
            self.register(memory.hva, memory.length)

    def userfaultfd(self) -> int:
        device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
        uffd = fcntl.ioctl(device, abi.USERFAULTFD_IOC_NEW, os.O_CLOEXEC | os.O_NONBLOCK)
        os.close(device)
        fcntl.ioctl(uffd, abi.UFFDIO_API, abi.uffdio_api(api=abi.UFFD_API, features=WISH))
        return uffd

    def register(self, start: int, length: int) -> None:
        whole = abi.uffdio_range(start=start, len=length)
        wish = abi.uffdio_register(range=whole, mode=abi.uffdio_register_modes.WP)
        fcntl.ioctl(self.uffd, abi.UFFDIO_REGISTER, wish)

    def close(self) -> None:
        """What is mapped goes with the last that looks at it."""
        os.close(self.uffd)
        for memory in self.memories:
            if memory.fd >= 0:
                os.close(memory.fd)

    # verbs

    def do_write(self, region: int, body: bytes) -> None:
        if len(body) > _FEW * 8:
            import numpy as np

            self.memories[region].write(np.frombuffer(body, np.int64))
            return
        for page in memoryview(body).cast("q"):
            self.memories[region].first_bytes[page] += 1

    def do_touch(self, region: int, pages: list[int]) -> int:
        """Read them."""
        return sum(self.memories[region].first_bytes[page] for page in pages)

    def do_discard(self, region: int, page: int, pages: int) -> None:
        where = self.memories[region].hva + page * PAGE
        assert self.libc.madvise(where, pages * PAGE, _MADV_DONTNEED) == 0

    def do_unmap(self, region: int, page: int, pages: int) -> None:
        assert self.libc.munmap(self.memories[region].hva + page * PAGE, pages * PAGE) == 0

    def do_close_userfaultfd(self) -> None:
        os.close(self.uffd)

    def do_register_again(self) -> None:
        self.uffd = self.userfaultfd()
        for memory in self.memories:
            self.register(memory.hva, memory.length)

    def do_storm(self, threads: int, seed: int) -> None:
        """Write at random until told to stop."""
        import numpy as np

        np.random.default_rng(seed)  # what it imports late, too
        self.storming.set()
        for number in range(threads):
            made = threading.Thread(target=self._storm, args=(seed + number,), daemon=True)
            self.storms.append(made)
            made.start()

    def do_calm(self) -> int:
        self.storming.clear()
        for storm in self.storms:
            storm.join()
        self.storms.clear()
        return sum(sum(memory.first_bytes) for memory in self.memories)

    def _storm(self, seed: int) -> None:
        import numpy as np

        chance = np.random.default_rng(seed)
        while self.storming.is_set():
            memory = self.memories[int(chance.integers(len(self.memories)))]
            pages = len(memory.counts)
            if chance.random() < 0.3:
                first = int(chance.integers(pages))
                memory.write(np.arange(first, min(pages, first + 128)))
            else:
                memory.write(np.unique(chance.integers(0, pages, 64)))


def main(words: list[str]) -> None:
    fd, kind, registered, *lengths = words
    channel = socket.socket(fileno=int(fd))
    process = WatchedMemory(kind, [int(word) for word in lengths], registered=registered == "1")
    regions = [Where(memory.hva, memory.length) for memory in process.memories]
    pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    socket.send_fds(channel, [pickle.dumps(regions)], [pagemap])
    os.close(pagemap)
    with contextlib.suppress(EOFError):
        while True:
            verb, given = _receive(channel)
            _send(channel, getattr(process, f"do_{verb}")(*given))


def _send(channel: socket.socket, told: Any) -> None:
    body = pickle.dumps(told)
    channel.sendall(struct.pack("=Q", len(body)) + body)


def _receive(channel: socket.socket) -> Any:
    (length,) = struct.unpack("=Q", _exactly(channel, 8))
    return pickle.loads(_exactly(channel, length))


def _exactly(channel: socket.socket, length: int) -> bytes:
    got = bytearray()
    while len(got) < length:
        part = channel.recv(min(1 << 20, length - len(got)))
        if not part:
            raise EOFError
        got += part
    return bytes(got)


if __name__ == "__main__":
    # Pickles name the module that they come from: not __main__.
    from tests.contract import dirty_writer

    dirty_writer.main(sys.argv[1:])
