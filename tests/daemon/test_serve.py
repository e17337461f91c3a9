"""The daemon as systemd and Prometheus see it: a real process, a real socket."""

import asyncio
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

CONFIG = """
[host]
name = "host-a"
state_dir = "{dir}/state"
runtime_dir = "{dir}/run"
profiles_dir = "{dir}/profiles"
"""


class OverUnix(http.client.HTTPConnection):
    """Blocking HTTP to a unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=10)
        self._path = str(path)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(10)
        self.sock.connect(self._path)


def get(path: Path, target: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = OverUnix(path)
    connection.request("GET", target, headers=headers)
    response = connection.getresponse()
    answer = response.status, dict(response.getheaders()), response.read()
    connection.close()
    return answer


class Told:
    """What the daemon told systemd."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.setblocking(False)
        self.all: list[str] = []

    async def until(self, wanted: str, within_s: float = 30) -> None:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(within_s):
            while wanted not in self.all:
                message = await loop.sock_recv(self._socket, 4096)
                self.all += message.decode().splitlines()

    def close(self) -> None:
        self._socket.close()


@asynccontextmanager
async def serving(root: Path) -> AsyncIterator[tuple[asyncio.subprocess.Process, Told]]:
    (root / "migrd.toml").write_text(CONFIG.format(dir=root))
    told = Told(root / "notify")
    environ = {
        **os.environ,
        "NOTIFY_SOCKET": str(root / "notify"),
        "WATCHDOG_USEC": "400000",
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "migrd", "serve", "--config", str(root / "migrd.toml"),
        env=environ, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        yield process, told
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()
        told.close()


async def test_systemd_hears_of_its_start_its_life_and_its_end(short_tmp_path: Path) -> None:
    async with serving(short_tmp_path) as (process, told):
        await told.until("READY=1")
        await told.until("WATCHDOG=1")
        socket_path = short_tmp_path / "run" / "api.sock"
        status, _, _ = await asyncio.to_thread(get, socket_path, "/healthz")
        assert status == 200
        assert socket_path.stat().st_mode & 0o777 == 0o660
        process.send_signal(signal.SIGTERM)
        await told.until("STOPPING=1")
        _, stderr = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 0, stderr.decode()
    lines = [json.loads(line) for line in stderr.splitlines()]
    assert any(line["event"] == "ready" and line["host"] == "host-a" for line in lines)
    assert not [line for line in lines if line["level"] in ("error", "critical")]


async def test_prometheus_gets_metrics_that_pass_its_own_check(
    short_tmp_path: Path, promtool: Path
) -> None:
    async with serving(short_tmp_path) as (_, told):
        await told.until("READY=1")
        path = short_tmp_path / "run" / "api.sock"
        status, headers, body = await asyncio.to_thread(get, path, "/metrics")
    assert status == 200
    assert headers.get("Content-Type", "").startswith("text/plain; version=0.0.4"), headers
    for name in (b"migrd_build_info", b"migrd_migrations_active", b"process_cpu_seconds_total"):
        assert name in body

    def check() -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [promtool, "check", "metrics"], input=body, capture_output=True, timeout=60
        )

    checked = await asyncio.to_thread(check)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")


async def test_the_hosts_hardware_is_shown_whatever_it_has(short_tmp_path: Path) -> None:
    async with serving(short_tmp_path) as (process, told):
        await told.until("READY=1")
        path = short_tmp_path / "run" / "api.sock"
        _, _, body = await asyncio.to_thread(get, path, "/v1/host")
        host = json.loads(body)
        status, _, body = await asyncio.to_thread(get, path, "/v1/devices?limit=1000")
        process.terminate()
        _, stderr = await asyncio.wait_for(process.communicate(), 30)
    assert host["kernel"]["release"] == os.uname().release
    assert host["all_iommus_track_dirty_why"]
    assert host["all_iommus_track_dirty"] is None or host["iommus"]
    assert status == 200
    assert len(json.loads(body)["items"]) == min(host["devices"], 1000)
    lines = [json.loads(line) for line in stderr.splitlines()]
    assert not [line for line in lines if line["level"] in ("error", "critical")]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("[watch]\ninterval = 1\n", "did you mean watch.interval_s?"),
        ('[api.tcp]\nhost = "127.0.0.1"\n', "never open without authentication"),
    ],
)
async def test_with_a_wrong_configuration_it_does_not_start_and_says_why(
    short_tmp_path: Path, more: str, said: str
) -> None:
    config = short_tmp_path / "migrd.toml"
    config.write_text(CONFIG.format(dir=short_tmp_path) + more)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "migrd", "serve", "--config", str(config),
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    _, stderr = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode not in (0, None)
    assert said in " ".join(stderr.decode().split())
    assert b"Traceback" not in stderr
    assert not (short_tmp_path / "state").exists()
