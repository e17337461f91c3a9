"""One end of a stream, in a process of its own: migrd's, or the fastest plain one we could write.

    python -m tests.bench.stream_ends source      python -m tests.bench.stream_ends destination

Each reads orders as JSON lines and answers each with one. Both ends of one run are told the same
order; the destination first answers with its port. The plain ends know nothing of pages, checksums
or rounds: each connection carries its share of the file, by sendfile(2) (with TLS: large writes out
of a mapping), into a file in memory.
"""

import asyncio
import json
import mmap
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from migrd.core.memory_map import MemoryMap
from migrd.direct.manifest import Manifest
from migrd.direct.receiver import Receiver
from migrd.direct.sender import Sender
from migrd.direct.stream_limits import StreamLimits
from migrd.direct.stream_tls import destination_context, source_context

BLOCK: Final = 1 << 20
HOST: Final = "127.0.0.1"
NAME: Final = "host-b"
Order = Mapping[str, Any]


def main(role: str) -> None:
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    end: Callable[[Order], dict[str, Any]] = Source().run if role == "source" else destination
    for line in sys.stdin:
        before_s = time.process_time()
        answer = end(json.loads(line))
        cpu_s = time.process_time() - before_s
        tell({"cpu_s": cpu_s} | answer | {"peak_bytes": peak_bytes()})


