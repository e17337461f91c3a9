"""What counts as the link moving: bytes, or less that is left."""

from __future__ import annotations

import pytest

from migrd.core.facts import QemuStatus, RunState, TransferSample
from migrd.engine.precopy import _is_nearer


def sample(remaining_bytes: int | None) -> TransferSample:
    return TransferSample(
        1.0, QemuStatus.ACTIVE, RunState.RUNNING, remaining_bytes=remaining_bytes, total_bytes=4096
    )


@pytest.mark.parametrize(
    ("was", "is_", "nearer"),
    [
        (8192, 4096, True),
        (4096, 4096, False),
        (4096, 8192, False),
        (None, 1, False),
        (1, None, False),
    ],
)
def test_skipped_zero_pages_are_progress_and_new_dirt_is_not(
    was: int | None, is_: int | None, nearer: bool
) -> None:
    assert _is_nearer(sample(was), sample(is_)) is nearer
