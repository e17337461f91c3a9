"""The handover's benchmark accounts for all of the time; what it comes to is judged by itself."""

import pytest

from tests.bench import handover
from tests.bench.handover import COMPLETE, SUCCEEDED, Moments, steps_of


async def test_every_step_of_a_handover_is_timed_with_and_without_an_arbiter() -> None:
    table = await handover.run(1, moves_a_run=2)
    assert len(table.figures) == 8
    assert all(figure.ours > 0 for figure in table.figures)
    alone, third, ground = table.notes
    assert alone.startswith("2 handovers, two journals")
    assert "arbiter: started" in third
    assert "arbiter: started" not in alone
    for text in (alone, third):
        for what in ("journal: granted", "GRANT travels", "journal: running", "the answer travels"):
            assert what in text
    assert "fsync" in ground


def test_the_steps_sum_to_the_total() -> None:
    moments = Moments()
    moments.renew(COMPLETE)
    for name, _ in handover.STEPS:
        if "arbiter" not in name and "assign" not in name:
            moments.reached(name)
    steps = steps_of(moments.at_s)
    total_s = moments.at_s[SUCCEEDED] - moments.at_s[COMPLETE]
    assert sum(took_s for _, took_s in steps) == pytest.approx(total_s)
    assert all(took_s >= 0 for _, took_s in steps), "each step follows the one before it"
