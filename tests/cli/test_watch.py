"""Following a migration: what is told, on a terminal and in a pipe, and what nothing may break."""

import asyncio
import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from migrd.cli.address import Address
from migrd.cli.client import Client
from migrd.cli.exits import CommandError, Exit, NoAnswer
from migrd.cli.watching import Look, Watch
from tests.cli.conftest import (
    PROGRAM,
    Run,
    lines_of,
    migration_to,
    parsed,
    run_alone,
    spawned,
    until,
)
from tests.cli.scripted_daemon import Daemon
from tests.cli.terminal import Terminal

WIDE, NARROW = (200, 50), (80, 24)


@pytest.fixture
def slow_daemon(daemon: Daemon) -> Daemon:
    """Twice as fast as life: time to do something in the middle of a migration."""
    daemon.call(lambda engine: setattr(engine, "speed", 4.0))
    return daemon


def on_terminal(daemon: Daemon, *arguments: str, size: tuple[int, int] = NARROW) -> Terminal:
    environment = {**os.environ, "MIGRD_SOCKET": str(daemon.socket), "LANG": "C.UTF-8"}
    return Terminal([*PROGRAM, *arguments], environment, columns=size[0], lines=size[1])


def test_in_a_pipe_each_change_is_one_line_in_the_order_it_happened(run: Run) -> None:
    result = run("migrate", "web1", "host-b", "--watch")
    lines = [line.split("  ", 1)[1] for line in result.stdout.splitlines() if line[2:3] == ":"]
    kinds = [line.split(":")[0] for line in lines]
    assert kinds == [
        "web1",
        "pending",
        "preflight",
        "preparing",
        "precopy",
        "round 1",
        "decision",
        "round 2",
        "decision",
        "round 3",
        "decision",
        "switchover",
        "granted",
        "completing",
        "succeeded",
    ]
    assert "sent 4.0 GiB in 4.10 s, 1000 MiB/s, left 1.6 GiB, dirtying 400 MiB/s" in result.stdout
    assert "\x1b" not in result.stdout


def test_the_summary_says_blackout_total_bytes_and_rounds(run: Run) -> None:
    out = run("migrate", "web1", "host-b", "--watch").stdout
    block = out[out.index("web1 runs on host-b") :]
    facts = dict(line.strip().split("  ", 1) for line in block.splitlines()[1:])
    assert facts["blackout"].strip().endswith("ms (limit 300 ms)")
    assert facts["sent"].strip() == "6.2 GiB in 3 rounds"
    assert "precopy" in facts["phases"]
    assert facts["total"].strip()


def test_decisions_that_say_nothing_new_are_told_once(run: Run) -> None:
    id_ = migration_to(run, "host-never", "--deadline-s", "2s")
    result = run("watch", id_)
    assert result.exit_code == Exit.ENDED_OTHERWISE
    assert result.stdout.count("[waiting]") == 1
    assert result.stdout.count("[deadline]") >= 1
    assert len(parsed(run("decisions", id_, "-o", "json"))["items"]) > 5


def test_json_lines_are_the_migrations_states_up_to_the_last(run: Run) -> None:
    result = run("migrate", "web1", "host-b", "--watch", "-o", "jsonl")
    states = [json.loads(line) for line in result.stdout.splitlines()]
    versions = [state["resource_version"] for state in states]
    assert versions == sorted(versions)
    assert states[-1]["phase"] == "succeeded"
    assert not any(state["is_terminal"] for state in states[:-1])
    assert result.stderr == ""


def test_waiting_too_long_is_code_9_and_the_migration_goes_on(run: Run) -> None:
    id_ = migration_to(run, "host-never")
    result = run("watch", id_, "--timeout", "1s")
    assert result.exit_code == Exit.TIMED_OUT
    assert "it goes on" in result.stderr
    assert f"migrd watch {id_}" in result.stderr.replace("\n", " ")
    assert parsed(run("migrations", "show", id_, "-o", "json"))["is_terminal"] is False


def test_needs_operator_ends_the_watch_unless_told_to_go_on(run: Run, daemon: Daemon) -> None:
    id_ = parsed(run("migrate", "web1", "host-unknown", "-w", "-o", "json"))["id"]
    assert run("watch", id_).exit_code == Exit.NEEDS_OPERATOR
    with spawned(daemon, "watch", id_, "--through-needs-operator") as going_on:
        next(line for line in lines_of(going_on) if "needs operator" in line)
        run("resolve", id_, "destination_runs", "--evidence", "seen on its console")
        daemon.call(lambda engine: asyncio.ensure_future(_release(engine, id_)))
        out, _ = going_on.communicate(timeout=20)
        assert going_on.returncode == 0, out
    assert "web1 runs on host-unknown (the destination)" in out


