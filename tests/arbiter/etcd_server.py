"""Real etcd servers, each a process of the test on loopback ports, with its data in the test's
directory.

    Cluster(binary, directory, members=3)      nothing runs yet
        .start()  .member(0).kill()  .stop()  .resume()  .leader()  .close()

Their election is quicker than by default, so that a test of a lost leader takes a second; it is
still slow enough for a busy machine. Blocking: call from fixtures, or in a thread.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HEARTBEAT_MS = 100
ELECTION_MS = 1000
PATIENCE_S = 40.0


def free_ports(count: int) -> list[int]:
    """Of the loopback; nobody has them for now."""
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in held]
    for server in held:
        server.close()
    return ports


@dataclass(frozen=True)
class ServerTls:
    """PEM files of a server that wants certificates of its clients."""

    cert: Path
    key: Path
    ca: Path


class Member:
    """One etcd."""

    def __init__(self, name: str, client_port: int, peer_port: int, directory: Path) -> None:
        self.name = name
        self.client_port = client_port
        self.peer_port = peer_port
        self.directory = directory
        self.address = "127.0.0.1"
        self.enter: tuple[str, ...] = ()
        """Put before its command: what enters a network namespace."""
        self.scheme = "http"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.address}:{self.client_port}"

    @property
    def peer_url(self) -> str:
        return f"http://{self.address}:{self.peer_port}"

    def run(self, binary: Path, cluster: str, *more: str) -> None:
        """Start it, for the first time or again; see `Cluster.until_ready`."""
        command = [
            *self.enter,
            str(binary),
            *("--name", self.name, "--data-dir", str(self.directory / self.name)),
            *("--listen-client-urls", self.url, "--advertise-client-urls", self.url),
            *("--listen-peer-urls", self.peer_url, "--initial-advertise-peer-urls", self.peer_url),
            *("--initial-cluster", cluster, "--initial-cluster-state", "new"),
            *("--heartbeat-interval", str(HEARTBEAT_MS), "--election-timeout", str(ELECTION_MS)),
            *("--logger", "zap", "--log-level", "error"),
            *more,
        ]
        with open(self.directory / f"{self.name}.log", "ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, and wait for its end."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            self._process.wait(PATIENCE_S)
            self._process = None

    def stop(self) -> None:
        """SIGSTOP: connections are taken, and nothing is answered. Returns when all threads stand
        still: until the signal is taken, an answer may still go out."""
        assert self._process is not None
        self.signal(signal.SIGSTOP)
        end_s = time.monotonic() + PATIENCE_S
        while os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WNOHANG) is None:
            if time.monotonic() > end_s:
                raise TimeoutError(f"{self.name} does not stop")
            time.sleep(0.001)

    def resume(self) -> None:
        self.signal(signal.SIGCONT)

    def ask(self, path: str, message: dict[str, Any] | None = None, within_s: float = 2) -> Any:
        """One request, plain; raises OSError."""
        body = json.dumps(message or {}).encode()
        request = urllib.request.Request(f"{self.url}{path}", body, method="POST")
        try:
            with urllib.request.urlopen(request, timeout=within_s) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as refused:
            with refused:
                raise OSError(f"{refused.code}: {refused.read()!r}") from None


class Cluster:
    """Members that know each other."""

    def __init__(
        self, binary: Path, directory: Path, members: int = 1, tls: ServerTls | None = None
    ) -> None:
        self._binary = binary
        self._tls = tls
        ports = free_ports(2 * members)
        self.members = [
            Member(f"m{n}", ports[2 * n], ports[2 * n + 1], directory) for n in range(members)
        ]
        if tls is not None:
            for member in self.members:
                member.scheme = "https"

    @property
    def urls(self) -> tuple[str, ...]:
        return tuple(member.url for member in self.members)

    @contextlib.contextmanager
    def serving(self) -> Iterator[Cluster]:
        """Started; killed at the end."""
        try:
            self.start()
            yield self
        finally:
            self.close()

    def start(self, only: Sequence[int] | None = None) -> None:
        """Start members that do not run (all, or those), and wait until they serve."""
        cluster = ",".join(f"{m.name}={m.peer_url}" for m in self.members)
        for n, member in enumerate(self.members):
            if not member.is_running and (only is None or n in only):
                member.run(self._binary, cluster, *self._tls_options())
        if self._tls is None:
            self.until_ready()
        else:
            self._until_listening()

    def _tls_options(self) -> list[str]:
        if self._tls is None:
            return []
        tls = self._tls
        return [
            *("--cert-file", str(tls.cert), "--key-file", str(tls.key)),
            *("--client-cert-auth", "--trusted-ca-file", str(tls.ca)),
        ]

    def until_ready(self) -> None:
        """Every member that runs knows a leader and answers a linearizable read."""
        for member in self.members:
            if member.is_running:
                _until(lambda m=member: m.ask("/v3/kv/range", {"key": "AA=="}), member.directory)

    def _until_listening(self) -> None:
        for member in self.members:
            address = (member.address, member.client_port)
            _until(lambda a=address: socket.create_connection(a, 1).close(), member.directory)

    def leader(self) -> Member:
        """The member that leads now."""
        by_id = {}
        leader = None
        for member in self.members:
            with contextlib.suppress(OSError):
                status = member.ask("/v3/maintenance/status")
                by_id[status["header"]["member_id"]] = member
                leader = status.get("leader", leader)
        assert leader in by_id, "the leader does not answer"
        return by_id[leader]

    def close(self) -> None:
        for member in self.members:
            member.kill()


def _until(asked: Any, directory: Path) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while True:
        try:
            asked()
        except OSError as failure:
            if time.monotonic() > deadline_s:
                logs = "".join(p.read_text()[-2000:] for p in directory.glob("*.log"))
                raise AssertionError(f"etcd does not come up: {failure}\n{logs}") from failure
            time.sleep(0.05)
        else:
            return
