"""The inventory of a host with 4,096 PCI functions: a full scan, one uevent, and the event loop.

full    everything read and put together, on the clock and in processor time; beside it the same
        reads with nothing around them, which no inventory can do without
uevent  from the message to the new snapshot, when one VF has lost or got its driver
probe   an answer about one VF put into the snapshot, with all devices that learn from it: this is
        done on the event loop
lag     how late the event loop is while full scans run one after the other; beside it a thread that
        does the same reads, and nothing else

The tree is a generated one, in memory as the real sysfs is.
"""

import asyncio
import gc
import os
import tempfile
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from migrd.core.devices import Capability
from migrd.kernel.inventory import HostInventory
from tests.bench.figures import Figure, Judge, Table, median, percentile
from tests.fakes.sysfs import FakeHost, bdf, large_host
from tests.fakes.uevents import FakeKernelMessages

FUNCTIONS: Final = 4096
IOMMUS: Final = 8
VF: Final = bdf(123)
IN_MEMORY: Final = "/dev/shm"
LAG_SCANS: Final = 3
_PROBE_S: Final = 0.002


async def run(runs: int, functions: int = FUNCTIONS) -> Table:
    with large_tree(functions) as host:
        full_ms, full_cpu_ms, bare_cpu_ms = await full(host, runs)
        uevent_ms = await uevents(host, runs)
        probe_ms = await probes(host, runs)
        bare_lag_ms, lag_ms = await lags(host)
    named = f"inventory of {functions} PCI functions"
    return Table.of(
        "inventory",
        runs,
        [
            Figure(named, "ms", median(full_ms), None, "", Judge.VALUE, 1000.0),
            Figure(
                f"{named}: CPU",
                *("ms", median(full_cpu_ms), median(bare_cpu_ms), "its reads alone"),
                *(Judge.RATIO, 4.0),
            ),
            Figure(
                "a uevent: its device read again",
                *("ms", median(uevent_ms), median(full_ms), "a full scan", Judge.VALUE, 10.0),
            ),
            Figure(
                f"an answer that {functions // IOMMUS} devices learn from: CPU on the event loop",
                *("ms", median(probe_ms), None, "", Judge.VALUE, 10.0),
            ),
            Figure(
                "event-loop lag during full scans, p99",
                *("ms", percentile(lag_ms, 0.99), percentile(bare_lag_ms, 0.99)),
                *("a thread that only reads", Judge.MORE, 20.0),
            ),
        ],
        [f"event-loop lag during full scans, worst of {len(lag_ms)}: {max(lag_ms):.1f} ms"],
    )


@contextmanager
def large_tree(functions: int) -> Iterator[FakeHost]:
    with tempfile.TemporaryDirectory(prefix="migrd-", dir=IN_MEMORY) as work:
        yield large_host(Path(work), functions, IOMMUS)


async def full(host: FakeHost, runs: int) -> tuple[list[float], list[float], list[float]]:
    """Clock and processor time of a scan, and processor time of its reads alone, in ms."""
    clock_ms, cpu_ms, bare_ms = [], [], []
    inventory = HostInventory(host.roots)
    addresses = os.listdir(host.sys / "bus" / "pci" / "devices")
    for turn in range(runs + 1):
        gc.collect()
        began_s, began_cpu_s = time.perf_counter(), time.process_time()
        await inventory.rescan()
        clock_s, cpu_s = time.perf_counter() - began_s, time.process_time() - began_cpu_s
        began_cpu_s = time.process_time()
        bare_reads(host, addresses)
        bare_s = time.process_time() - began_cpu_s
        if turn:
            clock_ms.append(clock_s * 1000)
            cpu_ms.append(cpu_s * 1000)
            bare_ms.append(bare_s * 1000)
    return clock_ms, cpu_ms, bare_ms


def bare_reads(host: FakeHost, addresses: list[str]) -> None:
    """The files and links that say what the inventory says, read and thrown away."""
    bus = os.open(host.sys / "bus" / "pci" / "devices", os.O_RDONLY | os.O_DIRECTORY)
    for address in addresses:
        device = os.open(address, os.O_RDONLY | os.O_DIRECTORY, dir_fd=bus)
        for name in ("modalias", "numa_node", "reset_method"):
            file = os.open(name, os.O_RDONLY, dir_fd=device)
            os.read(file, 4097)
            os.close(file)
        for name in ("driver", "iommu", "iommu_group"):
            os.readlink(name, dir_fd=device)
        if os.access("vfio-dev", os.F_OK, dir_fd=device):
            registered = os.open("vfio-dev", os.O_RDONLY | os.O_DIRECTORY, dir_fd=device)
            os.listdir(registered)
            os.close(registered)
        os.close(device)
    os.close(bus)


async def uevents(host: FakeHost, runs: int) -> list[float]:
    """From a message to the snapshot that shows it, in ms."""
    messages, shown = FakeKernelMessages(), asyncio.Event()
    inventory = HostInventory(host.roots, listen=messages.listen, rescan_every_s=3600)
    watching = asyncio.create_task(inventory.watch(lambda _: shown.set()))
    each_ms = []
    try:
        await shown.wait()
        for turn in range(2 * runs):
            is_bound = inventory.current.devices[VF].driver is not None
            if is_bound:
                host.unbind(VF)
            else:
                host.bind(VF, "mlx5_vfio_pci")
            gc.collect()
            await asyncio.sleep(0.05)
            shown.clear()
            began_s = time.perf_counter()
            messages.send("unbind" if is_bound else "bind", VF)
            await shown.wait()
            each_ms.append((time.perf_counter() - began_s) * 1000)
            assert (inventory.current.devices[VF].driver is None) is is_bound, turn
    finally:
        watching.cancel()
        await asyncio.wait([watching])
    return each_ms


async def probes(host: FakeHost, runs: int) -> list[float]:
    """Processor time, on the loop, of an answer that is news to all below an IOMMU, in ms."""
    each_ms = []
    inventory = HostInventory(host.roots)
    device = (await inventory.rescan()).devices[VF]
    for turn in range(runs):
        answer = Capability.probed(False, f"as asked for the {turn}. time")
        began_s = time.process_time()
        inventory.note_probed(replace(device, iommu_dirty_tracking=answer))
        each_ms.append((time.process_time() - began_s) * 1000)
    return each_ms


async def lags(host: FakeHost) -> tuple[list[float], list[float]]:
    """How late the event loop wakes, in ms: while a thread only reads, and during full scans."""
    inventory = HostInventory(host.roots)
    await inventory.rescan()
    addresses = list(inventory.current.devices)

    async def bare() -> None:
        for _ in range(LAG_SCANS):
            await asyncio.to_thread(bare_reads, host, addresses)

    async def scans() -> None:
        for _ in range(LAG_SCANS):
            await inventory.rescan()

    return await _lag_during(bare()), await _lag_during(scans())


async def _lag_during(work: Coroutine[Any, Any, None]) -> list[float]:
    running = asyncio.create_task(work)
    late_ms = []
    while not running.done():
        began_s = time.perf_counter()
        await asyncio.sleep(_PROBE_S)
        late_ms.append((time.perf_counter() - began_s - _PROBE_S) * 1000)
    await running
    return late_ms
