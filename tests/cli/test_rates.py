"""`migrd rates`: what people and scripts see of dirty rates."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from migrd.api import models
from migrd.cli.exits import Exit
from migrd.engine.rate_views import SamplingState, Trouble
from tests.cli.conftest import Run, lines_of, parsed, spawned
from tests.cli.scripted_daemon import Daemon
from tests.fakes.rates import SAMPLED_WALL_S


def test_windows_intervals_and_the_working_set_are_shown(run: Run) -> None:
    result = run("rates", "web1")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert "measured now and then" in lines[1]
    assert any(line.startswith("working set") and " MiB (" in line for line in lines)
    windows = [line for line in lines if " ms  " in line or line.startswith(("1.00", "4.00"))]
    assert [line.split()[0] for line in windows] == ["250", "1.00", "4.00"]
    assert all(" to " in line for line in windows)
    assert any("no write seen" in line for line in lines)


def test_json_is_the_apis_own_answer(run: Run) -> None:
    models.DirtyRate.model_validate_json(run("rates", "web1", "-o", "json").stdout)
    history = run("rates", "web1", "--history", "-o", "json").stdout
    assert len(models.RateHistory.model_validate_json(history).items) == 2
    rows = run("rates", "web1", "--history", "-o", "jsonl").stdout.splitlines()
    assert [json.loads(row)["tracker"] for row in rows] == ["qemu", "qemu"]


def test_the_past_is_a_line_for_each_step(run: Run) -> None:
    result = run("rates", "web1", "--history", "--since", "365d", "--step", "10min")
    header, *lines = result.stdout.splitlines()
    assert header.split()[:2] == ["FROM", "WRITTEN"]
    assert len(lines) == 2
    assert all("200 MiB/s" in line and "▇" in line for line in lines)
    nothing = run("rates", "web1", "--history", "--since", "1s")
    assert nothing.exit_code == 0
    assert nothing.stdout == ""


def test_a_measurement_is_asked_for_and_waited_for(
    run: Run, daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("migrd.cli.commands.rates.MEASURED_WITHIN_S", 0.3)
    result = run("rates", "web1", "--measure")
    assert result.exit_code == 0, result.output
    assert daemon.call(lambda service: service.asked_for_rates) == ("web1",)
    assert "working set" in result.stdout


def test_what_cannot_be_measured_ends_as_a_conflict(run: Run, daemon: Daemon) -> None:
    def turn_off(service: object) -> None:
        service.sampling_state = {"web1": SamplingState.OFF}  # type: ignore[attr-defined]  # the scripted one's

    daemon.call(turn_off)
    result = run("rates", "web1", "--measure")
    assert result.exit_code == Exit.REFUSED
    assert "sampling_off" in result.stderr
    shown = run("rates", "web1")
    assert shown.exit_code == 0
    assert "[sampling]" in shown.stdout


def test_trouble_is_shown_beside_the_last_sample(run: Run, daemon: Daemon) -> None:
    def fail(service: object) -> None:
        trouble = Trouble("rate_busy", "already being measured", SAMPLED_WALL_S)
        service.rate_trouble = trouble  # type: ignore[attr-defined]  # the scripted one's

    daemon.call(fail)
    shown = run("rates", "web1").stdout
    assert "already being measured [rate_busy]" in shown
    assert "146 MiB/s" in shown


def test_an_unknown_vm_is_not_found(run: Run) -> None:
    assert run("rates", "nobody").exit_code == Exit.NOT_FOUND
    assert run("rates", "nobody", "--history").exit_code == Exit.NOT_FOUND


@pytest.mark.parametrize("wrong", [("--since", "1h"), ("--step", "10"), ("--history", "--watch")])
def test_options_that_do_not_go_together_are_refused(run: Run, wrong: tuple[str, ...]) -> None:
    assert run("rates", "web1", *wrong).exit_code == Exit.USAGE


def test_a_watch_tells_each_measurement_once(daemon: Daemon) -> None:
    with spawned(daemon, "rates", "web1", "--watch", "-o", "jsonl") as program:
        lines: Iterator[str] = lines_of(program)
        first = [json.loads(next(lines)) for _ in range(2)]
        assert {each["tracker"] for each in first} == {"qemu", "iommu"}
        program.terminate()
        assert program.wait(20) == 128 + 15
        assert list(lines) == []


def test_a_plan_tells_what_the_last_measurement_foretells(run: Run) -> None:
    shown = run("plan", "web1", "host-b").stdout
    assert "400 MiB/s, measured 12.0 s ago" in shown
    assert "stands still for about" in shown
    assert "400 ms" in shown
    assert "would not converge" in run("plan", "web1", "host-never").stdout


def test_a_script_can_read_the_working_set(run: Run) -> None:
    seen = parsed(run("rates", "web1", "-o", "json"))
    cpu = next(each for each in seen["trackers"] if each["tracker"] == "qemu")
    assert cpu["working_set"]["set_low_bytes"] < cpu["working_set"]["set_high_bytes"]
