"""A monitor that stays: reconnecting, and never silent about what may have been missed."""

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import pytest

from migrd.qemu import monitor as monitor_module
from migrd.qemu.monitor import EventStream, Gap, GapKind, Monitor
from migrd.qemu.qmp import QmpConnection, connect_qmp
from migrd.qemu.wire import AnswerLost, NotSent, QmpEvent
from tests.fakes.qmp_server import FakeQmp, Fault
from tests.qemu.conftest import Served
from tests.qemu.test_qmp import until


def event(name: str) -> QmpEvent:
    return QmpEvent(name, {}, 0.0, None)


def drained(stream: EventStream) -> list[str]:
    """What is in the queue now: names of events, kinds of gaps with their count."""
    items = list(stream._queue)
    return [
        item.name if isinstance(item, QmpEvent) else f"{item.kind.value} {item.lost_events}"
        for item in items
    ]


async def test_commands_and_events_go_through(served: Served) -> None:
    async with Monitor(served.path) as monitor:
        await monitor.wait_connected(within_s=5)
        with monitor.subscribe() as stream:
            await served.qemu.emit("STOP")
            got = await stream.within(5)
        assert isinstance(got, QmpEvent)
        assert got.name == "STOP"
        assert (await monitor.execute("query-status"))["running"] is False
        assert monitor.state.connections == 1


async def test_without_a_connection_a_command_is_refused_at_once(run_dir: Path) -> None:
    async with Monitor(run_dir / "nobody") as monitor:
        with pytest.raises(NotSent, match="not sent"):
            await monitor.execute("query-status")
        with pytest.raises(NotSent, match="No such file"):
            await monitor.wait_connected(within_s=0.1)
        assert not monitor.is_connected


async def test_it_connects_as_soon_as_somebody_listens(run_dir: Path) -> None:
    async with Monitor(run_dir / "qmp") as monitor:
        with contextlib.suppress(NotSent):
            await monitor.wait_connected(within_s=0.05)
        async with FakeQmp().serving(run_dir / "qmp"):
            await monitor.wait_connected(within_s=5)
            assert await monitor.execute("query-status")


async def test_it_reconnects_and_tells_that_events_may_be_missing(served: Served) -> None:
    async with Monitor(served.path) as monitor:
        await monitor.wait_connected(within_s=5)
        with monitor.subscribe() as stream:
            before = monitor.state
            served.qemu.monitors[0].hang_up()
            gap = await stream.within(5)
            assert gap == Gap(GapKind.DISCONNECTED, None)
            assert not monitor.is_connected
            assert monitor.state.since_s >= before.since_s
            back = await stream.within(5)
            assert back == Gap(GapKind.RECONNECTED, None)
            await served.qemu.emit("RESUME")
            got = await stream.within(5)
        assert isinstance(got, QmpEvent)
        assert monitor.state.connections == 2
        assert await monitor.execute("query-status")


async def test_a_call_under_way_is_unknown_when_the_connection_breaks(served: Served) -> None:
    async with Monitor(served.path) as monitor:
        await monitor.wait_connected(within_s=5)
        served.qemu.block()
        call = asyncio.create_task(monitor.execute("echo"))
        await until(lambda: "echo" in served.qemu.received)
        served.qemu.monitors[0].hang_up()
        with pytest.raises(AnswerLost):
            await call
        served.qemu.unblock()


async def test_garbage_costs_one_connection_and_no_more(served: Served) -> None:
    async with Monitor(served.path) as monitor:
        await monitor.wait_connected(within_s=5)
        served.qemu.faults = [Fault.GARBAGE]
        with pytest.raises(AnswerLost):
            await monitor.execute("query-status")
        await until(lambda: monitor.state.connections == 2)
        assert await monitor.execute("query-status")


async def test_a_monitor_held_by_another_client_is_had_when_that_one_leaves(
    served: Served,
) -> None:
    async with Monitor(served.path) as first:
        await first.wait_connected(within_s=5)
        async with Monitor(served.path, greeting_deadline_s=0.05) as second:
            await until(lambda: "another client holds it" in second.state.reason)
            await first.close()
            await second.wait_connected(within_s=10)
            assert await second.execute("query-status")


async def test_a_bug_or_a_lack_of_descriptors_does_not_end_the_trying(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    troubles: list[Exception] = [RuntimeError("a bug"), OSError(24, "Too many open files")]
    connect = connect_qmp

    async def troubled(*arguments: Any, **options: Any) -> QmpConnection:
        if troubles:
            raise troubles.pop(0)
        return await connect(*arguments, **options)

    monkeypatch.setattr(monitor_module, "connect_qmp", troubled)
    async with Monitor(served.path) as monitor:
        await monitor.wait_connected(within_s=5)
        assert await monitor.execute("query-status")
    assert "a bug" in caplog.text


async def test_closing_ends_its_task_and_its_connection(served: Served) -> None:
    monitor = Monitor(served.path)
    monitor.start()
    await monitor.wait_connected(within_s=5)
    await monitor.close()
    assert not monitor.is_connected
    await monitor.close()  # again does no harm
    async with Monitor(served.path) as other:  # and the socket is free at once
        await other.wait_connected(within_s=5)


async def test_a_slow_subscriber_is_told_how_many_events_it_lost_and_where() -> None:
    stream = EventStream(None, bound=3)
    for name in ("a", "b", "c", "d", "e"):
        stream.put(event(name))
    assert drained(stream) == ["a", "b", "c", "overflow 2"]
    await stream.get()
    await stream.get()
    stream.put(event("f"))
    assert drained(stream) == ["c", "overflow 2", "f"]


def test_a_subscriber_that_never_reads_costs_a_bounded_queue() -> None:
    stream = EventStream(None, bound=3)
    for n in range(10_000):
        stream.put(event(str(n)))
        if n % 100 == 0:
            stream.put_gap(Gap(GapKind.DISCONNECTED, None))
            stream.put_gap(Gap(GapKind.RECONNECTED, None))
    assert len(drained(stream)) <= 4
    assert drained(stream)[-1] == "reconnected None"


def test_one_slow_subscriber_does_not_cost_another_anything() -> None:
    monitor = Monitor(Path("/nowhere"))
    with monitor.subscribe(bound=2) as slow, monitor.subscribe({"x7"}, bound=2) as picky:
        for n in range(10):
            monitor._deliver(event(f"x{n}"))
        assert drained(slow) == ["x0", "x1", "overflow 8"]
        assert drained(picky) == ["x7"]
    monitor._deliver(event("after"))
    assert "after" not in drained(slow)


async def test_nothing_new_within_the_time_is_none(served: Served) -> None:
    async with Monitor(served.path) as monitor:
        with monitor.subscribe() as stream:
            assert await stream.within(0.02) is None
