"""Processes that hand their guest over: the two examples, and one that is scripted.

    ExampleVmm     deploy/examples/direct/ in C or Python, as a process of its own
    ScriptedVmm    tests/fakes/scripted_vmm.py, in this process: does what it is told

All have a guest that counts in the first word of its memory as long as it may run.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from functools import cache
from pathlib import Path
from typing import Protocol

from migrd.direct.handoff import HandedOver
from migrd.direct.handoff_listener import HandoffLimits, HandoffListener
from tests.fakes.scripted_vmm import ScriptedVmm

ROOT = Path(__file__).parent.parent.parent
HEADER_DIRECTORY = ROOT / "migrd/direct/include"
EXAMPLES = ROOT / "deploy/examples/direct"
WAIT_S = 30.0
MIB = 1 << 20


class Host:
    """A daemon's side: a listener, and who came to it."""

    def __init__(self, directory: Path) -> None:
        self.socket = directory / "direct.sock"
        self.came: list[HandedOver] = []
        """Each call of on_client: twice the same object when it offered its memory later."""
        self.gone: list[HandedOver] = []
        self.listener: HandoffListener

    @asynccontextmanager
    async def up(self, limits: HandoffLimits | None = None) -> AsyncIterator[Host]:
        """Listening. May be entered again: a daemon that was restarted."""
        async with HandoffListener(
            self.socket,
            on_client=self.came.append,
            on_gone=self.gone.append,
            limits=limits,
        ) as self.listener:
            yield self

    async def client(self, vm: str = "guest") -> HandedOver:
        """The connected process of this VM, once there is one."""
        await until(lambda: self.listener.find(vm) is not None)
        found = self.listener.find(vm)
        assert found is not None
        return found


async def until(holds: Callable[[], bool], within_s: float = WAIT_S) -> None:
    async with asyncio.timeout(within_s):
        while not holds():  # noqa: ASYNC110 - what is waited for happens in another process
            await asyncio.sleep(0.01)


class GuestVmm(Protocol):
    """What a test needs of a process with a guest."""

    @property
    def pid(self) -> int: ...

    def beats(self) -> list[int]:
        """What the guest counted aloud, in order."""

    def has_ended(self) -> bool: ...


@cache
def compiled_counter(directory: Path) -> Path:
    target = directory / "counter"
    source = str(EXAMPLES / "counter.c")
    command = ["gcc", "-std=c11", "-O1", f"-I{HEADER_DIRECTORY}", "-o", str(target), source]
    subprocess.run([*command, "-pthread"], check=True, timeout=120)
    return target


class ExampleVmm:
    """One of the examples, running."""

    def __init__(self, child: subprocess.Popen[bytes], out: Path) -> None:
        self._child = child
        self._out = out
        self.pid = child.pid

    def lines(self) -> list[str]:
        text = self._out.read_text() if self._out.exists() else ""
        return text[: text.rfind("\n") + 1].splitlines()

    def beats(self) -> list[int]:
        lines = self.lines()
        assert all(line.startswith("beat ") for line in lines), lines
        return [int(line.split()[1]) for line in lines]

    def has_ended(self) -> bool:
        return self._child.poll() is not None

    def kill(self) -> None:
        self._child.kill()
        self._child.wait(WAIT_S)


def environment(socket: Path, instance: str, *, is_incoming: bool) -> Mapping[str, str]:
    told = {"MIGRD_SOCKET": str(socket), "MIGRD_VM": "guest", "MIGRD_INSTANCE": instance}
    return {**os.environ, **told, "MIGRD_INCOMING": "1" if is_incoming else ""}


@contextmanager
def example(
    kind: str,
    socket: Path,
    out: Path,
    *,
    instance: str = "",
    is_incoming: bool = False,
    pages_per_s: int = 1000,
) -> Iterator[ExampleVmm]:
    program = (
        [sys.executable, str(EXAMPLES / "counter.py")]
        if kind == "python"
        else [str(compiled_counter(out.parent))]
    )
    child = subprocess.Popen(
        [*program, str(out), "here", "1", str(pages_per_s), "2"],
        env=environment(socket, instance, is_incoming=is_incoming),
        stderr=subprocess.DEVNULL,
    )
    try:
        yield ExampleVmm(child, out)
    finally:
        child.kill()
        child.wait(WAIT_S)


@contextmanager
def vmm(
    kind: str, socket: Path, out: Path, *, instance: str = "", is_incoming: bool = False
) -> Iterator[GuestVmm]:
    """One of each kind that must behave alike: "python", "c", "scripted"."""
    if kind != "scripted":
        with example(kind, socket, out, instance=instance, is_incoming=is_incoming) as started:
            yield started
        return
    with ScriptedVmm(socket, instance=instance, is_incoming=is_incoming) as scripted:
        yield scripted
