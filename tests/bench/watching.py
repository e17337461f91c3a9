"""One daemon that watches many VMs, beside a bare client that asks the same questions.

Both run at the same time against the same fake QEMUs, so that both meet the same machine. What
counts is processor time per question, from the kernel's books, in windows of a few seconds.
"""

import asyncio
import contextlib
import re
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import aiohttp

from migrd.demo import hosts
from migrd.demo.hosts import Host
from tests.bench.children import Child, ask, cpu_s, helper, rss_bytes
from tests.bench.figures import Figure, Judge, Table, median

VMS: Final = 200
INTERVAL_S: Final = 1.0
WINDOW_S: Final = 4.0
CONFIG: Final = """\
[host]
name = "bench"
state_dir = "{dir}/state"
runtime_dir = "{dir}/run"
profiles_dir = "{dir}/profiles"
adopt_dir = "{adopt}"
[migration]
tls = "off"
[watch]
interval_s = {interval_s}
[log]
level = "info"
format = "json"
"""
_LAG = re.compile(r'migrd_event_loop_lag_seconds_bucket\{le="([^"]+)"\} ([\d.e+]+)')


@contextlib.asynccontextmanager
async def watching_daemon(directory: Path, adopt: Path) -> AsyncIterator[Host]:
    host = Host("bench", directory / "daemon", 0)
    for part in ("state", "run", "profiles"):
        (host.directory / part).mkdir(parents=True)
    host.config.write_text(
        CONFIG.format(dir=host.directory, adopt=adopt, interval_s=INTERVAL_S), encoding="utf-8"
    )
    try:
        await hosts.start(host)
        yield host
    finally:
        await hosts.stop(host)


async def metrics(host: Host) -> str:
    """The newest exposition."""
    connector = aiohttp.UnixConnector(str(host.socket))
    async with (
        aiohttp.ClientSession(connector=connector) as session,
        session.get("http://m/metrics") as reply,
    ):
        return await reply.text()


def lag_buckets(text: str) -> dict[float, float]:
    """Upper bound (s) -> probes that were no later, from the first bucket on."""
    return {float(bound): float(count) for bound, count in _LAG.findall(text)}


def p99_bound_s(before: dict[float, float], after: dict[float, float]) -> float:
    """The bucket that holds the 99th percentile of what came between two expositions."""
    total = after[float("inf")] - before.get(float("inf"), 0)
    assert total > 0, "no probe of the event loop in between"
    for bound in sorted(after):
        if after[bound] - before.get(bound, 0) >= 0.99 * total:
            return bound
    raise AssertionError("the buckets do not add up")


async def run(runs: int, *, vms: int = VMS, window_s: float = WINDOW_S) -> Table:
    """`runs` windows."""
    with tempfile.TemporaryDirectory(prefix="migrd-", dir="/tmp") as work:
        directory = Path(work)
        with helper("monitors", work, str(vms)) as monitors:
            async with watching_daemon(directory, directory / "adopt") as host:
                await _all_adopted(host, vms)
                plain_dir = str(directory / "plain")
                with helper("plain_watch", plain_dir, str(vms), str(INTERVAL_S)) as plain:
                    return await _watch(host, monitors, plain, runs, vms, window_s)


async def _all_adopted(host: Host, vms: int) -> None:
    give_up_at_s = time.monotonic() + 60.0
    running = 0
    while time.monotonic() < give_up_at_s:
        async with host.client() as client:
            reply = await client.call("GET", "/v1/vms", query={"limit": "1000"})
        assert isinstance(reply.body, dict)
        items = reply.body["items"]
        assert isinstance(items, list)
        running = sum(isinstance(vm, dict) and vm["state"] == "running" for vm in items)
        if running == vms:
            return
        await asyncio.sleep(0.2)
    raise AssertionError(f"{running} of {vms} VMs were adopted")


async def _watch(
    host: Host,
    monitors: Child,
    plain: Child,
    runs: int,
    vms: int,
    window_s: float,
) -> Table:
    assert host.process is not None
    pids = (host.process.pid, plain.pid)
    await asyncio.sleep(2.0)  # both have settled
    await asyncio.to_thread(ask, plain)
    lag_before = lag_buckets(await metrics(host))
    cpu: list[tuple[float, float]] = []
    polls: list[tuple[int, int]] = []
    for _ in range(runs + 1):
        counted = await asyncio.to_thread(ask, monitors)
        ours, theirs = (int(word) for word in counted.split())
        polls.append((ours, theirs))
        cpu.append((cpu_s(pids[0]), cpu_s(pids[1])))
        await asyncio.sleep(window_s)
    each_us: list[list[float]] = [[], []]
    for n in range(runs):
        for side in (0, 1):
            done = polls[n + 1][side] - polls[n][side]
            each_us[side].append((cpu[n + 1][side] - cpu[n][side]) / done * 1e6)
    plain_lag_s = float(await asyncio.to_thread(ask, plain))
    await asyncio.sleep(11.0)  # the exposition is at most so old while nobody asks
    lag_s = p99_bound_s(lag_before, lag_buckets(await metrics(host)))
    rss_mib = rss_bytes(pids[0]) / (1 << 20)
    plain_mib = rss_bytes(pids[1]) / (1 << 20)
    who, bare = f"watching {vms} VMs at 1 Hz", "bare Protocol + orjson"
    poll = (median(each_us[0]), median(each_us[1]), bare)
    lag = (lag_s * 1000, plain_lag_s * 1000, bare)
    return Table.of(
        "watching",
        runs,
        [
            Figure(f"{who}: CPU per poll", "µs", *poll, Judge.RATIO, 2.0),
            Figure(f"{who}: memory", "MiB", rss_mib, plain_mib, bare, Judge.VALUE, 200),
            Figure(f"{who}: event-loop lag, p99 at most", "ms", *lag, Judge.VALUE, 20),
        ],
        [f"CPU per poll by window, µs: migrd {rounded(each_us[0])}, bare {rounded(each_us[1])}"],
    )


def rounded(values: list[float]) -> str:
    return " ".join(f"{value:.0f}" for value in values)
