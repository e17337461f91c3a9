"""Many QEMUs that are all monitor: python -m tests.bench.monitors <directory> <count>

    <directory>/adopt/vm-0.qmp  vm-0.oob.qmp      for the daemon
    <directory>/plain/vm-0.qmp                    for the reference

A process for each, as it is in life: the daemon holds a pidfd of each and looks at it. They are
forked, wait in poll(2), and answer with ready bytes: the machine's time is the clients'. The
sockets' names stand on the command line, because an adopted QEMU is known by that.

Asked on stdin, it says how many commands came on the daemon's sockets, and how many on the others.
"""

import contextlib
import json
import mmap
import os
import select
import signal
import socket
import struct
import sys
from pathlib import Path
from typing import Any, Final

SCHEMA: Final = Path(__file__).parent.parent / "qemu" / "schemas" / "10.0.json"
VERSION: Final = {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": "bench"}
ANSWERS: Final[dict[str, Any]] = {
    "qmp_capabilities": {},
    "query-status": {"status": "running", "running": True},
    "query-migrate": {},
    "query-memory-size-summary": {"base-memory": 1 << 30, "plugged-memory": 0},
    "query-kvm": {"enabled": True, "present": True},
    "qom-list": [],
    "qom-get": "pc-q35-10.0-machine",
}
_COUNTS: Final = struct.Struct("QQ")


class Monitors:
    """What one process serves until it is killed."""

    def __init__(self, counts: mmap.mmap, at: int) -> None:
        self._counts, self._at = counts, at
        greeting = {"QMP": {"version": VERSION, "capabilities": ["oob"]}}
        self._greeting = json.dumps(greeting).encode() + b"\r\n"
        self._answers = {name: json.dumps(one).encode() for name, one in ANSWERS.items()}
        self._answers["query-qmp-schema"] = SCHEMA.read_bytes().replace(b"\n", b" ")
        self._poll = select.poll()
        self._listeners: dict[int, tuple[socket.socket, int]] = {}
        self._clients: dict[int, tuple[socket.socket, int]] = {}

    def listen(self, path: Path, count: int) -> None:
        """`count`: which of the two counts its commands belong to."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(os.fspath(path))
        listener.listen(1)
        self._listeners[listener.fileno()] = listener, count
        self._poll.register(listener.fileno(), select.POLLIN)

    def serve(self) -> None:
        while True:
            for fd, _ in self._poll.poll():
                if fd in self._listeners:
                    listener, count = self._listeners[fd]
                    client, _ = listener.accept()
                    self._clients[client.fileno()] = client, count
                    self._poll.register(client.fileno(), select.POLLIN)
                    _send(client, self._greeting)
                else:
                    self._answer(fd)

    def _answer(self, fd: int) -> None:
        client, count = self._clients[fd]
        try:
            received = client.recv(65536)
        except ConnectionError:
            received = b""
        if not received:
            self._poll.unregister(fd)
            self._clients.pop(fd)
            client.close()
            return
        decoder, text = json.JSONDecoder(), received.decode()
        while text := text.strip():
            message, end = decoder.raw_decode(text)  # what a client sends comes in one piece
            text = text[end:]
            self._count(count)
            result = self._answers.get(message["execute"], b"{}")
            id_ = b', "id": ' + json.dumps(message["id"]).encode() if "id" in message else b""
            _send(client, b'{"return": %b%b}\r\n' % (result, id_))

    def _count(self, which: int) -> None:
        both = list(_COUNTS.unpack_from(self._counts, self._at))
        both[which] += 1
        _COUNTS.pack_into(self._counts, self._at, *both)


def _send(client: socket.socket, payload: bytes) -> None:
    with contextlib.suppress(ConnectionError):  # gone: the poll says so
        client.sendall(payload)


def main() -> None:
    directory, count = Path(sys.argv[1]), int(sys.argv[2])
    names = [f"vm-{n}" for n in range(count)]
    wanted = [f"{name}.qmp" for name in names]
    if sys.argv[3:] != wanted:  # see the module: known by its command line
        module = ["-m", "tests.bench.monitors"]
        os.execv(sys.executable, [sys.executable, *module, *sys.argv[1:3], *wanted])
    for part in ("adopt", "plain"):
        (directory / part).mkdir()
    counts = mmap.mmap(-1, count * _COUNTS.size)
    children = []
    listening, listens = os.pipe()
    for number, name in enumerate(names):
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            monitors = Monitors(counts, number * _COUNTS.size)
            monitors.listen(directory / "adopt" / f"{name}.oob.qmp", 0)
            monitors.listen(directory / "adopt" / f"{name}.qmp", 0)
            monitors.listen(directory / "plain" / f"{name}.qmp", 1)
            os.write(listens, b".")
            monitors.serve()
        children.append(pid)
    try:
        for _ in names:
            os.read(listening, 1)
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        while sys.stdin.readline():
            rows = list(_COUNTS.iter_unpack(counts))
            sys.stdout.write(f"{sum(row[0] for row in rows)} {sum(row[1] for row in rows)}\n")
            sys.stdout.flush()
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
