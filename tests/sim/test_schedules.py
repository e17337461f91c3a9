"""Several faults at once, at random: as many schedules as a commit can afford, and those that found
something, kept."""

from __future__ import annotations

import pytest

from migrd.core import handover
from migrd.core.handover import DestinationPhase, DestinationTrigger
from migrd.core.phases import Phase
from tests.fakes.road import Loss
from tests.sim.run import Wrong, play
from tests.sim.schedule import Lost, Schedule, Struck, Timed, from_seed
from tests.sim.tempo import BRISK
from tests.sweep import scripts
from tests.sweep.test_mutants import resume_on_a_time_out

PER_COMMIT = 2_000
PARTS = 20
FIRST = 1_000_000

FOUND = [
    (
        "a source whose process had died asked, its journal failing, that the last copy be refused",
        Schedule(
            6082749,
            scripts.plain,
            (
                Timed(0.0014258320389655213, "monitor_lost", "beta", 2.5, after="precopy"),
                Timed(0.11999381995766459, "fsync_fails", "alpha", 7.0),
                Timed(0.4422863975132755, "qemu_dies", "alpha", 0.05),
            ),
            BRISK,
        ),
    ),
    (
        "a daemon that was stopped twice over left the keeper of a migration's rounds behind",
        Schedule(
            6096216,
            scripts.postcopy,
            (
                Timed(0.01720394939504725, "freeze", "beta", 7.0),
                Timed(0.0001866733180398942, "stopped", "alpha", 7.0, after="rolling_back"),
                Timed(0.001821392740120828, "crash_loop", "alpha", 0.001, after="rolling_back"),
            ),
            BRISK,
        ),
    ),
    (
        "a destination without a monitor could not cut a silent source off, and its task broke",
        Schedule(
            4033108,
            scripts.postcopy,
            (
                Struck("alpha", 12, 21, 12.0),
                Timed(0.00034, "monitor_lost", "beta", 14.0, after="precopy"),
            ),
            BRISK,
        ),
    ),
    (
        "a destination gave up on silence while the guest left by postcopy, and ended what it had",
        Schedule(
            3019773,
            scripts.postcopy,
            (
                Struck("alpha", 12, 43, 12.0),
                Timed(3.3739073840080795, "stopped", "beta", 14.0),
            ),
            BRISK,
        ),
    ),
    (
        "a postcopy whose source died behind a link that says nothing: both sides waited for ever",
        Schedule(
            2003681,
            scripts.postcopy,
            (
                Timed(0.0095, "qemu_hangs", "beta", 0.5, after="completing"),
                Timed(0.0154, "qemu_dies", "alpha", 0.05, after="starting"),
                Lost(1, Loss.UNREACHABLE, "grant"),
                Timed(0.0129, "freeze", "beta", 0.5, after="starting"),
            ),
            BRISK,
        ),
    ),
    (
        "a monitor that was away as postcopy was to leave: nobody told QEMU to go on, or back",
        Schedule(
            2027752,
            scripts.postcopy,
            (Timed(0.0002, "monitor_lost", "alpha", 7.0, after="switchover"),),
            BRISK,
        ),
    ),
    (
        "a preflight that failed left the look at QEMU behind, which nobody waited for",
        Schedule(
            1005233,
            scripts.throttled,
            (
                Timed(0.0038, "ask_again", "beta", 14.0),
                Struck("alpha", 2, 9, 1.0),  # it asks anew when it is back
                Struck("beta", 1, 8, 12.0),  # the last epoch cannot be read
            ),
            BRISK,
        ),
    ),
    (
        "a source that stood still beyond its deadline was told to be left behind, not ended",
        Schedule(
            30155,
            scripts.plain,
            (
                Struck("alpha", 18, 26, 12.0),  # its `quit` is not answered
                Timed(0.3877, "stopped", "alpha", 7.0),  # and before the next one it is stopped
            ),
            BRISK,
        ),
    ),
    (
        "`cancelled` was told before it was on the disk: a restarted daemon would have gone on",
        Schedule(
            1009701,
            scripts.plain,
            (
                Lost(1, Loss.REQUEST_LOST),  # preflight takes its time
                Timed(0.002, "disk_full", "alpha", 2.5),
                Timed(0.03, "cancel", "alpha", 14.0),
            ),
            BRISK,
            looks=(0.05, 0.1, 0.5, 1.0),
        ),
    ),
    (
        "limits that QEMU did not take were never said again: held in precopy for good",
        Schedule(
            3272,
            scripts.with_devices,
            (
                Struck("alpha", 11, 2, 0.05),  # the destination seems to be away: hold
                Struck("alpha", 14, 22, 0.0),  # it is there again; the monitor does not answer
                Timed(0.088, "swallow_ack", "alpha", 70.0),
            ),
        ),
    ),
    (
        "a guest that shut itself down while the daemon that had started it was dead: never told",
        Schedule(
            1868,
            scripts.after_a_round_trip,
            (
                Struck("beta", 9, 25, 0.0),
                Struck("beta", 12, 7, 45.0),  # killed after `cont`
                Timed(0.367, "guest_shuts_down", "beta", 70.0),
            ),
        ),
    ),
    (
        "limits that QEMU refused were never said again: held in precopy for good",
        Schedule(
            10**12 + 1268,
            scripts.throttled,
            (
                Struck("alpha", 11, 2, 0.05),  # the destination seems to be away: hold
                Struck("alpha", 14, 23, 0.0),  # it is there again; the monitor refuses the limits
            ),
            BRISK,
        ),
    ),
]
"""What random schedules have found in the product, cut down to what is needed."""


