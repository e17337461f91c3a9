"""Told to a real datagram socket, as systemd's own."""

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrd.systemd import Notifier, listen_fds


class Systemd:
    """The receiving end of NOTIFY_SOCKET."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address)
        self.socket.setblocking(False)
        name = "@" + address[1:] if address.startswith("\0") else address
        self.environ = {"NOTIFY_SOCKET": name}

    def heard(self) -> list[str]:
        found = []
        while True:
            try:
                found.append(self.socket.recv(4096).decode())
            except BlockingIOError:
                return found


@pytest.fixture(params=["path", "abstract"])
def systemd(request: pytest.FixtureRequest, short_tmp_path: Path) -> Iterator[Systemd]:
    is_path = request.param == "path"
    made = Systemd(str(short_tmp_path / "n") if is_path else f"\0migrd-test-{os.getpid()}")
    yield made
    made.socket.close()


def test_every_turn_of_the_daemon_is_told(systemd: Systemd) -> None:
    notifier = Notifier(systemd.environ)
    before_us = time.monotonic_ns() // 1000
    assert notifier.is_heard
    assert notifier.ready("2 VMs")
    assert notifier.status("one\nREADY=1 more")
    assert notifier.reloading()
    assert notifier.feed()
    assert notifier.stopping()
    ready, status, reloading, fed, stopping = systemd.heard()
    assert ready == "READY=1\nSTATUS=2 VMs"
    assert status == "STATUS=one READY=1 more", "a line feed would have begun another assignment"
    first, second = reloading.split("\n")
    assert first == "RELOADING=1"
    assert before_us <= int(second.removeprefix("MONOTONIC_USEC=")) <= time.monotonic_ns() // 1000
    assert (fed, stopping) == ("WATCHDOG=1", "STOPPING=1")


def test_the_variables_are_gone_so_that_a_qemu_cannot_speak_in_our_name(systemd: Systemd) -> None:
    systemd.environ |= {"WATCHDOG_USEC": "1000000", "WATCHDOG_PID": str(os.getpid())}
    Notifier(systemd.environ)
    assert systemd.environ == {}


@pytest.mark.parametrize("address", ["", "/nowhere/at/all", "@nobody-listens", "vsock:2:1234", "x"])
def test_without_a_listener_nothing_is_raised_and_nothing_waited_for(address: str) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": address})
    assert not notifier.ready()
    assert not notifier.stopping()
    assert not Notifier({}).is_heard


def test_a_systemd_that_does_not_read_is_not_waited_for(systemd: Systemd) -> None:
    notifier = Notifier(systemd.environ)
    sent = 0
    while notifier.feed():
        sent += 1
        assert sent < 100_000, "the queue of the socket never filled"
    assert not notifier.ready()


async def test_the_watchdog_is_fed_twice_as_often_as_it_must_be(systemd: Systemd) -> None:
    notifier = Notifier({**systemd.environ, "WATCHDOG_USEC": "200000"})
    begun_s = time.monotonic()
    task = asyncio.create_task(notifier.feed_watchdog())
    async with asyncio.timeout(10):
        fed = systemd.heard()
        while len(fed) < 5:
            await asyncio.sleep(0.01)
            fed += systemd.heard()
    took_s = time.monotonic() - begun_s
    task.cancel()
    await asyncio.wait([task])
    assert set(fed) == {"WATCHDOG=1"}
    assert took_s >= 0.39, "five feedings, at 0, 0.1 ... 0.4 s"


async def test_after_a_hang_of_half_the_time_the_watchdog_is_not_fed(systemd: Systemd) -> None:
    lags = iter([0.0, 0.051, 0.01])
    notifier = Notifier({**systemd.environ, "WATCHDOG_USEC": "100000"})
    asked = asyncio.Event()

    def worst_lag_s() -> float:
        lag = next(lags, None)
        if lag is None:
            asked.set()
            return 9.0
        return lag

    task = asyncio.create_task(notifier.feed_watchdog(worst_lag_s))
    await asyncio.wait_for(asked.wait(), 5)
    task.cancel()
    await asyncio.wait([task])
    assert len(systemd.heard()) == 2


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"WATCHDOG_USEC": "0"},
        {"WATCHDOG_USEC": "soon"},
        {"WATCHDOG_USEC": "-5"},
        {"WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"},
    ],
)
async def test_without_a_watchdog_the_task_ends_at_once(
    environ: dict[str, str], systemd: Systemd
) -> None:
    notifier = Notifier({**environ, **systemd.environ})
    assert notifier.watchdog_s is None
    await asyncio.wait_for(notifier.feed_watchdog(), 5)
    assert systemd.heard() == []


HANDED_OVER = """
import os, sys
os.environ["LISTEN_PID"] = str(os.getpid())
from migrd.systemd import listen_fds
found = listen_fds()
again = listen_fds()
assert again == ()
assert not [name for name in os.environ if name.startswith("LISTEN_")]
for one in found:
    assert not os.get_inheritable(one.socket.fileno())
    print(one.name, one.socket.getsockname(), one.socket.gettimeout())
"""


def test_sockets_of_systemd_are_taken_over_by_name(short_tmp_path: Path) -> None:
    api = socket.socket(socket.AF_UNIX)
    path = str(short_tmp_path / "api")
    api.bind(path)
    with api, (short_tmp_path / "file").open("w") as no_socket:
        program = (  # what systemd does between fork and exec
            f"import os; os.dup2({api.fileno()}, 3); os.dup2({no_socket.fileno()}, 4)\n"
            f"os.execv({sys.executable!r}, [{sys.executable!r}, '-c', {HANDED_OVER!r}])"
        )
        told = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "LISTEN_FDS": "2", "LISTEN_FDNAMES": "api:odd"},
            pass_fds=[api.fileno(), no_socket.fileno()],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    os.unlink(path)
    assert told.returncode == 0, told.stderr
    assert told.stdout == f"api {path} 0.0\n"


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"LISTEN_FDS": "1"},
        {"LISTEN_PID": "1", "LISTEN_FDS": "1"},
        {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "-1"},
        {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "many"},
        {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "0"},
    ],
)
def test_sockets_for_another_process_or_none_are_not_taken(environ: dict[str, str]) -> None:
    assert listen_fds(environ) == ()
    assert environ == {}
