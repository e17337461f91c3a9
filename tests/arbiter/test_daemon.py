"""A real daemon with a real etcd: what operators and Prometheus see when it goes and comes back."""

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from migrd.config import load
from migrd.doctor.arbiter import look_at_arbiter
from migrd.doctor.finding import Finding, Status
from migrd.engine.threads import in_thread
from tests.arbiter.etcd_server import Cluster, free_ports

PATIENCE_S = 60.0
CONFIG = """
[host]
name = "alpha"
state_dir = "{dir}/state"
runtime_dir = "{dir}/run"
profiles_dir = "{dir}/profiles"
[arbiter]
kind = "etcd"
endpoints = {urls}
request_timeout_ms = 6000
{more}
"""


@pytest.fixture
def own(etcd_binary: Path, tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(etcd_binary, tmp_path).serving() as cluster:
        yield cluster


def configured(root: Path, *urls: str, more: str = "") -> Path:
    (root / "profiles").mkdir(exist_ok=True)
    path = root / "migrd.toml"
    path.write_text(CONFIG.format(dir=root, urls=json.dumps(urls), more=more))
    return path


class Daemon:
    """One that runs, asked over its socket."""

    def __init__(self, root: Path, session: aiohttp.ClientSession) -> None:
        self._root = root
        self._session = session

    async def get(self, target: str) -> tuple[int, Any]:
        async with self._session.get(f"http://migrd{target}") as answer:
            text = await answer.text()
            is_json = "json" in answer.content_type
            return answer.status, json.loads(text) if is_json else text

    async def until(self, target: str, condition: Callable[[int, Any], object]) -> Any:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                with contextlib.suppress(aiohttp.ClientError):
                    status, body = await self.get(target)
                    if condition(status, body):
                        return body
                await asyncio.sleep(0.05)

    async def events(self) -> list[str]:
        """The arbiter's, from the first on."""
        kinds: list[str] = []
        headers = {"Last-Event-ID": "1"}
        async with self._session.get("http://migrd/v1/events", headers=headers) as answer:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1):
                    async for line in answer.content:
                        kinds += re.findall(r"^event: (arbiter\..*)$", line.decode().rstrip())
        return kinds

    async def shown(self, *words: str) -> str:
        """What the command line says."""
        command = [sys.executable, "-m", "migrd", "--socket", str(self._root / "run/api.sock")]
        done = await in_thread(
            subprocess.run, [*command, *words], capture_output=True, text=True, check=False
        )
        return str(done.stdout)


def _started(root: Path) -> subprocess.Popen[bytes]:
    with open(root / "migrd.log", "wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "migrd", "serve", "--config", str(root / "migrd.toml")],
            env={k: v for k, v in os.environ.items() if k != "NOTIFY_SOCKET"},
            stderr=log,
        )


@contextlib.asynccontextmanager
async def running(root: Path) -> AsyncIterator[Daemon]:
    process = _started(root)
    connector = aiohttp.UnixConnector(path=str(root / "run" / "api.sock"))
    try:
        async with aiohttp.ClientSession(connector=connector) as session:
            daemon = Daemon(root, session)
            await daemon.until("/healthz", lambda status, body: status == 200)
            yield daemon
        process.send_signal(signal.SIGTERM)
        assert await in_thread(process.wait, 30) == 0
    finally:
        process.kill()
        await in_thread(process.wait, 30)


async def test_readiness_names_the_arbiter_while_it_is_away_and_the_daemon_runs_on(
    own: Cluster, short_tmp_path: Path
) -> None:
    configured(short_tmp_path, *own.urls)
    async with running(short_tmp_path) as daemon:
        await daemon.until("/readyz", lambda status, body: status == 200)
        _, host = await daemon.get("/v1/host")
        told = host["arbiter"]
        assert (told["kind"], told["reachable"], told["problem"]) == ("etcd", True, None)
        assert (told["hosts"], told["endpoints"]) == (["alpha"], list(own.urls))
        assert "reachable since" in await daemon.shown("host")
        await in_thread(own.members[0].kill)
        problem = await daemon.until("/readyz", lambda status, body: status == 503)
        (violation,) = problem["violations"]
        assert violation["field"] == "arbiter"
        assert "Connection refused" in violation["message"]
        assert own.urls[0] in violation["message"]
        shown = await daemon.shown("host")
        assert "not reachable since" in shown
        assert "not ready to migrate:" in shown
        assert (await daemon.get("/healthz"))[0] == 200
        await daemon.until("/metrics", lambda status, body: "\nmigrd_arbiter_up 0.0" in body)
        await in_thread(own.start)
        await daemon.until("/readyz", lambda status, body: status == 200)
        text = await daemon.until("/metrics", lambda s, body: "\nmigrd_arbiter_up 1.0" in body)
        assert 'migrd_arbiter_requests_total{op="range",result="ok"}' in text
        assert await daemon.events() == [
            "arbiter.reachable",
            "arbiter.unreachable",
            "arbiter.reachable",
        ]
    everything = {"key": "AA==", "range_end": "AA=="}
    listed = await in_thread(own.members[0].ask, "/v3/kv/range", everything)
    assert "kvs" not in listed, "it took itself off the roster"


async def test_a_daemon_starts_without_its_arbiter_and_says_so(short_tmp_path: Path) -> None:
    (port,) = free_ports(1)
    configured(short_tmp_path, f"http://127.0.0.1:{port}")
    async with running(short_tmp_path) as daemon:
        problem = await daemon.until("/readyz", lambda s, b: s == 503 and "refused" in str(b))
        assert [v["field"] for v in problem["violations"]] == ["arbiter"]
        assert (await daemon.get("/v1/vms"))[0] == 200


def _bad(findings: Any) -> list[Finding]:
    return [finding for finding in findings if finding.status is not Status.OK]


async def test_the_doctor_finds_a_healthy_cluster_healthy_and_changes_nothing(
    own: Cluster, short_tmp_path: Path
) -> None:
    settings = await in_thread(load, configured(short_tmp_path, *own.urls), {})
    findings = list(await look_at_arbiter(settings))
    assert _bad(findings) == []
    said = " ".join(finding.message for finding in findings)
    for words in ("etcd 3.", "there is a quorum", "pace of this host's clock"):
        assert words in said
    status = await in_thread(own.members[0].ask, "/v3/maintenance/status")
    assert status["header"]["revision"] == "1", "nothing was written"


async def test_the_doctor_tells_a_member_that_is_down_from_a_cluster_that_is(
    trio: Cluster, short_tmp_path: Path
) -> None:
    settings = await in_thread(load, configured(short_tmp_path, *trio.urls), {})
    await in_thread(trio.members[0].kill)
    await in_thread(trio.until_ready)
    (one,) = _bad(await look_at_arbiter(settings))
    assert (one.status, one.name) == (Status.WARN, f"arbiter {trio.urls[0]}")
    await in_thread(trio.members[1].kill)
    findings = _bad(await look_at_arbiter(settings))
    assert {f.name for f in findings if f.status is Status.FAIL} >= {"arbiter writes"}
    await in_thread(trio.members[2].kill)
    findings = _bad(await look_at_arbiter(settings))
    assert [f.status for f in findings] == [Status.FAIL] * 3
    assert all("firewall" in f.cure for f in findings)


async def test_the_doctor_says_what_cannot_be_read(own: Cluster, short_tmp_path: Path) -> None:
    path = configured(short_tmp_path, *own.urls, more='ca = "/nonexistent/ca.pem"')
    (finding,) = await look_at_arbiter(await in_thread(load, path, {}))
    assert finding.status is Status.FAIL
    assert "/nonexistent/ca.pem" in finding.message
