"""Processes by name: reused pids, other boots, zombies, and deaths seen through a pidfd."""

import asyncio
import contextlib
import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from migrd.engine.threads import in_thread
from migrd.errors import VmmRefused, VmmUnreachable
from migrd.processes import process
from migrd.processes.process import (
    Life,
    ProcessIdentity,
    WatchedProcess,
    hold_child,
    identify,
    kill_once,
    look_up,
    look_up_life,
)
from migrd.qemu.attachment import identify_listener, listener_pid
from migrd.qemu.sockets import open_socket
from migrd.qemu.wire import MonitorBusy

LISTEN = """
import socket, sys, time
plain = socket.socket(socket.AF_UNIX)
plain.bind(sys.argv[1])
plain.listen(1)
print("listening", flush=True)
time.sleep(60)
"""


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A process that does nothing; dead and reaped at the end, by whom ever."""
    made = subprocess.Popen(["sleep", "60"])
    yield made
    made.kill()
    made.wait()


def named(pid: int) -> ProcessIdentity:
    identity = identify(pid)
    assert identity is not None
    return identity


async def watched(identity: ProcessIdentity, *, is_ours: bool = True) -> WatchedProcess:
    life, pidfd = await in_thread(look_up, identity)
    return WatchedProcess(identity, life, pidfd, is_ours=is_ours)


def started(seconds: str) -> int:
    """Pid of a child that nobody but a WatchedProcess will reap."""
    child = subprocess.Popen(["sleep", seconds])
    child.returncode = 0  # as in migrd.qemu.spawn
    return child.pid


def wait_exited(pidfd: int) -> None:
    """Without reaping, and without a turn of the event loop."""
    os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOWAIT)


def end(child: subprocess.Popen[bytes]) -> None:
    """Killed and reaped, without a turn of the event loop."""
    child.kill()
    child.wait()


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def is_zombie_or_there(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_a_living_process_is_known_again_and_its_identity_survives_json(
    child: subprocess.Popen[bytes],
) -> None:
    identity = named(child.pid)
    assert ProcessIdentity.of_json(dict(identity.as_json())) == identity == named(child.pid)
    assert identity != named(os.getpid())
    assert look_up_life(identity) is Life.ALIVE


@pytest.mark.parametrize(
    "fields",
    [
        None,
        [],
        {},
        {"pid": 0, "start_ticks": 1, "boot_id": "x", "pid_namespace": 1},
        {"pid": -1, "start_ticks": 1, "boot_id": "x", "pid_namespace": 1},
        {"pid": True, "start_ticks": 1, "boot_id": "x", "pid_namespace": 1},
        {"pid": "1", "start_ticks": 1, "boot_id": "x", "pid_namespace": 1},
        {"pid": 1, "start_ticks": 1, "boot_id": None, "pid_namespace": 1},
    ],
)
def test_what_names_no_process_is_no_identity(fields: object) -> None:
    assert ProcessIdentity.of_json(fields) is None


def test_a_name_with_brackets_and_blanks_does_not_shift_the_fields(tmp_path: Path) -> None:
    odd = tmp_path / "a) S 1 (b"
    shutil.copy(shutil.which("sleep") or "/bin/sleep", odd)
    with subprocess.Popen([odd, "60"]) as made:
        try:
            assert abs(named(made.pid).start_ticks - named(os.getpid()).start_ticks) < 10_000_000
            assert look_up_life(named(made.pid)) is Life.ALIVE
        finally:
            made.kill()


def test_a_pid_used_again_is_another_process_and_is_not_signalled(
    child: subprocess.Popen[bytes],
) -> None:
    earlier = replace(named(child.pid), start_ticks=named(child.pid).start_ticks - 1)
    assert look_up(earlier) == (Life.DEAD, None)
    kill_once(earlier)
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(timeout=0.05)
    kill_once(named(child.pid))
    assert child.wait(timeout=5) == -signal.SIGKILL


def test_another_boot_is_proof_of_death_and_another_pid_namespace_proves_nothing(
    child: subprocess.Popen[bytes],
) -> None:
    identity = named(child.pid)
    assert look_up(replace(identity, boot_id="another")) == (Life.DEAD, None)
    assert look_up(replace(identity, pid_namespace=1)) == (Life.UNKNOWN, None)


def test_a_process_that_was_reaped_is_dead_and_so_is_a_zombie() -> None:
    made = subprocess.Popen(["sleep", "60"])
    identity = named(made.pid)
    made.kill()
    os.waitid(os.P_PID, made.pid, os.WEXITED | os.WNOWAIT)  # exited, and not reaped: a zombie
    assert look_up_life(identity) is Life.DEAD
    assert identify(made.pid) is None
    made.wait()
    assert look_up_life(identity) is Life.DEAD


def test_a_pid_that_is_a_thread_now_is_not_the_process_it_was() -> None:
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    try:
        assert thread.native_id is not None
        identity = replace(named(os.getpid()), pid=thread.native_id)
        assert look_up_life(identity) is Life.DEAD
    finally:
        end.set()
        thread.join()


def test_what_cannot_be_read_is_unknown_and_not_dead(
    child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    identity, fds = named(child.pid), open_fds()
    with monkeypatch.context() as patch:
        patch.setattr(process, "_start_ticks", lambda pid: None)  # /proc with hidepid
        assert look_up(identity) == (Life.UNKNOWN, None)
        assert identify(child.pid) is None

    def refuse(pid: int) -> int:
        raise OSError(errno.EMFILE, "too many files")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pidfd_open", refuse)
        assert look_up(identity) == (Life.UNKNOWN, None)
    assert open_fds() == fds


async def test_a_sigkill_is_seen_within_milliseconds_and_leaves_no_zombie_and_no_descriptor() -> (
    None
):
    fds = open_fds()
    pid = started("60")
    identity, pidfd = await in_thread(hold_child, pid)
    watch = WatchedProcess(identity, Life.ALIVE, pidfd, is_ours=True)
    seen: list[str] = []
    watch.call_when_dead(lambda: seen.append("dead"))
    assert not watch.is_dead
    began_s = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    assert await watch.wait_dead(within_s=5)
    took_s = time.monotonic() - began_s
    await asyncio.sleep(0)
    assert seen == ["dead"]
    watch.call_when_dead(lambda: seen.append("late"))
    await asyncio.sleep(0)
    assert seen == ["dead", "late"]
    assert watch.exit_code == -signal.SIGKILL
    assert watch.ending == "killed by SIGKILL"
    assert not is_zombie_or_there(pid)
    assert open_fds() == fds
    assert took_s < 0.1, f"{took_s * 1000:.1f} ms"


async def test_a_death_is_known_before_the_loop_has_turned() -> None:
    pid = started("0")
    identity, pidfd = await in_thread(hold_child, pid)
    watch = WatchedProcess(identity, Life.ALIVE, pidfd, is_ours=True)
    wait_exited(pidfd)
    assert watch.is_dead
    assert watch.ending == "exit code 0"
    watch.kill()
    assert watch.pid == pid


async def test_a_child_of_somebody_else_is_seen_dead_without_its_exit_code(
    child: subprocess.Popen[bytes],
) -> None:
    watch = await watched(await in_thread(named, child.pid))
    end(child)
    assert await watch.wait_dead(within_s=5)
    assert watch.exit_code is None
    assert watch.ending == "exit code not known"


async def test_an_adopted_process_and_an_unknown_one_are_never_killed(
    child: subprocess.Popen[bytes],
) -> None:
    identity = await in_thread(named, child.pid)
    adopted = await watched(identity, is_ours=False)
    unknown = WatchedProcess(None, Life.UNKNOWN, None, is_ours=True)
    for watch in (adopted, unknown):
        with pytest.raises(VmmRefused):
            watch.kill()
        assert not await watch.wait_dead(within_s=0.02)
        assert not watch.is_dead
    assert unknown.pid is None
    adopted.close()
    adopted.close()
    assert child.poll() is None


async def test_watching_ends_without_touching_the_process(child: subprocess.Popen[bytes]) -> None:
    fds = open_fds()
    watch = await watched(await in_thread(named, child.pid))
    watch.close()
    assert open_fds() == fds
    assert child.poll() is None
    assert not watch.is_dead  # it said so last, and looks no more


@contextlib.contextmanager
def listening(path: Path, script: str = LISTEN) -> Iterator[subprocess.Popen[str]]:
    argv = [sys.executable, "-c", script, str(path)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as made:
        try:
            assert made.stdout is not None
            assert made.stdout.readline() == "listening\n"
            yield made
        finally:
            made.kill()


def test_the_process_behind_a_socket_is_the_one_that_listens_on_it(short_tmp_path: Path) -> None:
    path = short_tmp_path / "vm.qmp"
    with listening(path) as made:
        assert listener_pid(path) == made.pid
        assert identify_listener(path) == named(made.pid)
    with pytest.raises(VmmUnreachable):
        listener_pid(path)


def test_who_made_a_socket_for_others_is_not_taken_for_the_qemu(short_tmp_path: Path) -> None:
    path = short_tmp_path / "passed.qmp"
    with socket.socket(socket.AF_UNIX) as plain:
        plain.bind(str(path))
        plain.listen(1)  # this process listens, and its command line does not name the socket
        assert listener_pid(path) == os.getpid()
        assert identify_listener(path) is None


def test_a_listener_whose_queue_is_full_is_found_by_what_it_has_open(short_tmp_path: Path) -> None:
    path = short_tmp_path / "vm.qmp"
    with listening(path) as made, contextlib.ExitStack() as others:
        with contextlib.suppress(MonitorBusy):
            for _ in range(5):
                others.enter_context(open_socket(path))
        with pytest.raises(MonitorBusy):
            listener_pid(path)
        assert identify_listener(path) == named(made.pid)
        link = short_tmp_path / "link.qmp"
        link.symlink_to(path)
        assert identify_listener(link) == named(made.pid)