async def _release(engine: Any, id_: str) -> None:
    await engine._advance(engine.migrations_by_id[id_], "source_released")


def test_a_restart_of_the_daemon_is_waited_out_and_told(run: Run, slow_daemon: Daemon) -> None:
    seen = []
    with spawned(slow_daemon, "migrate", "web1", "host-b", "--watch") as watching:
        for line in lines_of(watching):
            seen.append(line)
            if "round 1" in line:
                slow_daemon.stop_listening()
            if "connection to the daemon lost" in line:
                slow_daemon.listen()
        told = "".join(seen)
        assert watching.wait(20) == 0, told
    assert told.count("connection to the daemon lost") == 1
    assert told.count("connected to the daemon again") == 1
    for number in (1, 2, 3):
        assert told.count(f"round {number}: ") == 1
    assert "web1 runs on host-b (the destination)" in told


async def test_a_daemon_that_stays_away_is_given_up_and_the_message_says_what_goes_on(
    short_tmp_path: Path,
) -> None:
    class Quiet:
        refresh_s = 0.05
        told: list[str] = []

        def show(self, look: Look) -> None: ...

        def lost(self, error: CommandError) -> None:
            self.told.append("lost")

        def back(self) -> None:
            self.told.append("back")

    screen = Quiet()
    async with Client(Address(socket=short_tmp_path / "none")) as client, asyncio.timeout(10):
        watching = Watch(client, "m1", screen, give_up_after_s=0.5)
        with pytest.raises(NoAnswer, match="goes on without being watched") as caught:
            await watching.to_the_end()
    assert caught.value.exit_code is Exit.UNREACHABLE
    assert "migrd watch m1" in caught.value.cure
    assert screen.told == ["lost"]


def test_without_the_event_stream_the_watch_polls(run: Run, daemon: Daemon) -> None:
    asked: list[str] = []

    @web.middleware
    async def refuse_streams(request: web.Request, handler: Any) -> web.StreamResponse:
        asked.append(request.path_qs)
        if request.path == "/v1/events":
            raise web.HTTPNotFound(text="no streams through this proxy")
        response: web.StreamResponse = await handler(request)
        return response

    daemon.stop_listening()
    daemon.middlewares = [refuse_streams]
    daemon.listen()
    result = run("migrate", "web1", "host-b", "--watch")
    assert result.exit_code == 0, result.output
    assert "round 3: " in result.stdout
    assert any("watch=true" in path for path in asked)


def test_ctrl_c_ends_the_watching_and_says_how_to_cancel(slow_daemon: Daemon) -> None:
    with on_terminal(slow_daemon, "migrate", "web1", "host-never", "--watch") as terminal:
        terminal.wait_for("throttle")
        terminal.interrupt()
        assert terminal.ended() == Exit.INTERRUPTED
        assert "The migration goes on." in terminal.text
        assert "migrd cancel " in terminal.text
        assert "Traceback" not in terminal.text
        assert terminal.raw.rindex(b"\x1b[?25h") > terminal.raw.rindex(b"\x1b[?25l")
    (running,) = slow_daemon.call(lambda engine: list(engine.migrations_by_id.values()))
    assert not running.state.is_terminal


def test_sigterm_puts_the_terminal_in_order(slow_daemon: Daemon) -> None:
    with on_terminal(slow_daemon, "migrate", "web1", "host-never", "--watch") as terminal:
        terminal.wait_for("throttle")
        terminal.signal(signal.SIGTERM)
        assert terminal.ended() == 128 + signal.SIGTERM
        assert terminal.raw.rindex(b"\x1b[?25h") > terminal.raw.rindex(b"\x1b[?25l")


def test_interrupted_in_a_pipe_it_says_the_same(slow_daemon: Daemon) -> None:
    with spawned(slow_daemon, "migrate", "web1", "host-never", "--watch") as watching:
        next(line for line in lines_of(watching) if "round 1" in line)
        watching.send_signal(signal.SIGINT)
        _, err = watching.communicate(timeout=20)
    assert watching.returncode == Exit.INTERRUPTED
    assert "The migration goes on." in err
    assert "Traceback" not in err


