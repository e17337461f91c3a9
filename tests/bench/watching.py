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
from dataclasses import dataclass
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
EXPOSITION_AGE_S: Final = 11.0
"""What /metrics shows is at most so old while nobody asks."""
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


async def run(
    runs: int, *, vms: int = VMS, window_s: float = WINDOW_S, with_lag: bool = True
) -> Table:
    """`runs` windows; without the lag it need not wait for an exposition of it."""
    with tempfile.TemporaryDirectory(prefix="migrd-", dir="/tmp") as work:
        directory = Path(work)
        with helper("monitors", work, str(vms)) as monitors:
            async with watching_daemon(directory, directory / "adopt") as host:
                await _all_adopted(host, vms)
                plain_dir = str(directory / "plain")
                with helper("plain_watch", plain_dir, str(vms), str(INTERVAL_S)) as plain:
                    watched = await _watch(host, monitors, plain, runs, window_s)
                    return await _report(watched, host, plain, vms, with_lag=with_lag)


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


@dataclass
class Watched:
    """What the windows came to; [0] is the daemon's, [1] the bare client's."""

    each_us: tuple[list[float], list[float]]
    lag_before: dict[float, float]
    """The daemon's probes of its event loop, before the windows."""


async def _watch(host: Host, monitors: Child, plain: Child, runs: int, window_s: float) -> Watched:
    assert host.process is not None
    pids = (host.process.pid, plain.pid)
    await asyncio.sleep(2.0)  # both have settled
    await asyncio.to_thread(ask, plain)
    watched = Watched(([], []), lag_buckets(await metrics(host)))
    before = await _spent(monitors, pids)
    for _ in range(runs):
        await asyncio.sleep(window_s)
        after = await _spent(monitors, pids)
        for side in (0, 1):
            polls, cpu_s_ = (after[part][side] - before[part][side] for part in (0, 1))
            watched.each_us[side].append(cpu_s_ / polls * 1e6)
        before = after
    return watched


async def _spent(
    monitors: Child, pids: tuple[int, int]
) -> tuple[tuple[float, float], tuple[float, float]]:
    """(questions so far, processor time so far), each of both."""
    ours, theirs = (await asyncio.to_thread(ask, monitors)).split()
    return (float(ours), float(theirs)), (cpu_s(pids[0]), cpu_s(pids[1]))


async def _report(watched: Watched, host: Host, plain: Child, vms: int, *, with_lag: bool) -> Table:
    assert host.process is not None
    ours_us, plain_us = watched.each_us
    who, bare = f"watching {vms} VMs at 1 Hz", "bare Protocol + orjson"
    poll = (median(ours_us), median(plain_us), bare)
    rss = (rss_bytes(host.process.pid) / (1 << 20), rss_bytes(plain.pid) / (1 << 20), bare)
    figures = [
        Figure(f"{who}: CPU per poll", "µs", *poll, Judge.RATIO, 2.0),
        Figure(f"{who}: memory", "MiB", *rss, Judge.VALUE, 200),
    ]
    if with_lag:
        plain_lag_ms = float(await asyncio.to_thread(ask, plain)) * 1000
        await asyncio.sleep(EXPOSITION_AGE_S)
        lag_ms = p99_bound_s(watched.lag_before, lag_buckets(await metrics(host))) * 1000
        lag = (lag_ms, plain_lag_ms, bare)
        figures.append(Figure(f"{who}: event-loop lag, p99 at most", "ms", *lag, Judge.VALUE, 20))
    each = f"CPU per poll by window, µs: migrd {rounded(ours_us)}, bare {rounded(plain_us)}"
    return Table.of("watching", len(ours_us), figures, [each])


def rounded(values: list[float]) -> str:
    return " ".join(f"{value:.0f}" for value in values)
