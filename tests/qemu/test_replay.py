"""Traffic of real QEMUs, recorded in all kinds of trouble, through our client and our reader."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from migrd.core.facts import QemuStatus, RunState
from migrd.qemu.passthrough import States, with_device_state
from migrd.qemu.qmp import connect_qmp
from migrd.qemu.samples import read_blocked_reasons, read_sample
from migrd.qemu.wire import AnswerLost, CommandRefused, QmpEvent
from tests.qemu.replay import TRANSCRIPTS, all_answers, one_connection, recorded, replaying
from tests.qemu.test_qmp import until

NAMES = sorted(path.stem for path in TRANSCRIPTS.glob("*.jsonl"))


@pytest.mark.parametrize("name", NAMES)
async def test_every_answer_and_every_event_of_a_recording_arrives(
    name: str, short_tmp_path: Path
) -> None:
    lines = one_connection(recorded(name))
    answers = {x.message["id"]: x.message for x in lines if "id" in x.message and not x.is_question}
    events: list[QmpEvent] = []
    asked: list[tuple[dict[str, Any], asyncio.Task[Any]]] = []
    async with replaying(short_tmp_path / "qmp", lines):
        qmp = await connect_qmp(short_tmp_path / "qmp", events.append)
        try:
            for line in lines:  # commands were given before others had been answered: so here
                if line.is_question and line.command != "qmp_capabilities":
                    execute = qmp.execute_oob if "exec-oob" in line.message else qmp.execute
                    asking = execute(line.command, line.message.get("arguments"), deadline_s=10)
                    answer = answers.get(line.message["id"])
                    asked.append((answer or {}, asyncio.create_task(asking)))
            expected = [x.message["event"] for x in lines if "event" in x.message]
            answered = [call for answer, call in asked if answer]
            await asyncio.wait(answered, timeout=10)
            await until(lambda: len(events) == len(expected))
        finally:
            await qmp.end()
            await asyncio.wait([call for _, call in asked])
    assert [event.name for event in events] == expected
    for answer, call in asked:
        if "error" in answer:
            assert isinstance(call.exception(), CommandRefused)
        elif answer:
            assert call.result() == answer["return"]
        else:  # QEMU was gone, or busy, until the recording ended
            assert isinstance(call.exception(), AnswerLost)


@pytest.mark.parametrize("name", NAMES)
def test_no_answer_of_a_recording_reads_as_unknown_or_contradicts_itself(name: str) -> None:
    answers = all_answers(name, "query-migrate")
    samples = [read_sample(answer, {"status": "running"}, at_s=1.0) for answer in answers]
    assert samples
    for sample in samples:
        assert sample.qemu_status is not QemuStatus.UNKNOWN
        assert sample.run_state is RunState.RUNNING
        if sample.remaining_bytes is not None:
            assert sample.total_bytes is not None
            assert sample.remaining_bytes <= sample.total_bytes
        for seconds in (sample.downtime_s, sample.expected_downtime_s, sample.total_time_s):
            assert seconds is None or 0 <= seconds < 60
        if sample.qemu_status in {QemuStatus.FAILED, QemuStatus.CANCELLED}:
            assert sample.remaining_bytes is None
    counts = [s.qemu_dirty_sync_count for s in samples if s.qemu_dirty_sync_count is not None]
    if name != "cancel-midflight":  # the one with two migrations
        assert counts == sorted(counts)


def test_throttle_and_device_numbers_are_read() -> None:
    throttled = [
        read_sample(a, {}, at_s=0.0) for a in all_answers("auto-converge", "query-migrate")
    ]
    assert {30, 50, 70} <= {sample.throttle_percent for sample in throttled}
    with_device = [read_sample(a, {}, at_s=0.0) for a in all_answers("vfio-basic", "query-migrate")]
    assert max(sample.device_transferred_bytes or 0 for sample in with_device) > 1 << 20


def test_a_device_that_was_reset_is_read_and_only_the_error_tells_it_from_a_cancel() -> None:
    answers = all_answers("vfio-fail-stop-copy", "query-migrate")
    names = {"VFIO_FD42": "hostdev0"}
    samples = [read_sample(answer, {}, at_s=0.0, own_names=names) for answer in answers]
    assert {s.reset_devices for s in samples if s.qemu_status is QemuStatus.FAILED} == {
        ("hostdev0",)
    }
    assert not any(s.reset_devices for s in samples if s.qemu_status is not QemuStatus.FAILED)
    states: States = ()
    told = []
    for line in recorded("vfio-fail-stop-copy"):
        if line.message.get("event") == "VFIO_MIGRATION":
            states = with_device_state(states, line.message["data"])
            told.append(dict(states)["hostdev0"])
    assert told == [
        *("running-p2p", "running"),  # the guest was started
        *("pre-copy", "pre-copy-p2p", "running"),  # reset
        *("running-p2p", "running"),  # the guest runs on
    ]


def test_blocked_reasons_are_qemus_own_words() -> None:
    answers = all_answers("vfio-no-dma-logging", "query-migrate")
    reasons = {reason for answer in answers for reason in read_blocked_reasons(answer)}
    assert any("dirty tracking" in reason for reason in reasons)
