"""Both ends of a memory stream in one process, and a guest's memory that tests can write."""

import asyncio
import mmap
import os
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from migrd.core.bitmap import DirtyBitmap
from migrd.core.memory_map import PAGE_BYTES, MemoryMap
from migrd.direct.manifest import Manifest
from migrd.direct.receiver import Receiver
from migrd.direct.sender import Sender
from migrd.direct.stream_limits import StreamLimits
from migrd.engine.threads import in_thread

ID, EPOCH = "0e3c2f6e-move", 7
PAGE = PAGE_BYTES
QUICK = StreamLimits(connect_s=20, stall_s=20, rebuild_s=20, load_s=20)


@dataclass
class Guest:
    """Regions in files in memory, mapped, so that a test can write them as a guest does."""

    memory: MemoryMap
    fds: dict[int, int]
    views: dict[int, mmap.mmap]

    def write(self, page: int, content: bytes) -> None:
        """`page` of the merged page space."""
        for region, offset, _ in self.memory.pieces(page, 1):
            self.views[region.id][offset : offset + len(content)] = content

    def read(self) -> dict[int, bytes]:
        return {number: bytes(view) for number, view in self.views.items()}


@contextmanager
def guest(*lengths_pages: int) -> Iterator[Guest]:
    """One region for each length; ids are not 0, 1, 2 and addresses have gaps."""
    pieces = [(10 + 3 * n, n << 32, pages * PAGE) for n, pages in enumerate(lengths_pages)]
    memory = MemoryMap.of(pieces)
    fds, views = {}, {}
    for region in memory.regions:
        fd = os.memfd_create("test-guest")
        os.ftruncate(fd, region.length_bytes)
        fds[region.id], views[region.id] = fd, mmap.mmap(fd, region.length_bytes)
    try:
        yield Guest(memory, fds, views)
    finally:
        for view in views.values():
            view.close()
        for fd in fds.values():
            os.close(fd)


@dataclass
class Owner:
    """The destination's owner: notes what it is told, and what the memory was at `load`."""

    rebuilt: list[Manifest] = field(default_factory=list)
    device_data: list[tuple[str, bytes]] = field(default_factory=list)
    state: bytes | None = None
    loads: int = 0
    fails_at: str = ""
    failure: Exception | None = None

    async def rebuild(self, manifest: Manifest, region_fds: Mapping[int, int]) -> None:
        self._fail("rebuild")
        assert set(region_fds) == {one.id for one in manifest.memory.regions}
        self.rebuilt.append(manifest)

    async def take_device_data(self, device: str, chunk: bytes) -> None:
        self._fail("device")
        self.device_data.append((device, chunk))

    async def load(self, state_fd: int | None) -> None:
        self._fail("load")
        if state_fd is not None:
            self.state = await in_thread(os.read, state_fd, 1 << 20)
        self.loads += 1

    def _fail(self, at: str) -> None:
        if self.fails_at == at and self.failure is not None:
            raise self.failure


def receiver(owner: Owner, **changed: Any) -> Receiver:
    given: dict[str, Any] = {
        "tls": None,
        "peer_name": None,
        "migration_id": ID,
        "epoch": EPOCH,
        "owner": owner,
        "limits": QUICK,
    }
    return Receiver("127.0.0.1", (0, 0), **(given | changed))


def sender(of: Guest, address: tuple[str, int], **changed: Any) -> Sender:
    given: dict[str, Any] = {
        "address": address,
        "channels": 2,
        "tls": None,
        "peer_name": "host-b",
        "migration_id": ID,
        "epoch": EPOCH,
        "limits": QUICK,
    }
    return Sender(of.memory, of.fds, **(given | changed))


@asynccontextmanager
async def connected(
    of: Guest, owner: Owner, *, devices: tuple[str, ...] = (), **changed: Any
) -> AsyncIterator[tuple[Sender, Receiver]]:
    """A stream that is ready for memory."""
    async with (
        receiver(owner) as destination,
        sender(of, destination.address, **changed) as source,
    ):
        await source.connect(Manifest(of.memory, devices, "test"))
        yield source, destination


def arrived(at: Receiver) -> dict[int, bytes]:
    """The guest's memory at the destination."""
    return {number: os.pread(fd, os.fstat(fd).st_size, 0) for number, fd in at.region_fds.items()}


def same_pages(one: DirtyBitmap, other: DirtyBitmap) -> bool:
    return bool((one.words == other.words).all())


async def until(condition: Callable[[], bool]) -> None:
    """Raises TimeoutError where it does not come true."""
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - what other threads do sets no asyncio.Event
            await asyncio.sleep(0.005)
