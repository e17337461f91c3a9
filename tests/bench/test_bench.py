"""The cheap benchmarks run with the tests: few runs, and a fifth of slack on each bound.

Only processor time is judged here, which other work on the machine hardly changes; the clock's
figures are judged by `python -m tests.bench` alone, but for the event loop's beat. Moving guests is
only tried: that both drivers move theirs, that no heartbeat is lost, and that the record accounts
for all of the time.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench import (
    arbiter,
    bitmap,
    harvest,
    harvest_correctness,
    loop_lag,
    moving,
    scraping,
    watching,
)
from tests.bench.figures import Figure, Judge, Table
from tests.bench.guest import Guest

SLACK = 0.2
SMALL = Guest(memory_mib=32, working_set_bytes=4 << 20, dirty_bytes_per_s=1_000_000)


def assert_holds(table: Table, slack: float = SLACK) -> None:
    assert table.figures
    missed = table.missed(slack)
    assert not missed, "\n" + Table(missed, table.notes).text()


async def test_watching_two_hundred_vms_costs_little_more_than_asking() -> None:
    assert_holds(await watching.run(3, window_s=2.0, with_lag=False))


async def test_the_arbiters_calls_are_measured_beside_bare_requests() -> None:
    table = await arbiter.run(1, calls_a_run=5)
    assert len(table.figures) == 8
    assert any("quantiles" in note for note in table.notes)


async def test_a_scrape_of_ten_thousand_series_costs_little_more_than_healthz() -> None:
    assert_holds(await scraping.run(5))


async def test_bitmaps_are_gone_over_at_memorys_speed() -> None:
    assert_holds(await bitmap.run(3, sizes_mib=(64,)))


async def test_the_event_loop_keeps_its_beat_while_bitmaps_are_gone_over() -> None:
    # Late by the clock, so with more room; where the GIL is held it is late by 90 ms.
    assert_holds(await loop_lag.run(5, bitmap_mib=256), slack=1.0)


async def test_a_harvest_of_process_memory_costs_little_more_than_its_ioctls() -> None:
    """In less memory what Python adds weighs more than in the full benchmark, so only the walk is
    judged, beside mincore's."""
    table = await harvest.run(5, length_bytes=2 << 30)
    judged = [figure for figure in table.figures if figure.reference_name == "mincore"]
    assert len(judged) == 2
    assert_holds(Table(judged))
    assert "ms per GiB" in table.notes[0]


async def test_a_harvest_misses_nothing_and_tells_of_nothing_in_vain() -> None:
    table = await harvest_correctness.run(
        3, dirtied_pages=60_000, region_bytes=24 << 20, storm_s=0.3
    )
    assert len(table.figures) == 9
    assert_holds(table)


@pytest.mark.real
async def test_both_drivers_move_their_guest_and_account_for_the_time() -> None:
    table = await moving.run(1, guest=SMALL)
    assert {figure.unit for figure in table.figures} == {"ms"}
    assert all(figure.ours > 0 for figure in table.figures)
    assert sum("where the blackout" in note for note in table.notes) == 2


def test_a_missed_bound_is_said_and_is_the_exit_code() -> None:
    met = Figure("a", "ms", 1.0, 2.0, "other", Judge.RATIO, 0.5)
    missed = Figure("b", "ms", 3.0, 2.0, "other", Judge.MORE, 0.5)
    assert (met.holds(), missed.holds()) == (True, False)
    text = Table([met, missed]).text()
    assert text.count("MISSED") == 1
    assert Table([met, missed]).missed() == [missed]


@pytest.mark.parametrize(
    ("judge", "bound", "holds"),
    [
        (Judge.RATIO, 2.0, True),
        (Judge.RATIO, 1.9, False),
        (Judge.MORE, 10.0, True),
        (Judge.MORE, 9.0, False),
        (Judge.VALUE, 20.0, True),
        (Judge.FASTER, 0.5, True),
        (Judge.FASTER, 0.6, False),
    ],
)
def test_what_a_bound_is_on(judge: Judge, bound: float, holds: bool) -> None:
    assert Figure("x", "ms", 20.0, 10.0, "other", judge, bound).holds() is holds


def test_a_wrong_name_is_wrong_usage() -> None:
    told = subprocess.run(
        [sys.executable, "-m", "tests.bench", "nonsense"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parent.parent.parent,
    )
    assert told.returncode == 2
    assert "nonsense" in told.stderr
