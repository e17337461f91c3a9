"""How fast the direct engine moves memory, beside the fastest plain sender we could write.

Source and destination are processes of their own (`stream_ends`), as two daemons are; the memory
goes over loopback from one file in memory into a new one. The plain pair does nothing else: share
of the file per connection, sendfile(2) (large writes out of a mapping with TLS), two ways of
receiving, of which the faster one counts. Both run in turn, and the medians are compared. The
destination's memory is new each time, so making its pages is part of both.
"""

import asyncio
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import trustme

from tests.bench.children import Child, ask, helper
from tests.bench.figures import Figure, Judge, Table, median

MIB: Final = 1 << 20
CHANNELS: Final = 2
MOST_TIME: Final = 1.43
"""Of the plain pair's: a throughput of at least 0.7 of its."""
PEAK_MORE_MIB: Final = 16.0
"""What a guest of sixteen times the size may cost each daemon more."""
RECEIVING: Final = ("buffer", "whole")
_BASE: Final[Mapping[str, Any]] = {
    "channels": CHANNELS,
    "tls": "",
    "plain": "",
    "stable": False,
    "every": 1,
    "reserve": False,
    "data_share": 1.0,
}


@dataclass
class Pair:
    """A source and a destination; each run's answers by name."""

    source: Child
    destination: Child
    took_s: dict[str, list[float]] = field(default_factory=dict)
    cpu_s: dict[str, list[float]] = field(default_factory=dict)
    peaks_mib: dict[str, tuple[float, float]] = field(default_factory=dict)
    wire_mib: dict[str, float] = field(default_factory=dict)

    def run(self, name: str, size_mib: int, **changed: Any) -> None:
        """One transfer. Blocking."""
        order = {**_BASE, "bytes": size_mib * MIB, **changed}
        listening = json.loads(ask(self.destination, json.dumps(order)))
        sent = json.loads(ask(self.source, json.dumps(order | {"port": listening["port"]})))
        assert self.destination.stdout is not None
        received = json.loads(self.destination.stdout.readline())
        self.took_s.setdefault(name, []).append(sent["took_s"])
        self.cpu_s.setdefault(name, []).append(sent["cpu_s"] + received["cpu_s"])
        before = self.peaks_mib.get(name, (0.0, 0.0))
        self.peaks_mib[name] = (
            max(before[0], sent["peak_bytes"] / MIB),
            max(before[1], received["peak_bytes"] / MIB),
        )
        self.wire_mib[name] = sent["wire_bytes"] / MIB

    def median_ms(self, name: str) -> float:
        return median(self.took_s[name]) * 1e3


async def run(runs: int, *, size_mib: int = 1024, largest_mib: int = 4096) -> Table:
    """`largest_mib`: of the guest whose cost in memory is compared with one of a sixteenth."""
    return await asyncio.to_thread(_run, runs, size_mib, largest_mib)


def _run(runs: int, size_mib: int, largest_mib: int) -> Table:
    with (
        tempfile.TemporaryDirectory() as directory,
        helper("stream_ends", "source") as source,
        helper("stream_ends", "destination") as destination,
    ):
        pair = Pair(source, destination)
        tls = certificates(Path(directory))
        for _ in range(runs):
            _one_of_each(pair, size_mib, tls)
        pair.run("sparse", size_mib, data_share=0.01)
        pair.run("every fourth page", size_mib, every=4)
        for size in (largest_mib // 16, largest_mib):
            pair.run(f"{size} MiB", size)
    figures = [
        _speed(pair, "memory over loopback", "ours", "plain", size_mib),
        _speed(pair, "memory over loopback with TLS", "ours, TLS", "plain, TLS", size_mib),
        *_peaks(pair, largest_mib),
    ]
    return Table.of("direct", runs, figures, [_note(pair, size_mib)])


def _one_of_each(pair: Pair, size_mib: int, tls: str) -> None:
    pair.run("ours", size_mib)
    pair.run("ours, TLS", size_mib, tls=tls)
    for receiving in RECEIVING:
        pair.run(f"plain, {receiving}", size_mib, plain=receiving)
        pair.run(f"plain, TLS, {receiving}", size_mib, plain=receiving, tls=tls)


def certificates(directory: Path) -> str:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(directory / "ca-cert.pem")
    issued = authority.issue_cert("host-b")
    for role in ("server", "client"):
        issued.cert_chain_pems[0].write_to_path(directory / f"{role}-cert.pem")
        issued.private_key_pem.write_to_path(directory / f"{role}-key.pem")
    return str(directory)


def _speed(pair: Pair, what: str, ours: str, plain: str, size_mib: int) -> Figure:
    fastest = min((f"{plain}, {one}" for one in RECEIVING), key=pair.median_ms)
    return Figure(
        f"{what}: {size_mib} MiB of random data on {CHANNELS} connections",
        "ms",
        pair.median_ms(ours),
        pair.median_ms(fastest),
        "the fastest plain pair",
        Judge.RATIO,
        MOST_TIME,
    )


def _peaks(pair: Pair, largest_mib: int) -> list[Figure]:
    small, large = pair.peaks_mib[f"{largest_mib // 16} MiB"], pair.peaks_mib[f"{largest_mib} MiB"]
    return [
        Figure(
            f"peak memory of the {end}, guest of {largest_mib} MiB",
            "MiB",
            large[at],
            small[at],
            f"guest of {largest_mib // 16} MiB",
            Judge.MORE,
            PEAK_MORE_MIB,
        )
        for at, end in enumerate(("source", "destination"))
    ]


def _note(pair: Pair, size_mib: int) -> str:
    def gb_per_s(name: str) -> float:
        return size_mib * MIB / pair.median_ms(name) / 1e6

    speeds = ", ".join(f"{name} {gb_per_s(name):.2f}" for name in pair.took_s if "MiB" not in name)
    ours, plain = (median(pair.cpu_s[name]) for name in ("ours", "plain, buffer"))
    return (
        f"direct: GB/s of guest memory: {speeds}. Processor time of both ends: ours {ours:.2f} s,"
        f" plain {plain:.2f} s. On the wire: {pair.wire_mib['ours']:.1f} MiB of {size_mib} MiB"
        f" random data, {pair.wire_mib['sparse']:.1f} MiB where 1 % is not zero"
    )
