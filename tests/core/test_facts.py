"""What comes from outside may be new: it becomes UNKNOWN, never an error."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migrd.core.facts import QemuStatus, RunState, TransferSample

PROPERTY = settings(max_examples=60, deadline=None)


@PROPERTY
@given(st.text() | st.none() | st.integers())
def test_any_word_of_qemus_has_its_meaning_or_is_unknown(word: object) -> None:
    assert QemuStatus.of(word) in QemuStatus
    assert RunState.of(word) in RunState


@pytest.mark.parametrize("status", QemuStatus)
def test_each_known_word_is_itself(status: QemuStatus) -> None:
    assert QemuStatus.of(status.value) is status


@pytest.mark.parametrize(
    ("run_state", "is_of_arrival"),
    [
        (RunState.RUNNING, True),
        (RunState.PAUSED, True),
        (RunState.POSTMIGRATE, False),
        (RunState.FINISH_MIGRATE, False),
        (RunState.UNKNOWN, False),
    ],
)
def test_a_completed_of_arrival_is_told_from_one_of_leaving(
    run_state: RunState, is_of_arrival: bool
) -> None:
    sample = TransferSample(0.0, QemuStatus.COMPLETED, run_state)
    assert sample.is_of_arrival is is_of_arrival