@pytest.mark.parametrize("part", range(PARTS))
def test_no_schedule_of_several_faults_doubles_loses_or_strands_a_guest(part: int) -> None:
    each = PER_COMMIT // PARTS
    ends = {play(from_seed(FIRST + part * each + number)).phase for number in range(each)}
    assert {Phase.SUCCEEDED, Phase.ROLLED_BACK} <= ends, "the schedules reach both ends"


@pytest.mark.parametrize(
    ("what", "schedule"), FOUND, ids=[f"seed-{schedule.seed}" for _, schedule in FOUND]
)
def test_what_was_found_once_stays_mended(what: str, schedule: Schedule) -> None:
    ended = play(schedule)
    assert ended.phase is not None, what
    assert not ended.resolved, what
    assert ended.cause != "source_left_behind", what


def test_a_destination_whose_guest_was_given_back_does_not_say_that_it_runs_nowhere() -> None:
    """Found by seed 1003150: its QEMU had died before the start, and a person had said so."""
    dies = Timed(0.0002, "qemu_dies", "beta", 0.05, after="starting")
    ended = play(Schedule(1003150, scripts.plain, (dies,), BRISK))
    assert ended.resolved == ["destination_died_starting: destination_fenced"]
    assert ended.phase == Phase.ROLLED_BACK


def test_a_source_that_was_freed_and_died_leaves_a_copy_that_a_person_judges() -> None:
    """Found by seed 3015945: cut loose at its deadline it had resumed, unseen, before it died, and
    the destination's copy, older than the guest, was run."""
    blows = (
        Timed(0.12729775704635873, "swallow_ack", "beta", 7.0),
        Timed(0.0008072548784276388, "qemu_dies", "alpha", 14.0, after="rolling_back"),
    )
    ended = play(Schedule(3015945, scripts.plain, blows, BRISK))
    assert ended.resolved == ["source_died_unwatched: guest_lost"]


def owned_before_cont(patch: pytest.MonkeyPatch) -> None:
    """GRANT is answered with `running` before the guest runs."""
    table = dict(handover.DESTINATION_TRANSITIONS)
    row = {DestinationTrigger.START_ORDERED: DestinationPhase.RUNNING}
    table[DestinationPhase.OWNED] = {**table[DestinationPhase.OWNED], **row}
    patch.setattr(handover, "DESTINATION_TRANSITIONS", table)


@pytest.mark.parametrize("mutant", [resume_on_a_time_out, owned_before_cont])
def test_random_schedules_catch_a_broken_rule(
    mutant: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert callable(mutant)
    mutant(monkeypatch)
    for seed in range(FIRST, FIRST + 400):
        try:
            play(from_seed(seed))
        except Wrong:
            return
    raise AssertionError("400 schedules saw nothing wrong")


def test_a_seed_is_one_run() -> None:
    for seed in (7, 1868, 3272):
        assert from_seed(seed) == from_seed(seed)
        assert play(from_seed(seed)) == play(from_seed(seed))