@pytest.mark.parametrize("size", [NARROW, WIDE, (40, 10)])
def test_the_live_view_shows_how_it_stands_and_fits_its_terminal(
    slow_daemon: Daemon, size: tuple[int, int]
) -> None:
    with on_terminal(slow_daemon, "migrate", "web1", "host-b", "-w", size=size) as terminal:
        terminal.wait_for("web1  host-a -> host-b")
        terminal.wait_for("memory")
        assert terminal.ended() == 0
        text = terminal.text
    assert "web1 runs on host-b (the destination)" in text
    assert max(len(line) for line in text.replace("\r", "\n").splitlines()) <= size[0]
    if size != (40, 10):
        assert "Ctrl-C stops watching; the migration goes on" in text
        assert "predicted blackout" in text
        assert "limit 300 ms: fits" in text or "limit 300 ms: converging" in text


def test_no_colour_is_respected_on_a_terminal(
    slow_daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    with on_terminal(slow_daemon, "migrate", "web1", "host-b", "-w") as terminal:
        assert terminal.ended() == 0
    coloured = [b"\x1b[%d;3%dm" % (a, b) for a in (0, 1) for b in range(8)]
    assert not any(code in terminal.raw for code in coloured)
    assert b"\x1b[36m" not in terminal.raw


def test_a_dumb_terminal_gets_plain_lines(
    slow_daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {**os.environ, "MIGRD_SOCKET": str(slow_daemon.socket)}
    command = ["env", "TERM=dumb", *PROGRAM, "migrate", "web1", "host-b", "-w"]
    with Terminal(command, environment, columns=80, lines=24) as terminal:
        assert terminal.ended() == 0
    assert b"\x1b" not in terminal.raw
    assert "round 3: " in terminal.text


def test_hostile_text_cannot_steer_the_live_view(slow_daemon: Daemon) -> None:
    with on_terminal(slow_daemon, "migrate", "web1", "host-odd", "-w", size=WIDE) as terminal:
        assert terminal.ended() == 0
    assert b"\x1b[2J" not in terminal.raw
    assert b"\x1b]0;" not in terminal.raw
    assert "\\x1b[2J\\x1b]0;owned" in terminal.text


def test_a_restart_is_shown_on_the_terminal(slow_daemon: Daemon) -> None:
    with on_terminal(slow_daemon, "migrate", "web1", "host-never", "-w") as terminal:
        terminal.wait_for("memory")
        slow_daemon.stop_listening()
        terminal.wait_for("connection to the daemon lost; trying again")
        terminal.wait_for("no answer from the daemon")
        slow_daemon.listen()
        terminal.wait_for("connected to the daemon again")
        terminal.interrupt()
        assert terminal.ended() == Exit.INTERRUPTED


def test_a_reader_that_goes_away_ends_the_program_without_a_traceback(
    slow_daemon: Daemon,
) -> None:
    with spawned(slow_daemon, "migrate", "web1", "host-b", "--watch") as watching:
        assert watching.stdout is not None
        assert watching.stderr is not None
        watching.stdout.readline()
        watching.stdout.close()
        err = watching.stderr.read()
        assert watching.wait(20) == Exit.UNEXPECTED
    assert "Traceback" not in err
    assert "BrokenPipe" not in err


def test_events_are_followed_over_a_restart(run: Run, daemon: Daemon) -> None:
    phases: list[str] = []
    with spawned(daemon, "events", "--follow", "-o", "jsonl") as following:
        until(lambda: daemon.call(lambda engine: engine.listeners) == 1)
        told = lines_of(following)
        for vm in ("web1", "db1"):
            assert run("migrate", vm, "host-b", "-w").exit_code == 0
            while not phases or phases[-1] != "succeeded":
                phases.append(json.loads(next(told))["body"].get("phase", ""))
            phases.append("restart")
            daemon.stop_listening()
            daemon.listen()
        following.send_signal(signal.SIGINT)
        assert following.wait(20) == Exit.INTERRUPTED
    assert phases.count("pending") == phases.count("succeeded") == 2


def test_a_program_in_a_pipe_prints_no_more_than_it_should(daemon: Daemon) -> None:
    done = subprocess.run(
        [*PROGRAM, "--socket", str(daemon.socket), "vms", "list", "-o", "jsonl"],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert done.stderr == ""
    assert [json.loads(line)["name"] for line in done.stdout.splitlines()] == ["db1", "web1"]


def test_a_watch_of_nothing_is_not_found(daemon: Daemon) -> None:
    unknown = "5a3cbb2c-6a8f-4b0c-9d1f-0c5d5c2f6f10"
    result = run_alone("--socket", str(daemon.socket), "watch", unknown)
    assert result.exit_code == Exit.NOT_FOUND
    assert "goes on" not in result.stderr
