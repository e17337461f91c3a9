"""Each call of each daemon fails once, before or after its effect, or is the last one it makes.

Whatever is struck, and whatever the migration was about: the guest runs on exactly one side, the
answer says on which, and the same VM can be moved again.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from migrd.core.phases import Phase
from tests.fakes.gate import Fault
from tests.sweep import scripts
from tests.sweep.sweeping import (
    BothStrikes,
    Finished,
    Limbo,
    Script,
    Strike,
    calls_of,
    messages_of,
    run,
    run_with_losses,
    strikes,
)

ALL, DEATHS = "", "killed"
COMMON = (scripts.plain, scripts.postcopy, scripts.with_arbiter)


def sweep(script: Script, side: str, kinds: str) -> Iterator[tuple[Strike, Finished]]:
    """Every call x everything that may happen to it; all failures are told together."""
    failures = []
    calls = calls_of(script, side)
    for number, call in enumerate(calls, 1):
        for name, fault in strikes(call):
            if kinds not in name:
                continue
            strike = Strike(number, name, fault)
            try:
                yield strike, run(script, {side: strike})
            except AssertionError as exc:
                failures.append(f"{side}: call {number}, {strike.struck}, {name}: {exc}")
    assert not failures, "\n".join([f"{len(failures)} of the sweep:", *failures])


@pytest.mark.parametrize("side", ["alpha", "beta"])
@pytest.mark.parametrize(
    ("script", "kinds", "ends"),
    [
        (scripts.plain, ALL, {Phase.SUCCEEDED}),
        (scripts.with_arbiter, ALL, {Phase.SUCCEEDED}),
        (scripts.postcopy, ALL, {Phase.SUCCEEDED}),
        (scripts.with_devices, ALL, {Phase.SUCCEEDED}),
        (scripts.cancelled_in_precopy, ALL, {Phase.CANCELLED}),
        (scripts.several_rounds, DEATHS, {Phase.SUCCEEDED}),
        (scripts.paused_guest, DEATHS, {Phase.SUCCEEDED}),
        (scripts.after_a_round_trip, DEATHS, {Phase.SUCCEEDED}),
        (scripts.after_a_cancelled_one, DEATHS, {Phase.SUCCEEDED}),
        (scripts.stalled_after_continue, DEATHS, {Phase.ROLLED_BACK}),
        (scripts.destination_dies_in_switchover, DEATHS, {Phase.ROLLED_BACK}),
        (scripts.source_dies_in_switchover, DEATHS, {Phase.SUCCEEDED}),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_no_single_failure_runs_the_guest_twice_or_nowhere(
    script: Script, kinds: str, ends: set[Phase], side: str
) -> None:
    swept = list(sweep(script, side, kinds))
    struck = [strike for strike, _ in swept if strike.struck is not None]
    assert len(struck) >= 14, "the sweep did not sweep"
    assert len(struck) >= 0.8 * len(swept), "most strikes must have hit something"
    assert ends <= {finished.phase for _, finished in swept}


@pytest.mark.parametrize("script", COMMON, ids=lambda script: script.__name__)
def test_both_daemons_killed_around_any_two_records_lose_nothing(script: Script) -> None:
    """alpha after each of its journal records x beta after each of its own."""
    swept, failures = 0, []
    records = {
        side: [n for n, call in enumerate(calls_of(script, side), 1) if "journal.app" in call]
        for side in ("alpha", "beta")
    }
    for pair in BothStrikes(records).all():
        try:
            run(script, pair)
        except AssertionError as exc:
            failures.append(f"{pair['alpha'].number} x {pair['beta'].number}: {exc}")
        swept += all(strike.struck is not None for strike in pair.values())
    assert not failures, "\n".join(failures)
    assert swept >= 12, "the sweep did not sweep"


@pytest.mark.parametrize("side", ["alpha", "beta"])
@pytest.mark.parametrize("script", COMMON, ids=lambda script: script.__name__)
def test_a_daemon_killed_and_then_cut_off_for_a_while_loses_nothing(
    script: Script, side: str
) -> None:
    """Longer than the source waits for an answer to GRANT: the operator is called, and not needed
    in the end."""
    failures, swept = [], 0
    for number, call in enumerate(calls_of(script, side), 1):
        strike = Strike(number, "killed and cut off", Fault(after_effect=True))
        try:
            run(script, {side: strike}, cut_off_s=40.0)
        except AssertionError as exc:
            failures.append(f"{side}: call {number}, {call}: {exc}")
        swept += strike.struck is not None
    assert not failures, "\n".join(failures)
    assert swept >= 9, "the sweep did not sweep"


@pytest.mark.parametrize("side", ["alpha", "beta"])
@pytest.mark.parametrize("script", COMMON, ids=lambda script: script.__name__)
def test_a_record_that_is_durable_although_its_write_failed_is_safe(
    script: Script, side: str
) -> None:
    failures, swept = [], 0
    for number, call in enumerate(calls_of(script, side), 1):
        for lives_on in (1, 3, 6, 20) if call.startswith("journal.app") else ():
            limbo = Limbo(number, lives_on)
            try:
                run(script, {side: limbo})
            except AssertionError as exc:
                failures.append(f"{side}: call {number}, {call}, lives on {lives_on}: {exc}")
            swept += limbo.lives_on < 0
    assert not failures, "\n".join(failures)
    assert swept >= 4, "the sweep did not sweep"


@pytest.mark.parametrize(
    "script",
    [*COMMON, scripts.cancelled_in_precopy],
    ids=lambda script: script.__name__,
)
def test_no_single_message_lost_late_or_repeated_does_harm(script: Script) -> None:
    swept, failures = 0, []
    for number in range(1, messages_of(script) + 1):
        for finished, loss, call in run_with_losses(script, number):
            swept += call is not None
            if isinstance(finished, AssertionError):
                failures.append(f"message {number} ({call}) {loss}: {finished}")
    assert not failures, "\n".join(failures)
    assert swept >= 25, "the sweep did not sweep"
