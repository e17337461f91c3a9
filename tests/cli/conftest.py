"""The program under test, in this process and in one of its own, and a daemon to speak with."""

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import structlog
from click.testing import CliRunner, Result

from migrd.cli.main import build
from tests.cli.scripted_daemon import Daemon

PROGRAM = [sys.executable, "-c", "from migrd.cli.main import build; build()(prog_name='migrd')"]

Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the developer's shell says must not reach the tests."""
    for name in [*os.environ]:
        if name.startswith("MIGRD_") or name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS"):
            monkeypatch.delenv(name)


@pytest.fixture
def daemon(short_tmp_path: Path) -> Iterator[Daemon]:
    """The real interface over the scripted engine, twenty times as fast as life.

    It lives in this process, so what it logs would stand in the output of the program under test.
    """
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    try:
        with Daemon(short_tmp_path / "api.sock") as running:
            yield running
    finally:
        structlog.reset_defaults()


@pytest.fixture
def run(daemon: Daemon) -> Run:
    """Run the program against the daemon: `run("vms", "-o", "json")`."""

    def invoke(*arguments: str) -> Result:
        return run_alone("--socket", str(daemon.socket), *arguments)

    return invoke


def run_alone(*arguments: str, stdin: str | None = None) -> Result:
    """Run the program in this process, wherever it is told to look."""
    return CliRunner().invoke(build(), arguments, prog_name="migrd", input=stdin)


def parsed(result: Result) -> Any:
    """stdout as one JSON document; nothing else may be on it."""
    return json.loads(result.stdout)


@contextmanager
def spawned(daemon: Daemon, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The program in a process of its own, its output in pipes; it does not outlive the block."""
    with subprocess.Popen(
        [*PROGRAM, *arguments],
        env={**os.environ, "MIGRD_SOCKET": str(daemon.socket)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as program:
        try:
            yield program
        finally:
            program.kill()


def lines_of(program: subprocess.Popen[str]) -> Iterator[str]:
    """What the program prints, as it comes; leaving the loop does not close the pipe."""
    assert program.stdout is not None
    return iter(program.stdout.readline, "")


def migration_to(run: Run, destination: str, *more: str) -> str:
    """Ask for a migration of web1; its id."""
    result = run("migrate", "web1", destination, *more)
    assert result.exit_code == 0, result.output
    return result.stdout.strip()


def ended(run: Run, destination: str, vm: str = "web1") -> str:
    """A migration that has ended; its id."""
    result = run("migrate", vm, destination, "--watch", "-o", "json")
    return str(parsed(result)["id"])


def until(condition: Callable[[], Any], within_s: float = 10.0) -> Any:
    """Wait for a condition, with a deadline."""
    deadline_s = time.monotonic() + within_s
    while time.monotonic() < deadline_s:
        if outcome := condition():
            return outcome
        time.sleep(0.02)
    raise AssertionError("it never came to that")
