"""Who runs the guest, asked of every QEMU itself over a monitor that migrd does not know of.

    QEMU a   ...asked: running........................asked: running   <- after b was seen: twice
    QEMU b   ................asked: running (b has the guest now)

A QEMU takes one guest in its life, and each migration has a new one. So once a younger QEMU has
been seen running, none that ran before may be seen running by a question asked after that. The
order of two answers is proven by the times of asking and answering; "at the same moment" never is.

The monitor comes with the binary: a script that migrd takes for QEMU adds it (`with_monitor`).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from dataclasses import dataclass, field
from pathlib import Path

LOOK_S = 0.03
_SCRIPT = """#!/bin/sh
case "$*" in
*-bios*) exec {binary} "$@" -qmp unix:{directory}/$$.qmp,server=on,wait=off ;;
*) exec {binary} "$@" ;;
esac
"""
"""A QEMU that is only asked what it can do has no guest, and says that it runs."""


def with_monitor(binary: Path, directory: Path) -> Path:
    """QEMU with one monitor more, at <directory>/<pid>.qmp. Blocking."""
    directory.mkdir()
    script = directory / "qemu-system-x86_64"
    script.write_text(_SCRIPT.format(binary=binary, directory=directory))
    script.chmod(0o755)
    return script


@dataclass
class Ground:
    """What is seen of all QEMUs of a fleet."""

    directory: Path
    violations: list[str] = field(default_factory=list)
    runs: int | None = None
    """The pid of the QEMU that was seen running last."""
    answers: int = 0
    _since_s: float = 0.0
    """When that was proven."""
    _ran: set[int] = field(default_factory=set)
    _watched: dict[Path, asyncio.Task[None]] = field(default_factory=dict)

    async def watch(self) -> None:
        """Until cancelled."""
        try:
            while True:
                for socket in await asyncio.to_thread(self._sockets):
                    if socket not in self._watched:
                        self._watched[socket] = asyncio.create_task(self._follow(socket))
                await asyncio.sleep(LOOK_S)
        finally:
            for task in self._watched.values():
                task.cancel()
            if self._watched:
                await asyncio.wait(self._watched.values())

    def has_run(self, pid: int) -> bool:
        return pid in self._ran

    def _sockets(self) -> list[Path]:
        return sorted(self.directory.glob("*.qmp"))

    async def _follow(self, socket: Path) -> None:
        pid = int(socket.stem)
        with contextlib.suppress(OSError, EOFError, ValueError):
            reader, writer = await asyncio.open_unix_connection(str(socket))
            try:
                await _ask(reader, writer, "qmp_capabilities")
                while True:
                    asked_s = time.monotonic()
                    status = await _ask(reader, writer, "query-status")
                    self.saw(pid, str(status["status"]), asked_s, time.monotonic())
                    await asyncio.sleep(LOOK_S)
            finally:
                writer.close()
        await asyncio.sleep(LOOK_S)
        await asyncio.to_thread(_forget_if_dead, pid, socket)
        self._watched.pop(socket, None)

    def saw(self, pid: int, status: str, asked_s: float, answered_s: float) -> None:
        """An answer: the QEMU was in this state at some moment between the two."""
        self.answers += 1
        if status != "running":
            return
        if pid == self.runs:
            return
        if pid not in self._ran:
            self._ran.add(pid)
            self.runs, self._since_s = pid, answered_s
        elif asked_s > self._since_s:
            self.violations.append(f"QEMU {pid} runs although {self.runs} has run since")


def _forget_if_dead(pid: int, socket: Path) -> None:
    """A QEMU that was killed leaves its socket. Blocking."""
    if not Path(f"/proc/{pid}").exists():
        socket.unlink(missing_ok=True)


async def _ask(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, command: str
) -> dict[str, object]:
    writer.write(json.dumps({"execute": command}).encode() + b"\n")
    while line := await reader.readline():
        answer = json.loads(line)
        if "return" in answer:
            return dict(answer["return"])
        if "error" in answer:
            raise ValueError(f"{command}: {answer['error']}")
    raise EOFError(command)
