"""A scrape takes what is ready; what is ready is never far behind."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import pytest

from migrd.engine.service import VmView
from migrd.metrics import Exposition, LoopLagProbe, Metrics
from migrd.metrics.render import Renderer
from tests.metrics.views import Host, migration_view, vm_facts, vm_view


@asynccontextmanager
async def running(exposition: Exposition) -> AsyncIterator[None]:
    task = asyncio.create_task(exposition.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
        if not task.cancelled():
            task.result()


async def until(is_so: Callable[[], bool], within_s: float = 5.0) -> None:
    """Wait until it is so."""
    async with asyncio.timeout(within_s):
        while not is_so():  # noqa: ASYNC110 - what is waited for knows no event
            await asyncio.sleep(0.005)


async def test_a_scrape_gets_the_snapshot_itself_and_its_etag_follows_the_content() -> None:
    host = Host(known=[vm_view("web")])
    exposition = Exposition(Metrics(), host)
    first = await exposition.refresh()
    assert exposition.serve() is first
    assert exposition.serve().body is first.body
    host.known = []
    second = await exposition.refresh()
    assert second.etag != first.etag
    assert second.etag.startswith('"')


async def test_changes_in_a_row_are_rendered_once_per_interval() -> None:
    metrics, host = Metrics(), Host()
    exposition = Exposition(metrics, host, min_interval_s=0.1, idle_interval_s=60)
    async with running(exposition):
        await until(lambda: exposition.renderings == 1)
        exposition.serve()
        begun = time.monotonic()
        while time.monotonic() - begun < 0.5:
            metrics.blackout(0.1)
            host.version += 1
            await asyncio.sleep(0.002)
    assert 2 <= exposition.renderings <= 7


async def test_a_change_is_seen_soon_while_somebody_scrapes() -> None:
    host = Host()
    exposition = Exposition(Metrics(), host, min_interval_s=0.02, idle_interval_s=60)
    async with running(exposition):
        exposition.serve()
        await until(lambda: exposition.renderings == 1)
        host.known, host.version = [vm_view("new")], 2
        await until(lambda: b'vm="new"' in exposition.serve().body)


async def test_without_a_scrape_or_a_change_nothing_is_rendered_before_the_idle_interval() -> None:
    metrics, host = Metrics(), Host()
    exposition = Exposition(metrics, host, min_interval_s=0.02, idle_interval_s=60)
    async with running(exposition):
        await until(lambda: exposition.renderings == 1)
        metrics.blackout(0.1)  # a change, but nobody looks
        await asyncio.sleep(0.15)
        assert exposition.renderings == 1
        exposition.serve()
        await until(lambda: exposition.renderings == 2)
        for _ in range(20):  # somebody looks, and nothing changed but what always does
            metrics.loop_lag(0.001)
            await asyncio.sleep(0.005)
        assert exposition.renderings == 2


async def test_the_idle_interval_renews_what_changes_all_the_time() -> None:
    exposition = Exposition(Metrics(), Host(), min_interval_s=0.02, idle_interval_s=0.05)
    async with running(exposition):
        await until(lambda: exposition.renderings >= 3)


async def test_a_scrape_during_a_rendering_gets_the_last_snapshot_without_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exposition = Exposition(Metrics(), Host())
    before = await exposition.refresh()
    may_end, threads = threading.Event(), []
    render = Renderer.render

    def slow(self: Renderer, families: object) -> bytes:
        threads.append(threading.current_thread())
        assert may_end.wait(10)
        return render(self, families)  # type: ignore[arg-type]  # passed on as it came

    monkeypatch.setattr(Renderer, "render", slow)
    refreshing = asyncio.create_task(exposition.refresh())
    await until(lambda: bool(threads))
    assert exposition.serve() is before
    may_end.set()
    assert await refreshing is exposition.serve()
    assert threads[0] is not threading.main_thread()


class Stuck(Host):
    """The engine in trouble: its views raise."""

    def vms(self) -> tuple[int, Sequence[VmView]]:
        raise RuntimeError("planted")


async def test_a_fault_in_the_views_ends_the_task_and_is_not_served_as_old_figures() -> None:
    with pytest.raises(RuntimeError, match="planted"):
        await asyncio.wait_for(Exposition(Metrics(), Stuck()).run(), 5)


async def test_ten_thousand_series_do_not_stall_the_event_loop() -> None:
    host = Host(
        known=[vm_view(f"vm-{n}", vm_facts(f"vm-{n}")) for n in range(1500)],
        moving=[migration_view(f"vm-{n}") for n in range(1500)],
    )
    metrics = Metrics()
    for n in range(1500):
        metrics.transferred(f"vm-{n}", "ram", 1)
    exposition = Exposition(metrics, host)
    assert (await exposition.refresh()).body.count(b"\n") > 10_000
    lags: list[float] = []
    async with asyncio.TaskGroup() as group:
        probe = group.create_task(LoopLagProbe(lags.append, interval_s=0.002).run())
        for _ in range(5):
            await exposition.refresh()
        probe.cancel()
    lags.sort()
    assert len(lags) > 10
    # the machine is shared: the median is what rendering does, not the worst
    assert lags[len(lags) // 2] < 0.01, lags[-5:]


async def test_the_probe_sees_a_loop_that_was_blocked() -> None:
    lags: list[float] = []
    probe = LoopLagProbe(lags.append, interval_s=0.01)
    task = asyncio.create_task(probe.run())
    await until(lambda: bool(lags))
    probe.take_worst_s()
    seen = len(lags)
    time.sleep(0.1)  # noqa: ASYNC251 - the fault, planted
    await until(lambda: len(lags) > seen)
    assert max(lags[seen:]) >= 0.05
    assert probe.take_worst_s() >= 0.05
    assert probe.take_worst_s() < 0.05
    task.cancel()
    await asyncio.wait([task])
