"""The watch around every test must bite: each kind of leak is planted once and seen caught."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

PLANTED = """
import asyncio, socket, subprocess, sys, time
from migrd.engine.threads import in_thread

async def test_leaves_a_task():
    test_leaves_a_task.kept = asyncio.create_task(asyncio.sleep(3600))

def start(path):
    command = [sys.executable, "-c", "input(1)", str(path)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child.stdout.read(1)
    keep(child)

def test_leaves_a_process(tmp_path):
    start(tmp_path)

def test_leaves_a_process_in_the_short_path(short_tmp_path):
    start(short_tmp_path)

def test_leaves_a_socket(short_tmp_path):
    keep(listener := socket.socket(socket.AF_UNIX))
    listener.bind(str(short_tmp_path / "s"))

async def test_blocks_the_loop_in_migrd(monkeypatch):
    from migrd.engine import threads
    code = compile("def nap(): time.sleep(0.01)", threads.__file__, "exec")
    exec(code, space := {"time": time})
    space["nap"]()

async def test_blocks_in_a_thread(tmp_path):
    await in_thread(time.sleep, 0.01)

async def test_leaves_nothing(tmp_path, short_tmp_path):
    await asyncio.create_task(asyncio.sleep(0))

kept = []
keep = kept.append
"""
CAUGHT = {
    "test_leaves_a_task": "tasks left behind",
    "test_leaves_a_process": "left behind",
    "test_leaves_a_process_in_the_short_path": "left behind",
    "test_leaves_a_socket": "left behind",
    "test_blocks_the_loop_in_migrd": "Blocking call to time.sleep",
}


def test_what_a_test_leaves_behind_fails_it(tmp_path: Path) -> None:
    planted = tmp_path / "test_planted.py"
    planted.write_text(PLANTED)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider"),
            *("-c", str(ROOT / "pyproject.toml"), "--rootdir", str(tmp_path), "--tb=line"),
            *("-W", "ignore::ResourceWarning", "--basetemp", str(tmp_path / "base")),
            str(planted),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "500"},  # the summary is cut at the terminal's width
        timeout=100,
    )
    assert "7 passed" not in done.stdout
    for test, complaint in CAUGHT.items():
        lines = [
            line
            for line in done.stdout.splitlines()
            if line.startswith(("FAILED", "ERROR")) and f"::{test} " in line
        ]
        assert lines, f"{test} was not caught:\n{done.stdout}{done.stderr}"
        assert complaint in lines[0]
    for innocent in ("test_blocks_in_a_thread", "test_leaves_nothing"):
        assert f"::{innocent} " not in done.stdout, done.stdout
