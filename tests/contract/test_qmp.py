"""QMP's own rules, on the fake and on real QEMUs; the same answers as QEMU's own client gets."""

import asyncio
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from qemu.qmp import ExecuteError, QMPClient

from migrd.qemu.qmp import QmpConnection, connect_qmp
from migrd.qemu.wire import CommandRefused, MonitorBusy, QmpEvent
from tests.contract.conftest import REAL
from tests.fakes.qmp_vm import FakeNetwork, FakeVm
from tests.qemu.real import running_qemu


@dataclass(frozen=True)
class Monitors:
    """Two free monitors of one QEMU, simulated or real, that has not started its guest."""

    first: Path
    second: Path


@pytest.fixture(
    params=[
        "fake 10.0",
        pytest.param("real 7.2", marks=pytest.mark.real),
        pytest.param("real 10.0", marks=pytest.mark.real),
    ]
)
async def monitors(request: pytest.FixtureRequest, short_tmp_path: Path) -> AsyncIterator[Monitors]:
    kind, version = request.param.split()
    if kind == "fake":
        paths = Monitors(short_tmp_path / "qmp", short_tmp_path / "oob")
        async with FakeVm(FakeNetwork(), version=version).serving(paths.first, paths.second):
            yield paths
    else:
        binary = request.getfixturevalue("qemu_binaries")[REAL[version]]
        async with running_qemu(binary, short_tmp_path) as qemu:
            await qemu.machine.close()  # leaves both monitors to the test
            yield Monitors(qemu.directory / "qmp", qemu.directory / "oob")


def ignore(event: QmpEvent) -> None:
    del event


async def connected(path: Path, seen: list[QmpEvent] | None = None) -> QmpConnection:
    on_event = ignore if seen is None else seen.append
    return await connect_qmp(path, on_event, deadline_s=10)


QUESTIONS = (
    "query-status",
    "query-migrate",
    "query-migrate-parameters",
    "query-migrate-capabilities",
    "query-memory-size-summary",
    "query-qmp-schema",
)


async def test_our_client_and_qemus_own_get_the_same_answers(monitors: Monitors) -> None:
    oracle = QMPClient("oracle")
    await oracle.connect(str(monitors.second))
    ours = await connected(monitors.first)
    try:
        for question in QUESTIONS:
            assert await ours.execute(question, deadline_s=10) == await oracle.execute(question)
        for command in ("no-such-command", "migrate-incoming"):
            arguments = {"uri": "tcp:127.0.0.1:0"} if command == "migrate-incoming" else None
            with pytest.raises(CommandRefused) as refused:
                await ours.execute(command, arguments)
            with pytest.raises(ExecuteError) as told:
                await oracle.execute(command, arguments)
            assert refused.value.description == told.value.error.error.desc
            assert refused.value.error_class == told.value.error.error.class_
    finally:
        await ours.end()
        await oracle.disconnect()


async def test_both_monitors_get_each_event(monitors: Monitors) -> None:
    seen: tuple[list[QmpEvent], list[QmpEvent]] = ([], [])
    first = await connected(monitors.first, seen[0])
    second = await connected(monitors.second, seen[1])
    try:
        await first.execute("cont")
        await first.execute("stop")
        await second.execute("query-status")  # what was told before has arrived by now
    finally:
        await first.end()
        await second.end()
    for events in seen:
        assert [event.name for event in events] == ["RESUME", "STOP"]
        assert all(event.sent_s is not None for event in events)


async def test_a_monitor_serves_one_client_and_then_the_next(monitors: Monitors) -> None:
    first = await connected(monitors.first)
    with pytest.raises(MonitorBusy):
        await connect_qmp(monitors.first, ignore, deadline_s=0.2)
    await first.end()
    next_one = await connected(monitors.first)
    assert (await next_one.execute("query-status"))["status"] == "prelaunch"
    await next_one.end()


async def test_capabilities_are_negotiated_on_each_connection_anew(monitors: Monitors) -> None:
    plain = await connect_qmp(monitors.first, ignore, deadline_s=10, want_oob=False)
    assert not plain.has_oob
    await plain.end()
    rich = await connected(monitors.first)
    try:
        assert rich.has_oob
        with pytest.raises(CommandRefused, match="already complete"):
            await rich.execute("qmp_capabilities")
        with pytest.raises(CommandRefused, match="does not support OOB"):
            await rich.execute_oob("query-status")
        with pytest.raises(CommandRefused, match="not found") as refused:
            await rich.execute_oob("yank", {"instances": [{"type": "migration"}]})
        assert refused.value.error_class == "DeviceNotFound"
    finally:
        await rich.end()


async def test_a_descriptor_is_taken_while_others_speak(monitors: Monitors) -> None:
    qmp = await connected(monitors.first)
    reader, writer = os.pipe()
    try:
        with pytest.raises(CommandRefused, match="SCM_RIGHTS"):
            await qmp.execute("getfd", {"fdname": "nothing"})
        for n in range(20):
            chatter = [asyncio.create_task(qmp.execute("query-status")) for _ in range(5)]
            await qmp.send_fd(f"fd{n}", writer)
            await asyncio.gather(*chatter)
    finally:
        os.close(reader)
        os.close(writer)
        await qmp.end()


async def test_forty_commands_at_once_are_all_answered(monitors: Monitors) -> None:
    qmp = await connected(monitors.first)
    try:
        answers = await asyncio.gather(
            *(qmp.execute("query-status", deadline_s=10) for _ in range(40))
        )
        assert len(answers) == 40
        assert qmp.unanswered == 0
    finally:
        await qmp.end()
