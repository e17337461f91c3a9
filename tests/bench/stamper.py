"""Stamps each heartbeat of each guest, in a process of its own: python -m tests.bench.stamper

    QEMU --isa-debugcon--> chardev --connects--> <path> --> (pid of the QEMU, time, byte)

One thread and one clock for all QEMUs. A process of its own, so that what a driver under test does
in Python cannot make a stamp late. Asked on stdin for `<from_s> <to_s>`, it answers with one line
of JSON: for each pid that printed in between, its [time, byte] pairs.
"""

import contextlib
import json
import os
import select
import socket
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tests.bench.guest import BEAT_S

KEPT: Final = 60_000
"""Beats kept of each QEMU: a minute."""

Beats = dict[int, list[tuple[float, int]]]


class Stamper:
    """The process's side: listens at `path` until stdin ends."""

    def __init__(self, path: str) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(path)
        self._listener.listen(16)
        self._pids: dict[int, int] = {}
        self._sockets: dict[int, socket.socket] = {}
        self._beats: dict[int, deque[tuple[float, int]]] = {}
        self._poll = select.epoll()

    def run(self) -> None:
        self._poll.register(self._listener.fileno(), select.EPOLLIN)
        self._poll.register(0, select.EPOLLIN)
        while True:
            for fd, _ in self._poll.poll():
                if fd == 0:
                    line = sys.stdin.readline()
                    if not line:
                        return
                    self._answer(*(float(word) for word in line.split()))
                elif fd == self._listener.fileno():
                    self._accept()
                else:
                    self._stamp(fd)

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        ucred = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        pid = int(struct.unpack("3i", ucred)[0])
        self._sockets[connection.fileno()] = connection
        self._pids[connection.fileno()] = pid
        self._beats[pid] = deque(maxlen=KEPT)
        self._poll.register(connection.fileno(), select.EPOLLIN)

    def _stamp(self, fd: int) -> None:
        try:
            printed = self._sockets[fd].recv(4096)
        except ConnectionError:
            printed = b""
        now_s = time.monotonic()
        if not printed:
            self._poll.unregister(fd)
            self._sockets.pop(fd).close()
            self._pids.pop(fd)
            return
        self._beats[self._pids[fd]].extend((now_s, byte) for byte in printed)

    def _answer(self, from_s: float, to_s: float) -> None:
        found = {
            pid: [beat for beat in beats if from_s <= beat[0] <= to_s]
            for pid, beats in self._beats.items()
        }
        sys.stdout.write(json.dumps({pid: beats for pid, beats in found.items() if beats}) + "\n")
        sys.stdout.flush()
        for pid in set(self._beats) - set(self._pids.values()):
            beats = self._beats[pid]
            if not beats or beats[-1][0] < from_s - 60:
                del self._beats[pid]


class Stamps:
    """The benchmark's side."""

    def __init__(self, child: "subprocess.Popen[str]", path: Path) -> None:
        self._child = child
        self.path = path

    def between(self, from_s: float, to_s: float) -> Beats:
        """Beats of every QEMU that printed. Blocking."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(f"{from_s} {to_s}\n")
        self._child.stdin.flush()
        answer = json.loads(self._child.stdout.readline())
        return {int(pid): [(at_s, byte) for at_s, byte in got] for pid, got in answer.items()}

    def chardev(self) -> list[str]:
        """QEMU's arguments for a guest that is stamped here."""
        return [
            *("-chardev", f"socket,id=beats,path={self.path}"),
            *("-device", "isa-debugcon,iobase=0xe9,chardev=beats"),
        ]


@contextlib.contextmanager
def stamping(path: Path) -> Iterator[Stamps]:
    """A stamper that listens at `path`, ready inside."""
    command = [sys.executable, "-m", "tests.bench.stamper", os.fspath(path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n", "the stamper did not start"
        yield Stamps(child, path)
        assert child.stdin is not None
        child.stdin.close()  # ends it


def blackout_s(beats: Beats, source: int, destination: int) -> float:
    """How long the guest stood still between two QEMUs, as its heartbeat shows.

    Raises AssertionError when the count has a gap or a repeat at the seam.
    """
    last_at_s, last = beats[source][-1]
    first_at_s, first = beats[destination][0]
    assert first == (last + 1) % 256, f"the guest counted {last} and then {first}"
    assert first_at_s > last_at_s, "it ran on the destination before it stopped on the source"
    return first_at_s - last_at_s - BEAT_S


def main() -> None:
    stamper = Stamper(sys.argv[1])
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    stamper.run()


if __name__ == "__main__":
    main()
