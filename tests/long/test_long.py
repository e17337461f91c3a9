"""The long run itself: a seed is one schedule, every failpoint is among them, and it sees what it
is there to see."""

from __future__ import annotations

from pathlib import Path

import pytest

from migrd import failpoints
from tests.long.__main__ import Result, Wanted
from tests.long.ground import Ground
from tests.long.schedule import EVERY, every_failpoint, from_seed

FOUND = [
    (
        "an incoming postcopy was taken up again at every restart, for good, when its guest had "
        "long gone on to another host: an alarm, and a slot that was never free again",
        "python -m tests.long --seed-from 1000056 --migrations 3",
        "tests/engine/test_postcopy_restarts.py",
    ),
    (
        "a destination with more guests on the way than slots could not answer a preflight",
        "python -m tests.long --seed-from 1000056 --migrations 3",
        "tests/engine/test_postcopy_restarts.py",
    ),
    (
        "a destination that was told twice at once that its guest was taken back journalled it "
        "twice, and never started again: the journal made no sense",
        "python -m tests.long --seed-from 1000066 --migrations 2",
        "tests/engine/test_taken_back.py",
    ),
    (
        "a guest lost in a migration could not be started again by a daemon that was restarted: "
        "its record named a process whose files were gone, and a start answered 200",
        "python -m tests.long --seed-from 181 --migrations 1",
        "tests/engine/test_starts_after_death.py",
    ),
]
"""What long runs have found in the product, the command that showed it, where it is tried now."""
OF_THE_ARBITER = ("source.assign.", "source.take_back.", "destination.mark_started.")
"""Acts that two hosts without an arbiter never come to."""


@pytest.mark.parametrize(("what", "command", "tried_in"), FOUND)
def test_what_was_found_is_tried_where_the_table_says(
    what: str, command: str, tried_in: str
) -> None:
    assert command.startswith("python -m tests.long"), what
    assert (Path(__file__).parents[2] / tried_in).is_file(), what


def test_a_seed_is_one_schedule() -> None:
    schedules = [from_seed(seed) for seed in range(300)]
    assert schedules == [from_seed(seed) for seed in range(300)]
    assert len(set(map(str, schedules))) > 290


def test_every_failpoint_is_killed_and_stopped_at_by_name() -> None:
    aimed_at = {(blows[-1].what, blows[-1].point) for _, blows in every_failpoint()}
    wanted = [point for point in failpoints.POINTS if not point.startswith(OF_THE_ARBITER)]
    assert aimed_at == {(what, point) for what in ("killed_at", "stopped_at") for point in wanted}
    assert from_seed(EVERY).blows == every_failpoint()[0][1]


def test_an_older_qemu_that_runs_after_a_younger_one_is_a_double_run() -> None:
    ground = Ground(Path("/nowhere"))
    ground.saw(1, "running", 0.0, 0.1)
    ground.saw(2, "paused", 0.2, 0.3)
    ground.saw(2, "running", 1.0, 1.1)
    ground.saw(1, "running", 0.9, 1.2)  # asked before the younger one was seen: proves nothing
    assert not ground.violations
    ground.saw(1, "running", 1.3, 1.4)
    assert ground.violations
    assert ground.runs == 2


def test_a_run_goes_on_until_there_are_enough_migrations_and_enough_restarts() -> None:
    wanted = Wanted(first=5, migrations=20, restarts=7, until_s=0.0)
    assert [one.seed for one in wanted.after(5, [])] == list(range(5, 20))
    assert [one.seed for one in wanted.after(20, [])] == list(range(20, 25))
    result = Result(1, "", "10", "", restarts=6)
    assert [one.seed for one in wanted.after(25, [result])] == list(range(25, 40))
    assert not wanted.after(40, [result, result])
