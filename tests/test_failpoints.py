"""Failpoints: what may be asked of them, and that they do it to a real process."""

import os
import signal
import subprocess
import sys

import pytest

from migrd import failpoints
from migrd.errors import ConfigError

POINT = "source.transfer_completed.journalled"
PASS_TWICE = f"""
from migrd import failpoints
failpoints.arm_from_environment()
for number in range(2):
    failpoints.reached({POINT!r})
    print(number, flush=True)
"""


def run(asked: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PASS_TWICE],
        env={**os.environ, failpoints.VARIABLE: asked},
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(("times", "printed"), [("", ""), ("@1", ""), ("@2", "0\n")])
def test_a_process_is_killed_when_it_reaches_the_point_for_the_nth_time(
    times: str, printed: str
) -> None:
    child = run(f"{POINT}=kill{times}")
    out, _ = child.communicate(timeout=60)
    lines = [line for line in out.splitlines(keepends=True) if line in ("0\n", "1\n")]
    assert child.returncode == -signal.SIGKILL
    assert "".join(lines) == printed


def test_a_stopped_process_goes_on_with_sigcont() -> None:
    child = run(f"{POINT}=stop")
    try:
        _, status = os.waitpid(child.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        child.send_signal(signal.SIGCONT)
        out, _ = child.communicate(timeout=60)
        assert out.endswith("0\n1\n")
    finally:
        child.kill()
        child.wait()


@pytest.mark.parametrize(
    "wrong",
    [
        "nowhere=kill",
        POINT,
        *(f"{POINT}={action}" for action in ("explode", "kill@0", "kill:3")),
        *(f"{POINT}={action}" for action in ("delay", "delay:soon", "delay:-1", "delay:1e9")),
    ],
)
def test_what_there_is_not_is_refused(wrong: str) -> None:
    with pytest.raises(ConfigError, match=failpoints.VARIABLE):
        failpoints.arm(wrong)


def test_a_name_in_the_code_that_is_in_no_list_is_a_defect() -> None:
    with failpoints.observing(lambda _: None), pytest.raises(ValueError, match="no failpoint"):
        failpoints.reached("source.nowhere.done")
