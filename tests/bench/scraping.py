"""What a scrape of many series costs the daemon, beside the cheapest answer it has (/healthz).

Requests go over one kept connection, in turns of the two paths, as Prometheus asks (it accepts
gzip). What counts is the processor time of the server's process per request.
"""

import asyncio
import socket
import tempfile
from pathlib import Path
from typing import Final

from tests.bench.children import Child, ask, cpu_s, helper
from tests.bench.figures import Figure, Judge, Table, median

SERIES: Final = 10_000
REQUESTS: Final = 60
ACCEPTS: Final = "Accept-Encoding: gzip\r\n"  # Prometheus sends it always


def requests(connection: socket.socket, path: str, count: int, accepts: str = ACCEPTS) -> int:
    """Ask so often, one after the other; bytes of the last body. Blocking."""
    asked = f"GET {path} HTTP/1.1\r\nHost: m\r\n{accepts}\r\n".encode()
    length = 0
    for _ in range(count):
        connection.sendall(asked)
        received = b""
        while b"\r\n\r\n" not in received:
            chunk = connection.recv(1 << 20)
            assert chunk, "the server hung up"
            received += chunk
        head, _, body = received.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200"), head
        lines = head.lower().split(b"\r\n")
        length = next(int(x[15:]) for x in lines if x.startswith(b"content-length:"))
        left = length - len(body)
        while left > 0:
            left -= len(connection.recv(1 << 20))
    return length


def _rounds(child: Child, path: Path, runs: int) -> tuple[list[float], list[float], int]:
    """Processor time per request, µs: of /metrics, of /healthz; and the size of a scrape."""
    each_us: tuple[list[float], list[float]] = ([], [])
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        size = requests(connection, "/metrics", REQUESTS)  # warm
        requests(connection, "/healthz", REQUESTS)
        for _ in range(runs):
            for side, where in enumerate(("/metrics", "/healthz")):
                before_s = cpu_s(child.pid)
                requests(connection, where, REQUESTS)
                each_us[side].append((cpu_s(child.pid) - before_s) / REQUESTS * 1e6)
    return *each_us, size


async def run(runs: int, *, series: int = SERIES) -> Table:
    with tempfile.TemporaryDirectory(prefix="migrd-", dir="/tmp") as work:
        path = Path(work) / "api.sock"
        with helper("scrape_server", str(path), str(series)) as child:
            scrape, health, size = await asyncio.to_thread(_rounds, child, path, runs)
            whole = (await asyncio.to_thread(ask, child)).split()[1]
    each = (median(scrape), median(health), "/healthz")
    figure = Figure(f"a scrape of {series} series: CPU", "µs", *each, Judge.RATIO, 2.0)
    note = f"a scrape sends {size} bytes of an exposition of {whole}"
    return Table.of("scraping", runs, [figure], [note])