def tell(answer: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def peak_bytes() -> int:
    """The most that was resident (VmHWM); what the kernel counts of files in memory is in it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmHWM")


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


# ------------------------------------------------------------------------------------ the source


class Source:
    """Keeps the guest's memory from order to order: making it costs more than moving it."""

    def __init__(self) -> None:
        self._made: tuple[object, ...] = ()
        self._fd = -1

    def run(self, order: Order) -> dict[str, Any]:
        self._make(order["bytes"], order["data_share"])
        forget_peak()
        return (plain_source if order["plain"] else our_source)(order, self._fd)

    def _make(self, length: int, data_share: float) -> None:
        if self._made == (length, data_share):
            return
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = os.memfd_create("bench-source")
        os.ftruncate(self._fd, length)
        block = os.urandom(BLOCK)
        for offset in range(0, int(length * data_share), BLOCK):
            os.pwrite(self._fd, block, offset)
        self._made = (length, data_share)


def our_source(order: Order, fd: int) -> dict[str, Any]:
    return asyncio.run(_our_source(order, fd))


async def _our_source(order: Order, fd: int) -> dict[str, Any]:
    memory = MemoryMap.of([(0, 0, order["bytes"])])
    tls = source_context(Path(order["tls"])) if order["tls"] else None
    async with Sender(
        memory,
        {0: fd},
        address=(HOST, order["port"]),
        channels=order["channels"],
        tls=tls,
        peer_name=NAME,
        migration_id="bench",
        epoch=1,
    ) as sender:
        await sender.connect(Manifest(memory))
        pending = memory.full()
        if order["every"] > 1:
            pending.words[:] = 0x1111_1111_1111_1111
        began_s = time.perf_counter()
        sent = await sender.send(pending, stable=order["stable"])
        took_s = time.perf_counter() - began_s
        await sender.finish()
    return {"took_s": took_s, "pages": sent.pages, "wire_bytes": sent.bytes_on_wire}


def plain_source(order: Order, fd: int) -> dict[str, Any]:
    channels, length = order["channels"], order["bytes"]
    context = source_context(Path(order["tls"])) if order["tls"] else None
    socks = []
    for _ in range(channels):
        sock = socket.create_connection((HOST, order["port"]))
        socks.append(context.wrap_socket(sock, server_hostname=NAME) if context else sock)
    began_s = time.perf_counter()
    share = length // channels
    _in_threads(
        (_plain_send_tls if context else _plain_send, sock, fd, n * share, share)
        for n, sock in enumerate(socks)
    )
    took_s = time.perf_counter() - began_s
    for sock in socks:
        sock.close()
    return {"took_s": took_s, "pages": length // 4096, "wire_bytes": length}


def _plain_send(sock: socket.socket, fd: int, offset: int, length: int) -> None:
    end = offset + length
    while offset < end:
        offset += os.sendfile(sock.fileno(), fd, offset, min(BLOCK, end - offset))
    sock.recv(1)


def _plain_send_tls(sock: socket.socket, fd: int, offset: int, length: int) -> None:
    with (
        mmap.mmap(fd, length, mmap.MAP_SHARED, mmap.PROT_READ, offset=offset) as mapped,
        memoryview(mapped) as view,
    ):
        for at in range(0, length, BLOCK):
            sock.sendall(view[at : at + BLOCK])
    sock.recv(1)


def _in_threads(calls: Any) -> None:
    threads = [threading.Thread(target=call, args=arguments) for call, *arguments in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# ------------------------------------------------------------------------------- the destination


def destination(order: Order) -> dict[str, Any]:
    forget_peak()
    return (plain_destination if order["plain"] else our_destination)(order)


class NoOwner:
    """Nobody waits for this guest."""

    async def rebuild(self, manifest: Manifest, region_fds: Mapping[int, int]) -> None: ...

    async def take_device_data(self, device: str, chunk: bytes) -> None: ...

    async def load(self, state_fd: int | None) -> None: ...


def our_destination(order: Order) -> dict[str, Any]:
    return asyncio.run(_our_destination(order))


async def _our_destination(order: Order) -> dict[str, Any]:
    tls = destination_context(Path(order["tls"])) if order["tls"] else None
    async with Receiver(
        HOST,
        (0, 0),
        tls=tls,
        peer_name=None,
        migration_id="bench",
        epoch=1,
        owner=NoOwner(),
        limits=StreamLimits(reserve=order["reserve"]),
    ) as receiver:
        tell({"port": receiver.address[1]})
        await receiver.loaded()
        return {"received_bytes": receiver.received_bytes}


def plain_destination(order: Order) -> dict[str, Any]:
    channels, length = order["channels"], order["bytes"]
    context = destination_context(Path(order["tls"])) if order["tls"] else None
    fd = os.memfd_create("bench-destination")
    os.ftruncate(fd, length)
    if order["reserve"]:
        os.posix_fallocate(fd, 0, length)
    with socket.create_server((HOST, 0)) as listener:
        tell({"port": listener.getsockname()[1]})
        socks = []
        for _ in range(channels):
            sock, _ = listener.accept()
            socks.append(context.wrap_socket(sock, server_side=True) if context else sock)
    share = length // channels
    receive = PLAIN_RECEIVERS[order["plain"]]
    _in_threads((receive, sock, fd, n * share, share) for n, sock in enumerate(socks))
    for sock in socks:
        sock.close()
    os.close(fd)
    return {"received_bytes": length}


def _plain_receive(sock: socket.socket, fd: int, offset: int, length: int) -> None:
    """By way of a buffer that stays in the cache."""
    buffer = memoryview(bytearray(BLOCK))
    end = offset + length
    while offset < end:
        done = sock.recv_into(buffer[: end - offset])
        offset += os.pwrite(fd, buffer[:done], offset)
    sock.sendall(b"x")


def _plain_receive_whole(sock: socket.socket, fd: int, offset: int, length: int) -> None:
    """The same, in whole blocks."""
    buffer = memoryview(bytearray(BLOCK))
    end = offset + length
    while offset < end:
        at, wanted = 0, min(BLOCK, end - offset)
        while at < wanted:
            at += sock.recv_into(buffer[at:wanted])
        offset += os.pwrite(fd, buffer[:at], offset)
    sock.sendall(b"x")


PLAIN_RECEIVERS: Final = {
    "buffer": _plain_receive,
    "whole": _plain_receive_whole,
}


if __name__ == "__main__":
    main(sys.argv[1])
